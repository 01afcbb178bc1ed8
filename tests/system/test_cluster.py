"""The pair on a Redis Cluster whose primaries are killed under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from deploy.local.servers import embedded_valkey
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PLANNER, Tenant
from tests.contract.topologies import SLOTS, Cluster
from tests.history import History, Traffic
from tests.oracle import eventually
from tests.system.conftest import NEAR_OFF, World, metric


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), embedded_valkey())
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World], cluster: Cluster) -> World:
    """Two controllers; idempotency_svc has the cluster in place of the world's own Valkey."""
    return start_world(controllers=2, controller_env=NEAR_OFF, idempotency_env={"REDIS_URL": cluster.url})


@pytest_asyncio.fixture
async def traffic(world: World, issuer: Issuer) -> AsyncIterator[Traffic]:
    """Traffic of a tenant of this test's own, at both controllers."""
    first, second = world.pair.controller_targets
    tenant = Tenant(issuer, first)
    made = Traffic(History(), [tenant.agent(connections=2), tenant.agent(target=second, connections=2)])
    await made.prepare()
    yield made
    await tenant.close()


def replays(world: World) -> float:
    """How many claims of both controllers were answered from Redis."""
    names = ("controller", "controller-2")
    return sum(metric(world, name, "orchestrator_claims_total", outcome="replay") for name in names)


async def all_are_hits(world: World, traffic: Traffic, name: str) -> None:
    """Returns when each of many keys, which are in the slots of all primaries, is answered from Redis."""
    history = traffic.history
    request = sessions_pb.CreateSessionRequest(agent_role=PLANNER)
    keys = [f"{name}-{number}" for number in range(60)]

    async def pass_() -> bool:
        before = replays(world)
        await asyncio.gather(*(history.insist(traffic.agents, request, key) for key in keys))
        return replays(world) - before == len(keys)

    await eventually(pass_)


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(1, id="short"),
        pytest.param(100, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
async def test_a_primary_killed_under_load(rounds: int, world: World, cluster: Cluster, traffic: Traffic) -> None:
    """By SIGKILL; its replica takes its place, and it comes back as a replica of that one."""
    history = traffic.history
    rng = random.Random(rounds)
    seen = 0
    await all_are_hits(world, traffic, "before")
    for number in range(rounds):
        slot, stop = rng.randrange(SLOTS), asyncio.Event()
        calls = asyncio.create_task(traffic.until(stop))
        try:
            victim = cluster.primary_of(slot)
            told = len(history.calls)
            await eventually(lambda told=told: len(history.calls) > told + 50)  # type: ignore[misc]
            await asyncio.to_thread(victim.kill)
            seen += await eventually(lambda: metric(world, "idempotency", "orchestrator_redis_slots_away") > 0)
            await eventually(lambda slot=slot, victim=victim: cluster.primary_of(slot) is not victim)  # type: ignore[misc]
            await asyncio.to_thread(cluster.wait_whole)
            await eventually(lambda: metric(world, "idempotency", "orchestrator_redis_slots_away") == 0)
        finally:
            stop.set()
            await calls
        assert victim.replicates is not None
        await all_are_hits(world, traffic, f"after-{number}")
        print(f"\r{number + 1} of {rounds}", end="", flush=True)
    await history.settle()
    await history.again()
    print(f" {dict(history.verdicts())}")
    history.enough(100 * rounds, {"killed": seen == rounds})
    history.check(world.tables)
