"""TaskService on the running pair: from routing to the end of a task, and all that can come between."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import AGENT, PLANNER, WORKER, Agent, Answer, Tenant, spans, struct
from tests.oracle import Tables, eventually


def state(task: tasks_pb.Task) -> str:
    return tasks_pb.Task.State.Name(task.state).removeprefix("STATE_")


def is_lost(answer: Answer) -> bool:
    return answer.refusal == ("FAILED_PRECONDITION", "LEASE_LOST")


async def test_the_first_job(tenant: Tenant, tables: Tables) -> None:
    """One agent routes a task to a role, another completes it, the first sees the result; retries are replayed."""
    planner = tenant.agent("ada", roles=(PLANNER,), permissions=(AGENT,))
    worker = tenant.agent("bob", roles=(WORKER,), permissions=(AGENT,))
    session = await planner.create()
    request = tasks_pb.RouteTaskRequest(
        session_id=session.id,
        type="NOTIFICATION",
        target_role=WORKER,
        description="say hello",
        data=struct({"to": "eve"}),
        context=struct({"why": ["because"]}),
    )
    routed = await planner.ask(request, key="route-1")
    task = routed.response.task
    assert (state(task), task.from_role, task.attempt, task.lease_holder) == ("PENDING", PLANNER, 0, "")
    assert (task.max_attempts, task.retry_backoff, task.lease_timeout) == (3, spans(1), spans(30))
    assert not task.HasField("attempt_timeout")
    assert task.schedule_time == task.create_time
    (claimed,) = await worker.claim(wait=5)
    assert (claimed.task.id, state(claimed.task), claimed.task.attempt) == (task.id, "RUNNING", 1)
    assert (claimed.task.data, claimed.task.context, claimed.task.lease_holder) == (task.data, task.context, "bob")
    assert claimed.lease_id.encode() not in (await planner.ask(tasks_pb.GetTaskRequest(task_id=task.id))).body
    beat = await worker.heartbeat(claimed, progress=struct({"percent": 50}))
    assert not beat.response.cancelled
    assert (await planner.task(task.id)).progress == struct({"percent": 50})
    completed = await worker.complete(claimed, key="complete-1", said="hello")
    assert state(completed.response.task) == "SUCCEEDED"
    seen = await planner.task(task.id)
    assert (seen.result, state(seen)) == (struct({"said": "hello"}), "SUCCEEDED")
    assert seen == completed.response.task
    again = await worker.complete(claimed, key="complete-1", said="hello")
    assert again.said == completed.said and again.replayed
    retried = await planner.ask(request, key="route-1")
    assert retried.said == routed.said and retried.replayed
    assert tables.audits(tenant.name, task.id) == 3
    assert (await planner.session(session.id)) == session, "routing changes no session"


async def test_tasks_are_handed_out_by_priority_then_age(agent: Agent) -> None:
    session = await agent.create()
    low = await agent.route(session.id, priority=-5)
    first = await agent.route(session.id)
    second = await agent.route(session.id)
    urgent = await agent.route(session.id, priority=100)
    await agent.route(session.id, target_role="others", priority=100)
    early = await agent.route(session.id, priority=1)
    (claimed,) = await agent.claim()
    assert claimed.task.id == urgent.id
    rest = await agent.claim(max_tasks=100)
    assert [one.task.id for one in rest] == [early.id, first.id, second.id, low.id]
    assert len({one.lease_id for one in (claimed, *rest)}) == 5
    assert await agent.claim(max_tasks=100) == []


async def test_tasks_wait_for_their_time(agent: Agent) -> None:
    session = await agent.create()
    soon, later = Timestamp(), Timestamp()
    soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=4))
    later.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    await agent.route(session.id, schedule_time=later, priority=100)
    task = await agent.route(session.id, schedule_time=soon)
    assert await agent.claim(max_tasks=2) == []
    (claimed,) = await agent.claim(max_tasks=2, wait=20)
    assert claimed.task.id == task.id
    assert claimed.task.start_time.ToDatetime() >= soon.ToDatetime()


async def test_a_waiting_claim_gets_what_is_routed_then(tenant: Tenant) -> None:
    """Ten wait, three tasks come: three get one each, and the others go on waiting until their time is over."""
    agent = tenant.agent()
    session = await agent.create()
    polls = [asyncio.create_task(agent.claim(wait=5)) for _ in range(10)]
    await asyncio.sleep(0.3)
    tasks = [await agent.route(session.id) for _ in range(3)]
    answers = await asyncio.gather(*polls)
    given = [claimed.task.id for answer in answers for claimed in answer]
    assert sorted(given) == sorted(task.id for task in tasks)
    assert sorted(map(len, answers)) == [0] * 7 + [1] * 3


async def test_concurrent_claims_share_no_task(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    tasks = await asyncio.gather(*(agent.route(session.id) for _ in range(60)))
    answers = await asyncio.gather(
        *(agent.claim(max_tasks=4, wait=1, key=secrets.token_hex(8) if n % 2 else "") for n in range(20))
    )
    given = [claimed.task.id for answer in answers for claimed in answer]
    left = await agent.claim(max_tasks=100)
    assert sorted(given + [claimed.task.id for claimed in left]) == sorted(task.id for task in tasks)
    assert tables.one("select count(*) from tasks where tenant = %s and attempt <> 1", tenant.name) == 0


async def test_a_claim_with_a_key_is_replayed(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    request = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2)
    empty = await agent.ask(request, key="claim-1")
    assert not empty.response.tasks
    session = await agent.create()
    for _ in range(4):
        await agent.route(session.id)
    first = await agent.ask(request, key="claim-1")
    assert len(first.response.tasks) == 2 and not first.replayed, "an empty answer is not kept"
    with tables.unchanged(tenant.name):
        waits = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2, wait=spans(5))
        for again in (await agent.ask(request, key="claim-1"), await agent.ask(waits, key="claim-1")):
            assert again.said == first.said and again.replayed, "the wait is no part of what is asked"
        other = await agent.ask(tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=3), key="claim-1")
        assert other.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
    assert len(await agent.claim(max_tasks=10, key="claim-2")) == 2
    racing = await asyncio.gather(*(agent.ask(request, key="claim-1") for _ in range(20)))
    assert {answer.said for answer in racing} == {first.said}


async def test_one_key_claimed_many_times_at_once(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    for _ in range(10):
        await agent.route(session.id)
    request = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=3, wait=spans(2))
    answers = await asyncio.gather(*(agent.ask(request, key="claim") for _ in range(40)))
    assert len({answer.said for answer in answers}) == 1
    assert len(answers[0].response.tasks) == 3
    assert tables.one("select count(*) from tasks where tenant = %s and state = 'RUNNING'", tenant.name) == 3


async def test_replay_needs_the_role_still(tenant: Tenant) -> None:
    holder = tenant.agent("ada", permissions=(AGENT,))
    await holder.route((await holder.create(key="create")).id)
    request = tasks_pb.ClaimTasksRequest(role=WORKER)
    assert len((await holder.ask(request, key="claim")).response.tasks) == 1
    demoted = tenant.agent("ada", roles=(PLANNER,), permissions=(AGENT,))
    assert (await demoted.ask(request, key="claim")).refusal == ("PERMISSION_DENIED", "ROLE_NOT_HELD")


async def test_answers_are_cut_at_a_mebibyte(agent: Agent) -> None:
    session = await agent.create()
    data = struct({"x": "y" * 15000})
    routed = [await agent.route(session.id, data=data, key=secrets.token_hex(8)) for _ in range(90)]
    request = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=100)
    answer = await agent.ask(request, key="all")
    assert 1 < len(answer.response.tasks) < 90
    assert 512 * 1024 < len(answer.body) <= 1024 * 1024
    assert (await agent.ask(request, key="all")).said == answer.said
    rest = await agent.claim(max_tasks=100)
    assert [one.task.id for one in (*answer.response.tasks, *rest)] == [task.id for task in routed]


async def test_heartbeats_extend_a_lease_and_nothing_else(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    await agent.route(session.id, lease_timeout=spans(20))
    (claimed,) = await agent.claim()
    before = await agent.task(claimed.task.id)
    first = (await agent.heartbeat(claimed)).response
    second = (await agent.heartbeat(claimed, progress=struct({"n": 1}))).response
    assert second.lease_expire_time.ToDatetime() > first.lease_expire_time.ToDatetime()
    assert first.lease_expire_time.ToDatetime() > before.lease_expire_time.ToDatetime()
    after = await agent.task(claimed.task.id)
    assert after.lease_expire_time == second.lease_expire_time
    assert after.progress == struct({"n": 1})
    assert (after.etag, after.update_time) == (before.etag, before.update_time)
    assert (await agent.heartbeat(claimed)).ok
    assert (await agent.task(claimed.task.id)).progress == struct({"n": 1}), "no progress told leaves what was told"
    assert tables.audits(tenant.name, claimed.task.id) == 2
    other = tenant.agent("agent-2")
    for answer in (await other.heartbeat(claimed), await other.complete(claimed), await other.release(claimed)):
        assert answer.refusal == ("PERMISSION_DENIED", "LEASE_NOT_HELD")
    beats = await asyncio.gather(
        *(agent.heartbeat(claimed) for _ in range(20)), agent.complete(claimed, key="complete")
    )
    assert beats[-1].ok
    assert all(beat.ok or is_lost(beat) for beat in beats)


async def test_no_heartbeat_keeps_a_lease_beyond_the_attempts_time(agent: Agent) -> None:
    session = await agent.create()
    task = await agent.route(session.id, lease_timeout=spans(60), attempt_timeout=spans(4), max_attempts=1)
    (claimed,) = await agent.claim()
    limit = claimed.task.start_time.ToDatetime() + timedelta(seconds=4)
    assert claimed.task.lease_expire_time.ToDatetime() == limit
    assert (await agent.heartbeat(claimed)).response.lease_expire_time.ToDatetime() == limit

    async def dead() -> bool:
        return state(await agent.task(task.id)) == "DEAD"

    await eventually(dead)
    assert (await agent.task(task.id)).error.code == "LEASE_LOST"
    assert is_lost(await agent.heartbeat(claimed))


async def test_failed_attempts_are_tried_again_later_until_dead(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    task = await agent.route(session.id, max_attempts=3, retry_backoff=spans(0.4))
    for attempt in (1, 2, 3):
        (claimed,) = await agent.claim(wait=20)
        assert (claimed.task.id, claimed.task.attempt) == (task.id, attempt)
        failed = (await agent.fail(claimed, f"BROKEN_{attempt}")).response.task
        assert (failed.error.code, failed.error.message) == (f"BROKEN_{attempt}", "it broke")
        assert is_lost(await agent.complete(claimed))
        if attempt < 3:
            assert state(failed) == "PENDING"
            pause = failed.schedule_time.ToDatetime() - failed.update_time.ToDatetime()
            assert pause == timedelta(seconds=0.4 * 2 ** (attempt - 1))
            assert claimed.task.start_time.ToDatetime() >= claimed.task.schedule_time.ToDatetime()
        else:
            assert state(failed) == "DEAD" and failed.HasField("end_time")
    assert await agent.claim() == []
    assert tables.audits(tenant.name, task.id) == 7


async def test_an_error_that_is_not_to_be_retried_kills_at_once(agent: Agent) -> None:
    session = await agent.create()
    await agent.route(session.id, max_attempts=3)
    (claimed,) = await agent.claim()
    failed = (await agent.fail(claimed, key="fail", non_retryable=True)).response.task
    assert (state(failed), failed.attempt, failed.error.non_retryable) == ("DEAD", 1, True)
    assert (await agent.fail(claimed, key="fail", non_retryable=True)).response.task == failed
    assert is_lost(await agent.fail(claimed))


async def test_a_released_task_is_handed_out_again_uncounted(agent: Agent) -> None:
    session = await agent.create()
    await agent.route(session.id, max_attempts=1)
    for _ in range(3):
        (claimed,) = await agent.claim()
        assert claimed.task.attempt == 1
        released = (await agent.release(claimed)).response.task
        assert (state(released), released.attempt) == ("PENDING", 0)
        assert is_lost(await agent.heartbeat(claimed))
    (claimed,) = await agent.claim()
    assert (await agent.complete(claimed)).ok


@pytest.mark.parametrize("running", [False, True], ids=["pending", "running"])
async def test_cancelled_tasks(running: bool, agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    task = await agent.route(session.id)
    claimed = (await agent.claim())[0] if running else None
    cancelled = (await agent.cancel(task.id, reason="changed our mind", key="cancel")).response.task
    assert (state(cancelled), cancelled.error.code) == ("CANCELLED", "CANCELLED")
    assert cancelled.error.message == "changed our mind"
    assert cancelled.HasField("end_time") and not cancelled.HasField("lease_expire_time")
    with tables.unchanged(tenant.name):
        assert (await agent.cancel(task.id)).response.task == cancelled
        assert (await agent.cancel(task.id, reason="changed our mind", key="cancel")).replayed
        if claimed is not None:
            beat = (await agent.heartbeat(claimed)).response
            assert beat.cancelled and not beat.HasField("lease_expire_time")
            for answer in (await agent.complete(claimed), await agent.fail(claimed), await agent.release(claimed)):
                assert answer.refusal == ("FAILED_PRECONDITION", "TASK_CANCELLED")
        assert await agent.claim() == []


async def test_cancel_and_complete_at_once_one_wins(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    for _ in range(5):
        task = await agent.route(session.id)
        (claimed,) = await agent.claim()
        answers = await asyncio.gather(
            *(agent.cancel(task.id) if n % 2 else agent.complete(claimed, key=f"{task.id}-{n}") for n in range(20))
        )
        completed, cancelled = answers[::2], answers[1::2]
        if state(await agent.task(task.id)) == "SUCCEEDED":
            assert sum(answer.ok for answer in completed) == 1
            assert {answer.refusal for answer in cancelled} == {("FAILED_PRECONDITION", "TASK_STATE_INVALID")}
        else:
            assert all(answer.ok for answer in cancelled)
            assert {answer.refusal for answer in completed} == {("FAILED_PRECONDITION", "TASK_CANCELLED")}
        assert tables.audits(tenant.name, task.id) == 3


async def test_tasks_of_a_paused_session_are_not_handed_out(agent: Agent) -> None:
    session = await agent.create()
    await agent.change("Activate", session.id)
    running = await agent.route(session.id, priority=1)
    task = await agent.route(session.id)
    (claimed,) = await agent.claim()
    assert claimed.task.id == running.id
    await agent.change("Pause", session.id)
    assert await agent.claim(wait=1.5) == []
    request = tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role=WORKER)
    assert (await agent.ask(request, key="k")).refusal == ("FAILED_PRECONDITION", "SESSION_NOT_OPEN")
    assert (await agent.heartbeat(claimed)).ok and (await agent.complete(claimed)).ok, "what runs goes on"
    poll = asyncio.create_task(agent.claim(wait=20))
    await agent.change("Resume", session.id)
    (resumed,) = await poll
    assert resumed.task.id == task.id


@pytest.mark.parametrize("verb", ["Complete", "Fail"])
async def test_unfinished_tasks_of_an_ended_session_are_cancelled(verb: str, agent: Agent) -> None:
    session = await agent.create()
    await agent.change("Activate", session.id)
    done = await agent.route(session.id, priority=2)
    (finished,) = await agent.claim()
    await agent.complete(finished)
    running = await agent.route(session.id, priority=1)
    (claimed,) = await agent.claim()
    pending = [await agent.route(session.id) for _ in range(5)]
    await agent.change(verb, session.id)
    assert await agent.claim() == []

    async def cancelled() -> bool:
        return all([state(await agent.task(task.id)) == "CANCELLED" for task in (running, *pending)])

    await eventually(cancelled)
    beat = (await agent.heartbeat(claimed)).response
    assert beat.cancelled
    assert (await agent.complete(claimed)).refusal == ("FAILED_PRECONDITION", "TASK_CANCELLED")
    assert state(await agent.task(done.id)) == "SUCCEEDED"
    trail = await agent.events(pending[0].id)
    assert [(e.subject, e.method) for e in trail[1:]] == [
        ("system", "/orchestrator.controller.v1.Sweeper/CancelOrphan")
    ]


async def test_tasks_routed_while_their_session_ends_are_cancelled_too(
    agent: Agent, tenant: Tenant, tables: Tables
) -> None:
    session = await agent.create()
    await agent.change("Activate", session.id)

    async def route() -> bool:
        request = tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role=WORKER)
        answer = await agent.ask(request, key=secrets.token_hex(8))
        assert answer.ok or answer.refusal == ("FAILED_PRECONDITION", "SESSION_NOT_OPEN")
        return answer.ok

    routes = [asyncio.create_task(route()) for _ in range(20)]
    ending = asyncio.create_task(agent.change("Complete", session.id))
    routes += [asyncio.create_task(route()) for _ in range(20)]
    routed = sum(await asyncio.gather(*routes))
    assert (await ending).ok
    query = "select count(*) from tasks where tenant = %s and state = 'CANCELLED'"
    await eventually(lambda: tables.one(query, tenant.name) == routed)
    assert tables.one("select count(*) from tasks where tenant = %s", tenant.name) == routed


async def test_lists_by_every_filter(agent: Agent) -> None:
    sessions = [await agent.create(), await agent.create()]
    tasks = [
        await agent.route(
            sessions[n % 2].id, target_role=("reader", "writer", WORKER)[n % 3], type=("ROUTING", "B")[n // 6]
        )
        for n in range(12)
    ]
    (claimed,) = await agent.claim()
    ids = [task.id for task in tasks]

    async def listed(**filters: object) -> list[int]:
        found: list[int] = []
        token = ""
        while True:
            request = tasks_pb.ListTasksRequest(page_size=2, page_token=token, include_total_size=True, **filters)  # type: ignore[arg-type]
            page = (await agent.ask(request)).response
            found += [ids.index(task.id) for task in page.tasks]
            token = page.next_page_token
            if not token:
                assert page.total_size == len(found)
                return found

    assert await listed() == list(range(11, -1, -1))
    assert await listed(session_id=sessions[1].id) == [11, 9, 7, 5, 3, 1]
    assert await listed(target_role="writer") == [10, 7, 4, 1]
    assert await listed(type="B", session_id=sessions[0].id) == [10, 8, 6]
    assert await listed(state=tasks_pb.Task.STATE_RUNNING) == [ids.index(claimed.task.id)] == [2]
    assert await listed(state=tasks_pb.Task.STATE_PENDING, target_role=WORKER) == [11, 8, 5]
    assert await listed(target_role="nobody") == []
