"""idempotency_svc as a process: what it takes, what it refuses, and how it is without its Redis."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from deploy.local import services
from deploy.local.processes import free_port
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.auth import TokenSigner
from tests.client import Agent
from tests.oracle import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from deploy.local.issuer import Issuer
    from deploy.local.servers import Valkey
    from tests.client import Answer
    from tests.conftest import ServiceKeys

SERVICE = "orchestrator.idempotency.v1.IdempotencyService"
TTL = 86_400_000
Messages = pb.ClaimRequest | pb.CompleteRequest | pb.ReleaseRequest | pb.ExtendRequest | pb.GetRequest


def fingerprint(text: bytes = b"f") -> pb.Fingerprint:
    return pb.Fingerprint(kind=1, digest=text * 32)


def claim(scope: bytes = b"s" * 32, nonce: bytes = b"n" * 16, **changes: Any) -> pb.ClaimItem:
    fields = {"fingerprints": [fingerprint()], "lease_millis": 30_000, "ttl_millis": TTL, **changes}
    return pb.ClaimItem(scope=scope, nonce=nonce, **fields)


def completion(scope: bytes = b"s" * 32, nonce: bytes = b"n" * 16, **changes: Any) -> pb.CompleteItem:
    fields = {"fingerprints": [fingerprint()], "code": 0, "answer": b"answer", "ttl_millis": TTL, **changes}
    return pb.CompleteItem(scope=scope, nonce=nonce, **fields)


def release(scope: bytes = b"s" * 32, nonce: bytes = b"n" * 16) -> pb.ReleaseItem:
    return pb.ReleaseItem(scope=scope, nonce=nonce)


def extension(scope: bytes = b"s" * 32, nonce: bytes = b"n" * 16, lease_millis: int = 30_000) -> pb.ExtendItem:
    return pb.ExtendItem(scope=scope, nonce=nonce, lease_millis=lease_millis)


def question(scope: bytes = b"s" * 32) -> pb.GetItem:
    return pb.GetItem(scope=scope)


def request(*items: Any) -> Messages:
    kinds: dict[type, Callable[..., Messages]] = {
        pb.ClaimItem: pb.ClaimRequest, pb.CompleteItem: pb.CompleteRequest, pb.ReleaseItem: pb.ReleaseRequest,
        pb.ExtendItem: pb.ExtendRequest, pb.GetItem: pb.GetRequest,
    }  # fmt: skip
    return kinds[type(items[0])](items=items)


def start(redis_url: str, keys: ServiceKeys, folder: Path, **env: str) -> services.Service:
    service = services.idempotency(
        port=free_port(),
        metrics_port=free_port(),
        redis_url=redis_url,
        service_key=keys.private,
        log=folder / "idempotency.log",
        env={"DRAIN_SECONDS": "0", **env},
    )
    service.start()
    service.wait("liveness")
    return service


def caller_of(service: services.Service, keys: ServiceKeys) -> Agent:
    signer = TokenSigner(keys.private, issuer="controller_svc", subject="controller_svc", audience="idempotency_svc")
    return Agent(service.target, signer.token())


@pytest.fixture(scope="module")
def shared(
    redis_engine: str, service_keys: ServiceKeys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[services.Service]:
    service = start(redis_engine, service_keys, tmp_path_factory.mktemp("idempotency"), REDIS_TIMEOUT_MILLIS="5000")
    service.wait()
    yield service
    assert service.stop() == 0


@pytest.fixture
async def controller(shared: services.Service, service_keys: ServiceKeys) -> AsyncIterator[Agent]:
    """Calls as the controller does."""
    agent = caller_of(shared, service_keys)
    yield agent
    await agent.close()


@pytest.fixture
async def service(own_valkey: Valkey, service_keys: ServiceKeys, tmp_path: Path) -> AsyncIterator[services.Service]:
    """A service of this test's own, on a server of its own."""
    own = start(own_valkey.url, service_keys, tmp_path, REDIS_TIMEOUT_MILLIS="5000")
    yield own
    own.kill()


@pytest.fixture
async def own_controller(service: services.Service, service_keys: ServiceKeys) -> AsyncIterator[Agent]:
    agent = caller_of(service, service_keys)
    yield agent
    await agent.close()


async def health(service: services.Service, name: str) -> str:
    async with grpc.aio.insecure_channel(service.target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=5)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def until_health(service: services.Service, status: str) -> None:
    async with asyncio.timeout(60):
        while await health(service, SERVICE) != status:
            await asyncio.sleep(0.02)


# --- what it says -----------------------------------------------------------------------------------------------------


async def test_a_key_from_claim_to_replay(controller: Agent) -> None:
    scope, mine, theirs = os.urandom(32), os.urandom(16), os.urandom(16)

    async def outcome(item: pb.ClaimItem) -> pb.ClaimOutcome:
        response: pb.ClaimResponse = (await controller.ask(pb.ClaimRequest(items=[item]))).response
        [only] = response.outcomes
        return only

    assert (await outcome(claim(scope, mine))).acquired.epoch == 1
    assert (await outcome(claim(scope, mine))).acquired.epoch == 1
    extended = (await controller.ask(request(extension(scope, mine), extension(scope, theirs)))).response.outcomes
    assert [one.result for one in extended] == [pb.ExtendOutcome.RESULT_EXTENDED, pb.ExtendOutcome.RESULT_FENCED]
    assert 0 < (await outcome(claim(scope, theirs))).busy.lease_left_millis <= 30_000
    assert not (await outcome(claim(scope, theirs, fingerprints=[fingerprint(b"x")]))).mismatch.durable

    [kept, nothing] = (await controller.ask(request(question(scope), question(os.urandom(32))))).response.outcomes
    assert (kept.record.state, kept.record.epoch) == (pb.GetOutcome.Record.STATE_IN_PROGRESS, 1)
    assert 0 < kept.record.lease_left_millis <= 30_000 < kept.record.ttl_left_millis <= TTL
    assert list(kept.record.fingerprint_kinds) == [1]
    assert not nothing.HasField("record")

    [released] = (await controller.ask(request(release(scope, mine)))).response.outcomes
    assert released.result == pb.ReleaseOutcome.RESULT_RELEASED
    assert (await outcome(claim(scope, theirs, lease_millis=1))).acquired.epoch == 2
    await asyncio.sleep(0.01)
    assert (await outcome(claim(scope, mine))).takeover.epoch == 3

    forced = pb.ReleaseItem(scope=scope, forced=True)
    [released] = (await controller.ask(request(forced))).response.outcomes
    assert released.result == pb.ReleaseOutcome.RESULT_RELEASED
    assert (await outcome(claim(scope, mine))).acquired.epoch == 4

    answer = os.urandom(3000)
    [fenced] = (await controller.ask(request(completion(scope, theirs, answer=answer)))).response.outcomes
    assert fenced.result == pb.CompleteOutcome.RESULT_FENCED
    [restored] = (
        await controller.ask(request(completion(scope, theirs, answer=answer, durable=True)))
    ).response.outcomes
    assert restored.result == pb.CompleteOutcome.RESULT_RESTORED
    replay = await outcome(claim(scope, mine))
    assert replay == pb.ClaimOutcome(replay=pb.ClaimOutcome.Replay(code=0, answer=answer, durable=True))
    assert (await outcome(claim(scope, mine, fingerprints=[fingerprint(b"x")]))).mismatch.durable


async def test_a_replay_tells_what_the_completion_said(controller: Agent) -> None:
    scopes = [os.urandom(32) for _ in range(2)]
    items = [
        completion(scopes[0], durable=True, timeline=2**32 - 1),
        completion(scopes[1], durable=True, timeline=3, answer=b"", answer_omitted=True),
    ]
    done = (await controller.ask(request(*items))).response
    assert {outcome.result for outcome in done.outcomes} == {pb.CompleteOutcome.RESULT_RESTORED}
    replays = (await controller.ask(request(*(claim(scope) for scope in scopes)))).response.outcomes
    assert [outcome.replay for outcome in replays] == [
        pb.ClaimOutcome.Replay(answer=b"answer", durable=True, timeline=2**32 - 1),
        pb.ClaimOutcome.Replay(durable=True, timeline=3, answer_omitted=True),
    ]


async def test_a_batch_has_an_outcome_for_each_item_in_order(controller: Agent) -> None:
    scopes = [os.urandom(32) for _ in range(256)]
    first = (await controller.ask(request(*(claim(scope) for scope in scopes)))).response
    assert [outcome.WhichOneof("outcome") for outcome in first.outcomes] == ["acquired"] * 256
    items = [completion(scope, code=index % 17, answer=scope) for index, scope in enumerate(scopes)]
    done = (await controller.ask(request(*items))).response
    assert {outcome.result for outcome in done.outcomes} == {pb.CompleteOutcome.RESULT_COMPLETED}
    again = (await controller.ask(request(*(claim(scope) for scope in scopes)))).response
    assert [(outcome.replay.code, outcome.replay.answer) for outcome in again.outcomes] == [
        (index % 17, scope) for index, scope in enumerate(scopes)
    ]
    released = (await controller.ask(request(*(release(scope) for scope in [*scopes[:1], os.urandom(32)])))).response
    assert [outcome.result for outcome in released.outcomes] == [
        pb.ReleaseOutcome.RESULT_ALREADY, pb.ReleaseOutcome.RESULT_ABSENT,
    ]  # fmt: skip


# --- what it refuses --------------------------------------------------------------------------------------------------

BAD_ITEMS: dict[str, tuple[Any, str]] = {
    "claim without scope": (claim(scope=b""), "items[1].scope"),
    "claim with a short scope": (claim(scope=b"s" * 31), "items[1].scope"),
    "claim with a long scope": (claim(scope=b"s" * 33), "items[1].scope"),
    "claim without nonce": (claim(nonce=b""), "items[1].nonce"),
    "claim with a long nonce": (claim(nonce=b"n" * 17), "items[1].nonce"),
    "claim without fingerprint": (claim(fingerprints=[]), "items[1].fingerprints"),
    "claim with nine fingerprints": (
        claim(fingerprints=[pb.Fingerprint(kind=kind, digest=b"f" * 32) for kind in range(1, 10)]),
        "items[1].fingerprints",
    ),
    "claim with a kind twice": (claim(fingerprints=[fingerprint(), fingerprint(b"x")]), "items[1].fingerprints"),
    "claim with kind 0": (claim(fingerprints=[pb.Fingerprint(digest=b"f" * 32)]), "items[1].fingerprints[0].kind"),
    "claim with kind 256": (
        claim(fingerprints=[fingerprint(), pb.Fingerprint(kind=256, digest=b"f" * 32)]), "items[1].fingerprints[1].kind"
    ),
    "claim with a short digest": (
        claim(fingerprints=[pb.Fingerprint(kind=1, digest=b"f" * 31)]), "items[1].fingerprints[0].digest"
    ),
    "claim without lease": (claim(lease_millis=0), "items[1].lease_millis"),
    "claim with a lease over an hour": (claim(lease_millis=3_600_001), "items[1].lease_millis"),
    "claim without ttl": (claim(ttl_millis=0), "items[1].ttl_millis"),
    "claim with a ttl over 30 days": (claim(ttl_millis=2_592_000_001), "items[1].ttl_millis"),
    "claim with the largest ttl": (claim(ttl_millis=2**64 - 1), "items[1].ttl_millis"),
    "completion with a short scope": (completion(scope=b"s"), "items[1].scope"),
    "completion with a short nonce": (completion(nonce=b"n"), "items[1].nonce"),
    "completion without fingerprint": (completion(fingerprints=[]), "items[1].fingerprints"),
    "completion with a negative code": (completion(code=-1), "items[1].code"),
    "completion with code 17": (completion(code=17), "items[1].code"),
    "completion with a large answer": (completion(answer=b"a" * ((2 << 20) + 1)), "items[1].answer"),
    "completion with a timeline that is not durable": (completion(timeline=1), "items[1].timeline"),
    "completion with an omitted answer that is not durable": (
        completion(answer=b"", answer_omitted=True), "items[1].answer_omitted"
    ),
    "completion with an omitted answer that is there": (
        completion(durable=True, answer_omitted=True), "items[1].answer_omitted"
    ),
    "completion without ttl": (completion(ttl_millis=0), "items[1].ttl_millis"),
    "release with a short scope": (release(scope=b"s"), "items[1].scope"),
    "extension with a short scope": (extension(scope=b"s"), "items[1].scope"),
    "extension without nonce": (extension(nonce=b""), "items[1].nonce"),
    "extension without lease": (extension(lease_millis=0), "items[1].lease_millis"),
    "extension with a lease over an hour": (extension(lease_millis=3_600_001), "items[1].lease_millis"),
    "release without nonce": (release(nonce=b""), "items[1].nonce"),
    "question with a short scope": (question(scope=b"s"), "items[1].scope"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ITEMS)
async def test_a_bad_item_refuses_the_request_and_is_named(controller: Agent, name: str) -> None:
    item, field = BAD_ITEMS[name]
    scope = os.urandom(32)
    good: Any
    match item:
        case pb.ClaimItem():
            good = claim(scope)
        case pb.CompleteItem():
            good = completion(scope, durable=True)
        case pb.ExtendItem():
            good = extension(scope)
        case pb.GetItem():
            good = question(scope)
        case _:
            good = release(scope)
    answer = await controller.ask(request(good, item))
    reason = "FIELD_REQUIRED" if "without" in name or name.endswith("kind 0") else "FIELD_INVALID"
    assert answer.refusal == ("INVALID_ARGUMENT", reason)
    assert answer.fields == [field]
    [outcome] = (await controller.ask(request(claim(scope)))).response.outcomes
    assert outcome.acquired.epoch == 1, "the good item was not treated"


@pytest.mark.parametrize("item", [claim, completion, release, extension, question])
async def test_batches_have_a_size(controller: Agent, item: Callable[[], Any]) -> None:
    for items, reason in (([], "FIELD_REQUIRED"), ([item()] * 257, "FIELD_INVALID")):
        answer = await controller.ask(type(request(item()))(items=items))
        assert answer.refusal == ("INVALID_ARGUMENT", reason)
        assert answer.fields == ["items"]


async def test_a_wait_ends_with_the_owner_or_with_its_time(controller: Agent) -> None:
    scope = os.urandom(32)
    await controller.ask(request(claim(scope)))
    item = claim(scope, os.urandom(16))
    short = await controller.ask(pb.AwaitRequest(item=item, wait_millis=20))
    assert short.response.outcome.busy.lease_left_millis > 0
    waiting = [
        asyncio.create_task(controller.ask(pb.AwaitRequest(item=claim(scope, os.urandom(16)), wait_millis=30_000)))
        for _ in range(20)
    ]
    await asyncio.sleep(0.1)
    await controller.ask(request(completion(scope)))
    told = {answer.body for answer in await asyncio.gather(*waiting)}
    replay = pb.ClaimOutcome(replay=pb.ClaimOutcome.Replay(answer=b"answer"))
    assert told == {pb.AwaitResponse(outcome=replay).SerializeToString()}


async def test_a_key_that_is_free_is_not_waited_for(controller: Agent) -> None:
    answer = await controller.ask(pb.AwaitRequest(item=claim(os.urandom(32)), wait_millis=30_000))
    assert answer.response.outcome.acquired.epoch == 1


async def test_a_caller_that_leaves_while_it_waits_does_not_become_the_owner(controller: Agent) -> None:
    scope = os.urandom(32)
    await controller.ask(request(claim(scope)))
    gone = await controller.ask(pb.AwaitRequest(item=claim(scope, b"g" * 16), wait_millis=30_000), timeout=0.2)
    assert gone.code.name == "DEADLINE_EXCEEDED"
    await controller.ask(request(release(scope)))
    [next_] = (await controller.ask(request(claim(scope, os.urandom(16))))).response.outcomes
    assert next_.acquired.epoch == 2


@pytest.mark.parametrize("wait,field,reason", [
    (pb.AwaitRequest(wait_millis=1), "item.scope", "FIELD_REQUIRED"),
    (pb.AwaitRequest(item=claim(nonce=b"n"), wait_millis=1), "item.nonce", "FIELD_INVALID"),
    (pb.AwaitRequest(item=claim(fingerprints=[]), wait_millis=1), "item.fingerprints", "FIELD_REQUIRED"),
    (pb.AwaitRequest(item=claim(ttl_millis=0), wait_millis=1), "item.ttl_millis", "FIELD_REQUIRED"),
    (pb.AwaitRequest(item=claim()), "wait_millis", "FIELD_REQUIRED"),
    (pb.AwaitRequest(item=claim(), wait_millis=30_001), "wait_millis", "FIELD_INVALID"),
])  # fmt: skip
async def test_a_bad_wait_is_refused_and_names_the_field(
    controller: Agent, wait: pb.AwaitRequest, field: str, reason: str
) -> None:
    answer = await controller.ask(wait)
    assert answer.refusal == ("INVALID_ARGUMENT", reason)
    assert answer.fields == [field]


async def test_requests_over_4_mib_are_refused(controller: Agent) -> None:
    answer = await controller.ask(request(*[completion(answer=b"a" * (2 << 20))] * 2))
    assert answer.refusal == ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
    assert answer.metadata["limit"] == str(4 << 20)


async def test_only_the_controller_may_call(
    shared: services.Service, service_keys: ServiceKeys, issuer: Issuer
) -> None:
    def signed(
        issuer: str = "controller_svc", subject: str = "controller_svc", audience: str = "idempotency_svc"
    ) -> str:
        return TokenSigner(service_keys.private, issuer=issuer, subject=subject, audience=audience).token()

    refused = {
        None: "TOKEN_MISSING",
        issuer.token(roles=["orchestrator.service", "orchestrator.operate"]): "TOKEN_INVALID",
        signed(subject="another_svc"): "TOKEN_INVALID",
        signed(audience="controller_svc"): "TOKEN_INVALID",
        signed(issuer="somebody"): "TOKEN_INVALID",
    }
    for token, reason in refused.items():
        agent = Agent(shared.target, token)
        asked = [request(item) for item in (claim(), completion(), release(), extension(), question())]
        for message in (*asked, pb.AwaitRequest(item=claim(), wait_millis=1)):
            assert (await agent.ask(message)).refusal == ("UNAUTHENTICATED", reason)
        await agent.close()


# --- without Redis, and at its own end --------------------------------------------------------------------------------


async def test_readiness_follows_redis(service: services.Service, own_controller: Agent, own_valkey: Valkey) -> None:
    await until_health(service, "SERVING")
    item = claim(os.urandom(32))
    assert (await own_controller.ask(request(item))).ok
    own_valkey.child.kill()
    for message in (request(claim(os.urandom(32))), request(completion(durable=True)), request(release())):
        answer: Answer = await own_controller.ask(message)
        assert answer.refusal == ("UNAVAILABLE", "REDIS_UNAVAILABLE")
        assert answer.metadata["cause"] in {"refused", "connection"}
    await until_health(service, "NOT_SERVING")
    assert await health(service, "") == "NOT_SERVING"
    assert await health(service, "liveness") == "SERVING"
    own_valkey.start()
    await until_health(service, "SERVING")
    answer = await own_controller.ask(request(item))
    assert answer.response.outcomes[0].acquired.epoch == 1, "the record outlived Redis, and the nonce still owns it"
    warnings = [line for line in service.output().splitlines() if '"redis_away"' in line and '"warning"' in line]
    assert len(warnings) == 1, "its cause may change, which is no warning"


async def test_it_starts_without_redis(own_valkey: Valkey, service_keys: ServiceKeys, tmp_path: Path) -> None:
    own_valkey.child.kill()
    service = start(own_valkey.url, service_keys, tmp_path)
    try:
        assert await health(service, SERVICE) == "NOT_SERVING"
        own_valkey.start()
        await until_health(service, "SERVING")
        assert service.stop() == 0
    finally:
        service.kill()


async def test_a_killed_service_forgets_nothing(
    service: services.Service, own_controller: Agent, own_valkey: Valkey
) -> None:
    """The claim whose answer was lost is asked for again, with the same nonce."""
    await until_health(service, "SERVING")
    item = claim(os.urandom(32), os.urandom(16))
    assert (await own_controller.ask(request(item))).ok
    service.kill()
    assert (await own_controller.ask(request(item), timeout=10)).code is grpc.StatusCode.UNAVAILABLE
    service.start()
    await asyncio.to_thread(service.wait)
    async with asyncio.timeout(60):
        while not (answer := await own_controller.ask(request(item))).ok:
            await asyncio.sleep(0.05)
    assert answer.response.outcomes[0].acquired.epoch == 1


async def test_what_was_accepted_is_answered_before_the_end(service: services.Service, own_controller: Agent) -> None:
    await until_health(service, "SERVING")
    running = True
    answers: list[Answer] = []

    async def work() -> None:
        while running:
            answers.append(await own_controller.ask(request(claim(os.urandom(32))), timeout=5))

    workers = [asyncio.create_task(work()) for _ in range(8)]
    await eventually(lambda: len(answers) > 20)
    code = await asyncio.to_thread(service.stop)
    running = False
    await asyncio.gather(*workers)
    assert code == 0
    assert {answer.code.name for answer in answers} <= {"OK", "UNAVAILABLE", "CANCELLED"}
    assert sum(answer.ok for answer in answers) > 10


async def test_metrics(shared: services.Service, controller: Agent) -> None:
    await controller.ask(request(claim(os.urandom(32))))
    url = f"http://127.0.0.1:{shared.env['METRICS_PORT']}/metrics" if shared.env else ""
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    for line in (
        'orchestrator_idempotency_outcomes_total{outcome="acquired",step="claim"}',
        'orchestrator_redis_script_seconds_count{step="claim"}',
        "orchestrator_redis_up 1.0",
        "orchestrator_redis_evicted_keys 0.0",
        f'method="/{SERVICE}/Claim"',
    ):
        assert line in text
