"""Redis forgets everything ten times a second, under half of what the pair bears."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.local.processes import ROOT
from orchestrator.controller.v1 import session_service_pb2 as pb
from tests.client import Agent, Tenant
from tests.load.calls import config, protoset, request
from tests.load.tools import find_ghz
from tests.system.conftest import World, metric, repeated, show

CREATE = pb.CreateSessionRequest.FromString(request("create"))
PAUSE = 0.1
CALLERS = 64
BUSY = "rpc error: code = Unavailable desc = The database did not answer in time."
"""As ghz says it, of a call in flight for which a process that stood still for a second found no connection."""


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """Two controllers as they are run, near-cache included."""
    return start_world(controllers=2)


class Ghz:
    """Creates by ghz, the n-th of each run with the key `<name>-<n>`."""

    def __init__(self, program: str, folder: Path, token: str | None) -> None:
        self._program = program
        self._folder = folder
        self._token = token or ""
        self._protoset = folder / "protos.binpb"
        self._protoset.write_bytes(protoset())

    async def run(self, name: str, target: str, *limits: str) -> Counter[str]:
        """How many calls were OK, and how many were told each error."""
        made: dict[str, Any] = config("create", TOKEN=self._token)
        made["metadata"]["idempotency-key"] = f"{name}-{{{{.RequestNumber}}}}"
        files = [self._folder / f"{name}-{target.rpartition(':')[2]}.{kind}" for kind in ("json", "output")]
        files[0].write_text(json.dumps(made))
        process = await asyncio.create_subprocess_exec(
            self._program, "--config", str(files[0]), "--protoset", str(self._protoset), "-c", str(CALLERS), *limits,
            "-O", "json", "-o", str(files[1]), target,
            cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        report = json.loads(files[1].read_text())
        return Counter(OK=report["statusCodeDistribution"]["OK"]) + Counter(report["errorDistribution"])


async def asked_again(agents: Sequence[Agent], keys: Sequence[str]) -> set[str]:
    """The ids of the sessions that the keys made; both controllers tell the same."""
    ids = set()
    for key in keys:
        answers = [await agent.ask(CREATE, key=key) for agent in agents]
        assert {answer.trailers.get("idempotency-replayed") for answer in answers} == {"true"}
        assert len({answer.body for answer in answers}) == 1
        ids.add(answers[0].response.session.id)
    return ids


@repeated(short=20, soak=600)
async def test_redis_is_flushed_at_half_the_rate_of_load(
    rounds: int, world: World, tenant: Tenant, tmp_path: Path
) -> None:
    """What one controller bears of creates is measured first; half of it then goes to the two, each key to both."""
    program = find_ghz()
    if program is None:
        pytest.skip("needs ghz: make tools")
    targets = world.pair.controller_targets
    agents = [tenant.agent(target=target) for target in targets]
    ghz = Ghz(program, tmp_path, agents[0].token)
    began = time.monotonic()
    borne = await ghz.run("full", targets[0], "-z", "3s", "--duration-stop=wait")
    full = borne["OK"] / (time.monotonic() - began)
    assert set(borne) <= {"OK", BUSY} and borne[BUSY] <= CALLERS

    count = str(round(full / 4 * (PAUSE * rounds + 1)))
    runs = asyncio.gather(*(ghz.run("half", target, "--rps", str(round(full / 4)), "-n", count) for target in targets))
    began = time.monotonic()
    forgotten = 0
    with redis.Redis.from_url(world.valkey.url) as connection:
        for number in range(rounds):
            forgotten += int(connection.dbsize())
            connection.flushall()
            await asyncio.sleep(PAUSE)
            show("FLUSHALL", number + 1, rounds)
    codes = sum(await runs, Counter())
    rate = 2 * int(count) / (time.monotonic() - began)
    print(f"{full:.0f} creates/s borne; {rate:.0f}/s under FLUSHALL: {codes}; {forgotten} records forgotten")

    assert codes["OK"] + codes[BUSY] == codes.total() == 2 * int(count)
    assert codes[BUSY] <= max(2 * CALLERS, codes.total() // 100)
    assert forgotten > 0
    for start in range(0, int(count) if codes[BUSY] else 0, CALLERS):
        keys = [f"half-{number}" for number in range(start, min(start + CALLERS, int(count)))]
        await asyncio.gather(*(agents[0].insist(CREATE, key=key) for key in keys))
    made = borne["OK"] + int(count)
    assert (world.tables.sessions(tenant.name), world.tables.audits(tenant.name)) == (made, made)
    keys = [f"half-{number}" for number in range(0, int(count), max(1, int(count) // 100))]
    assert len(await asked_again(agents, keys)) == len(keys)
    assert metric(world, "controller", "orchestrator_near_replays_total") > 0
    assert world.tables.sessions(tenant.name) == made
    assert metric(world, "controller", "orchestrator_writes_total", outcome="unknown") == 0
