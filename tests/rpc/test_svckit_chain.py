"""The chain, seen by its callers: one order of layers, one definite answer for whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from svckit import errors, interceptors, statuses
from svckit.interceptors import LAYERS, Call
from svckit.telemetry import RPC_SECONDS, current_trace
from tests.oracle import eventually
from tests.rpc.svckit_parts import (
    PROBE,
    FakeIssuer,
    Probe,
    Text,
    ask,
    bearer,
    refused,
    running_issuer,
    serving,
    user_verifier,
    watch,
)

ASK = "/svckit.test.Probe/Ask"


class Stage:
    """A served Probe, a channel to it, and a good token."""

    def __init__(self, probe: Probe, channel: grpc.aio.Channel, issuer: FakeIssuer, server: Any, address: str) -> None:
        self.probe = probe
        self.channel = channel
        self.issuer = issuer
        self.server = server
        self.address = address
        self.token = issuer.token()
        self.ask = ask(channel)

    async def refusal(self, request: Any = None, **more: Any) -> Any:
        return await refused(
            self.ask(request or Text(value="x"), **{"metadata": bearer(self.token), "timeout": 5, **more})
        )


@pytest.fixture
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """Settings come by `@pytest.mark.parametrize("stage", [{...}], indirect=True)`."""
    settings = getattr(request, "param", {})
    with running_issuer() as issuer:
        probe = Probe()
        async with (
            serving(user_verifier(issuer), (PROBE, probe), **settings) as (server, address),
            grpc.aio.insecure_channel(address) as channel,
        ):
            yield Stage(probe, channel, issuer, server, address)


def settings(**given: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", [given], indirect=True)


async def test_answers_and_hands_the_call_over(stage: Stage) -> None:
    seen: list[Call] = []

    async def answer(request: Any, call: Call) -> bytes:
        seen.append(call)
        assert current_trace.get() is call.trace
        call.trailer("idempotency-replayed", "true")
        return Text(value="stored").SerializeToString()

    stage.probe.ask = answer  # type: ignore[method-assign]
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    sent = Text(value="hello")
    call = stage.ask(sent, metadata=bearer(stage.token, ("idempotency-key", "k"), ("traceparent", parent)), timeout=7)
    assert (await call).value == "stored"
    assert ("idempotency-replayed", "true") in tuple(await call.trailing_metadata())
    (got,) = seen
    assert got.raw == sent.SerializeToString()
    assert got.values("idempotency-key") == ["k"]
    assert got.values("nothing") == []
    assert 5 < got.remaining() < 7.1
    assert (got.trace.trace_id, got.trace.parent_id) == ("a" * 32, "b" * 16)
    assert got.request_id == got.trace.span_id
    assert got.policy.full_method == ASK
    assert (got.principal.tenant, got.principal.subject) == ("acme", "agent-1")
    assert got.principal.roles == {"planner"}
    assert got.principal.permissions == {"orchestrator.agent"}


# --- the order --------------------------------------------------------------------------------------------------------


def test_order_by_name() -> None:
    assert LAYERS == ("telemetry", "errors", "admission", "auth", "parse", "servicer")


async def test_nothing_is_parsed_for_a_stranger(stage: Stage) -> None:
    malformed = b"\xff\xff\xff"
    raw = ask(stage.channel, raw=True)
    assert (await refused(raw(malformed, timeout=5))).reason == "UNAUTHENTICATED TOKEN_MISSING"
    assert (await refused(raw(malformed, timeout=5, metadata=bearer("x")))).reason == "UNAUTHENTICATED TOKEN_INVALID"
    powerless = stage.issuer.token(realm_access={"roles": ["planner"]})
    refusal = await refused(raw(malformed, timeout=5, metadata=bearer(powerless)))
    assert refusal.reason == "PERMISSION_DENIED PERMISSION_MISSING"
    assert refusal.info.metadata["permission"] == "orchestrator.agent"
    refusal = await refused(raw(malformed, timeout=5, metadata=bearer(stage.token)))
    assert refusal.reason == "INVALID_ARGUMENT REQUEST_MALFORMED"
    assert stage.probe.calls == []


async def test_a_replay_is_asked_for_after_auth_and_parse_and_before_the_servicer(stage: Stage) -> None:
    asked: list[Call] = []

    async def body(value: str) -> bytes:
        return Text(value=value).SerializeToString()

    def replay(call: Call) -> Awaitable[bytes] | None:
        asked.append(call)
        if call.request.value == "new":
            return None
        call.trailer("idempotency-replayed", "true")
        return body("as before")

    stage.probe.replay = replay  # type: ignore[method-assign]
    write, good = ask(stage.channel, "Write"), bearer(stage.token)
    powerless = bearer(stage.issuer.token(realm_access={"roles": ["planner"]}))
    assert (await refused(write(Text(), timeout=5))).reason == "UNAUTHENTICATED TOKEN_MISSING"
    assert (
        await refused(write(Text(), timeout=5, metadata=powerless))
    ).reason == "PERMISSION_DENIED PERMISSION_MISSING"
    large = await refused(write(Text(value="x" * 100), timeout=5, metadata=good))
    assert large.reason == "RESOURCE_EXHAUSTED REQUEST_TOO_LARGE"
    malformed = ask(stage.channel, "Write", raw=True)(b"\xff\xff", timeout=5, metadata=good)
    assert (await refused(malformed)).reason == "INVALID_ARGUMENT REQUEST_MALFORMED"
    assert asked == []

    known = write(Text(value="old"), timeout=5, metadata=good)
    assert (await known).value == "as before"
    assert ("idempotency-replayed", "true") in tuple(await known.trailing_metadata())
    assert stage.probe.calls == []
    assert (asked[0].principal.subject, asked[0].raw) == ("agent-1", Text(value="old").SerializeToString())
    assert (await write(Text(value="new"), timeout=5, metadata=good)).value == "new!"
    assert (len(asked), len(stage.probe.calls)) == (2, 1)
    assert (await stage.ask(Text(value="old"), timeout=5, metadata=good)).value == "old!"  # not guarded
    assert len(asked) == 2


async def test_a_replay_may_refuse(stage: Stage) -> None:
    def replay(call: Call) -> Awaitable[bytes] | None:
        raise errors.InvalidArgument("IDEMPOTENCY_FIRST_SENT_INVALID", "no time")

    stage.probe.replay = replay  # type: ignore[method-assign]
    refusal = await refused(ask(stage.channel, "Write")(Text(), timeout=5, metadata=bearer(stage.token)))
    assert refusal.reason == "INVALID_ARGUMENT IDEMPOTENCY_FIRST_SENT_INVALID"


@settings(max_in_flight=1)
async def test_admission_is_before_auth(stage: Stage) -> None:
    inside, leave = asyncio.Event(), asyncio.Event()

    async def slow(request: Any, call: Call) -> Any:
        inside.set()
        await leave.wait()
        return request

    stage.probe.ask = slow  # type: ignore[method-assign]
    first = asyncio.ensure_future(stage.ask(Text(), metadata=bearer(stage.token), timeout=9))
    await inside.wait()
    refusal = await refused(stage.ask(Text(), timeout=5))  # no token: who asks does not matter yet
    assert refusal.reason == "RESOURCE_EXHAUSTED TOO_MANY_IN_FLIGHT"
    assert 100 <= int(refusal.trailers["grpc-retry-pushback-ms"]) <= 1000
    assert 100 <= refusal.retry.retry_delay.ToMilliseconds() <= 1000
    leave.set()
    await first
    assert (await refused(stage.ask(Text(), timeout=5))).reason == "UNAUTHENTICATED TOKEN_MISSING"


@settings(max_in_flight=1, max_request_bytes=256)
async def test_telemetry_sees_the_final_code_of_each(stage: Stage) -> None:
    async def fail(request: Any, call: Call) -> Any:
        match request.value:
            case "boom":
                raise RuntimeError("boom")
            case "missing":
                raise errors.NotFound("SESSION_NOT_FOUND", "no such session")
            case _:
                return request

    stage.probe.ask = fail  # type: ignore[method-assign]

    def count(code: str) -> int:
        return RPC_SECONDS.count(ASK, code)

    for code, request, token in (
        ("OK", Text(value="fine"), stage.token),
        ("INTERNAL", Text(value="boom"), stage.token),
        ("NOT_FOUND", Text(value="missing"), stage.token),
        ("UNAUTHENTICATED", Text(), "x"),
        ("RESOURCE_EXHAUSTED", Text(value="y" * 300), stage.token),
    ):
        before = count(code)
        with capture_logs() as logs:
            call = stage.ask(request, metadata=bearer(token), timeout=5)
            if code == "OK":
                await call
            else:
                assert (await refused(call)).code == code
            await eventually(lambda: count(code) == before + 1)  # noqa: B023 - awaited here
        lines = [line for line in logs if line["event"] == "call"]
        assert [line["code"] for line in lines] == ([] if code == "OK" else [code])
        assert token not in str(logs) or len(token) < 9


@settings(log_ok_sample=1.0)
async def test_ok_calls_are_logged_by_the_sample(stage: Stage) -> None:
    with capture_logs() as logs:
        await stage.ask(Text(), metadata=bearer(stage.token), timeout=5)
        await asyncio.sleep(0.01)
    (line,) = (line for line in logs if line["event"] == "call")
    assert (line["method"], line["code"], line["tenant"], line["subject"]) == (ASK, "OK", "acme", "agent-1")


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_unforeseen_exceptions_stay_inside(stage: Stage) -> None:
    async def fail(request: Any, call: Call) -> Any:
        raise RuntimeError("CANARY dsn=postgres://u:pw@h")

    stage.probe.ask = fail  # type: ignore[method-assign]
    with capture_logs() as logs:
        refusal = await stage.refusal()
    assert refusal.reason == "INTERNAL INTERNAL"
    error_id = refusal.info.metadata["error_id"]
    assert error_id in refusal.message
    assert "CANARY" not in f"{refusal.message}{refusal.status}{refusal.trailers}"
    (line,) = (line for line in logs if line["event"] == "unforeseen")
    assert line["error_id"] == error_id
    assert line["exc_info"] is True


async def test_an_error_that_cannot_be_told_is_internal(stage: Stage) -> None:
    async def fail(request: Any, call: Call) -> Any:
        raise errors.StoredAnswer(5, b"\xff not a status")

    stage.probe.ask = fail  # type: ignore[method-assign]
    assert (await stage.refusal()).reason == "INTERNAL INTERNAL"


async def test_stored_answer_is_replayed_verbatim(stage: Stage) -> None:
    stored = statuses.status_of(errors.NotFound("SESSION_NOT_FOUND", "no such session", metadata={"a": "b"}))

    async def fail(request: Any, call: Call) -> Any:
        call.trailer("idempotency-replayed", "true")
        raise errors.StoredAnswer(5, stored.SerializeToString())

    stage.probe.ask = fail  # type: ignore[method-assign]
    refusal = await stage.refusal()
    assert refusal.reason == "NOT_FOUND SESSION_NOT_FOUND"
    assert refusal.message == "no such session"
    assert refusal.trailers["grpc-status-details-bin"] == stored.SerializeToString()
    assert refusal.trailers["idempotency-replayed"] == "true"


async def test_stray_cancel_is_a_definite_answer(stage: Stage) -> None:
    async def fail(request: Any, call: Call) -> Any:
        raise asyncio.CancelledError

    stage.probe.ask = fail  # type: ignore[method-assign]
    assert (await stage.refusal()).reason == "UNAVAILABLE CALL_ABANDONED"


@pytest.mark.parametrize("by", ["cancel", "deadline"])
async def test_a_caller_that_leaves_cancels_the_work(stage: Stage, by: str) -> None:
    inside, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(request: Any, call: Call) -> Any:
        inside.set()
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    stage.probe.ask = slow  # type: ignore[method-assign]
    code = "CANCELLED" if by == "cancel" else "DEADLINE_EXCEEDED"
    before = RPC_SECONDS.count(ASK, code)
    call = stage.ask(Text(), metadata=bearer(stage.token), timeout=30 if by == "cancel" else 3)
    waiting = asyncio.ensure_future(refused(call))
    await inside.wait()
    if by == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        assert (await waiting).code == "DEADLINE_EXCEEDED"
    await asyncio.wait_for(cancelled.wait(), 30)
    await eventually(lambda: stage.server.chain.admission.in_flight == 0)
    await eventually(lambda: RPC_SECONDS.count(ASK, code) > before)
    assert RPC_SECONDS.count(ASK, code) == before + 1


@pytest.mark.parametrize("timeout", [None, 3600])
async def test_no_call_outlives_the_limit(stage: Stage, timeout: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "MAX_SECONDS", 0.2)
    remaining = []

    async def slow(request: Any, call: Call) -> Any:
        remaining.append(call.remaining())
        await asyncio.sleep(100)

    stage.probe.ask = slow  # type: ignore[method-assign]
    refusal = await asyncio.wait_for(stage.refusal(timeout=timeout), 30)
    assert refusal.reason == "DEADLINE_EXCEEDED DEADLINE_EXCEEDED"
    assert remaining[0] <= 0.2


async def test_errors_send_trailers_only_so_that_clients_may_retry(stage: Stage) -> None:
    attempts = 0

    async def fail(request: Any, call: Call) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise errors.Unavailable("DATABASE_UNAVAILABLE", "later", retry_after=0.01)
        return request

    stage.probe.ask = fail  # type: ignore[method-assign]
    config = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "60s", '
        '"maxBackoff": "60s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )
    address = stage.address
    async with grpc.aio.insecure_channel(address, options=[("grpc.service_config", config)]) as channel:
        answer = await ask(channel)(Text(value="r"), metadata=bearer(stage.token), timeout=30)  # less than a backoff
    assert answer.value == "r"
    assert attempts == 3


@settings(max_request_bytes=256)
async def test_limits_of_size_have_our_reason(stage: Stage) -> None:
    good = Text(value="y" * 200)
    await stage.ask(good, metadata=bearer(stage.token), timeout=5)
    refusal = await stage.refusal(Text(value="y" * 300))
    assert refusal.reason == "RESOURCE_EXHAUSTED REQUEST_TOO_LARGE"
    assert refusal.trailers["grpc-retry-pushback-ms"] == "-1"
    assert refusal.info.metadata["limit"] == "256"
    small = ask(stage.channel, "Small")
    await small(Text(value="y" * 14), metadata=bearer(stage.token), timeout=5)
    refusal = await refused(small(Text(value="y" * 15), metadata=bearer(stage.token), timeout=5))
    assert refusal.reason == "RESOURCE_EXHAUSTED REQUEST_TOO_LARGE"
    # The outer guard is gRPC's own, without a reason.
    assert (await stage.refusal(Text(value="y" * (1 << 20)))).code == "RESOURCE_EXHAUSTED"


async def test_unknown_methods(stage: Stage) -> None:
    for path in ("/svckit.test.Probe/Nope", "/no.Service/Ask", "/"):
        unary: Any = stage.channel.unary_unary(path)
        assert (await refused(unary(b"", timeout=5))).reason == "UNIMPLEMENTED METHOD_UNKNOWN"

    async def requests() -> AsyncIterator[bytes]:
        yield b""

    method: Any = stage.channel.stream_stream("/no.Service/Stream")
    stream = method(requests(), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in stream:
            pass
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert RPC_SECONDS.count("/no.Service/Ask", "UNIMPLEMENTED") == 0
    assert RPC_SECONDS.count("unknown", "UNIMPLEMENTED") >= 4


# --- waiting ----------------------------------------------------------------------------------------------------------


@settings(max_in_flight=2, max_waiting=3)
async def test_waiting_calls_leave_room_for_working_ones(stage: Stage) -> None:
    leave = asyncio.Event()

    async def poll(request: Any, call: Call) -> Any:
        if request.value == "wait":
            with call.waiting():
                await leave.wait()
        return request

    stage.probe.ask = poll  # type: ignore[method-assign]
    admission = stage.server.chain.admission
    polls = []
    for number in range(1, 4):  # one by one: three at once are more than may be in flight before they wait
        call = stage.ask(Text(value="wait"), metadata=bearer(stage.token), timeout=30)
        polls.append(asyncio.ensure_future(call))
        await eventually(lambda: admission.waiting == number)  # noqa: B023 - awaited here
    assert admission.in_flight == 0
    assert (await stage.ask(Text(value="work"), metadata=bearer(stage.token), timeout=5)).value == "work"
    refusal = await stage.refusal(Text(value="wait"))
    assert refusal.reason == "RESOURCE_EXHAUSTED TOO_MANY_WAITING"
    assert int(refusal.trailers["grpc-retry-pushback-ms"]) >= 100
    leave.set()
    await asyncio.gather(*polls)
    assert (admission.in_flight, admission.waiting) == (0, 0)


# --- streams ----------------------------------------------------------------------------------------------------------


async def collect(stream: Any) -> list[str]:
    return [answer.value async for answer in stream]


async def test_streams_pass_every_layer(stage: Stage) -> None:
    stream = watch(stage.channel)
    assert await collect(stream(Text(value="abc"), metadata=bearer(stage.token), timeout=5)) == ["a", "b", "c"]
    for metadata in ((), bearer("x"), bearer(stage.issuer.token(realm_access={}))):
        calls = len(stage.probe.calls)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(stream(Text(value="abc"), metadata=metadata, timeout=5))
        assert error.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        assert len(stage.probe.calls) == calls


async def test_a_stream_that_fails_midway_says_so(stage: Stage) -> None:
    async def fail(request: Any, call: Call) -> AsyncIterator[Any]:
        yield Text(value="one")
        raise RuntimeError("CANARY")

    stage.probe.watch = fail  # type: ignore[method-assign]
    got = []
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for answer in watch(stage.channel)(Text(), metadata=bearer(stage.token), timeout=5):
            got.append(answer.value)
    assert got == ["one"]
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "CANARY" not in str(error.value)


@settings(max_waiting=1)
async def test_streams_count_as_waiting_and_end_when_the_caller_leaves(stage: Stage) -> None:
    ended = asyncio.Event()

    async def endless(request: Any, call: Call) -> AsyncIterator[Any]:
        try:
            yield Text(value="first")
            assert call.remaining() > 1e9
            await asyncio.sleep(100)
        finally:
            ended.set()

    stage.probe.watch = endless  # type: ignore[method-assign]
    first = watch(stage.channel)(Text(), metadata=bearer(stage.token))
    assert (await first.read()).value == "first"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(watch(stage.channel)(Text(), metadata=bearer(stage.token), timeout=5))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()
    await asyncio.wait_for(ended.wait(), 30)
    await eventually(lambda: stage.server.chain.admission.waiting == 0)
