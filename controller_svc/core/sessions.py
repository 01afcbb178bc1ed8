"""Sessions: an agent's span of work, its state machine and the mutations that change it."""

from __future__ import annotations

import json
from dataclasses import field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol

from controller_svc.core.audit import AuditEvent
from controller_svc.core.mutations import Actor, Decision, Key, Keys, Lookup, Rows, Table
from controller_svc.core.values import value_class
from svckit.errors import Aborted, FailedPrecondition, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

SERVICE: Final = "/orchestrator.controller.v1.SessionService"
EXPIRE_METHOD: Final = "/orchestrator.controller.v1.Sweeper/ExpireSession"
MAX_METADATA_BYTES: Final = 16384
"""Limit of a session's metadata, as `metadata_size` measures it."""

Verb = Literal["Activate", "Pause", "Resume", "Complete", "Fail"]


class SessionState(StrEnum):
    """Where a session stands; COMPLETED, FAILED and EXPIRED are its ends."""

    PENDING = "PENDING"
    ACTIVE = "ACTIVE"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"


ENDED: Final = frozenset({SessionState.COMPLETED, SessionState.FAILED, SessionState.EXPIRED})
OPEN_FOR_TASKS: Final = frozenset({SessionState.PENDING, SessionState.ACTIVE})

MOVES: Final[Mapping[Verb, Mapping[SessionState, SessionState]]] = {
    "Activate": {SessionState.PENDING: SessionState.ACTIVE, SessionState.ACTIVE: SessionState.ACTIVE},
    "Pause": {SessionState.ACTIVE: SessionState.PAUSED, SessionState.PAUSED: SessionState.PAUSED},
    "Resume": {SessionState.PAUSED: SessionState.ACTIVE, SessionState.ACTIVE: SessionState.ACTIVE},
    "Complete": {SessionState.ACTIVE: SessionState.COMPLETED, SessionState.COMPLETED: SessionState.COMPLETED},
    "Fail": {SessionState.ACTIVE: SessionState.FAILED, SessionState.FAILED: SessionState.FAILED},
}
"""Per verb, the state it leads to from each state that accepts it; a state that leads to itself is left unchanged."""


@value_class(frozen=True, slots=True, kw_only=True)
class Session:
    """One version of a session. Times are aware and in whole microseconds."""

    table: ClassVar[Table] = "sessions"

    tenant: str
    id: UUID
    version: int
    agent_role: str
    state: SessionState
    task_id: UUID | None
    """The task it works on."""
    metadata: dict[str, Any]
    create_time: datetime
    update_time: datetime
    """Never goes back, whatever the clock does."""
    expire_time: datetime
    """When it is expired unless it changes before: update_time + retention. An expired session keeps the one it had."""
    start_time: datetime | None
    """When it was first activated."""
    pause_time: datetime | None
    """When it was last paused; kept when it is resumed."""
    end_time: datetime | None
    """Set exactly in the states COMPLETED, FAILED and EXPIRED."""


@value_class(frozen=True, slots=True, kw_only=True)
class CreateSession:
    """Open a session. That the actor holds `agent_role` is checked before, by the servicer."""

    actor: Actor
    id: UUID
    agent_role: str
    task_id: UUID | None
    metadata: dict[str, Any]


@value_class(frozen=True, slots=True, kw_only=True)
class UpdateSession:
    """Change what `paths` names.

    `metadata` is merged by top-level key, a null removing it; `metadata.<key>` sets one key, a null or its absence
    removing it; `task_id` is set, or removed if None.
    """

    actor: Actor
    id: UUID
    etag: str
    """The version it must still have; empty for any."""
    paths: tuple[str, ...]
    metadata: dict[str, Any]
    task_id: UUID | None


@value_class(frozen=True, slots=True, kw_only=True)
class ChangeSession:
    """Apply a verb to a session."""

    actor: Actor
    id: UUID
    etag: str = ""
    """The version it must still have; empty for any."""


class SessionStore(Protocol):
    """Reads of sessions. A filter that is None does not filter."""

    async def get(self, tenant: str, session_id: UUID) -> Session | None:
        """Must answer the tenant's session, None if it has no such session."""
        ...

    async def list(
        self,
        tenant: str,
        *,
        agent_role: str | None,
        state: SessionState | None,
        task_id: UUID | None,
        before: UUID | None,
        limit: int,
    ) -> Sequence[Session]:
        """Must answer at most `limit` sessions with an id below `before`, by id descending."""
        ...

    async def count(
        self, tenant: str, *, agent_role: str | None, state: SessionState | None, task_id: UUID | None
    ) -> int:
        """Must answer how many sessions the same filters select."""
        ...

    async def expirable(self, limit: int) -> Sequence[Key]:
        """Must answer at most `limit` sessions that are due to expire, of any tenant.

        They are not ended, their expire_time has passed by the store's clock and they have no unfinished task.
        """
        ...


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True).encode


def metadata_size(metadata: Mapping[str, Any]) -> int:
    """The bytes of its compact JSON in UTF-8."""
    return len(_encode(metadata).encode()) if metadata else 2


def session_not_found(session_id: UUID) -> NotFound:
    """The refusal for a session that the tenant does not have."""
    return NotFound(
        "SESSION_NOT_FOUND", f"Session {session_id} does not exist.", metadata={"session_id": str(session_id)}
    )


def task_not_found(task_id: UUID) -> NotFound:
    """The refusal for a task that the tenant does not have."""
    return NotFound("TASK_NOT_FOUND", f"Task {task_id} does not exist.", metadata={"task_id": str(task_id)})


def check_etag(etag: str, version: int) -> None:
    """Raises Aborted ETAG_MISMATCH unless the etag is empty or of this version."""
    if etag and etag != str(version):
        raise Aborted("ETAG_MISMATCH", "The resource has changed since it was read; read it again.")


@value_class(frozen=True, slots=True)
class _Create:
    retention: timedelta
    method: str = f"{SERVICE}/CreateSession"

    def reads(self, command: CreateSession, found: Rows) -> Keys:
        if command.task_id is None:
            return Keys()
        return Keys(look=(Key("tasks", command.actor.tenant, command.task_id),))

    def decide(self, command: CreateSession, found: Rows, now: datetime) -> Decision:
        """Raises NotFound TASK_NOT_FOUND."""
        _check_task(command.actor, command.task_id, found)
        session = Session(
            tenant=command.actor.tenant,
            id=command.id,
            version=1,
            agent_role=command.agent_role,
            state=SessionState.PENDING,
            task_id=command.task_id,
            metadata=command.metadata,
            create_time=now,
            update_time=now,
            expire_time=now + self.retention,
            start_time=None,
            pause_time=None,
            end_time=None,
        )
        event = AuditEvent(
            resource_type="session",
            resource_id=session.id,
            version_before=0,
            version_after=1,
            state_before="",
            state_after=session.state,
            role=command.actor.acting_role(session.agent_role),
        )
        return Decision((session,), session, (event,))


@value_class(frozen=True, slots=True)
class _Update:
    retention: timedelta
    method: str = f"{SERVICE}/UpdateSession"

    def reads(self, command: UpdateSession, found: Rows) -> Keys:
        tenant, task_id = command.actor.tenant, command.task_id
        look = (Key("tasks", tenant, task_id),) if task_id is not None and "task_id" in command.paths else ()
        return Keys(change=(Key("sessions", tenant, command.id),), look=look)

    def decide(self, command: UpdateSession, found: Rows, now: datetime) -> Decision:
        """Raises NotFound, PermissionDenied ROLE_NOT_HELD, Aborted, FailedPrecondition METADATA_TOO_LARGE."""
        session = _changeable(command, found)
        metadata = _merged(_as_given(session.metadata), command.paths, command.metadata)
        task_id = session.task_id
        if "task_id" in command.paths:
            _check_task(command.actor, command.task_id, found)
            task_id = command.task_id
        # Compared as JSON: to Python, True == 1.
        text = _encode(metadata)
        if task_id == session.task_id and text == _encode(_as_given(session.metadata)):
            return Decision((), session, ())
        if len(text.encode()) > MAX_METADATA_BYTES:
            raise FailedPrecondition(
                "METADATA_TOO_LARGE",
                f"The merged metadata would take more than {MAX_METADATA_BYTES} bytes of JSON.",
                metadata={"session_id": str(session.id)},
                violations=(("METADATA_TOO_LARGE", str(session.id), "The merged metadata is too large."),),
            )
        return _changed(command.actor, session, now, self.retention, metadata=metadata, task_id=task_id)


@value_class(frozen=True, slots=True)
class _Move:
    verb: Verb
    retention: timedelta
    method: str

    def reads(self, command: ChangeSession, found: Rows) -> Keys:
        return Keys(change=(Key("sessions", command.actor.tenant, command.id),))

    def decide(self, command: ChangeSession, found: Rows, now: datetime) -> Decision:
        """Raises NotFound, PermissionDenied ROLE_NOT_HELD, Aborted, FailedPrecondition SESSION_STATE_INVALID."""
        session = _changeable(command, found)
        state = MOVES[self.verb].get(session.state)
        if state is None:
            raise FailedPrecondition(
                "SESSION_STATE_INVALID",
                f"{self.verb}Session does not accept a session that is {session.state}.",
                metadata={"state": str(session.state), "verb": self.verb, "session_id": str(session.id)},
                violations=(("SESSION_STATE_INVALID", str(session.id), f"The session is {session.state}."),),
            )
        if state is session.state:
            return Decision((), session, ())
        return _changed(command.actor, session, now, self.retention, state=state)


@value_class(frozen=True, slots=True)
class _Expire:
    retention: timedelta
    method: str = EXPIRE_METHOD

    def reads(self, command: ChangeSession, found: Rows) -> Keys:
        tenant = command.actor.tenant
        return Keys((Key("sessions", tenant, command.id),), (Lookup("unfinished_tasks", tenant, command.id),))

    def decide(self, command: ChangeSession, found: Rows, now: datetime) -> Decision:
        """Never refuses: a session that is gone, ended, not due or has unfinished tasks is left as it is."""
        tenant = command.actor.tenant
        session: Session | None = found[Key("sessions", tenant, command.id)]
        if (
            session is None
            or session.state in ENDED
            or session.expire_time > now
            or found[Lookup("unfinished_tasks", tenant, command.id)]
        ):
            return Decision((), session, ())
        return _changed(command.actor, session, now, self.retention, state=SessionState.EXPIRED)


@value_class(frozen=True, slots=True)
class SessionMutations:
    """The use cases of sessions, for one retention (how long an idle session lives)."""

    retention: timedelta
    create: _Create = field(init=False)
    update: _Update = field(init=False)
    activate: _Move = field(init=False)
    pause: _Move = field(init=False)
    resume: _Move = field(init=False)
    complete: _Move = field(init=False)
    fail: _Move = field(init=False)
    expire: _Expire = field(init=False)

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        set_once(self, "create", _Create(self.retention))
        set_once(self, "update", _Update(self.retention))
        for verb in MOVES:
            set_once(self, verb.lower(), _Move(verb, self.retention, f"{SERVICE}/{verb}Session"))
        set_once(self, "expire", _Expire(self.retention))


def _changeable(command: UpdateSession | ChangeSession, found: Rows) -> Session:
    """The session that was read, if the actor may change it and the etag is its own."""
    session: Session | None = found[Key("sessions", command.actor.tenant, command.id)]
    if session is None:
        raise session_not_found(command.id)
    command.actor.require(session.agent_role)
    check_etag(command.etag, session.version)
    return session


def _check_task(actor: Actor, task_id: UUID | None, found: Rows) -> None:
    if task_id is not None and found[Key("tasks", actor.tenant, task_id)] is None:
        raise task_not_found(task_id)


def _as_given(value: Any) -> Any:
    """JSON as it was before it was stored: Postgres spells out the digits of 1e300, which reads as a long integer."""
    if isinstance(value, dict):
        return {key: _as_given(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_given(item) for item in value]
    return float(value) if isinstance(value, int) and abs(value) >= 2**53 else value


def _merged(current: dict[str, Any], paths: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    metadata = dict(current)
    for path in paths:
        if path == "metadata":
            keys = tuple(given)
        elif path.startswith("metadata."):
            keys = (path.removeprefix("metadata."),)
        else:
            continue
        for key in keys:
            value = given.get(key)
            if value is None:
                metadata.pop(key, None)
            else:
                metadata[key] = value
    return metadata


def _changed(actor: Actor, session: Session, now: datetime, retention: timedelta, **changes: Any) -> Decision:
    """The session's next version: `changes` and the times that follow from them."""
    at = max(now, session.update_time)
    state: SessionState = changes.get("state", session.state)
    if state is not session.state:
        if state is SessionState.ACTIVE and session.start_time is None:
            changes["start_time"] = at
        elif state is SessionState.PAUSED:
            changes["pause_time"] = at
        elif state in ENDED:
            changes["end_time"] = at
    if state is not SessionState.EXPIRED:
        changes["expire_time"] = at + retention
    after = replace(session, version=session.version + 1, update_time=at, **changes)
    event = AuditEvent(
        resource_type="session",
        resource_id=session.id,
        version_before=session.version,
        version_after=after.version,
        state_before=session.state,
        state_after=after.state,
        role=actor.acting_role(session.agent_role),
    )
    return Decision((after,), after, (event,))
