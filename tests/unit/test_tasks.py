"""The rules of tasks: routing, leases that fence, retries, cancelling, and what the server does by itself."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from controller_svc.core.audit import AuditEvent
from controller_svc.core.ids import new_id
from controller_svc.core.mutations import Actor, Decision, Key, system_actor
from controller_svc.core.sessions import Session, SessionState
from controller_svc.core.tasks import (
    MAX_BACKOFF,
    UNFINISHED,
    CancelOrphan,
    CancelTask,
    CompleteTask,
    FailTask,
    LoseLease,
    ReleaseTask,
    RouteTask,
    Task,
    TaskError,
    TaskMutations,
    TaskState,
    backoff,
    lease_refusal,
)
from svckit.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied

if TYPE_CHECKING:
    from controller_svc.core.mutations import Mutation, Rows

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEFORE = NOW - timedelta(minutes=5)
LATER = NOW + timedelta(seconds=20)
TICK = timedelta(microseconds=1)
MUTATIONS = TaskMutations()
LEASE = new_id()

SENDER = Actor(issuer="https://issuer", tenant="acme", subject="sender", roles=frozenset({"planner"}), operate=False)
WORKER = replace(SENDER, subject="worker", roles=frozenset({"coder"}))
OPERATOR = replace(SENDER, subject="ops", roles=frozenset(), operate=True)
SERVER = system_actor("acme")

STATES = list(TaskState)
ENDS = [state for state in STATES if state not in UNFINISHED]
LEASE_VERBS = ["complete", "fail", "release"]


def a_session(state: str = "ACTIVE", **changes: Any) -> Session:
    return replace(
        Session(
            tenant="acme",
            id=new_id(),
            version=2,
            agent_role="planner",
            state=SessionState(state),
            task_id=None,
            metadata={},
            create_time=BEFORE,
            update_time=BEFORE,
            expire_time=NOW + timedelta(days=7),
            start_time=BEFORE,
            pause_time=None,
            end_time=None,
        ),
        **changes,
    )


def a_task(state: str = "RUNNING", **changes: Any) -> Task:
    """A task as it comes to stand in this state; what was claimed once was claimed by WORKER under LEASE."""
    claimed = state not in ("PENDING", "BLOCKED")
    return replace(
        Task(
            tenant="acme",
            id=new_id(),
            version=3,
            beat=5,
            session_id=new_id(),
            type="ROUTING",
            from_role="planner",
            target_role="coder",
            description="do it",
            data={"a": 1},
            context={},
            trace_id="0" * 32,
            priority=0,
            schedule_time=BEFORE,
            attempt=1 if claimed else 0,
            max_attempts=3,
            retry_backoff=timedelta(seconds=1),
            lease_timeout=timedelta(seconds=30),
            attempt_timeout=None,
            state=TaskState(state),
            result={} if state == "SUCCEEDED" else None,
            error=TaskError(code="BAD", message="") if state in ("DEAD", "CANCELLED") else None,
            progress={"done": 1},
            lease_id=LEASE if claimed else None,
            lease_holder="worker" if claimed else "",
            lease_expire_time=LATER if state == "RUNNING" else None,
            create_time=BEFORE,
            update_time=BEFORE,
            start_time=BEFORE if claimed else None,
            end_time=None if state in UNFINISHED else BEFORE,
        ),
        **changes,
    )


def decide(mutation: Mutation[Any], command: Any, *rows: Task | Session, now: datetime = NOW) -> Decision:
    """Asks for keys as the door does, until nothing new is asked, then decides on what was asked for only."""
    stored: Rows = {Key(row.table, row.tenant, row.id): row for row in rows}
    asked: dict[Any, Any] = {}
    while True:
        keys = mutation.reads(command, asked)
        missing = [key for key in (*keys.change, *keys.look) if key not in asked]
        if not missing:
            break
        asked.update({key: stored.get(key) for key in missing})
    decision = mutation.decide(command, asked, now)
    assert len(decision.events) == len(decision.rows)
    assert {Key(row.table, row.tenant, row.id) for row in decision.rows if row.version > 1} <= set(keys.change)
    return decision


def under_lease(verb: str, task: Task, **more: Any) -> Decision:
    actor = more.pop("actor", WORKER)
    lease_id = more.pop("lease_id", LEASE)
    now = more.pop("now", NOW)
    if verb == "complete":
        command: Any = CompleteTask(actor=actor, id=task.id, lease_id=lease_id, result=more.pop("result", {"ok": True}))
    elif verb == "fail":
        error = more.pop("error", TaskError(code="TIMEOUT", message="too slow"))
        command = FailTask(actor=actor, id=task.id, lease_id=lease_id, error=error)
    else:
        command = ReleaseTask(actor=actor, id=task.id, lease_id=lease_id)
    assert not more
    return decide(getattr(MUTATIONS, verb), command, task, now=now)


def cancel(task: Task, *, actor: Actor = SENDER, etag: str = "", reason: str = "changed my mind") -> Decision:
    return decide(MUTATIONS.cancel, CancelTask(actor=actor, id=task.id, reason=reason, etag=etag), task)


def after(decision: Decision, before: Task) -> Task:
    """The changed task, with what holds for every change of a task checked."""
    (task,) = decision.rows
    assert decision.answer is task
    assert isinstance(task, Task)
    assert task.version == before.version + 1
    assert task.beat == before.beat
    assert (task.lease_id, task.lease_holder) == (before.lease_id, before.lease_holder)
    assert (task.lease_expire_time is None) == (task.state is not TaskState.RUNNING)
    assert (task.end_time is None) == (task.state in UNFINISHED)
    assert (task.result is None) == (task.state is not TaskState.SUCCEEDED)
    assert 0 <= task.attempt <= task.max_attempts
    assert task.state is not TaskState.PENDING or task.attempt < task.max_attempts
    assert task.update_time >= before.update_time
    (event,) = decision.events
    assert event == AuditEvent(
        resource_type="task",
        resource_id=task.id,
        version_before=before.version,
        version_after=task.version,
        state_before=before.state,
        state_after=task.state,
        role=event.role,
    )
    return task


def changes(before: Task, now: Task) -> set[str]:
    names = {field.name for field in fields(Task) if getattr(before, field.name) != getattr(now, field.name)}
    return names - {"version", "update_time"}


# -- route --


def route(session: Session | None, **more: Any) -> Decision:
    now = more.pop("now", NOW)
    defaults: dict[str, Any] = {
        "actor": SENDER,
        "id": new_id(),
        "session_id": session.id if session else new_id(),
        "type": "ROUTING",
        "target_role": "coder",
        "description": "do it",
        "data": {"a": 1},
        "context": {"b": 2},
        "trace_id": "ab" * 16,
        "priority": 7,
        "schedule_time": None,
        "max_attempts": 4,
        "retry_backoff": timedelta(seconds=2),
        "lease_timeout": timedelta(seconds=9),
        "attempt_timeout": timedelta(minutes=1),
    }
    rows = (session,) if session else ()
    return decide(MUTATIONS.route, RouteTask(**{**defaults, **more}), *rows, now=now)


def test_a_new_task_is_pending_and_carries_its_sessions_role() -> None:
    session = a_session()
    task_id = new_id()
    decision = route(session, id=task_id)
    (task,) = decision.rows
    assert decision.answer is task
    assert task == Task(
        tenant="acme",
        id=task_id,
        version=1,
        beat=0,
        session_id=session.id,
        type="ROUTING",
        from_role="planner",
        target_role="coder",
        description="do it",
        data={"a": 1},
        context={"b": 2},
        trace_id="ab" * 16,
        priority=7,
        schedule_time=NOW,
        attempt=0,
        max_attempts=4,
        retry_backoff=timedelta(seconds=2),
        lease_timeout=timedelta(seconds=9),
        attempt_timeout=timedelta(minutes=1),
        state=TaskState.PENDING,
        result=None,
        error=None,
        progress=None,
        lease_id=None,
        lease_holder="",
        lease_expire_time=None,
        create_time=NOW,
        update_time=NOW,
        start_time=None,
        end_time=None,
    )
    assert decision.events == (
        AuditEvent(
            resource_type="task",
            resource_id=task_id,
            version_before=0,
            version_after=1,
            state_before="",
            state_after="PENDING",
            role="planner",
        ),
    )


@pytest.mark.parametrize("state", list(SessionState))
def test_tasks_are_routed_in_open_sessions_only(state: str) -> None:
    session = a_session(state)
    if state in ("PENDING", "ACTIVE"):
        assert len(route(session).rows) == 1
        return
    with pytest.raises(FailedPrecondition) as refusal:
        route(session)
    assert refusal.value.reason == "SESSION_NOT_OPEN"
    assert refusal.value.metadata == {"state": state, "session_id": str(session.id)}
    assert refusal.value.violations[0][:2] == ("SESSION_NOT_OPEN", str(session.id))


def test_routing_looks_at_its_session_and_changes_nothing_else() -> None:
    session = a_session()
    command = RouteTask(
        actor=SENDER,
        id=new_id(),
        session_id=session.id,
        type="T",
        target_role="r",
        description="",
        data={},
        context={},
        trace_id="",
        priority=0,
        schedule_time=None,
        max_attempts=1,
        retry_backoff=timedelta(),
        lease_timeout=timedelta(seconds=1),
        attempt_timeout=None,
    )
    assert MUTATIONS.route.reads(command, {}) == ((), (Key("sessions", "acme", session.id),))


def test_who_may_route() -> None:
    with pytest.raises(NotFound) as missing:
        route(None)
    assert missing.value.reason == "SESSION_NOT_FOUND"
    with pytest.raises(NotFound):
        route(a_session(tenant="other"))
    for state in ("ACTIVE", "COMPLETED"):
        with pytest.raises(PermissionDenied) as denied:
            route(a_session(state), actor=WORKER)
        assert denied.value.reason == "ROLE_NOT_HELD"
    assert route(a_session(), actor=OPERATOR).events[0].role == ""


@pytest.mark.parametrize(
    ("asked", "scheduled"),
    [
        (None, NOW),
        (datetime(1, 1, 1, tzinfo=UTC), NOW),
        (NOW - TICK, NOW),
        (NOW + TICK, NOW + TICK),
        (NOW + timedelta(days=366), NOW + timedelta(days=366)),
    ],
)
def test_a_task_is_scheduled_now_or_later(asked: datetime | None, scheduled: datetime) -> None:
    (task,) = route(a_session(), schedule_time=asked).rows
    assert isinstance(task, Task)
    assert task.schedule_time == scheduled


@pytest.mark.parametrize("ahead", [timedelta(days=366) + TICK, datetime.max.replace(tzinfo=UTC) - NOW])
def test_a_task_is_not_scheduled_too_far_ahead(ahead: timedelta) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        route(a_session(), schedule_time=NOW + ahead)
    assert refusal.value.reason == "FIELD_INVALID"
    assert refusal.value.fields[0][0] == "schedule_time"


# -- the lease --


@pytest.mark.parametrize("verb", LEASE_VERBS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mine", [True, False])
def test_a_lease_fences(verb: str, state: str, mine: bool) -> None:
    task = a_task(state)
    lease_id = LEASE if mine else new_id()
    if state == "RUNNING" and mine:
        assert len(under_lease(verb, task, lease_id=lease_id).rows) == 1
        return
    with pytest.raises(FailedPrecondition) as refusal:
        under_lease(verb, task, lease_id=lease_id)
    assert refusal.value.reason == ("TASK_CANCELLED" if state == "CANCELLED" and mine else "LEASE_LOST")
    assert refusal.value.metadata == {"task_id": str(task.id), "state": state}
    assert refusal.value.violations[0][:2] == (refusal.value.reason, str(task.id))


@pytest.mark.parametrize("verb", LEASE_VERBS)
def test_a_lease_ends_at_its_time(verb: str) -> None:
    task = a_task()
    assert len(under_lease(verb, task, now=LATER - TICK).rows) == 1
    for late in (LATER, LATER + TICK):
        with pytest.raises(FailedPrecondition) as refusal:
            under_lease(verb, task, now=late)
        assert refusal.value.reason == "LEASE_LOST"


@pytest.mark.parametrize("verb", LEASE_VERBS)
def test_a_lease_is_of_the_subject_that_claimed_it(verb: str) -> None:
    for actor in (replace(WORKER, subject="thief"), OPERATOR):
        with pytest.raises(PermissionDenied) as refusal:
            under_lease(verb, a_task(), actor=actor)
        assert refusal.value.reason == "LEASE_NOT_HELD"
    # The role is asked for at the claim; whoever lost it since may still end what it began.
    decision = under_lease(verb, a_task(), actor=replace(WORKER, roles=frozenset()))
    assert decision.events[0].role == ""
    assert under_lease(verb, a_task()).events[0].role == "coder"


@pytest.mark.parametrize("verb", LEASE_VERBS)
def test_a_missing_task_is_not_found(verb: str) -> None:
    with pytest.raises(NotFound) as refusal:
        under_lease(verb, a_task(tenant="other"))
    assert refusal.value.reason == "TASK_NOT_FOUND"


def test_the_store_learns_of_a_held_lease_by_none() -> None:
    task = a_task()
    assert lease_refusal(task, task.id, LEASE, "worker", NOW) is None
    assert isinstance(lease_refusal(None, task.id, LEASE, "worker", NOW), NotFound)
    assert isinstance(lease_refusal(task, task.id, LEASE, "thief", NOW), PermissionDenied)
    assert isinstance(lease_refusal(task, task.id, LEASE, "worker", LATER), FailedPrecondition)


# -- complete, fail, release --


def test_complete() -> None:
    task = a_task(error=TaskError(code="EARLIER", message="first attempt"))
    done = after(under_lease("complete", task, result={"files": [1]}), task)
    assert changes(task, done) == {"state", "result", "error", "end_time", "lease_expire_time"}
    assert (done.state, done.result, done.error, done.end_time) == (TaskState.SUCCEEDED, {"files": [1]}, None, NOW)


def test_fail_with_attempts_left_tries_again_after_the_backoff() -> None:
    task = a_task(attempt=2, retry_backoff=timedelta(seconds=3))
    failed = after(under_lease("fail", task), task)
    assert changes(task, failed) == {"state", "error", "schedule_time", "lease_expire_time"}
    assert (failed.state, failed.schedule_time) == (TaskState.PENDING, NOW + timedelta(seconds=6))
    assert failed.error == TaskError(code="TIMEOUT", message="too slow")


@pytest.mark.parametrize(
    ("attempt", "non_retryable", "state"),
    [
        (1, False, "PENDING"),
        (2, False, "PENDING"),
        (3, False, "DEAD"),
        (1, True, "DEAD"),
        (3, True, "DEAD"),
    ],
)
def test_attempts_run_out(attempt: int, non_retryable: bool, state: str) -> None:
    task = a_task(attempt=attempt)
    error = TaskError(code="BROKEN", message="", non_retryable=non_retryable)
    failed = after(under_lease("fail", task, error=error), task)
    assert (failed.state, failed.attempt, failed.error) == (state, attempt, error)
    if state == "DEAD":
        assert changes(task, failed) == {"state", "error", "end_time", "lease_expire_time"}


@pytest.mark.parametrize(
    ("first", "attempt", "expected"),
    [
        (1, 1, 1),
        (1, 2, 2),
        (1, 3, 4),
        (1, 12, 2048),
        (1, 13, 3600),
        (1, 100, 3600),
        (0, 1, 0),
        (0, 100, 0),
        (3600, 1, 3600),
        (3600, 2, 3600),
        (0.000001, 33, 3600),
        (0.000001, 100, 3600),
        (0.25, 3, 1),
    ],
)
def test_backoff_doubles_up_to_an_hour(first: float, attempt: int, expected: float) -> None:
    assert backoff(timedelta(seconds=first), attempt) == timedelta(seconds=expected)


def test_backoff_never_shrinks_and_never_overflows() -> None:
    for first in (TICK, timedelta(milliseconds=7), timedelta(seconds=1), MAX_BACKOFF):
        delays = [backoff(first, attempt) for attempt in range(1, 101)]
        assert delays == sorted(delays)
        assert (delays[0], delays[-1]) == (first, MAX_BACKOFF)


def test_release_gives_the_attempt_back() -> None:
    task = a_task(attempt=3, schedule_time=BEFORE)
    released = after(under_lease("release", task), task)
    assert changes(task, released) == {"state", "attempt", "schedule_time", "lease_expire_time"}
    assert (released.state, released.attempt, released.schedule_time) == (TaskState.PENDING, 2, NOW)
    assert after(under_lease("release", a_task(attempt=1)), a_task(id=task.id)).attempt == 0


def test_update_time_never_goes_back_with_the_clock() -> None:
    task = a_task(update_time=NOW + timedelta(seconds=1))
    done = after(under_lease("complete", task), task)
    assert done.update_time == done.end_time == task.update_time


# -- cancel --


@pytest.mark.parametrize("state", STATES)
def test_cancel_from_every_state(state: str) -> None:
    task = a_task(state)
    if state in UNFINISHED:
        decision = cancel(task)
        cancelled = after(decision, task)
        assert changes(task, cancelled) == {"state", "error", "end_time"} | (
            {"lease_expire_time"} if state == "RUNNING" else set()
        )
        assert (cancelled.state, cancelled.end_time) == (TaskState.CANCELLED, NOW)
        assert cancelled.error == TaskError(code="CANCELLED", message="changed my mind")
        assert decision.events[0].role == "planner"
    elif state == "CANCELLED":
        assert cancel(task, etag="3") == Decision((), task, ())
    else:
        with pytest.raises(FailedPrecondition) as refusal:
            cancel(task)
        assert refusal.value.reason == "TASK_STATE_INVALID"
        assert refusal.value.metadata == {"state": state, "verb": "Cancel", "task_id": str(task.id)}
        assert refusal.value.violations[0][:2] == ("TASK_STATE_INVALID", str(task.id))


@pytest.mark.parametrize("state", STATES)
def test_cancel_looks_at_role_then_etag_then_state(state: str) -> None:
    task = a_task(state)
    with pytest.raises(PermissionDenied) as denied:
        cancel(task, actor=WORKER, etag="2")
    assert denied.value.reason == "ROLE_NOT_HELD"
    with pytest.raises(Aborted) as aborted:
        cancel(task, etag="2")
    assert aborted.value.reason == "ETAG_MISMATCH"
    with pytest.raises(NotFound) as missing:
        cancel(replace(task, tenant="other"), etag="2")
    assert missing.value.reason == "TASK_NOT_FOUND"


def test_an_operator_cancels_any_task() -> None:
    assert cancel(a_task(), actor=OPERATOR, etag="3").events[0].role == ""


def test_a_cancelled_task_tells_the_worker_that_held_it() -> None:
    task = a_task()
    cancelled = after(cancel(task), task)
    with pytest.raises(FailedPrecondition) as refusal:
        under_lease("complete", cancelled)
    assert refusal.value.reason == "TASK_CANCELLED"


# -- what the server does by itself --


def lose(task: Task | None, now: datetime = LATER) -> Decision:
    command = LoseLease(actor=SERVER, id=task.id if task else new_id())
    return decide(MUTATIONS.lose_lease, command, *((task,) if task else ()), now=now)


@pytest.mark.parametrize(("attempt", "state"), [(1, "PENDING"), (2, "PENDING"), (3, "DEAD")])
def test_a_lost_lease_uses_its_attempt(attempt: int, state: str) -> None:
    task = a_task(attempt=attempt)
    decision = lose(task)
    lost = after(decision, task)
    assert (lost.state, lost.attempt) == (state, attempt)
    assert lost.error is not None
    assert lost.error.code == "LEASE_LOST"
    assert lost.schedule_time == (LATER if state == "PENDING" else BEFORE)
    assert decision.events[0].role == ""


def test_a_lease_that_runs_on_is_not_lost() -> None:
    task = a_task()
    assert lose(task, LATER - TICK) == Decision((), task, ())
    extended = replace(task, beat=6, lease_expire_time=LATER + TICK)
    assert lose(extended) == Decision((), extended, ())
    assert lose(None) == Decision((), None, ())


@pytest.mark.parametrize("state", [state for state in STATES if state != "RUNNING"])
def test_only_a_running_task_can_lose_its_lease(state: str) -> None:
    task = a_task(state)
    assert lose(task, NOW + timedelta(days=1)) == Decision((), task, ())


@pytest.mark.parametrize("session_state", list(SessionState))
@pytest.mark.parametrize("state", STATES)
def test_orphans_are_the_unfinished_tasks_of_ended_sessions(state: str, session_state: str) -> None:
    session = a_session(session_state)
    task = a_task(state, session_id=session.id)
    decision = decide(MUTATIONS.cancel_orphan, CancelOrphan(actor=SERVER, id=task.id), task, session)
    if state in UNFINISHED and session_state in ("COMPLETED", "FAILED", "EXPIRED"):
        cancelled = after(decision, task)
        assert cancelled.state is TaskState.CANCELLED
        assert cancelled.error == TaskError(code="CANCELLED", message=f"Its session is {session_state}.")
        assert decision.events[0].role == ""
    else:
        assert decision == Decision((), task, ())


def test_an_orphans_session_is_asked_for_once_the_task_is_known() -> None:
    task = a_task()
    command = CancelOrphan(actor=SERVER, id=task.id)
    key = Key("tasks", "acme", task.id)
    assert MUTATIONS.cancel_orphan.reads(command, {}) == ((key,), ())
    assert MUTATIONS.cancel_orphan.reads(command, {key: None}) == ((key,), ())
    assert MUTATIONS.cancel_orphan.reads(command, {key: task}) == (
        (key,),
        (Key("sessions", "acme", task.session_id),),
    )
    assert decide(MUTATIONS.cancel_orphan, command) == Decision((), None, ())


def test_each_mutation_carries_the_name_of_its_rpc() -> None:
    service, sweeper = "/orchestrator.controller.v1.TaskService/", "/orchestrator.controller.v1.Sweeper/"
    assert {field.name: getattr(MUTATIONS, field.name).method for field in fields(MUTATIONS)} == {
        "route": f"{service}RouteTask",
        "cancel": f"{service}CancelTask",
        "complete": f"{service}CompleteTask",
        "fail": f"{service}FailTask",
        "release": f"{service}ReleaseTask",
        "lose_lease": f"{sweeper}LoseLease",
        "cancel_orphan": f"{sweeper}CancelOrphan",
    }
