"""Between the API's messages and the core: the only place that knows both, and where a request's fields are checked.

Requests become commands, filters and ids; resources become messages. A field that breaks its limit raises
InvalidArgument with reason FIELD_INVALID or FIELD_REQUIRED and the field's path; what the database could not store is
refused here.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, TypedDict

from google.protobuf import descriptor_pool

from controller_svc.core.ids import new_id, parse_id
from controller_svc.core.mutations import Actor
from controller_svc.core.records import RecordState
from controller_svc.core.sessions import (
    MAX_METADATA_BYTES,
    ChangeSession,
    CreateSession,
    SessionState,
    UpdateSession,
    metadata_size,
)
from controller_svc.core.tasks import (
    CancelTask,
    ClaimTasks,
    CompleteTask,
    FailTask,
    ReleaseTask,
    RouteTask,
    TaskError,
    TaskState,
)
from controller_svc.fingerprint import json_number, kinds_of
from controller_svc.idempotency import idempotency_key, scope_of
from orchestrator.controller.v1 import record_service_pb2 as records_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from orchestrator.options.v1 import options_pb2
from svckit.errors import InvalidArgument, invalid_field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from uuid import UUID

    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.struct_pb2 import Struct, Value
    from google.protobuf.timestamp_pb2 import Timestamp

    from controller_svc.core.audit import RecordedAuditEvent
    from controller_svc.core.records import GuardFacts, RecordFacts
    from controller_svc.core.sessions import Session
    from controller_svc.core.status import Component
    from controller_svc.core.tasks import HeartbeatResult, Task
    from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
    from svckit.auth import Principal

    SessionResponse = (
        sessions_pb.CreateSessionResponse
        | sessions_pb.GetSessionResponse
        | sessions_pb.UpdateSessionResponse
        | sessions_pb.ActivateSessionResponse
        | sessions_pb.PauseSessionResponse
        | sessions_pb.ResumeSessionResponse
        | sessions_pb.CompleteSessionResponse
        | sessions_pb.FailSessionResponse
    )
    ChangeSessionRequest = (
        sessions_pb.ActivateSessionRequest
        | sessions_pb.PauseSessionRequest
        | sessions_pb.ResumeSessionRequest
        | sessions_pb.CompleteSessionRequest
        | sessions_pb.FailSessionRequest
    )
    KeyRequest = records_pb.GetRecordRequest | records_pb.ReleaseRecordRequest
    TaskResponse = (
        tasks_pb.RouteTaskResponse
        | tasks_pb.GetTaskResponse
        | tasks_pb.CancelTaskResponse
        | tasks_pb.CompleteTaskResponse
        | tasks_pb.FailTaskResponse
        | tasks_pb.ReleaseTaskResponse
    )

OPERATE: Final = "orchestrator.operate"

MAX_NESTING: Final = 32
"""Structs and lists inside each other, the outermost counted."""
MAX_DESCRIPTION: Final = 4096
MAX_REASON: Final = 1024
MAX_ERROR_MESSAGE: Final = 4096
MAX_FILTER: Final = 1024

DEFAULT_MAX_ATTEMPTS: Final = 3
DEFAULT_MAX_TASKS: Final = 1
DEFAULT_RETRY_BACKOFF: Final = timedelta(seconds=1)
DEFAULT_LEASE_TIMEOUT: Final = timedelta(seconds=30)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN_SECONDS = -62135596800  # 0001-01-01T00:00:00Z
_MAX_SECONDS = 253402300799  # 9999-12-31T23:59:59Z
_MAX_DURATION_SECONDS = 315576000000  # the proto's own limit
_MAX_NANOS = 999_999_999
_ZERO = timedelta()
_SECOND = timedelta(seconds=1)
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)

_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}").fullmatch
_ROLE_RULE = "Must be 1 to 64 letters, digits, '.', '_', ':' or '-', the first one a letter or digit."
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,62}").fullmatch
_NAME_RULE = "Must be 1 to 63 capital letters, digits or '_', the first one a letter."

_SESSION_STATES: Final[Mapping[int, SessionState]] = {
    sessions_pb.Session.STATE_PENDING: SessionState.PENDING,
    sessions_pb.Session.STATE_ACTIVE: SessionState.ACTIVE,
    sessions_pb.Session.STATE_PAUSED: SessionState.PAUSED,
    sessions_pb.Session.STATE_COMPLETED: SessionState.COMPLETED,
    sessions_pb.Session.STATE_FAILED: SessionState.FAILED,
    sessions_pb.Session.STATE_EXPIRED: SessionState.EXPIRED,
}
_TASK_STATES: Final[Mapping[int, TaskState]] = {
    tasks_pb.Task.STATE_PENDING: TaskState.PENDING,
    tasks_pb.Task.STATE_BLOCKED: TaskState.BLOCKED,
    tasks_pb.Task.STATE_RUNNING: TaskState.RUNNING,
    tasks_pb.Task.STATE_SUCCEEDED: TaskState.SUCCEEDED,
    tasks_pb.Task.STATE_DEAD: TaskState.DEAD,
    tasks_pb.Task.STATE_CANCELLED: TaskState.CANCELLED,
}
_RECORD_STATE_NUMBERS: Final[Mapping[RecordState, Any]] = {
    RecordState.IN_PROGRESS: records_pb.Record.STATE_IN_PROGRESS,
    RecordState.RELEASED: records_pb.Record.STATE_RELEASED,
    RecordState.COMPLETED: records_pb.Record.STATE_COMPLETED,
    RecordState.UNSPECIFIED: records_pb.Record.STATE_UNSPECIFIED,
}
_SESSION_STATE_NUMBERS: Final[Mapping[str, Any]] = {state: number for number, state in _SESSION_STATES.items()}
_TASK_STATE_NUMBERS: Final[Mapping[str, Any]] = {state: number for number, state in _TASK_STATES.items()}


# -- who --


def actor_of(principal: Principal) -> Actor:
    """The verified caller as the core sees it."""
    return Actor(
        issuer=principal.issuer,
        tenant=principal.tenant,
        subject=principal.subject,
        roles=principal.roles,
        operate=OPERATE in principal.permissions,
        on_behalf_of=principal.on_behalf_of,
    )


# -- values --


def struct_to_dict(struct: Struct, field: str) -> dict[str, Any]:
    """The struct as JSON values; whole numbers up to 2^53 become int, so that they are stored as written.

    Raises InvalidArgument naming `field` for NaN, infinity, NUL, a value without a kind and nesting deeper than 32.
    """
    return _from_struct(struct, field, MAX_NESTING)


def _from_struct(struct: Struct, field: str, levels: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    fields = struct.fields
    for key in fields:
        if "\0" in key:
            raise invalid_field(field, "Must not contain NUL in a key.")
        values[key] = _from_value(fields[key], field, levels)
    return values


def _from_value(value: Value, field: str, levels: int) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        text = value.string_value
        if "\0" in text:
            raise invalid_field(field, "Must not contain NUL in a string.")
        return text
    if kind == "number_value":
        number = value.number_value
        if not isfinite(number):
            raise invalid_field(field, "Must not contain NaN or infinity.")
        return json_number(number)
    if kind == "bool_value":
        return value.bool_value
    if kind == "null_value":
        return None
    if kind is None:
        raise invalid_field(field, "Must not contain a value without a kind.")
    if levels == 1:
        raise invalid_field(field, f"Must not be nested deeper than {MAX_NESTING} levels.")
    if kind == "struct_value":
        return _from_struct(value.struct_value, field, levels - 1)
    return [_from_value(item, field, levels - 1) for item in value.list_value.values]


def fill_struct(struct: Struct, values: Mapping[str, Any]) -> None:
    """Writes JSON values into an empty struct, which is present afterwards even if there are none."""
    struct.SetInParent()
    fields = struct.fields
    for key, value in values.items():
        _fill_value(fields[key], value)


def _fill_value(message: Value, value: Any) -> None:
    if isinstance(value, str):
        message.string_value = value
    elif value is None:
        message.null_value = 0  # type: ignore[assignment]
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, (int, float)):
        message.number_value = value
    elif isinstance(value, dict):
        fill_struct(message.struct_value, value)
    else:
        message.list_value.SetInParent()
        items = message.list_value.values
        for item in value:
            _fill_value(items.add(), item)


def _metadata(struct: Struct) -> dict[str, Any]:
    metadata = struct_to_dict(struct, "metadata")
    # JSON takes at most six bytes per byte of the message (a control character's escape): most need no measuring.
    if struct.ByteSize() * 6 > MAX_METADATA_BYTES and metadata_size(metadata) > MAX_METADATA_BYTES:
        raise invalid_field("metadata", f"Must be at most {MAX_METADATA_BYTES} bytes of JSON.", "METADATA_TOO_LARGE")
    return metadata


def time_of(message: Timestamp, field: str) -> datetime:
    """The time, cut to microseconds. Raises InvalidArgument naming `field` outside the years 0001 to 9999."""
    seconds, nanos = message.seconds, message.nanos
    if not (_MIN_SECONDS <= seconds <= _MAX_SECONDS and 0 <= nanos <= _MAX_NANOS):
        raise invalid_field(field, "Must be a time in the years 0001 to 9999.")
    return _EPOCH + timedelta(0, seconds, nanos // 1000)


def fill_time(message: Timestamp, time: datetime) -> None:
    """Writes an aware time."""
    since = time - _EPOCH
    message.seconds = since.days * 86400 + since.seconds
    message.nanos = since.microseconds * 1000


def span_of(message: Duration, field: str, least: timedelta, most: timedelta) -> timedelta:
    """The span, cut to microseconds. Raises InvalidArgument naming `field` outside `least` to `most`."""
    seconds, nanos = message.seconds, message.nanos
    valid = (
        abs(seconds) <= _MAX_DURATION_SECONDS
        and abs(nanos) <= _MAX_NANOS
        and (seconds == 0 or nanos == 0 or (seconds > 0) == (nanos > 0))
    )
    span = timedelta(0, seconds, nanos // 1000) if valid else None
    if span is None or not least <= span <= most:
        raise invalid_field(field, f"Must be {least.total_seconds():g} to {most.total_seconds():g} seconds.")
    return span


def fill_span(message: Duration, span: timedelta) -> None:
    """Writes a span that is not negative."""
    message.seconds = span.days * 86400 + span.seconds
    message.nanos = span.microseconds * 1000


def _role(text: str, field: str) -> str:
    if _ROLE(text) is None:
        raise invalid_field(field, _ROLE_RULE if text else "Required.", "FIELD_INVALID" if text else "FIELD_REQUIRED")
    return text


def _name(text: str, field: str) -> str:
    if _NAME(text) is None:
        raise invalid_field(field, _NAME_RULE if text else "Required.", "FIELD_INVALID" if text else "FIELD_REQUIRED")
    return text


def _text(text: str, field: str, limit: int) -> str:
    if len(text) > limit:
        raise invalid_field(field, f"Must be at most {limit} characters.")
    if "\0" in text:
        raise invalid_field(field, "Must not contain NUL.")
    return text


def _number(number: int, field: str, least: int, most: int) -> int:
    if not least <= number <= most:
        raise invalid_field(field, f"Must be {least} to {most}.")
    return number


# -- sessions --


class SessionFilters(TypedDict):
    """What ListSessions selects by; None selects all."""

    agent_role: str | None
    state: SessionState | None
    task_id: UUID | None


def session_id(request: sessions_pb.GetSessionRequest) -> UUID:
    """Which session is asked for."""
    return parse_id(request.session_id, "session_id")


def session_filters(request: sessions_pb.ListSessionsRequest) -> SessionFilters:
    """The filters of a list of sessions."""
    state = None
    if request.state:
        state = _SESSION_STATES.get(request.state)
        if state is None:
            raise invalid_field("state", f"Has no value {request.state}.")
    return {
        "agent_role": _role(request.agent_role, "agent_role") if request.agent_role else None,
        "state": state,
        "task_id": parse_id(request.task_id, "task_id") if request.task_id else None,
    }


def create_session(request: sessions_pb.CreateSessionRequest, actor: Actor) -> CreateSession:
    """The command, its session's new id included. Raises METADATA_TOO_LARGE as reason where that is the fault."""
    return CreateSession(
        actor=actor,
        id=new_id(),
        agent_role=_role(request.agent_role, "agent_role"),
        task_id=parse_id(request.task_id, "task_id") if request.task_id else None,
        metadata=_metadata(request.metadata),
    )


def update_session(request: sessions_pb.UpdateSessionRequest, actor: Actor) -> UpdateSession:
    """The command; its mask is neither empty nor names anything unknown or twice."""
    return UpdateSession(
        actor=actor,
        id=parse_id(request.session_id, "session_id"),
        etag=request.etag,
        paths=_session_paths(request.update_mask.paths),
        metadata=_metadata(request.metadata),
        task_id=parse_id(request.task_id, "task_id") if request.task_id else None,
    )


def _session_paths(paths: Iterable[str]) -> tuple[str, ...]:
    seen: dict[str, None] = {}
    for path in paths:
        if path in seen:
            raise invalid_field("update_mask", "Must not name a path twice.")
        if path not in ("metadata", "task_id") and (not path.startswith("metadata.") or path == "metadata."):
            raise invalid_field("update_mask", "Must name `metadata`, `metadata.<key>` or `task_id` only.")
        if "\0" in path:
            raise invalid_field("update_mask", "Must not contain NUL.")
        seen[path] = None
    if not seen:
        raise invalid_field("update_mask", "Required: at least one path.", "FIELD_REQUIRED")
    return tuple(seen)


def change_session(request: ChangeSessionRequest, actor: Actor) -> ChangeSession:
    """The command of any verb."""
    return ChangeSession(actor=actor, id=parse_id(request.session_id, "session_id"), etag=request.etag)


def fill_session(message: sessions_pb.Session, session: Session, metadata: Struct | None = None) -> None:
    """Writes a session into an empty message. `metadata`: its metadata as the request has it, which spares filling."""
    message.id = str(session.id)
    message.agent_role = session.agent_role
    message.state = _SESSION_STATE_NUMBERS[session.state]
    if session.task_id is not None:
        message.task_id = str(session.task_id)
    if session.metadata and metadata is not None:
        message.metadata.CopyFrom(metadata)
        message.metadata.DiscardUnknownFields()
    elif session.metadata:
        fill_struct(message.metadata, session.metadata)
    fill_time(message.create_time, session.create_time)
    fill_time(message.update_time, session.update_time)
    fill_time(message.expire_time, session.expire_time)
    if session.start_time is not None:
        fill_time(message.start_time, session.start_time)
    if session.pause_time is not None:
        fill_time(message.pause_time, session.pause_time)
    if session.end_time is not None:
        fill_time(message.end_time, session.end_time)
    message.etag = str(session.version)


def session_answer(response: type[SessionResponse], metadata: Struct | None = None) -> Callable[[Session], bytes]:
    """Makes the answer's bytes of a session, for a method that answers with this message.

    `metadata` is as for `fill_session`.
    """

    def answer(session: Session) -> bytes:
        message = response()
        fill_session(message.session, session, metadata)
        return message.SerializeToString()

    return answer


# -- tasks --


class TaskFilters(TypedDict):
    """What ListTasks selects by; None selects all."""

    session_id: UUID | None
    target_role: str | None
    state: TaskState | None
    task_type: str | None


def task_id(request: tasks_pb.GetTaskRequest | tasks_pb.HeartbeatTaskRequest) -> UUID:
    """Which task is asked for."""
    return parse_id(request.task_id, "task_id")


def task_filters(request: tasks_pb.ListTasksRequest) -> TaskFilters:
    """The filters of a list of tasks."""
    state = None
    if request.state:
        state = _TASK_STATES.get(request.state)
        if state is None:
            raise invalid_field("state", f"Has no value {request.state}.")
    return {
        "session_id": parse_id(request.session_id, "session_id") if request.session_id else None,
        "target_role": _role(request.target_role, "target_role") if request.target_role else None,
        "state": state,
        "task_type": _name(request.type, "type") if request.type else None,
    }


def route_task(request: tasks_pb.RouteTaskRequest, actor: Actor, trace_id: str) -> RouteTask:
    """The command, its task's new id and the defaults included."""
    return RouteTask(
        actor=actor,
        id=new_id(),
        session_id=parse_id(request.session_id, "session_id"),
        type=_name(request.type, "type"),
        target_role=_role(request.target_role, "target_role"),
        description=_text(request.description, "description", MAX_DESCRIPTION),
        data=struct_to_dict(request.data, "data"),
        context=struct_to_dict(request.context, "context"),
        trace_id=trace_id,
        priority=_number(request.priority, "priority", -100, 100),
        schedule_time=time_of(request.schedule_time, "schedule_time") if request.HasField("schedule_time") else None,
        max_attempts=_number(request.max_attempts or DEFAULT_MAX_ATTEMPTS, "max_attempts", 1, 100),
        retry_backoff=span_of(request.retry_backoff, "retry_backoff", _ZERO, _HOUR)
        if request.HasField("retry_backoff")
        else DEFAULT_RETRY_BACKOFF,
        lease_timeout=span_of(request.lease_timeout, "lease_timeout", _SECOND, _HOUR)
        if request.HasField("lease_timeout")
        else DEFAULT_LEASE_TIMEOUT,
        attempt_timeout=span_of(request.attempt_timeout, "attempt_timeout", _SECOND, _DAY)
        if request.HasField("attempt_timeout")
        else None,
    )


def cancel_task(request: tasks_pb.CancelTaskRequest, actor: Actor) -> CancelTask:
    """The command."""
    return CancelTask(
        actor=actor,
        id=parse_id(request.task_id, "task_id"),
        reason=_text(request.reason, "reason", MAX_REASON),
        etag=request.etag,
    )


def claim_tasks(request: tasks_pb.ClaimTasksRequest, actor: Actor) -> ClaimTasks:
    """The command, its defaults included."""
    wait = span_of(request.wait, "wait", _ZERO, timedelta(seconds=30))
    return ClaimTasks(
        actor=actor,
        role=_role(request.role, "role"),
        max_tasks=_number(request.max_tasks or DEFAULT_MAX_TASKS, "max_tasks", 1, 100),
        wait_seconds=wait.total_seconds(),
    )


def lease_id(request: tasks_pb.HeartbeatTaskRequest) -> UUID:
    """Under which lease the caller acts."""
    return parse_id(request.lease_id, "lease_id")


def progress(request: tasks_pb.HeartbeatTaskRequest) -> dict[str, Any] | None:
    """The progress told; None if none is."""
    return struct_to_dict(request.progress, "progress") if request.HasField("progress") else None


def complete_task(request: tasks_pb.CompleteTaskRequest, actor: Actor) -> CompleteTask:
    """The command."""
    return CompleteTask(
        actor=actor,
        id=parse_id(request.task_id, "task_id"),
        lease_id=parse_id(request.lease_id, "lease_id"),
        result=struct_to_dict(request.result, "result"),
    )


def fail_task(request: tasks_pb.FailTaskRequest, actor: Actor) -> FailTask:
    """The command."""
    if not request.HasField("error"):
        raise invalid_field("error", "Required.", "FIELD_REQUIRED")
    return FailTask(
        actor=actor,
        id=parse_id(request.task_id, "task_id"),
        lease_id=parse_id(request.lease_id, "lease_id"),
        error=TaskError(
            code=_name(request.error.code, "error.code"),
            message=_text(request.error.message, "error.message", MAX_ERROR_MESSAGE),
            non_retryable=request.error.non_retryable,
        ),
    )


def release_task(request: tasks_pb.ReleaseTaskRequest, actor: Actor) -> ReleaseTask:
    """The command."""
    return ReleaseTask(
        actor=actor,
        id=parse_id(request.task_id, "task_id"),
        lease_id=parse_id(request.lease_id, "lease_id"),
    )


def fill_task(message: tasks_pb.Task, task: Task) -> None:
    """Writes a task into an empty message."""
    message.id = str(task.id)
    message.session_id = str(task.session_id)
    message.type = task.type
    message.from_role = task.from_role
    message.target_role = task.target_role
    message.description = task.description
    if task.data:
        fill_struct(message.data, task.data)
    if task.context:
        fill_struct(message.context, task.context)
    message.trace_id = task.trace_id
    message.priority = task.priority
    fill_time(message.schedule_time, task.schedule_time)
    message.attempt = task.attempt
    message.max_attempts = task.max_attempts
    fill_span(message.retry_backoff, task.retry_backoff)
    fill_span(message.lease_timeout, task.lease_timeout)
    if task.attempt_timeout is not None:
        fill_span(message.attempt_timeout, task.attempt_timeout)
    message.state = _TASK_STATE_NUMBERS[task.state]
    if task.result is not None:
        fill_struct(message.result, task.result)
    if task.error is not None:
        message.error.code = task.error.code
        message.error.message = task.error.message
        message.error.non_retryable = task.error.non_retryable
    if task.progress is not None:
        fill_struct(message.progress, task.progress)
    message.lease_holder = task.lease_holder
    if task.lease_expire_time is not None:
        fill_time(message.lease_expire_time, task.lease_expire_time)
    fill_time(message.create_time, task.create_time)
    fill_time(message.update_time, task.update_time)
    if task.start_time is not None:
        fill_time(message.start_time, task.start_time)
    if task.end_time is not None:
        fill_time(message.end_time, task.end_time)
    message.etag = str(task.version)


def task_answer(response: type[TaskResponse]) -> Callable[[Task], bytes]:
    """Makes the answer's bytes of a task, for a method that answers with this message."""

    def answer(task: Task) -> bytes:
        message = response()
        fill_task(message.task, task)
        return message.SerializeToString()

    return answer


def claim_answer(claimed: Sequence[tuple[Task, UUID]]) -> bytes:
    """The answer's bytes of a claim: each task with its new lease."""
    message = tasks_pb.ClaimTasksResponse()
    for task, lease in claimed:
        item = message.tasks.add()
        fill_task(item.task, task)
        item.lease_id = str(lease)
    return message.SerializeToString()


def heartbeat_answer(result: HeartbeatResult) -> bytes:
    """The answer's bytes of a heartbeat."""
    message = tasks_pb.HeartbeatTaskResponse(cancelled=result.cancelled)
    if result.lease_expire_time is not None:
        fill_time(message.lease_expire_time, result.lease_expire_time)
    return message.SerializeToString()


# -- audit --


class AuditFilters(TypedDict):
    """What ListAuditEvents selects by; None selects all."""

    resource_id: UUID | None
    method: str | None
    subject: str | None
    start_time: datetime | None
    end_time: datetime | None


def audit_filters(request: audit_pb.ListAuditEventsRequest) -> AuditFilters:
    """The filters of a list of audit events."""
    return {
        "resource_id": parse_id(request.resource_id, "resource_id") if request.resource_id else None,
        "method": _text(request.method, "method", MAX_FILTER) or None,
        "subject": _text(request.subject, "subject", MAX_FILTER) or None,
        "start_time": time_of(request.start_time, "start_time") if request.HasField("start_time") else None,
        "end_time": time_of(request.end_time, "end_time") if request.HasField("end_time") else None,
    }


def fill_audit_event(message: audit_pb.AuditEvent, event: RecordedAuditEvent) -> None:
    """Writes an audit event into an empty message."""
    message.id = str(event.id)
    fill_time(message.create_time, event.create_time)
    message.method = event.method
    message.resource_type = event.resource_type
    message.resource_id = str(event.resource_id)
    message.version_before = event.version_before
    message.version_after = event.version_after
    message.state_before = event.state_before
    message.state_after = event.state_after
    message.subject = event.subject
    message.role = event.role
    message.on_behalf_of = event.on_behalf_of
    message.trace_id = event.trace_id
    if event.key_hash is not None:
        message.idempotency_key_hash = event.key_hash.hex()
    message.command_id = str(event.command_id)


# -- records --


def key_scope(request: KeyRequest, principal: Principal) -> bytes:
    """The scope of the key that an operator names; always one of the operator's own tenant."""
    method = _guarded_method(request.method)
    if not request.subject:
        raise invalid_field("subject", "Required.", "FIELD_REQUIRED")
    subject = _text(request.subject, "subject", MAX_FILTER)
    issuer = _text(request.issuer, "issuer", MAX_FILTER) or principal.issuer
    if not request.idempotency_key:
        raise invalid_field("idempotency_key", "Required.", "FIELD_REQUIRED")
    try:
        idempotency_key([request.idempotency_key])
    except InvalidArgument:
        raise invalid_field("idempotency_key", "Must be 1 to 255 visible ASCII characters.") from None
    return scope_of(issuer, principal.tenant, subject, method, request.idempotency_key)


def _guarded_method(name: str) -> str:
    """The name, if it is that of a method that writes under a key."""
    if not name:
        raise invalid_field("method", "Required.", "FIELD_REQUIRED")
    service, _, method = name.removeprefix("/").partition("/")
    try:
        found = descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
        write = found.GetOptions().Extensions[options_pb2.policy].write
    except KeyError:
        write = options_pb2.WRITE_MODE_UNSPECIFIED
    if write != options_pb2.WRITE_MODE_GUARDED or name != f"/{found.containing_service.full_name}/{found.name}":
        raise invalid_field("method", "Must be the full name of a method that writes under a key.")
    return name


def fill_guard(message: records_pb.Guard, guard: GuardFacts) -> None:
    """Writes a guard into an empty message."""
    message.code = guard.code
    fill_time(message.create_time, guard.create_time)
    fill_time(message.expire_time, guard.expire_time)
    message.command_id = str(guard.command_id)
    message.fingerprint_kinds.extend(kinds_of(guard.fingerprints))
    message.answer_bytes = guard.answer_bytes


def fill_record(message: records_pb.Record, record: RecordFacts) -> None:
    """Writes a record into an empty message."""
    message.state = _RECORD_STATE_NUMBERS[record.state]
    fill_span(message.ttl_left, record.ttl_left)
    if record.lease_left is not None:
        fill_span(message.lease_left, record.lease_left)
    message.epoch = record.epoch
    message.code = record.code
    message.durable = record.durable
    message.timeline = record.timeline
    message.fingerprint_kinds.extend(record.fingerprint_kinds)
    message.answer_bytes = record.answer_bytes
    if record.age is not None:
        fill_span(message.age, record.age)


# -- status --


def fill_component(message: status_pb.Component, component: Component) -> None:
    """Writes the state of a dependency into an empty message."""
    if component.up is None:
        message.state = status_pb.Component.STATE_DISABLED
    else:
        message.state = status_pb.Component.STATE_UP if component.up else status_pb.Component.STATE_DOWN
    message.detail = component.detail
    fill_time(message.since_time, component.since)
