"""Many callers of one key, on several controllers: one effect, one owner at a time, one answer."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import redis

from deploy.local.issuer import Issuer
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PASSING, PLANNER, Agent, Answer, Tenant
from tests.oracle import eventually
from tests.system.conftest import NEAR_OFF, World, metric, repeated, show

CLIENTS = 10_000
REQUEST = sessions_pb.CreateSessionRequest(agent_role=PLANNER)


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """Three controllers with failpoints, which ask idempotency_svc about every call."""
    return start_world(controllers=3, failpoints=True, controller_env=NEAR_OFF)


@pytest_asyncio.fixture
async def tenant(world: World, issuer: Issuer) -> AsyncIterator[Tenant]:
    own = Tenant(issuer, world.pair.controller_target)
    yield own
    await own.close()


def agents_of(tenant: Tenant, world: World, *, connections: int) -> list[Agent]:
    return [tenant.agent(target=target, connections=connections) for target in world.pair.controller_targets]


async def by_the_contract(agent: Agent, key: str, told: list[Answer]) -> Answer:
    """Asks until there is an answer, heeding RetryInfo, with backoff otherwise; notes all other answers."""
    pause = 0.1
    while True:
        answer = await agent.ask(REQUEST, key=key, timeout=20)
        if answer.code.name not in PASSING:
            return answer
        told.append(answer)
        pause = min(2 * pause, 5.0)
        await asyncio.sleep(max(answer.retry_after, random.uniform(0, pause)))


def memory_of(pid: int) -> int:
    """The most bytes that a process has had in memory."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def script_calls(world: World) -> int:
    """How many scripts Redis has run."""
    with redis.Redis.from_url(world.valkey.url) as connection:
        return int(connection.info("commandstats")["cmdstat_evalsha"]["calls"])


async def replays(agent: Agent) -> None:
    """Makes a controller claim before it begins, as where replays are frequent."""
    for _ in range(20):
        assert (await agent.ask(REQUEST, key="frequent")).ok


@pytest.mark.timeout(300)
async def test_ten_thousand_clients_of_one_key(world: World, tenant: Tenant) -> None:
    """At two controllers, while the first to write takes two seconds: no storm, and 10,000 equal answers."""
    agents = agents_of(tenant, world, connections=10)[:2]
    for agent in agents:
        await replays(agent)
    names = ("controller", "controller-2", "idempotency")
    before = {name: memory_of(world.pair.services[name].pid) for name in names}
    calls = script_calls(world)
    for name in names[:2]:
        world.pair.failpoints[name].arm("before-write", "delay", seconds=2)
    told: list[Answer] = []
    with_audit = world.tables.audits(tenant.name)
    answers = await asyncio.gather(*(by_the_contract(agents[n % 2], "one", told) for n in range(CLIENTS)))

    assert {answer.said for answer in answers} == {answers[0].said}
    assert answers[0].ok
    assert world.tables.audits(tenant.name) == with_audit + 1
    assert world.tables.sessions(tenant.name) == 2, "that one, and the one of the replays"
    assert {answer.refusal[0] for answer in told} <= {"ABORTED", "RESOURCE_EXHAUSTED"}
    assert any(answer.refusal == ("ABORTED", "IDEMPOTENCY_IN_PROGRESS") for answer in told)
    assert all(answer.retry_after > 0 for answer in told)
    # One script call for a claim of up to 96 calls; without groups and lines it were one for each look of each client.
    assert script_calls(world) - calls < CLIENTS / 4
    for name in names:
        assert memory_of(world.pair.services[name].pid) - before[name] < 200 << 20
    assert metric(world, "idempotency", "orchestrator_idempotency_waiters") == 0
    world.tables.check()


@repeated(2, 100)
async def test_owner_dies_while_others_wait(rounds: int, world: World, tenant: Tenant) -> None:
    """SIGKILL before its write; callers wait at two other controllers, and exactly one of those goes on."""
    owner, *others = agents_of(tenant, world, connections=2)
    failpoints = world.pair.failpoints["controller"]
    started = len(failpoints.hits)

    def takeovers() -> float:
        return metric(world, "idempotency", "orchestrator_idempotency_outcomes_total", step="claim", outcome="takeover")

    for number in range(rounds):
        for agent in (owner, *others):
            await replays(agent)
        key, before = secrets.token_hex(8), takeovers()
        failpoints.arm("before-write", "kill", seconds=0.3)
        dying = asyncio.create_task(owner.ask(REQUEST, key=key, timeout=1))
        await eventually(lambda: len(failpoints.hits) == started + number + 1)  # noqa: B023 - awaited here
        waiting = [asyncio.create_task(agent.ask(REQUEST, key=key)) for _ in range(50) for agent in others]
        assert not (await dying).ok
        answers = await asyncio.gather(*waiting)
        assert len({answer.said for answer in answers}) == 1
        assert answers[0].ok
        assert sum(not answer.replayed for answer in answers) == 1, "one of those who waited was promoted"
        assert takeovers() == before + 1
        await asyncio.to_thread(world.pair.start, "controller")
        show("owner killed", number + 1, rounds)
    assert world.tables.sessions(tenant.name) == rounds + 1
    world.tables.check()
