"""Who waits for a key: the sign, the look, the one who is promoted, on a real Redis."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from prometheus_client import REGISTRY
from redis.asyncio.connection import Connection
from structlog.testing import capture_logs

from deploy.local.processes import ROOT
from idempotency_svc import waiters
from idempotency_svc.cache import Acquired, Busy, ClaimItem, ExtendItem, GetItem, Mismatch, RedisCache, Replay, Takeover
from idempotency_svc.server import Signs
from idempotency_svc.waiters import Waiters
from svckit.errors import Aborted, Unavailable
from tests.contract.caches import (
    FOREIGN,
    OTHER,
    OWNER,
    SAME,
    claim,
    complete,
    new_scope,
    release,
    until,
)

if TYPE_CHECKING:
    from deploy.local.servers import Valkey
    from idempotency_svc.cache import ClaimOutcome, Fingerprints

LONG = 60.0


@pytest.fixture
def line(own: RedisCache) -> Waiters:
    return Waiters(own)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks come only with signs."""
    monkeypatch.setattr(waiters, "FIRST_LOOK", LONG)
    monkeypatch.setattr(waiters, "LAST_LOOK", LONG)


def ask(scope: bytes, fingerprints: Fingerprints = SAME, *, nonce: bytes = b"", lease: int = 60_000) -> ClaimItem:
    return ClaimItem(scope, fingerprints, nonce or os.urandom(16), lease, 600_000)


def waiting() -> float:
    return REGISTRY.get_sample_value("orchestrator_idempotency_waiters") or 0.0


async def stand(line: Waiters, items: list[ClaimItem], seconds: float = LONG) -> list[asyncio.Task[ClaimOutcome]]:
    """Tasks that wait in this order, once they do."""
    before = waiting()
    tasks = [asyncio.create_task(line.wait(item, seconds)) for item in items]
    await until(lambda: waiting() == before + len(items))
    return tasks


async def subscribed(admin: redis.asyncio.Redis, count: int = 1) -> None:
    async with asyncio.timeout(30):
        while len(await admin.pubsub_shardchannels()) != count:
            await asyncio.sleep(0.01)


async def finished(tasks: list[asyncio.Task[ClaimOutcome]], count: int) -> list[ClaimOutcome]:
    """What the first `count` that ended were told; no other has ended."""
    await until(lambda: sum(task.done() for task in tasks) >= count)
    done = [task.result() for task in tasks if task.done()]
    assert len(done) == count
    return done


@pytest.mark.usefixtures("patient")
async def test_a_completion_wakes_all(own: RedisCache, admin: redis.asyncio.Redis, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope) for _ in range(200)])
    await subscribed(admin)
    [(_, subscribers)] = await admin.pubsub_shardnumsub(*await admin.pubsub_shardchannels())
    assert subscribers == 1
    await complete(own, scope, OWNER, answer=b"told")
    assert set(await asyncio.gather(*tasks)) == {Replay(0, b"told", False)}
    await subscribed(admin, 0)
    assert waiting() == 0


@pytest.mark.usefixtures("patient")
async def test_a_durable_completion_of_another_wakes_too(
    own: RedisCache, admin: redis.asyncio.Redis, line: Waiters
) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    [task] = await stand(line, [ask(scope)])
    await subscribed(admin)
    await complete(own, scope, OTHER, durable=True)
    assert await task == Replay(0, b"answer", True)


@pytest.mark.usefixtures("patient")
async def test_a_release_promotes_one(own: RedisCache, admin: redis.asyncio.Redis, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    items = [ask(scope) for _ in range(5)]
    tasks = await stand(line, items)
    await subscribed(admin)
    await release(own, scope, OWNER)
    assert await finished(tasks, 1) == [Acquired(2)]
    assert tasks[0].done(), "who waits longest"
    await release(own, scope, items[0].nonce)
    assert await finished(tasks, 2) == [Acquired(2), Acquired(3)]
    await complete(own, scope, items[1].nonce)
    assert Counter(await asyncio.gather(*tasks)) == {Acquired(2): 1, Acquired(3): 1, Replay(0, b"answer", False): 3}


@pytest.mark.usefixtures("patient")
async def test_the_end_of_a_lease_promotes_one(own: RedisCache, line: Waiters) -> None:
    scope = new_scope()
    await own.claim([ask(scope, nonce=OWNER, lease=300)])
    tasks = await stand(line, [ask(scope) for _ in range(5)])
    await asyncio.sleep(0)
    assert await finished(tasks, 1) == [Takeover(2)]
    await complete(own, scope, OWNER, durable=True)
    await asyncio.gather(*tasks)


async def test_looks_find_out_without_signs(
    own: RedisCache, server: Valkey, admin: redis.asyncio.Redis, line: Waiters
) -> None:
    """A Redis whose user may not subscribe or publish; among them most users of before Redis had such rights."""
    await admin.execute_command("ACL", "SETUSER", "quiet", "on", ">pw", "~idem:*", "+@all", "resetchannels")  # type: ignore[no-untyped-call]
    quiet = RedisCache(f"redis://quiet:pw@{server.url.rpartition('@')[2]}", timeout=1)
    await quiet.start()
    scope = new_scope()
    await claim(quiet, scope, OWNER)
    tasks = await stand(Waiters(quiet), [ask(scope) for _ in range(3)])
    await complete(quiet, scope, OWNER)
    assert await asyncio.gather(*tasks) == [Replay(0, b"answer", False)] * 3
    assert await admin.pubsub_shardchannels() == []
    await quiet.stop()


@pytest.mark.usefixtures("patient")
async def test_a_lost_subscription_is_made_again(own: RedisCache, admin: redis.asyncio.Redis, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    [task] = await stand(line, [ask(scope)])
    await subscribed(admin)
    await admin.client_kill_filter(_type="pubsub")
    await subscribed(admin, 0)
    await subscribed(admin)
    await complete(own, scope, OWNER)
    assert await task == Replay(0, b"answer", False)


async def test_a_forgotten_record_promotes_one(own: RedisCache, admin: redis.asyncio.Redis, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope) for _ in range(3)])
    await admin.flushall()
    assert await finished(tasks, 1) == [Acquired(1)]
    await complete(own, scope, OWNER, durable=True)
    await asyncio.gather(*tasks)


@pytest.mark.usefixtures("patient")
async def test_another_request_is_told_so(own: RedisCache, line: Waiters) -> None:
    """It may stand in line with others, when a record of its own was lost."""
    scope = new_scope()
    await claim(own, scope, OWNER)
    items = [ask(scope, FOREIGN), ask(scope), ask(scope, FOREIGN)]
    tasks = [asyncio.create_task(line.wait(item, LONG)) for item in items]
    assert await finished(tasks, 2) == [Mismatch(False)] * 2
    tasks += await stand(line, [ask(scope, FOREIGN)])
    await complete(own, scope, OWNER)
    assert [await tasks[1], await tasks[3]] == [Replay(0, b"answer", False), Mismatch(False)]


async def test_time_is_over(own: RedisCache, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope)], 0.4) + await stand(line, [ask(scope)])
    assert isinstance(await tasks[0], Busy)
    await complete(own, scope, OWNER)
    assert await tasks[1] == Replay(0, b"answer", False)


@pytest.mark.usefixtures("patient")
async def test_who_has_left_does_not_become_the_owner(
    own: RedisCache, admin: redis.asyncio.Redis, line: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the claim for it was on its way: the next in line does."""
    scope = new_scope()
    await claim(own, scope, OWNER)
    items = [ask(scope) for _ in range(3)]
    tasks = await stand(line, items)
    await subscribed(admin)
    tasks[0].cancel()
    real = own.claim

    async def claim_and_leave(asked: list[ClaimItem]) -> list[ClaimOutcome]:
        outcomes = await real(asked)
        if asked == [items[1]] and isinstance(outcomes[0], Acquired):
            tasks[1].cancel()
            await asyncio.sleep(0)
        return outcomes

    monkeypatch.setattr(own, "claim", claim_and_leave)
    await release(own, scope, OWNER)
    assert await tasks[2] == Acquired(3)
    assert tasks[0].cancelled()
    assert tasks[1].cancelled()


@pytest.mark.usefixtures("patient")
async def test_no_more_than_may_wait_do(
    own: RedisCache, admin: redis.asyncio.Redis, line: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "MAX_WAITERS", 3)
    scope = new_scope()
    await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope) for _ in range(3)])
    await subscribed(admin)
    with pytest.raises(Aborted) as refused:
        await line.wait(ask(scope), LONG)
    assert refused.value.reason == "IDEMPOTENCY_IN_PROGRESS"
    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 0
    tasks[0].cancel()
    await until(lambda: waiting() == 2)
    tasks += await stand(line, [ask(scope)])
    await complete(own, scope, OWNER)
    assert await asyncio.gather(*tasks[1:]) == [Replay(0, b"answer", False)] * 3


async def test_a_redis_that_goes_away_is_told_to_all(own: RedisCache, server: Valkey, line: Waiters) -> None:
    scope = new_scope()
    await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope) for _ in range(3)])
    server.child.kill()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    server.start()
    await until(lambda: own.ready)
    await complete(own, scope, OWNER, durable=True)
    assert await line.wait(ask(scope), LONG) == Replay(0, b"answer", True)


@pytest.mark.usefixtures("patient")
async def test_ten_thousand_wait_for_a_thousand_keys(
    own: RedisCache, admin: redis.asyncio.Redis, line: Waiters
) -> None:
    """One subscription for each key, and none left behind."""
    scopes = [new_scope() for _ in range(1000)]
    for scope in scopes:
        await claim(own, scope, OWNER)
    tasks = await stand(line, [ask(scope) for scope in scopes for _ in range(10)])
    await subscribed(admin, 1000)
    for scope in scopes:
        await complete(own, scope, OWNER, answer=scope)
    told = await asyncio.gather(*tasks)
    assert told == [Replay(0, scope, False) for scope in scopes for _ in range(10)]
    await subscribed(admin, 0)


async def test_a_connection_for_signs_that_takes_no_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a black hole: who begins to wait must not stand there for ever."""
    monkeypatch.setattr("idempotency_svc.server.TELL_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        signs = Signs(lambda: Connection(port=listener.getsockname()[1], protocol=2, driver_info=None))
        event = asyncio.Event()
        async with asyncio.timeout(60):
            await signs.listen(b"first", event)
            for _ in range(60):
                await signs.listen(os.urandom(1 << 20), asyncio.Event())
            await event.wait()  # it is set when the connection is lost
        await signs.stop()


async def test_the_rights_that_the_documentation_names_suffice(own: RedisCache, server: Valkey) -> None:
    text = (ROOT / "docs" / "IDEMPOTENCY.md").read_text()
    rights = text.partition("a user with `")[2].partition("`")[0].split()
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "-@all", *rights)  # type: ignore[no-untyped-call]
        with capture_logs() as logs:
            app = RedisCache(f"redis://app:pw@{server.url.rpartition('@')[2]}", timeout=1)
            await app.start()
        assert [line["event"] for line in logs] == ["redis_ready"]
        scope = new_scope()
        await claim(app, scope, OWNER)
        [task] = await stand(Waiters(app), [ask(scope)])
        await subscribed(client)
        await complete(app, scope, OWNER)
        assert await task == Replay(0, b"answer", False)
        await app.get([GetItem(scope)])
        await app.extend([ExtendItem(scope, OWNER, 1000)])
        await release(app, scope, OWNER)
        assert await client.acl_log() == []
        await app.stop()
