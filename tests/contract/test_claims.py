"""The door with a real cache of claims: what each answer of idempotency_svc leads to, when calls have company."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from controller_svc import mutation
from controller_svc.idempotency import COMPLETE_GATHER, Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.store.write import write
from deploy.local.servers import Postgres
from idempotency_svc.cache import RedisCache
from idempotency_svc.servicer import IdempotencyServicer
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import Aborted, FailedPrecondition
from tests.contract.test_door import Client, _client


class Stub:
    """idempotency_svc's servicer without the wire; it notes what it is asked and what it answers."""

    def __init__(self, servicer: IdempotencyServicer, url: str) -> None:
        self._servicer = servicer
        self._url = url
        self.outcomes: list[str] = []
        self.claims: list[pb.ClaimItem] = []
        self.largest = 0

    def lose_all(self) -> None:
        """Redis forgets everything."""
        with redis.Redis.from_url(self._url) as connection:
            connection.flushdb()

    async def Claim(self, request: pb.ClaimRequest, *, timeout: float) -> pb.ClaimResponse:
        answer: Any = await self._servicer.Claim(request, None)  # type: ignore[arg-type]
        response = pb.ClaimResponse.FromString(answer)
        self.claims += request.items
        self.outcomes += [outcome.WhichOneof("outcome") or "" for outcome in response.outcomes]
        return response

    async def Complete(self, request: pb.CompleteRequest, *, timeout: float) -> None:
        self.largest = max(self.largest, request.ByteSize())
        await self._servicer.Complete(request, None)  # type: ignore[arg-type]

    async def Release(self, request: pb.ReleaseRequest, *, timeout: float) -> None:
        await self._servicer.Release(request, None)  # type: ignore[arg-type]


@pytest.fixture
async def stub(redis_url: str) -> AsyncIterator[Stub]:
    """A cache on an empty Redis."""
    cache = RedisCache(redis_url)
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


async def completed() -> None:
    """Lets completions arrive."""
    await asyncio.sleep(10 * COMPLETE_GATHER)


async def foreign_claim(stub: Stub, item: pb.ClaimItem, *, lease_millis: int, digest: bytes | None = None) -> None:
    """Claims the scope of an earlier call as another process would."""
    item.nonce = os.urandom(16)
    item.lease_millis = lease_millis
    if digest is not None:
        item.fingerprints[0].digest = digest
    await stub.Claim(pb.ClaimRequest(items=[item]), timeout=1)


async def scope_item(client: Client, stub: Stub, key: str, **data: Any) -> pb.ClaimItem:
    """The claim of a call that was refused without a trace: its scope and fingerprint are what counts."""
    ready, client.database._component = (
        client.database._component,
        client.database._component.__class__(False, "", client.database._component.since),
    )
    with pytest.raises(Exception, match="DATABASE_UNAVAILABLE"):
        await client.create(key, **data)
    client.database._component = ready
    await completed()
    return stub.claims[-1]


async def test_a_replay_needs_no_postgres(client: Client, stub: Stub, own_postgres: Postgres) -> None:
    first = await client.create("k", a=1)
    await completed()
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
    await completed()
    client.door.replayed = 0.0
    with a_write_under_way(monkeypatch) as there:
        other = asyncio.create_task(client.create("other"))
        await there.wait()
        assert await client.create("k", a=1) == first + " replayed"
    await other
    assert await client.rows("select count(*) from sessions") == [(2,)]


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
    await completed()
    await foreign_claim(stub, stub.claims[-1], lease_millis=1000)
    assert stub.outcomes[-1] == "acquired"
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_frequent_replays_make_claims_go_first(client: Client, stub: Stub) -> None:
    client.door.replayed = 0.0
    first = await client.create("k", a=1)
    while client.door.replayed <= mutation.CLAIM_FIRST:
        assert await client.create("k", a=1) == first + " replayed"
    await completed()
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


async def test_busy_looks_at_the_guard_first(client: Client, stub: Stub) -> None:
    """Its owner may have died between COMMIT and Complete."""
    first = await client.create("k", a=1)
    await completed()
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


async def test_large_answers_are_completed_in_batches_the_service_takes(stub: Stub) -> None:
    idempotency = Idempotency(stub, ttl=86400)  # type: ignore[arg-type]
    for number in range(8):
        idempotency.complete(
            bytes([number]) * 32, os.urandom(16), fingerprint=b"f" * 32, code=0, answer=b"a" * 900_000, ttl=60
        )
    await idempotency.close()
    assert 900_000 < stub.largest < 4 << 20
    assert idempotency.component().up
