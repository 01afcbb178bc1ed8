"""Tasks: work routed to a role, leased to a worker, its state machine and the mutations that change it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from controller_svc.core.audit import AuditEvent
from controller_svc.core.mutations import Actor, Decision, Key, Keys, Rows, Table
from controller_svc.core.sessions import (
    ENDED,
    OPEN_FOR_TASKS,
    Session,
    check_etag,
    session_not_found,
    task_not_found,
)
from controller_svc.core.values import value_class
from svckit.errors import FailedPrecondition, PermissionDenied, ServiceError, invalid_field

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

SERVICE: Final = "/orchestrator.controller.v1.TaskService"
LOSE_LEASE_METHOD: Final = "/orchestrator.controller.v1.Sweeper/LoseLease"
CANCEL_ORPHAN_METHOD: Final = "/orchestrator.controller.v1.Sweeper/CancelOrphan"
MAX_BACKOFF: Final = timedelta(hours=1)
MAX_SCHEDULE_AHEAD: Final = timedelta(days=366)


class TaskState(StrEnum):
    """Where a task stands; SUCCEEDED, DEAD and CANCELLED are its ends."""

    PENDING = "PENDING"
    BLOCKED = "BLOCKED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    DEAD = "DEAD"
    CANCELLED = "CANCELLED"


UNFINISHED: Final = frozenset({TaskState.PENDING, TaskState.BLOCKED, TaskState.RUNNING})


@value_class(frozen=True, slots=True, kw_only=True)
class TaskError:
    """Why an attempt, or the task, failed."""

    code: str
    message: str
    non_retryable: bool = False


@value_class(frozen=True, slots=True, kw_only=True)
class Task:
    """One version of a task. Times are aware and in whole microseconds."""

    table: ClassVar[Table] = "tasks"

    tenant: str
    id: UUID
    version: int
    beat: int
    """Counts heartbeats: the version that was read is (version, beat). No mutation changes it."""
    session_id: UUID
    type: str
    from_role: str
    """The agent_role of its session."""
    target_role: str
    description: str
    data: dict[str, Any]
    context: dict[str, Any]
    trace_id: str
    """W3C trace id (32 hex digits) of the call that routed it."""
    priority: int
    """-100..100; the higher is handed out first."""
    schedule_time: datetime
    """Not handed out before."""
    attempt: int
    """Attempts used, the running one included; a release gives its attempt back."""
    max_attempts: int
    retry_backoff: timedelta
    """Delay after the first failed attempt; doubles per attempt up to 1 h."""
    lease_timeout: timedelta
    """How long a claim or a heartbeat keeps the lease."""
    attempt_timeout: timedelta | None
    """No heartbeat keeps the lease beyond start_time + attempt_timeout."""
    state: TaskState
    result: dict[str, Any] | None
    """Set exactly in SUCCEEDED."""
    error: TaskError | None
    """The last attempt's failure, or the reason of DEAD or CANCELLED."""
    progress: dict[str, Any] | None
    """What the last heartbeat that carried one said."""
    lease_id: UUID | None
    """Names the last lease, also after it ended; None before the first claim. It fences: a worker must present it."""
    lease_holder: str
    """The subject that claimed the last lease, also after it ended; empty before the first claim."""
    lease_expire_time: datetime | None
    """Set exactly while RUNNING."""
    create_time: datetime
    update_time: datetime
    """Never goes back, whatever the clock does. A heartbeat does not change it."""
    start_time: datetime | None
    """When it was last claimed."""
    end_time: datetime | None
    """Set exactly in the states SUCCEEDED, DEAD and CANCELLED."""


@value_class(frozen=True, slots=True, kw_only=True)
class RouteTask:
    """Hand a new task of a session to a role."""

    actor: Actor
    id: UUID
    session_id: UUID
    type: str
    target_role: str
    description: str
    data: dict[str, Any]
    context: dict[str, Any]
    trace_id: str
    priority: int
    schedule_time: datetime | None
    """None or past: now."""
    max_attempts: int
    retry_backoff: timedelta
    lease_timeout: timedelta
    attempt_timeout: timedelta | None


@value_class(frozen=True, slots=True, kw_only=True)
class CancelTask:
    """End an unfinished task."""

    actor: Actor
    id: UUID
    reason: str
    etag: str = ""
    """The version it must still have; empty for any."""


@value_class(frozen=True, slots=True, kw_only=True)
class ClaimTasks:
    """Lease up to `max_tasks` tasks of a role. That the actor holds it is checked before, by the servicer."""

    actor: Actor
    role: str
    max_tasks: int
    wait_seconds: float
    """How long to wait for a first task."""


@value_class(frozen=True, slots=True, kw_only=True)
class CompleteTask:
    """End a leased task with its result."""

    actor: Actor
    id: UUID
    lease_id: UUID
    result: dict[str, Any]


@value_class(frozen=True, slots=True, kw_only=True)
class FailTask:
    """End a leased attempt with an error."""

    actor: Actor
    id: UUID
    lease_id: UUID
    error: TaskError


@value_class(frozen=True, slots=True, kw_only=True)
class ReleaseTask:
    """Give a leased task back, unattempted."""

    actor: Actor
    id: UUID
    lease_id: UUID


@value_class(frozen=True, slots=True, kw_only=True)
class LoseLease:
    """Take a task back whose lease has run out."""

    actor: Actor
    id: UUID


@value_class(frozen=True, slots=True, kw_only=True)
class CancelOrphan:
    """End an unfinished task whose session has ended."""

    actor: Actor
    id: UUID


@value_class(frozen=True, slots=True, kw_only=True)
class HeartbeatResult:
    """What a heartbeat answers: until when the lease is kept, or that the task was cancelled."""

    lease_expire_time: datetime | None
    """None exactly when cancelled."""
    cancelled: bool


class TaskStore(Protocol):
    """Reads of tasks. A filter that is None does not filter."""

    async def get(self, tenant: str, task_id: UUID) -> Task | None:
        """Must answer the tenant's task, None if it has no such task."""
        ...

    async def list(
        self,
        tenant: str,
        *,
        session_id: UUID | None,
        target_role: str | None,
        state: TaskState | None,
        task_type: str | None,
        before: UUID | None,
        limit: int,
    ) -> Sequence[Task]:
        """Must answer at most `limit` tasks with an id below `before`, by id descending."""
        ...

    async def count(
        self,
        tenant: str,
        *,
        session_id: UUID | None,
        target_role: str | None,
        state: TaskState | None,
        task_type: str | None,
    ) -> int:
        """Must answer how many tasks the same filters select."""
        ...

    async def lost_leases(self, limit: int) -> Sequence[Key]:
        """Must answer at most `limit` RUNNING tasks, of any tenant, whose lease has run out by the store's clock."""
        ...

    async def orphans(self, limit: int) -> Sequence[Key]:
        """Must answer at most `limit` unfinished tasks, of any tenant, whose session has ended."""
        ...


class HeartbeatStore(Protocol):
    """What keeps a lease."""

    async def beat(
        self, tenant: str, task_id: UUID, lease_id: UUID, subject: str, progress: dict[str, Any] | None
    ) -> HeartbeatResult:
        """Must extend a lease that `lease_refusal` finds held, in one statement and by the store's clock.

        lease_expire_time becomes now + lease_timeout, at most start_time + attempt_timeout, never earlier than it was;
        `progress` is set unless it is None; `beat` goes up by one. Version, update_time and audit trail stay.
        A CANCELLED task whose last lease is `lease_id` answers cancelled. Any other lease that is not held is refused
        with the error of `lease_refusal`. Who may have been extended, though nobody confirmed it, must not be told that
        nothing was written: Unavailable OUTCOME_UNKNOWN.
        """
        ...


def lease_refusal(task: Task | None, task_id: UUID, lease_id: UUID, subject: str, now: datetime) -> ServiceError | None:
    """Why `subject` may not act under `lease_id`; None if it holds that lease now.

    NotFound TASK_NOT_FOUND; FailedPrecondition TASK_CANCELLED if the task was cancelled under this lease, LEASE_LOST
    if the lease has ended, run out or passed to another; PermissionDenied LEASE_NOT_HELD if another subject claimed it.
    """
    if task is None:
        return task_not_found(task_id)
    if task.lease_id == lease_id and task.state is TaskState.CANCELLED:
        return _precondition("TASK_CANCELLED", task, "The task was cancelled; its lease has ended.")
    if task.lease_id != lease_id or task.lease_expire_time is None or task.lease_expire_time <= now:
        return _precondition("LEASE_LOST", task, "The lease has ended; the task is no longer this worker's.")
    if task.lease_holder != subject:
        return PermissionDenied(
            "LEASE_NOT_HELD", "The lease was claimed by another subject.", metadata={"task_id": str(task.id)}
        )
    return None


@value_class(frozen=True, slots=True)
class _Route:
    method: str = f"{SERVICE}/RouteTask"

    def reads(self, command: RouteTask, found: Rows) -> Keys:
        return Keys(look=(Key("sessions", command.actor.tenant, command.session_id),))

    def decide(self, command: RouteTask, found: Rows, now: datetime) -> Decision:
        """Raises NotFound SESSION_NOT_FOUND, PermissionDenied ROLE_NOT_HELD, FailedPrecondition SESSION_NOT_OPEN.

        And InvalidArgument if schedule_time is too far ahead.
        """
        session: Session | None = found[Key("sessions", command.actor.tenant, command.session_id)]
        if session is None:
            raise session_not_found(command.session_id)
        command.actor.require(session.agent_role)
        if session.state not in OPEN_FOR_TASKS:
            raise FailedPrecondition(
                "SESSION_NOT_OPEN",
                f"The session is {session.state}; tasks are routed in a session that is PENDING or ACTIVE.",
                metadata={"session_id": str(session.id), "state": str(session.state)},
                violations=(("SESSION_NOT_OPEN", str(session.id), f"The session is {session.state}."),),
            )
        schedule_time = now if command.schedule_time is None else max(command.schedule_time, now)
        if schedule_time - now > MAX_SCHEDULE_AHEAD:
            raise invalid_field("schedule_time", f"Must be at most {MAX_SCHEDULE_AHEAD.days} days ahead.")
        task = Task(
            tenant=command.actor.tenant,
            id=command.id,
            version=1,
            beat=0,
            session_id=command.session_id,
            type=command.type,
            from_role=session.agent_role,
            target_role=command.target_role,
            description=command.description,
            data=command.data,
            context=command.context,
            trace_id=command.trace_id,
            priority=command.priority,
            schedule_time=schedule_time,
            attempt=0,
            max_attempts=command.max_attempts,
            retry_backoff=command.retry_backoff,
            lease_timeout=command.lease_timeout,
            attempt_timeout=command.attempt_timeout,
            state=TaskState.PENDING,
            result=None,
            error=None,
            progress=None,
            lease_id=None,
            lease_holder="",
            lease_expire_time=None,
            create_time=now,
            update_time=now,
            start_time=None,
            end_time=None,
        )
        event = AuditEvent(
            resource_type="task",
            resource_id=task.id,
            version_before=0,
            version_after=1,
            state_before="",
            state_after=task.state,
            role=command.actor.acting_role(task.from_role),
        )
        return Decision((task,), task, (event,))


@value_class(frozen=True, slots=True)
class _Cancel:
    method: str = f"{SERVICE}/CancelTask"

    def reads(self, command: CancelTask, found: Rows) -> Keys:
        return _reads_task(command)

    def decide(self, command: CancelTask, found: Rows, now: datetime) -> Decision:
        """Raises NotFound, PermissionDenied ROLE_NOT_HELD, Aborted, FailedPrecondition TASK_STATE_INVALID."""
        task: Task | None = found[Key("tasks", command.actor.tenant, command.id)]
        if task is None:
            raise task_not_found(command.id)
        command.actor.require(task.from_role)
        check_etag(command.etag, task.version)
        if task.state is TaskState.CANCELLED:
            return Decision((), task, ())
        if task.state not in UNFINISHED:
            raise _precondition("TASK_STATE_INVALID", task, f"The task is {task.state}.", verb="Cancel")
        return _cancelled(command.actor, task, now, command.reason)


@value_class(frozen=True, slots=True)
class _Complete:
    method: str = f"{SERVICE}/CompleteTask"

    def reads(self, command: CompleteTask, found: Rows) -> Keys:
        return _reads_task(command)

    def decide(self, command: CompleteTask, found: Rows, now: datetime) -> Decision:
        """Raises what `lease_refusal` finds."""
        task = _leased(command, found, now)
        return _changed(
            command.actor,
            task,
            now,
            task.target_role,
            state=TaskState.SUCCEEDED,
            result=command.result,
            error=None,
        )


@value_class(frozen=True, slots=True)
class _Fail:
    method: str = f"{SERVICE}/FailTask"

    def reads(self, command: FailTask, found: Rows) -> Keys:
        return _reads_task(command)

    def decide(self, command: FailTask, found: Rows, now: datetime) -> Decision:
        """Raises what `lease_refusal` finds."""
        task = _leased(command, found, now)
        if command.error.non_retryable or task.attempt >= task.max_attempts:
            changes: dict[str, Any] = {"state": TaskState.DEAD}
        else:
            changes = {"state": TaskState.PENDING, "schedule_time": now + backoff(task.retry_backoff, task.attempt)}
        return _changed(command.actor, task, now, task.target_role, error=command.error, **changes)


@value_class(frozen=True, slots=True)
class _Release:
    method: str = f"{SERVICE}/ReleaseTask"

    def reads(self, command: ReleaseTask, found: Rows) -> Keys:
        return _reads_task(command)

    def decide(self, command: ReleaseTask, found: Rows, now: datetime) -> Decision:
        """Raises what `lease_refusal` finds."""
        task = _leased(command, found, now)
        return _changed(
            command.actor,
            task,
            now,
            task.target_role,
            state=TaskState.PENDING,
            attempt=task.attempt - 1,
            schedule_time=now,
        )


@value_class(frozen=True, slots=True)
class _LoseLease:
    method: str = LOSE_LEASE_METHOD

    def reads(self, command: LoseLease, found: Rows) -> Keys:
        return _reads_task(command)

    def decide(self, command: LoseLease, found: Rows, now: datetime) -> Decision:
        """Never refuses: a task that is gone, or whose lease has not run out, is left as it is."""
        task: Task | None = found[Key("tasks", command.actor.tenant, command.id)]
        if task is None or task.lease_expire_time is None or task.lease_expire_time > now:
            return Decision((), task, ())
        error = TaskError(code="LEASE_LOST", message="The lease ran out before the attempt ended.")
        if task.attempt >= task.max_attempts:
            return _changed(command.actor, task, now, "", state=TaskState.DEAD, error=error)
        return _changed(command.actor, task, now, "", state=TaskState.PENDING, error=error, schedule_time=now)


@value_class(frozen=True, slots=True)
class _CancelOrphan:
    method: str = CANCEL_ORPHAN_METHOD

    def reads(self, command: CancelOrphan, found: Rows) -> Keys:
        keys = _reads_task(command)
        task: Task | None = found.get(keys.change[0])
        if task is None:
            return keys
        return keys._replace(look=(Key("sessions", task.tenant, task.session_id),))

    def decide(self, command: CancelOrphan, found: Rows, now: datetime) -> Decision:
        """Never refuses: a task that is gone, ended or of a session that goes on is left as it is."""
        task: Task | None = found[Key("tasks", command.actor.tenant, command.id)]
        if task is None or task.state not in UNFINISHED:
            return Decision((), task, ())
        session: Session | None = found[Key("sessions", task.tenant, task.session_id)]
        if session is None or session.state not in ENDED:
            return Decision((), task, ())
        return _cancelled(command.actor, task, now, f"Its session is {session.state}.")


@value_class(frozen=True, slots=True)
class TaskMutations:
    """The use cases of tasks."""

    route: _Route = _Route()
    cancel: _Cancel = _Cancel()
    complete: _Complete = _Complete()
    fail: _Fail = _Fail()
    release: _Release = _Release()
    lose_lease: _LoseLease = _LoseLease()
    cancel_orphan: _CancelOrphan = _CancelOrphan()


def backoff(first: timedelta, attempt: int) -> timedelta:
    """The delay after failed attempt number `attempt` (from 1): `first`, doubled per attempt before it, at most 1 h."""
    # 2**32 of any span that is not zero is above the cap; an uncapped power would overflow.
    factor: int = 2 ** min(attempt - 1, 32)
    return min(first * factor, MAX_BACKOFF)


def _reads_task(command: CancelTask | CompleteTask | FailTask | ReleaseTask | LoseLease | CancelOrphan) -> Keys:
    return Keys((Key("tasks", command.actor.tenant, command.id),))


def _leased(command: CompleteTask | FailTask | ReleaseTask, found: Rows, now: datetime) -> Task:
    """The task that was read, if the actor holds the lease that the command names."""
    task: Task | None = found[Key("tasks", command.actor.tenant, command.id)]
    refusal = lease_refusal(task, command.id, command.lease_id, command.actor.subject, now)
    if refusal is not None:
        raise refusal
    assert task is not None  # lease_refusal refuses an absent one
    return task


def _precondition(reason: str, task: Task, message: str, verb: str = "") -> FailedPrecondition:
    metadata = {"state": str(task.state), "task_id": str(task.id)}
    if verb:
        metadata["verb"] = verb
    return FailedPrecondition(reason, message, metadata=metadata, violations=((reason, str(task.id), message),))


def _cancelled(actor: Actor, task: Task, now: datetime, reason: str) -> Decision:
    error = TaskError(code="CANCELLED", message=reason)
    return _changed(actor, task, now, task.from_role, state=TaskState.CANCELLED, error=error)


def _changed(actor: Actor, task: Task, now: datetime, role: str, *, state: TaskState, **changes: Any) -> Decision:
    """The task's next version in `state`, which no mutation makes RUNNING, with `changes` and the times that follow."""
    at = max(now, task.update_time)
    after = replace(
        task,
        version=task.version + 1,
        state=state,
        update_time=at,
        lease_expire_time=None,
        end_time=None if state in UNFINISHED else at,
        **changes,
    )
    event = AuditEvent(
        resource_type="task",
        resource_id=task.id,
        version_before=task.version,
        version_after=after.version,
        state_before=task.state,
        state_after=after.state,
        role=actor.acting_role(role),
    )
    return Decision((after,), after, (event,))
