"""kill -9 at random moments, under load whose callers ask again: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import Message

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, Agent, Answer, Tenant, spans, struct
from tests.oracle import eventually
from tests.system.conftest import World

FAULTS = ["controller", "backends", "idempotency", "backends", "controller", "valkey", "backends"]
"""What is killed, and how often compared to the others."""


@dataclass
class History:
    """What callers were told."""

    acknowledged: list[tuple[Message, str, Answer]] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)

    async def insist(self, agent: Agent, request: Message, key: str) -> Answer:
        """Asks until there is an answer that lasts, with deadlines of all lengths."""
        while True:
            answer = await agent.ask(request, key=key, timeout=random.choice((0.05, 0.5, 5)))
            self.codes[answer.code.name] += 1
            if answer.code.name in ("OK", "FAILED_PRECONDITION", "NOT_FOUND"):
                self.acknowledged.append((request, key, answer))
                return answer
            assert answer.code.name in ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED"), str(answer)
            await asyncio.sleep(random.uniform(0.01, 0.1))


async def planner(agent: Agent, history: History, number: int, stop: asyncio.Event) -> int:
    """One job after the other: a session, its tasks, its end. Answers how many it finished."""
    job = 0
    while not stop.is_set():
        name = f"{number}-{job}"
        created = await history.insist(
            agent, sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name})), f"{name}-c"
        )
        session_id = created.response.session.id
        await history.insist(agent, sessions_pb.ActivateSessionRequest(session_id=session_id), f"{name}-a")
        for n in range(2):
            route = tasks_pb.RouteTaskRequest(
                session_id=session_id, type="ROUTING", target_role="kills", lease_timeout=spans(2), max_attempts=100
            )
            await history.insist(agent, route, f"{name}-r{n}")
        paused = await history.insist(agent, sessions_pb.PauseSessionRequest(session_id=session_id), f"{name}-p")
        assert paused.response.session.etag == "3"
        early = await history.insist(agent, sessions_pb.CompleteSessionRequest(session_id=session_id), f"{name}-e")
        assert early.reason == "SESSION_STATE_INVALID"
        await history.insist(agent, sessions_pb.ResumeSessionRequest(session_id=session_id), f"{name}-s")
        job += 1
    return job


async def worker(agent: Agent, history: History, number: int, done: Counter[str], stop: asyncio.Event) -> None:
    """Claims and completes. A lease may be lost meanwhile; what is acknowledged as completed counts."""
    n = 0
    while not stop.is_set():
        n += 1
        claim = tasks_pb.ClaimTasksRequest(role="kills", max_tasks=3, wait=spans(0.2))
        answer = await history.insist(agent, claim, f"claim-{number}-{n}")
        if not answer.response.tasks:
            history.acknowledged.pop(_index(history, answer))  # an empty answer is not kept
        for claimed in answer.response.tasks:
            request = tasks_pb.CompleteTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id)
            completed = await history.insist(agent, request, f"complete-{claimed.lease_id}")
            if completed.ok:
                done[claimed.task.id] += 1
            else:
                assert completed.reason == "LEASE_LOST"


def _index(history: History, answer: Answer) -> int:
    return next(i for i in range(len(history.acknowledged) - 1, -1, -1) if history.acknowledged[i][2] is answer)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(9, id="short"),
        pytest.param(300, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
async def test_no_acknowledged_write_is_lost_or_doubled(seconds: int, world: World, tenant: Tenant) -> None:
    planning, working = tenant.agent("planner"), tenant.agent("worker", roles=("kills",))
    history, done, kills = History(), Counter[str](), Counter[str]()
    stop = asyncio.Event()
    load = asyncio.gather(
        *(planner(planning, history, number, stop) for number in range(8)),
        *(worker(working, history, number, done, stop) for number in range(4)),
    )
    rng = random.Random(13)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    faults: list[str] = []
    enough = 20 * seconds
    while loop.time() < end or (
        (len(history.acknowledged) <= enough or set(kills) != set(FAULTS)) and loop.time() < end + 120
    ):
        assert not load.done(), load.exception()
        await asyncio.sleep(rng.uniform(0.1, 0.8))
        faults = faults or rng.sample(FAULTS, len(FAULTS))
        fault = faults.pop()
        if fault == "backends":
            kills[fault] += world.tables.end_backends(only_active=rng.random() < 0.7)
        elif fault == "valkey":
            await asyncio.to_thread(world.valkey.child.kill)
            await asyncio.to_thread(world.valkey.start)
            kills[fault] += 1
        else:
            await asyncio.to_thread(world.pair.kill, fault)
            await asyncio.sleep(rng.uniform(0, 0.3))
            await asyncio.to_thread(world.pair.start, fault)
            kills[fault] += 1
    stop.set()
    await load
    print(f"{len(history.acknowledged)} acknowledged, codes {dict(history.codes)}, kills {dict(kills)}")
    assert set(kills) == set(FAULTS)
    assert len(history.acknowledged) > enough, "too little traffic for the run to count"

    by_worker = (tasks_pb.ClaimTasksRequest, tasks_pb.CompleteTaskRequest)
    sample = rng.sample(history.acknowledged, min(4000, len(history.acknowledged)))
    for start in range(0, len(sample), 50):
        part = sample[start : start + 50]
        again = await asyncio.gather(
            *(
                (working if isinstance(request, by_worker) else planning).insist(request, key=key, timeout=20)
                for request, key, _ in part
            )
        )
        for (request, key, told), answer in zip(part, again, strict=True):
            assert answer.said == told.said, f"{key} {request}: {told}, then {answer}"

    def rows(query: str) -> list[tuple[Any, ...]]:
        return world.tables.rows(query, tenant.name)

    names = {key.removesuffix("-c") for _, key, _ in history.acknowledged if key.endswith("-c")}
    counted = dict(rows("select metadata->>'name', count(*) from sessions where tenant = %s group by 1"))
    assert counted == dict.fromkeys(names, 1)
    routed = [
        answer.response.task.id
        for request, _, answer in history.acknowledged
        if isinstance(request, tasks_pb.RouteTaskRequest)
    ]
    assert sorted(id_ for (id_,) in rows("select id::text from tasks where tenant = %s")) == sorted(routed)
    assert set(done.values()) == {1}, "a task was completed by two"
    succeeded = {id_ for (id_,) in rows("select id::text from tasks where tenant = %s and state = 'SUCCEEDED'")}
    assert set(done) == succeeded
    world.tables.check()

    async def is_claimable() -> bool:
        left = "select count(*) from tasks where tenant = %s and state in ('PENDING', 'RUNNING')"
        for claimed in await working.claim("kills", max_tasks=100):
            await working.complete(claimed)
        return rows(left) == [(0,)]

    await eventually(is_claimable, seconds=60)
