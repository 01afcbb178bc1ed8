"""The door with a real cache of claims: what each answer of idempotency_svc leads to, when calls have company."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from struct import unpack_from
from types import SimpleNamespace
from typing import Any

import grpc
import psycopg
import pytest
import redis
from prometheus_client import REGISTRY

from controller_svc import idempotency, mutation
from controller_svc.claims import Claims
from controller_svc.core.tasks import ClaimTasks, TaskMutations
from controller_svc.fingerprint import earlier_fingerprint_of
from controller_svc.idempotency import MAX_ANSWER_BYTES, Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.store.write import write
from deploy.local.servers import Postgres
from idempotency_svc.cache import RedisCache
from idempotency_svc.servicer import IdempotencyServicer
from orchestrator.controller.v1 import task_service_pb2
from orchestrator.controller.v1.task_service_pb2 import ClaimTasksRequest
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import Aborted, FailedPrecondition, InvalidArgument, ServiceError, Unavailable
from svckit.interceptors import Admission, Call
from svckit.options import policies
from svckit.telemetry import new_trace
from tests.contract.rows import lock_scope
from tests.contract.test_door import ACTOR, PRINCIPAL, Client, _client, create_request

pytestmark = pytest.mark.one_redis
CLAIM_TASKS = policies(task_service_pb2.DESCRIPTOR.services_by_name["TaskService"], 16384)[
    "/orchestrator.controller.v1.TaskService/ClaimTasks"
]
NO_CALL: Any = SimpleNamespace(waiting=nullcontext)


class Stub:
    """idempotency_svc's servicer without the wire; it notes what it is asked and what it answers."""

    def __init__(self, servicer: IdempotencyServicer, url: str) -> None:
        self._servicer = servicer
        self._url = url
        self.outcomes: list[str] = []
        self.claims: list[pb.ClaimItem] = []
        self.extended: list[pb.ExtendItem] = []
        self.asked_to_wait = asyncio.Event()
        self.largest = 0

    def lose_all(self) -> None:
        """Redis forgets everything."""
        with redis.Redis.from_url(self._url) as connection:
            connection.flushdb()

    async def Claim(self, request: pb.ClaimRequest, *, timeout: float) -> pb.ClaimResponse:
        response = pb.ClaimResponse.FromString(await self._servicer.Claim(request, NO_CALL))
        self.claims += request.items
        self.outcomes += [outcome.WhichOneof("outcome") or "" for outcome in response.outcomes]
        return response

    async def Await(self, request: pb.AwaitRequest, *, timeout: float) -> pb.AwaitResponse:
        self.asked_to_wait.set()
        response = pb.AwaitResponse.FromString(await self._servicer.Await(request, NO_CALL))
        self.outcomes.append(response.outcome.WhichOneof("outcome") or "")
        return response

    async def Complete(self, request: pb.CompleteRequest, *, timeout: float) -> pb.CompleteResponse:
        self.largest = max(self.largest, request.ByteSize())
        return pb.CompleteResponse.FromString(await self._servicer.Complete(request, NO_CALL))

    async def Release(self, request: pb.ReleaseRequest, *, timeout: float) -> pb.ReleaseResponse:
        return pb.ReleaseResponse.FromString(await self._servicer.Release(request, NO_CALL))

    async def Extend(self, request: pb.ExtendRequest, *, timeout: float) -> pb.ExtendResponse:
        self.extended += request.items
        return pb.ExtendResponse.FromString(await self._servicer.Extend(request, NO_CALL))


@pytest.fixture
async def stub(redis_url: str) -> AsyncIterator[Stub]:
    """A cache on an empty Redis."""
    cache = RedisCache(redis_url, timeout=5)  # the loop stands still while a test stops its Postgres
    await cache.start()
    yield Stub(IdempotencyServicer(cache), redis_url)
    await cache.stop()


@pytest.fixture
async def client(own_postgres: Postgres, stub: Stub) -> AsyncIterator[Client]:
    """A door that has seen replays, so that every claim is waited for."""
    async with _client(own_postgres.url) as client:
        idempotency = Idempotency(stub, ttl=86400)  # type: ignore[arg-type]
        client.door = Door(client.database, idempotency, Lifetimes(ok=86400, error=600), lanes=1)
        client.door.replayed = 1.0
        yield client


async def completed(client: Client) -> None:
    """Lets completions arrive, and whatever else is on its way."""
    await client.door.close()
    await client.door._idempotency._ends.drained()


async def foreign_claim(stub: Stub, item: pb.ClaimItem, *, lease_millis: int, digest: bytes | None = None) -> None:
    """Claims the scope of an earlier call as another process would."""
    item.nonce = os.urandom(16)
    item.lease_millis = lease_millis
    if digest is not None:
        for fingerprint in item.fingerprints:
            fingerprint.digest = digest
    await stub.Claim(pb.ClaimRequest(items=[item]), timeout=30)


async def scope_item(client: Client, stub: Stub, key: str, **data: Any) -> pb.ClaimItem:
    """The claim of a call that was refused without a trace: its scope and fingerprint are what counts."""
    ready, client.database._component = (
        client.database._component,
        client.database._component.__class__(False, "", client.database._component.since),
    )
    with pytest.raises(Exception, match="DATABASE_UNAVAILABLE"):
        await client.create(key, **data)
    client.database._component = ready
    await completed(client)
    return stub.claims[-1]


async def test_a_replay_needs_no_postgres(client: Client, stub: Stub, own_postgres: Postgres) -> None:
    first = await client.create("k", a=1)
    await completed(client)
    own_postgres.stop()
    assert await client.create("k", a=1) == first + " replayed"
    assert stub.outcomes == ["acquired", "replay"]
    with pytest.raises(FailedPrecondition) as reused:
        await client.create("k", a=2)
    assert reused.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert stub.outcomes[-1] == "mismatch"


@contextmanager
def a_write_under_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Event]:
    """The next statement is sent only at the end: what comes after it stands in line. The event: it is there."""
    there, go_on = asyncio.Event(), asyncio.Event()

    async def held(*args: Any, **kwargs: Any) -> Any:
        there.set()
        await go_on.wait()
        return await write(*args, **kwargs)

    monkeypatch.setattr(mutation, "write", held)
    yield there
    go_on.set()


async def test_a_first_call_does_not_wait_for_its_claim(
    client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.door.replayed = 0.0
    asked = asyncio.Event()

    async def hang(*_args: Any, **_more: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(stub, "Claim", hang)
    with a_write_under_way(monkeypatch) as there:
        call = asyncio.create_task(client.create("k", a=1))
        await there.wait()
        await asked.wait()  # it takes long enough to be announced
    await call
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_a_call_in_line_learns_its_answer_by_being_announced(
    client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await client.create("k", a=1)
    await completed(client)
    client.door.replayed = 0.0
    with a_write_under_way(monkeypatch) as there:
        other = asyncio.create_task(client.create("other"))
        await there.wait()
        assert await client.create("k", a=1) == first + " replayed"
    await other
    assert await client.rows("select count(*) from sessions") == [(2,)]


async def test_an_announcement_leaves_alone_who_claims_by_itself_now(
    client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settled here, it would go on all the same when its own claim is lost, and take slots that nobody gives back."""
    first = await client.create("k", a=1)
    await completed(client)
    held: list[mutation.Attempt] = []
    monkeypatch.setattr(client.door, "_start", held.append)
    call = asyncio.create_task(client.create("k", a=1))
    while not held:
        await asyncio.sleep(0)
    for key_busy in (True, False):
        held[0].key_busy = key_busy
        await client.door._announce(held)
        assert held[0].settled is not key_busy
    assert await call == first + " replayed"


async def test_an_announced_call_whose_caller_left_gives_its_key_back(
    client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.door.replayed = 0.0
    with a_write_under_way(monkeypatch) as there:
        other = asyncio.create_task(client.create("other"))
        await there.wait()
        leaving = asyncio.create_task(client.create("k", a=1))
        while len(stub.claims) < 2:
            await asyncio.sleep(0.01)
        leaving.cancel()
    await other
    await completed(client)
    await foreign_claim(stub, stub.claims[-1], lease_millis=1000)
    assert stub.outcomes[-1] == "acquired"
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_frequent_replays_make_claims_go_first(client: Client, stub: Stub) -> None:
    client.door.replayed = 0.0
    first = await client.create("k", a=1)
    while client.door.replayed <= mutation.CLAIM_FIRST:
        assert await client.create("k", a=1) == first + " replayed"
    await completed(client)
    stub.outcomes.clear()
    assert await client.create("k", a=1) == first + " replayed"
    assert stub.outcomes == ["replay"]


async def test_busy_waits_for_the_owner_and_takes_over_when_its_lease_is_over(client: Client, stub: Stub) -> None:
    item = await scope_item(client, stub, "k", a=1)
    await foreign_claim(stub, item, lease_millis=400)
    assert not (await client.create("k", a=1)).endswith("replayed")
    assert stub.outcomes[-1] == "takeover"
    assert stub.outcomes.count("busy") >= 1
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_busy_until_the_deadline_is_told(client: Client, stub: Stub) -> None:
    item = await scope_item(client, stub, "k", a=1)
    await foreign_claim(stub, item, lease_millis=60_000)
    with pytest.raises(Aborted) as busy:
        await client.create("k", seconds=0.5, a=1)
    assert busy.value.reason == "IDEMPOTENCY_IN_PROGRESS"
    assert await client.rows("select count(*) from sessions") == [(0,)]


async def told_by_another(client: Client, stub: Stub, item: pb.ClaimItem) -> None:
    """Completes the foreign claim as its process would."""
    completion = pb.CompleteItem(
        scope=item.scope,
        fingerprints=item.fingerprints,
        nonce=item.nonce,
        answer=b"told",
        ttl_millis=60_000,
        durable=True,
        timeline=client.database.timeline,
    )
    await stub.Complete(pb.CompleteRequest(items=[completion]), timeout=1)


async def test_busy_is_answered_as_soon_as_the_owner_is(client: Client, stub: Stub) -> None:
    """The other process' completion is a sign; before that nothing more than one wait a second is asked."""
    item = await scope_item(client, stub, "k", a=1)
    await foreign_claim(stub, item, lease_millis=60_000)
    waiting = [asyncio.create_task(client.create("k", a=1)) for _ in range(10)]
    while "busy" not in stub.outcomes[1:]:
        await asyncio.sleep(0.01)
    await told_by_another(client, stub, item)
    assert await asyncio.gather(*waiting) == ["told replayed"] * 10
    assert stub.outcomes[-1] == "replay"
    assert await client.rows("select count(*) from sessions") == [(0,)]


async def test_a_caller_that_leaves_while_it_waits_hands_the_key_on(client: Client, stub: Stub) -> None:
    item = await scope_item(client, stub, "k", a=1)
    await foreign_claim(stub, item, lease_millis=60_000)
    leaving, staying = (asyncio.create_task(client.create("k", a=1)) for _ in range(2))
    while "busy" not in stub.outcomes[1:]:
        await asyncio.sleep(0.01)
    leaving.cancel()
    await stub.Release(pb.ReleaseRequest(items=[pb.ReleaseItem(scope=item.scope, nonce=item.nonce)]), timeout=1)
    assert not (await staying).endswith("replayed")
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_no_more_than_may_wait_here_do(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "MAX_FOLLOWERS", 3)
    with a_write_under_way(monkeypatch) as there:
        tasks = [asyncio.create_task(client.create("k", a=1)) for _ in range(10)]
        await there.wait()
        refused = await asyncio.gather(*tasks[4:], return_exceptions=True)
    for error in refused:
        assert isinstance(error, Aborted)
        assert error.reason == "IDEMPOTENCY_IN_PROGRESS"
        assert error.retry_after is not None
    told = {answer.removesuffix(" replayed") for answer in await asyncio.gather(*tasks[:4])}
    assert len(told) == 1


async def test_what_is_sent_again_keeps_its_key(client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than its caller had, and than its lease."""
    lost = iter([True])

    async def losing(*args: Any, **kwargs: Any) -> Any:
        outcome = await write(*args, **kwargs)
        if next(lost, False):
            raise psycopg.OperationalError("the answer is lost")
        return outcome

    monkeypatch.setattr(mutation, "write", losing)
    await client.create("k", seconds=1, a=1)
    await completed(client)
    assert stub.claims[-1].lease_millis <= 3000
    [extended] = stub.extended
    assert (extended.scope, extended.nonce) == (stub.claims[-1].scope, stub.claims[-1].nonce)
    assert extended.lease_millis == mutation.SETTLE_SECONDS * 1000
    assert await client.rows("select count(*) from sessions") == [(1,)]


@contextmanager
def held_in_postgres(client: Client, item: pb.ClaimItem) -> Iterator[None]:
    """While inside, another process' statement has the lock of the key."""
    with psycopg.connect(client.url, autocommit=True) as stranger:
        stranger.execute("select pg_advisory_lock(%s)", unpack_from(">q", item.scope))
        yield


async def test_who_meets_its_key_in_postgres_waits_for_the_owner(client: Client, stub: Stub) -> None:
    client.door.replayed = 0.0
    item = await scope_item(client, stub, "k", a=1)
    await foreign_claim(stub, item, lease_millis=60_000)
    stub.outcomes.clear()
    with held_in_postgres(client, item):
        with pytest.raises(Aborted) as busy:
            await client.create("k", seconds=1, a=1)
        assert busy.value.reason == "IDEMPOTENCY_IN_PROGRESS"
        assert set(stub.outcomes) == {"busy"}
        call = asyncio.create_task(client.create("k", a=1))
        await stub.asked_to_wait.wait()
        await told_by_another(client, stub, item)
        assert await call == "told replayed"
    assert await client.rows("select count(*) from sessions") == [(0,)]


async def test_who_meets_its_key_in_postgres_and_nowhere_else_waits_there(client: Client, stub: Stub) -> None:
    """The other has not announced itself yet, or is away from Redis."""
    client.door.replayed = 0.0
    item = await scope_item(client, stub, "k", a=1)
    with held_in_postgres(client, item):
        with pytest.raises(Aborted) as busy:
            await client.create("k", seconds=1, a=1)
        assert busy.value.reason == "IDEMPOTENCY_IN_PROGRESS"
        call = asyncio.create_task(client.create("k", a=1))
        await asyncio.sleep(0.5)
        assert not call.done()
    assert not (await call).endswith("replayed")
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_a_record_of_an_earlier_version_is_compared_by_its_one_fingerprint(client: Client, stub: Stub) -> None:
    """Its owner is at work still, or gave up, so that no guard could tell."""
    item = await scope_item(client, stub, "k", a=1)
    stub.lose_all()
    del item.fingerprints[:]
    item.fingerprints.add(kind=1, digest=earlier_fingerprint_of(create_request(a=1)))
    await foreign_claim(stub, item, lease_millis=60_000)
    with pytest.raises(FailedPrecondition, match="IDEMPOTENCY_KEY_REUSED"):
        await client.create("k", a=2)
    with pytest.raises(Aborted, match="IDEMPOTENCY_IN_PROGRESS"):
        await client.create("k", seconds=0.5, a=1)
    await stub.Release(pb.ReleaseRequest(items=[pb.ReleaseItem(scope=item.scope, nonce=item.nonce)]), timeout=1)
    with pytest.raises(FailedPrecondition, match="IDEMPOTENCY_KEY_REUSED"):
        await client.create("k", a=2)
    first = await client.create("k", a=1)
    await completed(client)
    assert await client.create("k", a=1) == first + " replayed"


@pytest.mark.parametrize("whole", [False, True], ids=["its part of Redis", "idempotency_svc"])
async def test_a_release_out_of_reach_is_told_again(
    whole: bool, client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim before it may have been on its way to a Redis that stood still, and have arrived since."""
    monkeypatch.setattr(idempotency, "RELEASE_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(idempotency, "PROBE_SECONDS", 0.2)
    told: list[pb.ReleaseRequest] = []
    release = stub.Release

    async def away_at_first(request: pb.ReleaseRequest, *, timeout: float) -> pb.ReleaseResponse:
        told.append(request)
        if len(told) > 2:
            return await release(request, timeout=timeout)
        if whole:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)
        return pb.ReleaseResponse(outcomes=[pb.ReleaseOutcome(result=pb.ReleaseOutcome.RESULT_AWAY)])

    monkeypatch.setattr(stub, "Release", away_at_first)
    item = await scope_item(client, stub, "k", a=1)
    async with asyncio.timeout(10):
        while told.count(told[0]) < (2 if whole else 3):
            await asyncio.sleep(0.01)
    await completed(client)
    await foreign_claim(stub, item, lease_millis=1000)
    assert stub.outcomes[-1] == "acquired"


AWAY = pb.ReleaseOutcome(result=pb.ReleaseOutcome.RESULT_AWAY)
FOUND = pb.ReleaseOutcome(result=pb.ReleaseOutcome.RESULT_ABSENT)


@pytest.mark.parametrize(
    ("answers", "degraded"),
    [([[FOUND]], [0]), ([[AWAY], [AWAY], [AWAY, FOUND]], [0, 0, 1]), ([RuntimeError("broken"), [FOUND]], [0, 1])],
    ids=["at once", "late twice, then a part of it", "a defect"],
)
async def test_what_the_probe_finds(
    answers: list[list[pb.ReleaseOutcome] | Exception],
    degraded: list[float],
    client: Client,
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """idempotency_svc answers by itself, AWAY, while it is in doubt. No call claims before the probe is over."""
    monkeypatch.setattr(idempotency, "PROBE_SECONDS", 0.05)
    service = client.door._idempotency
    in_use: list[bool] = []
    told: list[tuple[bool | None, float | None]] = []
    claim, release = stub.Claim, stub.Release

    def gauge() -> float | None:
        return REGISTRY.get_sample_value("orchestrator_idempotency_degraded")

    async def late(request: pb.ClaimRequest, *, timeout: float) -> pb.ClaimResponse:
        monkeypatch.setattr(stub, "Claim", claim)
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing)

    async def probed(request: pb.ReleaseRequest, *, timeout: float) -> pb.ReleaseResponse:
        assert len({item.scope for item in request.items}) == len(request.items) > 8, "many, of any part of a cluster"
        in_use.append(service.up)
        told.append((service.component().up, gauge()))
        if len(told) > len(answers):
            return await release(request, timeout=timeout)
        answer = answers[len(told) - 1]
        if isinstance(answer, Exception):
            raise answer
        return pb.ReleaseResponse(outcomes=answer)

    monkeypatch.setattr(stub, "Claim", late)
    monkeypatch.setattr(stub, "Release", probed)
    await client.create("k")
    async with asyncio.timeout(10):
        while not service.up:
            await asyncio.sleep(0.01)
    assert in_use == [False] * len(answers)
    assert told == [(not number, number) for number in degraded], "what lasts is an outage"
    assert (service.component().up, gauge()) == (True, 0)


async def test_a_claim_of_tasks_whose_key_is_held_is_not_told_that_there_are_none(
    client: Client, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt, at another controller, may have taken some."""
    request = ClaimTasksRequest(role="finance")
    command = ClaimTasks(actor=ACTOR, role="finance", max_tasks=1, wait_seconds=0)
    claims = Claims(client.database, client.door, TaskMutations())

    def claim(seconds: float) -> Awaitable[bytes]:
        call = Call(
            policy=CLAIM_TASKS,
            raw=request.SerializeToString(),
            metadata=(("idempotency-key", "k"),),
            deadline=asyncio.get_running_loop().time() + seconds,
            trace=new_trace(),
            principal=PRINCIPAL,
            admission=Admission(1, 1),
            request=request,
        )
        return claims.claim(command, call, lambda tasks: b"%d" % len(tasks))

    assert await claim(20) == b"0"
    await completed(client)
    await foreign_claim(stub, stub.claims[-1], lease_millis=60_000)
    with pytest.raises(Aborted, match="IDEMPOTENCY_IN_PROGRESS"):
        await claim(0.3)
    # Held in Postgres alone, as by another controller that has not announced it.
    monkeypatch.setattr(client.door, "_idempotency", Idempotency(None, ttl=86400))
    async with await psycopg.AsyncConnection.connect(client.url) as owner:
        await lock_scope(owner, stub.claims[-1].scope)
        with pytest.raises(Aborted, match="IDEMPOTENCY_IN_PROGRESS"):
            await claim(0.6)
    assert await claim(20) == b"0"


async def test_who_has_left_does_not_count_among_those_who_wait(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutation, "MAX_FOLLOWERS", 3)
    with a_write_under_way(monkeypatch) as there:
        owner = asyncio.create_task(client.create("k", a=1))
        await there.wait()
        for _ in range(5):
            leaving = asyncio.create_task(client.create("k", a=1))
            await asyncio.sleep(0.01)
            leaving.cancel()
        staying = asyncio.create_task(client.create("k", a=1))
        await asyncio.sleep(0.01)
    assert await staying == await owner + " replayed"


async def test_busy_looks_at_the_guard_first(client: Client, stub: Stub) -> None:
    """Its owner may have died between COMMIT and Complete."""
    first = await client.create("k", a=1)
    await completed(client)
    item = stub.claims[-1]
    stub.lose_all()
    await foreign_claim(stub, item, lease_millis=60_000)
    assert await client.create("k", a=1) == first + " replayed"
    assert stub.outcomes[-1] == "busy"


async def test_another_request_that_is_only_under_way_does_not_decide(client: Client, stub: Stub) -> None:
    item = await scope_item(client, stub, "k", a=1)
    stub.lose_all()
    await foreign_claim(stub, item, lease_millis=60_000, digest=b"x" * 32)
    with pytest.raises(FailedPrecondition) as reused:
        await client.create("k", a=1)
    assert reused.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert stub.outcomes[-1] == "mismatch"


async def test_an_answer_that_a_failover_lost_is_not_replayed(
    client: Client, stub: Stub, own_postgres: Postgres, tmp_path: Path
) -> None:
    """Redis has it for a day; the server that was promoted never had it."""
    data, behind = tmp_path / "own-postgres" / "data", tmp_path / "behind"
    own_postgres.stop()
    shutil.copytree(data, behind)
    own_postgres.start()
    await ready(client)
    lost = await client.create("k", a=1)
    await completed(client)
    assert await client.create("k", a=1) == lost + " replayed"

    own_postgres.stop()
    shutil.rmtree(data)
    behind.rename(data)
    (data / "standby.signal").touch()
    own_postgres.start()
    with psycopg.connect(own_postgres.url, autocommit=True) as connection:
        while client.database.ready:
            await asyncio.sleep(0.01)
        connection.execute("select pg_promote()")
    while not client.database.ready:
        await asyncio.sleep(0)
    again = await create_when_there(client)
    assert again != lost
    assert stub.outcomes[-1] == "replay"
    await completed(client)
    assert await client.create("k", a=1) == again + " replayed"
    assert await client.rows("select count(*) from sessions") == [(1,)]
    own_postgres.stop()
    assert await client.create("k", a=1) == again + " replayed", "the record is of the new timeline now"


async def create_when_there(client: Client) -> str:
    """Connections of before the restart fail when they are next used; a caller retries."""
    while True:
        try:
            return await client.create("k", a=1)
        except Unavailable:
            await asyncio.sleep(0.05)


async def ready(client: Client) -> None:
    """Waits until writes go through again; each try has no key, so that no claim is made."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.rows("select pg_is_in_recovery()")
                await client.move("Activate", await client.session())
            except (ServiceError, psycopg.Error):
                await asyncio.sleep(0.05)
            else:
                break
    async with await psycopg.AsyncConnection.connect(client.url, autocommit=True) as connection:
        await connection.execute("delete from sessions")


@pytest.mark.parametrize("size", [MAX_ANSWER_BYTES, (4 << 20) - 1000])
async def test_an_answer_over_the_limit_is_replayed_from_its_guard(size: int, client: Client, stub: Stub) -> None:
    big = "x" * size
    client.answer_suffix = big
    first = await client.create("k", a=1)
    await completed(client)
    assert await client.create("k", a=1) == first + " replayed"
    assert stub.outcomes == ["acquired", "replay"]
    assert first.endswith(big)
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_a_guard_of_an_earlier_version_is_compared_by_its_one_fingerprint(client: Client, stub: Stub) -> None:
    first = await client.create("k", a=1)
    await completed(client)
    async with await psycopg.AsyncConnection.connect(client.url, autocommit=True) as connection:
        await connection.execute(
            "update idempotency_guards set fingerprint = %s", (earlier_fingerprint_of(create_request(a=1)),)
        )
    stub.lose_all()
    assert await client.create("k", a=1) == first + " replayed"
    await completed(client)
    assert await client.create("k", a=1) == first + " replayed", "its record has kind 1 alone"
    with pytest.raises(FailedPrecondition, match="IDEMPOTENCY_KEY_REUSED"):
        await client.create("k", a=2)


def near_door(client: Client) -> Door:
    """Remembers answers, and knows no idempotency_svc."""
    lifetimes = Lifetimes(ok=86400, error=600)
    return Door(client.database, Idempotency(None, ttl=86400), lifetimes, lanes=1, near_bytes=1 << 20)


async def test_near_answers_need_nobody(client: Client, own_postgres: Postgres) -> None:
    client.door = near_door(client)
    first = await client.create("k", a=1)
    own_postgres.stop()
    assert await client.create("k", a=1) == first + " replayed"


async def test_near_answers_of_another_timeline_are_forgotten(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.door = near_door(client)
    call = client.call("CreateSession", create_request(a=1), "k")
    first = await client.create("k", a=1)
    known = client.door.known(call)
    assert known is not None and (await known).decode() == first
    monkeypatch.setattr(client.database, "timeline", client.database.timeline + 1)
    assert client.door.known(call) is None


async def test_an_answer_to_another_request_is_not_remembered(client: Client, own_postgres: Postgres) -> None:
    first = await client.create("k", a=1)
    client.door = near_door(client)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="IDEMPOTENCY_KEY_REUSED"):
            await client.create("k", a=2)
    assert await client.create("k", a=1) == first + " replayed"
    own_postgres.stop()
    assert await client.create("k", a=1) == first + " replayed"
    assert client.door.known(client.call("CreateSession", create_request(a=2), "k")) is None


async def test_a_retry_that_comes_too_late_is_refused_unless_its_answer_is_known(client: Client, stub: Stub) -> None:
    old = ("idempotency-first-sent", (datetime.now(UTC) - timedelta(seconds=86401)).isoformat())
    with pytest.raises(FailedPrecondition) as refused:
        await client.create("k", more=(old,), a=1)
    assert refused.value.reason == "IDEMPOTENCY_KEY_EXPIRED"
    assert await client.rows("select count(*) from sessions") == [(0,)]
    first = await client.create("k", a=1)
    assert await client.create("k", more=(old,), a=1) == first + " replayed"
    fresh = ("idempotency-first-sent", (datetime.now(UTC) - timedelta(seconds=86000)).isoformat())
    assert not (await client.create("other", more=(fresh,))).endswith("replayed")
    with pytest.raises(InvalidArgument) as invalid:
        await client.create("third", more=(("idempotency-first-sent", "yesterday"),))
    assert invalid.value.reason == "IDEMPOTENCY_FIRST_SENT_INVALID"


async def test_large_answers_are_completed_in_batches_the_service_takes(stub: Stub) -> None:
    idempotency = Idempotency(stub, ttl=86400)  # type: ignore[arg-type]
    for number in range(100):
        idempotency.complete(
            bytes([number]) * 32,
            os.urandom(16),
            fingerprints=b"f" * 33,
            code=0,
            answer=b"a" * 60_000,
            ttl=60,
            timeline=1,
        )
    await idempotency.close()
    assert 128 << 10 < stub.largest < 256 << 10
    assert idempotency.component().up


async def test_what_waits_for_a_service_that_hangs_is_given_up_with_it(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def hangs(request: object, *, timeout: float) -> None:
        nonlocal asked
        asked += isinstance(request, pb.CompleteRequest)
        await asyncio.sleep(0.05)
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing)

    monkeypatch.setattr(stub, "Complete", hangs)
    monkeypatch.setattr(stub, "Release", hangs)
    waiting = Idempotency(stub, ttl=86400)  # type: ignore[arg-type]
    for _ in range(2560):
        waiting.complete(
            os.urandom(32), os.urandom(16), fingerprints=b"f" * 33, code=0, answer=b"a", ttl=60, timeline=1
        )
    await waiting.close()
    assert not waiting.component().up
    assert 1 <= asked <= 3, "ten groups waited"
