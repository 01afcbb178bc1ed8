"""Many callers of one key, on several controllers: one effect, one owner at a time, one answer."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
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
    """Three controllers with failpoints, which ask idempotency_svc about every call: Redis, too, may take a second."""
    return start_world(
        controllers=3,
        failpoints=True,
        controller_env=NEAR_OFF,
        idempotency_env={"REDIS_TIMEOUT_MILLIS": "1000"},
    )


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


def script_calls_while_all_wait(world: World) -> int:
    """In two seconds. In a thread: the loop has 10,000 clients to look after."""
    before = script_calls(world)
    time.sleep(2)
    return script_calls(world) - before


async def replays(world: World, *agents: Agent) -> None:
    """Makes their controllers claim before they begin, as where replays are frequent, on an idempotency_svc in use."""
    controllers = [name for name in world.pair.services if name != "idempotency"]
    while True:
        for agent in agents:
            for _ in range(20):
                assert (await agent.ask(REQUEST, key="frequent")).ok
        if not any(metric(world, name, "orchestrator_idempotency_degraded") for name in controllers):
            break
        await asyncio.sleep(0.1)


@pytest.mark.timeout(300)
async def test_ten_thousand_clients_of_one_key(world: World, tenant: Tenant) -> None:
    """At two controllers, while the first takes five seconds to write: no storm, and 10,000 equal answers."""
    agents = agents_of(tenant, world, connections=10)[:2]
    await replays(world, *agents)
    names = ("controller", "controller-2", "idempotency")
    before = {name: memory_of(world.pair.services[name].pid) for name in names}
    world.pair.failpoints["controller"].arm("before-write", "delay", seconds=5)
    told: list[Answer] = []
    with_audit = world.tables.audits(tenant.name)
    first = asyncio.create_task(by_the_contract(agents[0], "one", told))
    await eventually(lambda: "before-write" in world.pair.failpoints["controller"].hits)
    second = asyncio.create_task(by_the_contract(agents[1], "one", told))
    await eventually(lambda: metric(world, "idempotency", "orchestrator_idempotency_waiters"))
    watching = asyncio.create_task(asyncio.to_thread(script_calls_while_all_wait, world))
    clients = [first, second, *(by_the_contract(agents[n % 2], "one", told) for n in range(CLIENTS - 2))]
    answers = await asyncio.gather(*clients)

    found = await watching
    assert 1 <= found < 20, "one line looks for all who wait"
    assert {answer.said for answer in answers} == {answers[0].said}
    assert answers[0].ok
    assert world.tables.audits(tenant.name) == with_audit + 1
    assert world.tables.sessions(tenant.name) == 2, "that one, and the one of the replays"
    assert {answer.refusal[0] for answer in told} <= {"ABORTED", "RESOURCE_EXHAUSTED"}
    assert any(answer.refusal == ("ABORTED", "IDEMPOTENCY_IN_PROGRESS") for answer in told)
    assert all(answer.retry_after > 0 for answer in told)
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

    def claims(outcome: str) -> float:
        return metric(world, "idempotency", "orchestrator_idempotency_outcomes_total", step="claim", outcome=outcome)

    taken_over = claims("takeover")
    for number in range(rounds):
        await replays(world, owner, *others)
        key, acquired, takeovers = secrets.token_hex(8), claims("acquired"), claims("takeover")
        failpoints.arm("before-write", "kill", seconds=0.3)
        dying = asyncio.create_task(owner.ask(REQUEST, key=key, timeout=2))
        await eventually(lambda: len(failpoints.hits) == started + number + 1)  # noqa: B023 - awaited here
        waiting = [asyncio.create_task(agent.ask(REQUEST, key=key)) for _ in range(50) for agent in others]
        assert not (await dying).ok
        answers = await asyncio.gather(*waiting)
        assert len({answer.said for answer in answers}) == 1
        assert answers[0].ok
        assert sum(not answer.replayed for answer in answers) == 1, "one of those who waited was promoted"
        assert claims("acquired") == acquired + 1
        # None if the owner's claim took longer than a second, and did not arrive before its end.
        assert claims("takeover") - takeovers in (0, 1)
        await asyncio.to_thread(world.pair.start, "controller")
        show("owner killed", number + 1, rounds)
    assert claims("takeover") - taken_over >= rounds / 2
    assert world.tables.sessions(tenant.name) == rounds + 1
    world.tables.check()


@repeated(2, 100)
async def test_those_who_wait_outlive_idempotency_svc_and_their_controller(
    rounds: int, world: World, tenant: Tenant
) -> None:
    """While the owner is at work, SIGKILL to idempotency_svc with a waiting call, or to a controller that waits."""
    owner, second, third = agents_of(tenant, world, connections=2)
    for number in range(rounds):
        await replays(world, owner, second, third)
        victim, failpoint = (("idempotency", "before-wait"), ("controller-2", "before-await"))[number % 2]
        key = secrets.token_hex(8)
        world.pair.failpoints["controller"].arm("before-write", "delay", seconds=1.5)
        world.pair.failpoints[victim].arm(failpoint, "kill", seconds=0.3)
        waiting = [asyncio.create_task(owner.ask(REQUEST, key=key))]
        await asyncio.sleep(0.2)
        waiting += [asyncio.create_task(agent.insist(REQUEST, key=key)) for _ in range(20) for agent in (second, third)]
        await eventually(lambda: not world.pair.services[victim].running)  # noqa: B023 - awaited here
        await asyncio.to_thread(world.pair.start, victim)
        answers = await asyncio.gather(*waiting)
        assert len({answer.said for answer in answers}) == 1
        assert answers[0].ok
        show("killed while waiting", number + 1, rounds)
    assert world.tables.sessions(tenant.name) == rounds + 1
    world.tables.check()
