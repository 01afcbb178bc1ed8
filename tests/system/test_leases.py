"""Workers that die, and workers that wait: leases end by themselves, and polls cost nobody else anything."""

from __future__ import annotations

import asyncio
import signal
import sys

from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import WORKER, Tenant, spans
from tests.system.conftest import World


def state(task: tasks_pb.Task) -> str:
    return tasks_pb.Task.State.Name(task.state).removeprefix("STATE_")


async def test_the_task_of_a_killed_worker_is_claimed_by_another(world: World, tenant: Tenant) -> None:
    """While it beats, its lease holds; killed, another gets the task, and what comes late is refused."""
    agent, doomed = tenant.agent("alive"), tenant.agent("doomed")
    session = await agent.create()
    task = await agent.route(session.id, lease_timeout=spans(6))
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.system.worker", world.pair.controller_target, doomed.token or "", WORKER,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert worker.stdout is not None
        async with asyncio.timeout(60):
            task_id, lease_id = (await worker.stdout.readline()).decode().split()
        assert task_id == task.id
        assert await agent.claim(wait=9) == [], "a lease that is extended does not end"
        held = await agent.task(task.id)
        assert (state(held), held.attempt, held.lease_holder) == ("RUNNING", 1, "doomed")
    finally:
        worker.kill()
        await worker.wait()
    last = (await agent.task(task.id)).lease_expire_time
    (claimed,) = await agent.claim(wait=20)
    assert (claimed.task.id, claimed.task.attempt, claimed.task.lease_holder) == (task.id, 2, "alive")
    assert claimed.task.error.code == "LEASE_LOST"
    assert claimed.task.start_time.ToDatetime() >= last.ToDatetime(), "both by Postgres' clock"

    late = tasks_pb.ClaimedTask(task=task, lease_id=lease_id)
    for answer in (
        await doomed.complete(late, key="late", said="done"),
        await doomed.fail(late),
        await doomed.release(late),
        await doomed.heartbeat(late),
    ):
        assert answer.refusal == ("FAILED_PRECONDITION", "LEASE_LOST")
        assert answer.metadata == {"task_id": task.id, "state": "RUNNING"}
    assert (await agent.complete(claimed, said="done")).ok
    trail = await agent.events(task.id)
    assert [(e.state_before, e.state_after, e.subject) for e in trail] == [
        ("", "PENDING", "alive"),
        ("PENDING", "RUNNING", "doomed"),
        ("RUNNING", "PENDING", "system"),
        ("PENDING", "RUNNING", "alive"),
        ("RUNNING", "SUCCEEDED", "alive"),
    ]


async def test_lost_leases_use_up_the_attempts(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    session = await agent.create()
    tasks = [await agent.route(session.id, lease_timeout=spans(6), max_attempts=2) for _ in range(30)]
    for attempt in (1, 2):
        given: list[str] = []
        while len(given) < len(tasks):
            claims = await agent.claim(max_tasks=7, wait=20)
            assert claims
            assert {claimed.task.attempt for claimed in claims} == {attempt}
            given += [claimed.task.id for claimed in claims]
        assert sorted(given) == sorted(task.id for task in tasks)
    async with asyncio.timeout(120):
        while {state(await agent.task(task.id)) for task in tasks} != {"DEAD"}:
            await asyncio.sleep(0.1)
    assert {(await agent.task(task.id)).error.code for task in tasks} == {"LEASE_LOST"}
    assert world.tables.audits(tenant.name) == 1 + 5 * len(tasks)
    world.tables.check()


async def test_a_thousand_waiting_claims_hinder_nobody(world: World, tenant: Tenant) -> None:
    """CreateSession is never refused; a task routed then reaches one of them; SIGTERM answers the others empty."""
    agent = tenant.agent(connections=2)
    waiting = tenant.agent("waiting", connections=10)
    session = await agent.create()
    polls: list[asyncio.Task[list[tasks_pb.ClaimedTask]]] = []
    refused: list[str] = []
    stop = asyncio.Event()

    async def creator() -> int:
        count = 0
        while not stop.is_set():
            try:
                await agent.create()
            except AssertionError as error:
                refused.append(str(error))
            count += 1
            await asyncio.sleep(0.01)
        return count

    creators = [asyncio.create_task(creator()) for _ in range(3)]
    for _ in range(20):
        polls += [asyncio.create_task(waiting.claim(wait=30)) for _ in range(50)]
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    assert not any(poll.done() for poll in polls)
    task = await agent.route(session.id, lease_timeout=spans(60))
    done, _ = await asyncio.wait(polls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert [claimed.task.id for poll in done for claimed in poll.result()] == [task.id]
    stop.set()
    created = sum(await asyncio.gather(*creators))
    assert refused == []
    assert world.tables.sessions(tenant.name) == created + 1

    controller = world.pair.services["controller"]
    controller.send(signal.SIGTERM)
    answers = await asyncio.gather(*polls)
    assert sum(map(len, answers)) == 1, "no poll is cut off, and none gets what is not there"
    async with asyncio.timeout(60):
        while controller.running:
            await asyncio.sleep(0.02)
    assert controller.exit_code == 0
    await asyncio.to_thread(world.pair.start, "controller")
    world.tables.check()
