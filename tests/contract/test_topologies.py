"""The Cache on Redis behind sentinels and on a cluster: the same answers, and what becomes of a part that is away."""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from redis.crc import key_slot

from deploy.local.processes import LOOPBACK, free_port
from idempotency_svc.cache import (
    AWAY,
    Acquired,
    Busy,
    Completed,
    CompleteItem,
    Extended,
    ExtendItem,
    GetItem,
    Mismatch,
    Released,
    ReleaseItem,
    Replay,
    State,
    Takeover,
)
from svckit.errors import Unavailable
from tests.conftest import REDIS_ENGINES, redis_binary
from tests.contract.caches import (
    FOREIGN,
    LEASE,
    OTHER,
    OWNER,
    SAME,
    THIRD,
    TTL,
    cache_on,
    claim,
    claim_item,
    complete,
    key_of,
    metric,
    new_scope,
    noting,
    refused,
    until,
)
from tests.contract.topologies import PASSWORD, SLOTS, USER, Cluster, Node, Sentinels, wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from idempotency_svc.cache import Cache, RedisCache


@pytest.fixture(scope="module", params=REDIS_ENGINES)
def binary(request: pytest.FixtureRequest) -> Path:
    return redis_binary(request.param)


@pytest.fixture(scope="module")
def started_sentinels(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    made = Sentinels(tmp_path_factory.mktemp("sentinels"), binary)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def started_cluster(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), binary)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def sentinels(started_sentinels: Sentinels) -> Iterator[Sentinels]:
    """A primary with a replica, watched by sentinels; whatever the test kills."""
    yield started_sentinels
    started_sentinels.wait_whole()


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of three primaries with a replica each; whatever the test kills or stops."""
    yield started_cluster
    started_cluster.wait_whole()


@pytest.fixture(params=["sentinels", "cluster"])
def redis_servers(request: pytest.FixtureRequest, binary: Path) -> Sentinels | Cluster:
    """Each of them."""
    servers: Sentinels | Cluster = request.getfixturevalue(request.param)
    return servers


@asynccontextmanager
async def using(
    servers: Sentinels | Cluster, url: str = "", *, changes: list[bool] | None = None
) -> AsyncIterator[RedisCache]:
    """A cache on these servers, in use; it must leave neither a connection nor a task behind."""
    on_ready = None if changes is None else noting(changes)
    async with cache_on(url or servers.url, timeout=1, on_ready=on_ready) as cache:
        await until(lambda: cache.ready and metric("orchestrator_redis_up") == 1)
        yield cache
    clients = f"user={USER}".encode()
    running = [node for node in servers.nodes if node.running]
    await asyncio.to_thread(wait, lambda: not any(clients in node.ask("CLIENT", "LIST") for node in running))
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("redis")]


def slot_of(scope: bytes) -> int:
    return key_slot(key_of(scope).encode())


def scopes_in(slots: range, count: int) -> list[bytes]:
    """New scopes whose keys are in these slots."""
    found: list[bytes] = []
    while len(found) < count:
        if slot_of(scope := new_scope()) in slots:
            found.append(scope)
    return found


THIRDS = [range(SLOTS * number // 3, SLOTS * (number + 1) // 3) for number in range(3)]
"""The slots of each primary of a cluster."""


def errors(cause: str) -> float:
    return metric("orchestrator_redis_errors_total", cause=cause)


async def claims(cache: Cache, scopes: Sequence[bytes], nonce: bytes = OWNER) -> list[object]:
    return list(await cache.claim([claim_item(scope, nonce) for scope in scopes]))


# --- each of them ----------------------------------------------------------------------------------------------------


async def test_the_main_steps(redis_servers: Sentinels | Cluster) -> None:
    async with using(redis_servers) as cache:
        scopes = [new_scope() for _ in range(30)]
        done, released, held = scopes[:10], scopes[10:20], scopes[20:]
        assert await claims(cache, scopes) == [Acquired(1)] * 30
        assert {type(outcome) for outcome in await claims(cache, scopes, OTHER)} == {Busy}
        assert await cache.extend([ExtendItem(scope, OTHER, LEASE) for scope in scopes]) == [Extended.FENCED] * 30
        items = [CompleteItem(scope, SAME, OWNER, 0, scope * 20, TTL, True, 7) for scope in done]
        assert await cache.complete(items) == [Completed.COMPLETED] * 10
        assert await cache.release([ReleaseItem(scope, OWNER) for scope in released]) == [Released.RELEASED] * 10
        assert await cache.extend([ExtendItem(scope, OWNER, LEASE) for scope in held]) == [Extended.EXTENDED] * 10
        outcomes = await claims(cache, scopes, THIRD)
        assert outcomes[:20] == [*(Replay(0, scope * 20, True, 7) for scope in done), *[Acquired(2)] * 10]
        assert {type(outcome) for outcome in outcomes[20:]} == {Busy}
        over = [claim_item(new_scope(), lease=1) for _ in range(10)]
        assert await cache.claim(over) == [Acquired(1)] * 10
        await asyncio.sleep(0.005)
        assert await claims(cache, [item.scope for item in over], THIRD) == [Takeover(2)] * 10
        foreign = [claim_item(scope, THIRD, FOREIGN) for scope in scopes]
        assert await cache.claim(foreign) == [Mismatch(True)] * 10 + [Mismatch(False)] * 20
        records = await cache.get([GetItem(scope) for scope in (*scopes, new_scope())])
        assert [record and record.state for record in records] == (
            [State.COMPLETED] * 10 + [State.IN_PROGRESS] * 20 + [None]
        )


async def test_a_wrong_password_is_told(redis_servers: Sentinels | Cluster) -> None:
    counted = errors("auth")
    async with cache_on(redis_servers.url.replace(f"{PASSWORD}@", "wrong@"), timeout=1) as cache:
        assert await refused(cache) == "auth"
    assert errors("auth") > counted


async def test_nobody_who_knows_is_there(redis_servers: Sentinels | Cluster) -> None:
    scheme, _, rest = redis_servers.url.partition("@")
    service = rest.partition("/")[2]
    async with cache_on(f"{scheme}@{LOOPBACK}:{free_port()}/{service}", timeout=1) as cache:
        assert await refused(cache) == ("nomaster" if service else "refused")


async def test_one_who_knows_is_enough(redis_servers: Sentinels | Cluster) -> None:
    scheme, _, rest = redis_servers.url.partition("@")
    async with using(redis_servers, f"{scheme}@{LOOPBACK}:{free_port()},{rest}") as cache:
        assert await claim(cache, new_scope()) == Acquired(1)


# --- sentinels -------------------------------------------------------------------------------------------------------


async def test_a_planned_failover_is_not_noticed(sentinels: Sentinels) -> None:
    """The old primary has become a replica when it is asked next: the new one is asked within the same call."""
    async with using(sentinels) as cache:
        scope, counted = new_scope(), errors("readonly")
        assert await complete(cache, scope, durable=True) is Completed.RESTORED
        before = sentinels.primary
        assert before is not None
        before.spread()
        sentinels.fail_over()  # on this thread, so that the cache does not look around meanwhile
        [after] = [node for node in sentinels.nodes if node is not before]
        before.ask("REPLICAOF", LOOPBACK, after.port)
        assert await asyncio.gather(*(claim(cache, scope, OTHER) for _ in range(8))) == [Replay(0, b"answer", True)] * 8
        assert errors("readonly") > counted
        assert cache.ready and metric("orchestrator_redis_up") == 1


async def test_a_primary_that_others_replace(sentinels: Sentinels) -> None:
    """Killed. Nothing is asked until the sentinels name another; then hits again, by itself."""
    changes: list[bool] = []
    async with using(sentinels, changes=changes) as cache:
        scope = new_scope()
        assert await complete(cache, scope, durable=True) is Completed.RESTORED
        before = sentinels.primary
        assert before is not None
        before.spread()
        before.kill()
        assert await refused(cache) in {"refused", "connection"}
        assert metric("orchestrator_redis_up") == 0
        assert metric("orchestrator_redis_slots_away") == SLOTS
        await until(lambda: cache.ready)
        assert await claim(cache, scope, OTHER) == Replay(0, b"answer", True)
        assert metric("orchestrator_redis_up") == 1
        await until(lambda: changes == [True, False, True])


# --- a cluster -------------------------------------------------------------------------------------------------------


async def test_a_batch_over_all_primaries(cluster: Cluster) -> None:
    """The largest one, each fourth key twice: outcomes in order, and the second claim of a key after the first."""
    async with using(cluster) as cache:
        scopes = [new_scope() for _ in range(192)]
        assert {index for scope in scopes for index, slots in enumerate(THIRDS) if slot_of(scope) in slots} == {0, 1, 2}
        items = [claim_item(scope) for scope in scopes]
        items += [claim_item(scope, OTHER, FOREIGN) for scope in scopes[::3]]
        assert await cache.claim(items) == [Acquired(1)] * 192 + [Mismatch(False)] * 64
        answers = [CompleteItem(scope, SAME, OWNER, 0, scope, TTL, True) for scope in scopes]
        again = [item._replace(answer=b"another") for item in answers[::3]]
        assert await cache.complete([*again, *answers]) == (
            [Completed.COMPLETED] * 64
            + [Completed.ALREADY if place % 3 == 0 else Completed.COMPLETED for place in range(192)]
        )
        outcomes = await claims(cache, [*reversed(scopes), *scopes[:64]], OTHER)
        expected = {scope: Replay(0, scope, True) for scope in scopes}
        expected |= {scope: Replay(0, b"another", True) for scope in scopes[::3]}
        assert outcomes == [expected[scope] for scope in [*reversed(scopes), *scopes[:64]]]


async def test_cancelled_calls_do_not_mix_up_others(cluster: Cluster) -> None:
    """Whoever gets a connection next must not read an answer of the cancelled call."""
    chance = random.Random(1)
    async with using(cluster) as cache:
        scopes = [new_scope() for _ in range(50)]
        items = [CompleteItem(scope, SAME, OWNER, 0, scope, TTL, True) for scope in scopes]
        assert await cache.complete(items) == [Completed.RESTORED] * 50

        async def ask(patience: float) -> bool:
            some = chance.sample(scopes, 9)
            try:
                async with asyncio.timeout(patience):
                    assert await claims(cache, some) == [Replay(0, scope, True) for scope in some]
            except TimeoutError:
                return False
            return True

        answered, longest = 0, 0.03
        for _ in range(20):
            in_time = sum(await asyncio.gather(*(ask(chance.uniform(0, longest)) for _ in range(20))))
            longest *= 1 if in_time else 2  # as patient as a busy machine needs
            answered += in_time
        assert 0 < answered < 400
        assert await asyncio.gather(*(ask(30) for _ in range(20))) == [True] * 20
        assert metric("orchestrator_redis_up") == 1


async def test_scripts_flushed_on_one_primary(cluster: Cluster) -> None:
    async with using(cluster) as cache:
        counted = errors("noscript")
        cluster.primary_of(THIRDS[1][0]).ask("SCRIPT", "FLUSH")
        assert await claims(cache, [scope for slots in THIRDS for scope in scopes_in(slots, 5)]) == [Acquired(1)] * 15
        assert errors("noscript") == counted + 1


async def test_a_slot_that_moves(cluster: Cluster) -> None:
    """Its keys are found wherever they are: before, on the way with some keys there and some here, and afterwards."""
    [first] = scopes_in(THIRDS[0], 1)
    slot = slot_of(first)
    stays, goes, fresh, later = first, *scopes_in(range(slot, slot + 1), 3)
    source, target = cluster.primary_of(slot), cluster.primary_of(THIRDS[1][0])
    async with using(cluster) as cache:
        counted = {cause: errors(cause) for cause in ("ask", "moved", "tryagain")}
        items = [CompleteItem(scope, SAME, OWNER, 0, scope, TTL, True) for scope in (stays, goes)]
        assert await cache.complete(items) == [Completed.RESTORED] * 2
        cluster.open(slot, source, target)
        cluster.move(key_of(goes), source, target)
        # Duplicates, too: what is asked of one server at once never has two keys, some of which may be elsewhere.
        scopes = [stays, goes, fresh, goes, stays, new_scope(), fresh]
        outcomes = await claims(cache, scopes)
        kept = {scope: Replay(0, scope, True) for scope in (stays, goes)}
        assert outcomes == [kept.get(scope, Acquired(1)) for scope in scopes]
        assert errors("ask") == counted["ask"] + 2
        assert errors("moved") == counted["moved"]
        assert isinstance(await claim(cache, fresh, OTHER), Busy)

        cluster.move(key_of(stays), source, target)
        cluster.give(slot, source, target)
        scopes = [later, goes, stays, new_scope()]
        assert await claims(cache, scopes) == [kept.get(scope, Acquired(1)) for scope in scopes]
        assert errors("moved") == counted["moved"] + 3
        await claims(cache, scopes)
        assert errors("moved") == counted["moved"] + 3, "it is remembered"
        assert isinstance(await claim(cache, fresh, OTHER), Busy)
        assert errors("tryagain") == counted["tryagain"]
        assert cache.ready and metric("orchestrator_redis_up") == 1

        cluster.open(slot, target, source)
        for scope in (stays, goes, fresh, later):
            cluster.move(key_of(scope), target, source)
        cluster.give(slot, target, source)
        assert await claim(cache, stays) == Replay(0, stays, True)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_primary_away(cluster: Cluster, fault: signal.Signals) -> None:
    """Its keys are AWAY, all others go on; when its replica has its place, they are hits again, by itself.

    The cache was told of no other node than the one that goes.
    """
    victim = cluster.primary_of(0)
    changes: list[bool] = []
    only = f"redis+cluster://{USER}:{PASSWORD}@{LOOPBACK}:{victim.port}"
    async with using(cluster, only, changes=changes) as cache:
        scopes = [scope for slots in THIRDS for scope in scopes_in(slots, 4)]
        items = [CompleteItem(scope, SAME, OWNER, 0, scope, TTL, True) for scope in scopes]
        assert await cache.complete(items) == [Completed.RESTORED] * 12
        assert metric("orchestrator_redis_slots_away") == 0
        victim.spread()
        kept = [Replay(0, scope, True) for scope in scopes]
        victim.send(fault)
        assert await claims(cache, scopes, OTHER) == [*[AWAY] * 4, *kept[4:]]
        if fault == signal.SIGKILL:  # else it is in doubt for longer than the cluster takes
            assert metric("orchestrator_redis_up") == 0
            assert metric("orchestrator_redis_slots_away") == len(THIRDS[0])
        assert await claims(cache, scopes, OTHER) == [*[AWAY] * 4, *kept[4:]]
        with pytest.raises(Unavailable):
            await cache.get([GetItem(scopes[0])])
        [record] = await cache.get([GetItem(scopes[-1])])
        assert record is not None

        late = 0
        while (outcomes := await claims(cache, scopes, OTHER)) != kept:
            assert all(outcome in (AWAY, known) for outcome, known in zip(outcomes, kept, strict=True))
            late += AWAY in outcomes[4:]
            await asyncio.sleep(0.02)
        assert late < 5, "no more than a second's standing still costs"
        await until(lambda: cluster.primary_of(0) is not victim)  # whichever node is asked has heard of it
        await until(lambda: metric("orchestrator_redis_up") == 1)
        assert metric("orchestrator_redis_slots_away") == 0
        assert changes == [True], "it was ready all the time"
        await asyncio.to_thread(cluster.wait_whole)
        assert await claims(cache, scopes, OTHER) == kept


async def test_a_primary_without_memory(cluster: Cluster) -> None:
    scopes = [scope for slots in THIRDS for scope in scopes_in(slots, 2)]
    full = cluster.primary_of(THIRDS[2][0])
    async with using(cluster) as cache:
        counted = errors("oom")
        full.configure(maxmemory="1")
        assert await claims(cache, scopes) == [*[Acquired(1)] * 4, AWAY, AWAY]
        assert errors("oom") > counted
        assert metric("orchestrator_redis_slots_away") == len(THIRDS[2])
        full.configure(maxmemory="0")
        await until(lambda: metric("orchestrator_redis_up") == 1)
        assert await claims(cache, scopes) == [Acquired(1)] * 6


async def test_a_primary_that_says_clusterdown(cluster: Cluster) -> None:
    """It misses a slot, and is told to serve nothing then; what it says of the cluster is not believed."""
    scopes = [scope for slots in THIRDS for scope in scopes_in(slots, 2)]
    down = cluster.primary_of(THIRDS[1][0])
    async with using(cluster, f"redis+cluster://{USER}:{PASSWORD}@{LOOPBACK}:{down.port}") as cache:
        counted = errors("clusterdown")
        down.configure(cluster_require_full_coverage="yes")
        down.ask("CLUSTER", "DELSLOTS", THIRDS[1][7])
        await until(lambda: b"cluster_state:fail" in down.ask("CLUSTER", "INFO"))
        assert await claims(cache, scopes) == [Acquired(1), Acquired(1), AWAY, AWAY, Acquired(1), Acquired(1)]
        assert errors("clusterdown") > counted
        assert metric("orchestrator_redis_slots_away") == len(THIRDS[1])
        down.ask("CLUSTER", "ADDSLOTS", THIRDS[1][7])
        down.configure(cluster_require_full_coverage="no")
        await until(lambda: metric("orchestrator_redis_up") == 1)
        assert await claims(cache, scopes) == [Acquired(1)] * 6


async def test_a_whole_cluster_away(cluster: Cluster) -> None:
    changes: list[bool] = []
    async with using(cluster, changes=changes) as cache:
        scopes = [scope for slots in THIRDS for scope in scopes_in(slots, 2)]
        items = [CompleteItem(scope, SAME, OWNER, 0, scope, TTL, True) for scope in scopes]
        assert await cache.complete(items) == [Completed.RESTORED] * 6
        for node in cluster.nodes:
            node.kill()
        with pytest.raises(Unavailable) as caught:
            await claims(cache, scopes)
        assert caught.value.reason == "REDIS_UNAVAILABLE"
        assert caught.value.metadata["cause"] in {"refused", "connection"}
        await until(lambda: not cache.ready)
        assert await refused(cache) in {"refused", "connection"}
        assert metric("orchestrator_redis_slots_away") == SLOTS
        await until(lambda: changes == [True, False])
        await asyncio.to_thread(cluster.wait_whole)
        await until(lambda: metric("orchestrator_redis_up") == 1)
        assert await claims(cache, scopes, OTHER) == [Replay(0, scope, True) for scope in scopes]
        await until(lambda: changes == [True, False, True])


# --- one server ------------------------------------------------------------------------------------------------------


async def test_a_server_that_loads_its_records(binary: Path, tmp_path: Path) -> None:
    slow = {"key-load-delay": "5000", "loading-process-events-interval-bytes": "1024"}
    node = Node(tmp_path / "node", binary, slow)
    node.start()
    try:
        async with cache_on(f"redis://{USER}:{PASSWORD}@{LOOPBACK}:{node.port}", timeout=1) as cache:
            scopes = [new_scope() for _ in range(200)]
            for scope in scopes:
                assert await complete(cache, scope, durable=True) is Completed.RESTORED
            node.ask("BGREWRITEAOF")
            await until(lambda: b"aof_rewrites:1" in node.ask("INFO", "persistence"))
            await until(lambda: b"aof_rewrite_in_progress:0" in node.ask("INFO", "persistence"))
            counted = errors("loading")
            node.kill()
            starting = asyncio.create_task(asyncio.to_thread(node.start))
            await until(lambda: errors("loading") > counted)
            assert await refused(cache) == "loading"
            await until(lambda: cache.ready)
            await starting
            assert await claims(cache, scopes, OTHER) == [Replay(0, b"answer", True)] * 200
    finally:
        node.kill()
