"""Calls that are cut: whatever becomes of their callers, each takes effect once or not at all."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import pytest

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, WORKER, Agent, Tenant, spans, struct
from tests.system.conftest import World

CREATE = "/orchestrator.controller.v1.SessionService/CreateSession"
CLAIM = "/orchestrator.controller.v1.TaskService/ClaimTasks"
LONGEST_CUT = 0.03
"""Seconds after which the latest cut comes."""


def create(number: int) -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"n": number}))


async def cancelled(agent: Agent, raw: bytes, metadata: list[tuple[str, str]], after: float) -> bytes | None:
    """A call that its caller cancels, unless it was quicker."""
    call = agent.call(CREATE, raw, metadata=metadata)
    asyncio.get_running_loop().call_later(after, call.cancel)
    try:
        body: bytes = await call
    except asyncio.CancelledError:
        return None
    return body


async def out_of_time(agent: Agent, raw: bytes, metadata: list[tuple[str, str]], after: float) -> bytes | None:
    """A call with a deadline that is too short, or just not."""
    try:
        body: bytes = await agent.call(CREATE, raw, metadata=metadata, timeout=max(after, 0.001))
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
        return None
    return body


def disconnected(target: str) -> Callable[..., Awaitable[bytes | None]]:
    """A call whose connection is closed under it."""

    async def cut(agent: Agent, raw: bytes, metadata: list[tuple[str, str]], after: float) -> bytes | None:
        own = Agent(target, agent.token)
        try:
            await own.channels[0].channel_ready()
            call = own.call(CREATE, raw, metadata=metadata)
            closing = asyncio.get_running_loop().create_task(_close_later(own, after))
            try:
                body: bytes = await call
            except (asyncio.CancelledError, grpc.aio.AioRpcError):
                return None
            finally:
                await closing
            return body
        finally:
            await own.close()

    return cut


async def _close_later(agent: Agent, after: float) -> None:
    await asyncio.sleep(after)
    await agent.close()


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(10_000, id="short"),
        pytest.param(100_000, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
async def test_a_third_of_all_creates_is_cut(calls: int, world: World, tenant: Tenant) -> None:
    """An answered call has one row and one audit event, a cut one one or none; a retry with its key converges."""
    agent = tenant.agent(connections=4)
    cuts = (cancelled, out_of_time, disconnected(world.pair.controller_target))
    loop = asyncio.get_running_loop()
    answered: dict[int, str] = {}
    cut: set[int] = set()
    rng = random.Random(11)
    numbers = iter(range(calls))
    usual = LONGEST_CUT  # what a call takes of late, in seconds, so that cuts come at every point of its way

    def is_keyed(number: int) -> bool:
        return number % 5 != 0

    async def caller() -> None:
        nonlocal usual
        for number in numbers:
            key = f"k{number}" if is_keyed(number) else ""
            if number % 3:
                started = loop.time()
                answer = await agent.ask(create(number), key=key)
                usual += (loop.time() - started - usual) / 50
                assert answer.ok, str(answer)
                body: bytes | None = answer.body
            else:
                metadata = [("idempotency-key", key)] if key else []
                raw = create(number).SerializeToString()
                (cut_by,) = rng.choices(cuts, weights=(9, 8, 3))
                body = await cut_by(agent, raw, metadata, rng.uniform(0, 1.2 * usual))
            if body is None:
                cut.add(number)
            else:
                answered[number] = sessions_pb.CreateSessionResponse.FromString(body).session.id

    await asyncio.gather(*(caller() for _ in range(64)))
    assert len(answered) + len(cut) == calls
    assert len(cut) > calls / 20, "too few were cut for the run to count"

    query = (
        "select (s.metadata->>'n')::int, min(s.id::text), count(*), count(a.*) from sessions s"
        " left join audit_events a on a.tenant = s.tenant and a.resource_id = s.id where s.tenant = %s group by 1"
    )
    rows = {number: (id_, n, audits) for number, id_, n, audits in world.tables.rows(query, tenant.name)}
    for number, id_ in answered.items():
        assert rows[number] == (id_, 1, 1)
    assert {(n, audits) for _, n, audits in rows.values()} == {(1, 1)}
    written = Counter(number in rows for number in cut)
    print(f"{len(answered)} answered, {len(cut)} cut, of which {written[True]} written")
    assert written[True] and written[False], "cuts came too early or too late to count"

    retries = iter(sorted(number for number in cut if is_keyed(number)))
    retried: dict[int, str] = {}

    async def retrier() -> None:
        for number in retries:
            # Nobody is at work on it any more: a retry that had to wait for the end of a lease would wait 32 s.
            answer = await agent.insist(create(number), key=f"k{number}", seconds=28)
            retried[number] = answer.response.session.id

    await asyncio.gather(*(retrier() for _ in range(32)))
    before, rows = rows, {n: (id_, count, audits) for n, id_, count, audits in world.tables.rows(query, tenant.name)}
    assert {(n, audits) for _, n, audits in rows.values()} == {(1, 1)}
    for number, id_ in retried.items():
        assert rows[number][0] == id_ == before.get(number, rows[number])[0]
    world.tables.check()
    assert world.pair.services["controller"].running


async def test_changes_that_are_cut_happen_whole_or_not_at_all(world: World, tenant: Tenant) -> None:
    """Moves by many callers, many of them cut: versions and audit events stay in step, and retries converge."""
    agent = tenant.agent(connections=2)
    rng = random.Random(5)
    sessions = [await agent.create() for _ in range(8)]

    async def one(number: int) -> None:
        session_id = sessions[number % len(sessions)].id
        verb = rng.choice(("Activate", "Pause", "Resume"))
        timeout = rng.choice((30, 30, rng.uniform(0.001, LONGEST_CUT)))
        request = getattr(sessions_pb, f"{verb}SessionRequest")(session_id=session_id)
        first = await agent.ask(request, key=f"k{number}", timeout=timeout)
        again = await agent.insist(request, key=f"k{number}", timeout=20)
        if first.code.name in ("OK", "FAILED_PRECONDITION"):
            assert again.said == first.said

    for start in range(0, 800, 80):
        await asyncio.gather(*(one(number) for number in range(start, start + 80)))
    world.tables.check()


async def test_claims_that_are_cut_lose_no_task(world: World, tenant: Tenant) -> None:
    """Without a key the tasks come back, at once or when their lease ends; with one, the retry gets them."""
    agent = tenant.agent(connections=2)
    session = await agent.create()
    tasks = [await agent.route(session.id, lease_timeout=spans(2), max_attempts=100) for _ in range(60)]
    rng = random.Random(9)
    done: list[str] = []

    async def worker(number: int) -> None:
        n = 0
        while len(done) < len(tasks):
            n += 1
            key = f"{number}-{n}" if number % 2 else ""
            request = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2, wait=spans(0.2))
            cut = await agent.ask(request, key=key, timeout=rng.uniform(0.001, LONGEST_CUT))
            if key:
                cut = await agent.insist(request, key=key, timeout=20)
            for claimed in cut.response.tasks if cut.ok else ():
                answer = await agent.complete(claimed)
                if answer.ok:
                    done.append(claimed.task.id)
                else:
                    assert answer.refusal == ("FAILED_PRECONDITION", "LEASE_LOST")

    async with asyncio.timeout(240):
        await asyncio.gather(*(worker(number) for number in range(8)))
    assert sorted(done) == sorted(task.id for task in tasks)
    world.tables.check()


async def test_a_waiting_call_that_is_cut_leaves_its_key(world: World, tenant: Tenant) -> None:
    """Its row is held by a stranger, or it stands behind such a call: no retry waits for the end of its lease."""
    agent = tenant.agent()
    session = await agent.create()
    requests = {
        "started": sessions_pb.ActivateSessionRequest(session_id=session.id),
        "in-line": sessions_pb.ActivateSessionRequest(session_id=session.id, etag="2"),
    }
    with world.tables.locked(session.id):
        calls = [asyncio.create_task(agent.ask(request, key=key)) for key, request in requests.items()]
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
    for key, request in requests.items():
        answer = await agent.insist(request, key=key, seconds=28)
        assert answer.response.session.etag == "2"
    assert world.tables.audits(tenant.name, session.id) == 2
