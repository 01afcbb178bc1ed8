"""Clocks that are wrong, and that jump: minutes apart at controllers and Redis, every write still takes effect once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from deploy.local.servers import embedded_valkey
from tests.client import AGENT, PLANNER, WORKER, Agent
from tests.conftest import DEBIAN
from tests.history import History, Traffic
from tests.oracle import eventually
from tests.system.conftest import NEAR_OFF, World, repeated, show

LIBRARY = DEBIAN.parent / "libfaketime.so.1"
"""libfaketime, which `make tools` gets: it stands before the C library, so Redis is deceived too."""

OFFSETS = (300, -300, 0)
"""Seconds that a clock is wrong by."""


class Clock:
    """The wall clock of one process, to be set while it runs; what it measures spans with is left alone."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    def set(self, offset: int) -> None:
        """From now on the process' time is wrong by this."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset:+d}\n")
        fresh.replace(self._file)

    @property
    def env(self) -> dict[str, str]:
        """What the process has to be started with."""
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }


Clocks = dict[str, Clock]


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> Clocks:
    if not LIBRARY.exists():
        pytest.skip("libfaketime is not here: `make tools` gets it (on Debian 12)")
    folder = tmp_path_factory.mktemp("clocks")
    return {name: Clock(folder / name) for name in ("redis", "idempotency", "controller", "controller-2")}


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World], clocks: Clocks, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two controllers; each process but Postgres has a clock of its own."""
    program = tmp_path_factory.mktemp("valkey") / "valkey-server"
    env = " ".join(f"'{name}={value}'" for name, value in clocks["redis"].env.items())
    program.write_text(f'#!/bin/sh\nexec env {env} "{embedded_valkey()}" "$@"\n')
    program.chmod(0o755)
    world = start_world(controllers=2, controller_env=NEAR_OFF, redis_binary=program)
    for name, service in world.pair.services.items():
        service.env = {**(service.env or {}), **clocks[name].env}
        world.pair.restart(name)
    return world


@pytest_asyncio.fixture
async def traffic(world: World, clocks: Clocks, issuer: Issuer) -> AsyncIterator[Traffic]:
    """Traffic of one subject, whose token is good by every clock."""
    now = int(time.time())
    tenant = f"clocks-{secrets.token_hex(4)}"
    token = issuer.token(tenant=tenant, roles=(AGENT, PLANNER, WORKER), iat=now - 900, exp=now + 2700)
    agents = [Agent(target, token, tenant=tenant, subject="agent-1") for target in world.pair.controller_targets]
    made = Traffic(History(), agents)
    await made.prepare()
    yield made
    for clock in clocks.values():
        clock.set(0)
    for agent in agents:
        await agent.close()


async def test_clocks_that_are_minutes_apart(world: World, clocks: Clocks, traffic: Traffic) -> None:
    """The controllers' are ten minutes apart. Their service tokens are refused then: Postgres decides alone."""
    history = traffic.history
    clocks["controller"].set(OFFSETS[0])
    clocks["controller-2"].set(OFFSETS[1])
    for agent in traffic.agents:
        await traffic.burst(30, agent=agent)
    requests = [call for call in history.calls if not call.intent.key.startswith("keyless")]
    for call in requests[:60]:
        await history.insist(traffic.agents, call.request, call.intent.key)
    await history.settle()
    await history.again()
    history.enough(60, {"requests": len(requests)})
    history.check(world.tables)


@repeated(short=10, soak=300)
async def test_redis_clock_jumps(rounds: int, world: World, clocks: Clocks, traffic: Traffic) -> None:
    """Forth and back by minutes under writes: leases and records end early or late, and no write is doubled."""
    history = traffic.history
    stop = asyncio.Event()
    callers = asyncio.create_task(traffic.until(stop))
    for number in range(rounds):
        clocks["redis"].set(OFFSETS[number % len(OFFSETS)])
        enough = len(history.calls) + 20
        await eventually(lambda enough=enough: len(history.calls) > enough)  # type: ignore[misc]
        assert not callers.done(), callers.exception()
        show("jumps", number + 1, rounds)
    stop.set()
    await callers
    clocks["redis"].set(0)
    await history.settle()
    await history.again()
    print(dict(history.verdicts()))
    history.enough(10 * rounds, {})
    history.check(world.tables)
