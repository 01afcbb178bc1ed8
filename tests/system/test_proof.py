"""The proof by killing: named failpoints, a history of every call, and the tables held against it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from tests.client import Tenant
from tests.history import History, Traffic
from tests.system.conftest import NEAR_OFF, World

KILLS = {
    "controller": (
        "before-claim",
        "after-claim",
        "before-write",
        "after-write",
        "before-complete",
        "after-complete",
        "before-answer",
        "before-take",
        "after-take",
    ),
    "idempotency": ("before-claim-script", "after-claim-script", "before-complete-script", "after-complete-script"),
}
"""Where each process is killed."""


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """Two controllers, everything with failpoints and behind proxies."""
    return start_world(
        controllers=2, failpoints=True, proxied={"redis", "postgres", "idempotency"}, controller_env=NEAR_OFF
    )


@pytest_asyncio.fixture
async def traffic(world: World, issuer: Issuer) -> AsyncIterator[Traffic]:
    """Traffic of a tenant of this test's own, at both controllers."""
    first, second = world.pair.controller_targets
    tenant = Tenant(issuer, first)
    made = Traffic(History(), [tenant.agent(connections=2), tenant.agent(target=second, connections=2)])
    await made.prepare()
    yield made
    await tenant.close()


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(1, id="short"),
        pytest.param(100, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
@pytest.mark.parametrize("victim,failpoint", [(victim, name) for victim, names in KILLS.items() for name in names])
async def test_killed_at(victim: str, failpoint: str, rounds: int, world: World, traffic: Traffic) -> None:
    """The first controller, or idempotency_svc, ends by SIGKILL right there, under mixed calls; retries go to both."""
    history, failpoints = traffic.history, world.pair.failpoints[victim]
    service = world.pair.services[victim]
    rng = random.Random(failpoint)
    hits = len(failpoints.hits)
    for number in range(rounds):
        failpoints.arm(failpoint, "kill", nth=rng.randint(1, 3))
        while service.running:
            await traffic.burst(12, agent=traffic.agents[0], timeout=2)
            await asyncio.sleep(0.02)  # completions go off the callers' path
        await asyncio.to_thread(world.pair.start, victim)
        print(f"\r{failpoint}: {number + 1} of {rounds}", end="", flush=True)
    await traffic.burst(20)
    await history.settle()
    await history.again(100)
    print(f" {dict(history.verdicts())}")
    history.enough(10 * rounds, {failpoint: len(failpoints.hits) - hits == rounds})
    history.check(world.tables)
