"""The proof by killing: named failpoints, a history of every call, and the tables held against it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.history import Traffic
from tests.system.conftest import NEAR_OFF, World, repeated, show

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


@repeated(short=1, soak=100)
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
        show(failpoint, number + 1, rounds)
    await traffic.burst(20)
    await history.settle()
    await history.again(100)
    print(dict(history.verdicts()))
    history.enough(10 * rounds, {failpoint: len(failpoints.hits) - hits == rounds})
    history.check(world.tables)
