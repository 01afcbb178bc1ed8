"""The one statement that writes: guards, rows at exactly the versions that were read, audit rows, for a group at once.

What it relies on, in Postgres' terms (READ COMMITTED, one autocommit statement):

- A command takes part only while its scope's advisory lock is ours, so a guard conflict is never with a write under
  way.
- Rows are locked in key order before anything is changed, and only at the version the decision was made on. A group
  skips what is locked elsewhere; a command alone waits for it (`lock_timeout` bounds the wait).
- A guard is inserted only when all rows of its command are locked; effects and audit rows join the guards that were
  inserted.
- If rows moved and guards won should ever differ, the division by zero at the end rolls the whole group back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from struct import unpack_from
from typing import TYPE_CHECKING, Any

from psycopg import AsyncRawCursor

from controller_svc.store.arrays import Array, Blobs, Ints, Jsons, Longs, Spans, Texts, Times, Uuids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    import psycopg

    from controller_svc.core.audit import AuditEvent
    from controller_svc.core.mutations import Row


@dataclass(slots=True)
class Write:
    """One command's share of a statement: what is to be true afterwards, and the guard that makes it true once."""

    command_id: UUID
    tenant: str
    scope: bytes
    fingerprints: bytes
    """Packed (controller_svc/fingerprint.py)."""
    code: int
    """gRPC status code of the answer; 0 is OK."""
    answer: bytes
    lifetime: timedelta
    """How long the guard lives."""
    not_after: datetime
    """By Postgres' clock: later than this, the command does nothing."""
    method: str
    subject: str
    on_behalf_of: str
    trace_id: str
    key_hash: bytes | None
    rows: tuple[Row, ...] = ()
    events: tuple[AuditEvent, ...] = ()


class Outcome(Enum):
    """What became of one command."""

    WON = "won"
    """Guard, rows and audit rows are written."""
    LOST = "lost"
    """The scope has a guard already: its answer counts. It may be this very command's, sent twice."""
    STALE = "stale"
    """A row is locked by somebody, or no longer at the version that was read. Nothing is written."""
    BUSY = "busy"
    """Somebody holds the scope: a write of the same key is under way. Nothing is written."""
    EXPIRED = "expired"
    """`not_after` is over, and no write of the scope is under way. Nothing is written, nor ever will be."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table and where its values come from."""

    name: str
    array: type[Array]
    value: Callable[[Any], Any]
    changes: bool = True
    """False: set when the row is new, never after."""


@dataclass(frozen=True, slots=True)
class Table:
    """How rows of one table are written."""

    name: str
    columns: tuple[Column, ...]
    same_version: str
    """Holds for row `r` and new values `n` when the row is as the decision saw it."""
    parent: tuple[str, str] | None = None
    """(table, column of ours) of the row a new one belongs to."""
    touch: str = ""
    """Further assignments of a change."""


def _column(name: str, array: type[Array], *, changes: bool = True) -> Column:
    return Column(name, array, attrgetter(name), changes)


def _span(name: str) -> Column:
    return Column(f"{name}_us", Spans, attrgetter(name), changes=False)


def _error(row: Any) -> dict[str, Any] | None:
    error = row.error
    if error is None:
        return None
    return {"code": error.code, "message": error.message, "non_retryable": error.non_retryable}


SESSIONS = Table(
    "sessions",
    (
        _column("id", Uuids, changes=False),
        _column("version", Longs),
        _column("agent_role", Texts, changes=False),
        _column("state", Texts),
        _column("task_id", Uuids),
        _column("metadata", Jsons),
        _column("create_time", Times, changes=False),
        _column("update_time", Times),
        _column("expire_time", Times),
        _column("start_time", Times),
        _column("pause_time", Times),
        _column("end_time", Times),
    ),
    same_version="r.version = n.version - 1",
)

TASKS = Table(
    "tasks",
    (
        _column("id", Uuids, changes=False),
        _column("version", Longs),
        _column("beat", Longs, changes=False),
        _column("session_id", Uuids, changes=False),
        _column("type", Texts, changes=False),
        _column("from_role", Texts, changes=False),
        _column("target_role", Texts, changes=False),
        _column("description", Texts, changes=False),
        _column("data", Jsons, changes=False),
        _column("context", Jsons, changes=False),
        _column("trace_id", Texts, changes=False),
        _column("priority", Ints, changes=False),
        _column("schedule_time", Times),
        _column("attempt", Ints),
        _column("max_attempts", Ints, changes=False),
        _span("retry_backoff"),
        _span("lease_timeout"),
        _span("attempt_timeout"),
        _column("state", Texts),
        _column("result", Jsons),
        Column("error", Jsons, _error),
        _column("progress", Jsons),
        _column("lease_id", Uuids),
        _column("lease_holder", Texts),
        _column("lease_expire_time", Times),
        _column("create_time", Times, changes=False),
        _column("update_time", Times),
        _column("start_time", Times),
        _column("end_time", Times),
    ),
    same_version="r.version = n.version - 1 and r.beat = n.beat",
    parent=("sessions", "session_id"),
    touch=", xid = pg_current_xact_id()",
)

TABLES = {table.name: table for table in (SESSIONS, TASKS)}

_COMMAND: tuple[Column, ...] = (
    _column("tenant", Texts),
    _column("scope", Blobs),
    Column("lock", Longs, lambda write: unpack_from(">q", write.scope)[0]),
    _column("command_id", Uuids),
    Column("fingerprint", Blobs, attrgetter("fingerprints")),
    _column("code", Ints),
    _column("answer", Blobs),
    _column("lifetime", Spans),
    _column("not_after", Times),
    Column("moves", Longs, lambda write: len([row for row in write.rows if row.version > 1])),
    Column(
        "parents",
        Longs,
        lambda write: len([row for row in write.rows if row.version == 1 and TABLES[row.table].parent]),
    ),
    _column("method", Texts),
    _column("subject", Texts),
    _column("on_behalf_of", Texts),
    _column("trace_id", Texts),
    _column("key_hash", Blobs),
)

_EVENT: tuple[Column, ...] = (
    _column("resource_type", Texts),
    _column("resource_id", Uuids),
    _column("version_before", Longs),
    _column("version_after", Longs),
    _column("state_before", Texts),
    _column("state_after", Texts),
    _column("role", Texts),
)

Shape = tuple[frozenset[str], frozenset[str], bool]
"""Tables with new rows, tables with changed rows, whether there are audit events."""


async def write(
    connection: psycopg.AsyncConnection[Any], writes: Sequence[Write], *, wait: bool = False
) -> tuple[list[Outcome], datetime]:
    """Runs the statement for one group and returns each command's outcome, in order, and Postgres' time.

    With `wait` (for a command alone) locks are waited for instead of skipped. Raises psycopg.Error; then nothing is
    known but what the error says.
    """
    new: dict[str, list[tuple[int, Any]]] = {}
    changed: dict[str, list[tuple[int, Any]]] = {}
    events: list[tuple[int, Any]] = []
    for ord_, command in enumerate(writes):
        for row in command.rows:
            (new if row.version == 1 else changed).setdefault(row.table, []).append((ord_, row))
        for event in command.events:
            events.append((ord_, event))

    parameters = _arrays(enumerate(writes), _COMMAND)
    for table in TABLES.values():
        if table.name in changed:
            parameters += _arrays(changed[table.name], table.columns)
    for table in TABLES.values():
        if table.name in new:
            parameters += _arrays(new[table.name], table.columns)
    if events:
        parameters += _arrays(events, _EVENT)

    text = statement((frozenset(new), frozenset(changed), bool(events)), wait)
    cursor = AsyncRawCursor(connection)
    await cursor.execute(text, parameters, binary=True)
    outcomes = [Outcome.BUSY] * len(writes)
    time = None
    for ord_, locked, live, ready, won, time in await cursor.fetchall():  # noqa: B007 - the last row's time is used
        if won:
            outcomes[ord_] = Outcome.WON
        elif not locked:
            outcomes[ord_] = Outcome.BUSY
        elif not live:
            outcomes[ord_] = Outcome.EXPIRED
        elif ready:
            outcomes[ord_] = Outcome.LOST
        else:
            outcomes[ord_] = Outcome.STALE
    assert time is not None
    return outcomes, time


def _arrays(rows: Iterable[tuple[int, Any]], columns: tuple[Column, ...]) -> list[Array]:
    ords, values = zip(*rows, strict=True)
    return [Ints.of(ords), *[column.array.of([*map(column.value, values)]) for column in columns]]


@cache
def statement(shape: Shape, wait: bool) -> str:
    """The text for a group of this shape; one per set of tables touched."""
    new, changed, events = shape
    skip = "" if wait else "skip locked"
    lock = "pg_advisory_xact_lock(t.lock)::text is not null" if wait else "pg_try_advisory_xact_lock(t.lock)"
    parameter = 0

    def unnest(columns: tuple[Column, ...]) -> str:
        nonlocal parameter
        types = ["int[]", *(column.array.type for column in columns)]
        numbers = range(parameter + 1, parameter + 1 + len(types))
        parameter += len(types)
        arrays = ", ".join(f"${number}::{type_}" for number, type_ in zip(numbers, types, strict=True))
        names = ", ".join(["ord", *(column.name for column in columns)])
        return f"unnest({arrays}) as t({names})"

    clock = "clock_timestamp()"
    parts = [f"c as materialized (select t.*, {lock} as locked, {clock} < t.not_after as live from {unnest(_COMMAND)})"]
    for table in TABLES.values():
        if table.name in changed:
            parts.append(f"changed_{table.name} as materialized (select * from {unnest(table.columns)})")
            parts.append(
                f"locked_{table.name} as materialized (select c.ord from {table.name} r"
                f" join changed_{table.name} n on n.id = r.id join c on c.ord = n.ord and c.tenant = r.tenant"
                f" where c.locked and c.live and {table.same_version}"
                f" order by r.tenant, r.id for no key update of r {skip})"
            )
    for table in TABLES.values():
        if table.name in new:
            parts.append(f"new_{table.name} as materialized (select * from {unnest(table.columns)})")
            if table.parent:
                parent, column = table.parent
                parts.append(
                    f"parents_{table.name} as materialized (select c.ord from {parent} r"
                    f" join new_{table.name} n on n.{column} = r.id join c on c.ord = n.ord and c.tenant = r.tenant"
                    f" where c.locked and c.live order by r.tenant, r.id for key share of r {skip})"
                )
    parts.append(_ready(new, changed))
    parts.append(
        "g as (insert into idempotency_guards as k"
        " (tenant, scope, command_id, fingerprint, code, answer, create_time, expire_time)"
        " select tenant, scope, command_id, fingerprint, code, answer, clock_timestamp(),"
        " clock_timestamp() + lifetime * interval '1 microsecond' from ready order by tenant, scope"
        " on conflict (tenant, scope) do update set"
        " command_id = excluded.command_id, fingerprint = excluded.fingerprint, code = excluded.code,"
        " answer = excluded.answer, create_time = excluded.create_time, expire_time = excluded.expire_time"
        " where k.expire_time <= clock_timestamp() returning k.command_id)"
    )
    parts.append("won as materialized (select ready.* from ready join g using (command_id))")
    parts.extend(_effects(new, changed))
    if events:
        names = ", ".join(column.name for column in _EVENT)
        fields = ", ".join(f"t.{column.name}" for column in _EVENT)
        parts.append(
            "a as (insert into audit_events"
            f" (tenant, method, {names}, subject, on_behalf_of, trace_id, key_hash, command_id)"
            f" select won.tenant, won.method, {fields},"
            " won.subject, won.on_behalf_of, won.trace_id, won.key_hash, won.command_id"
            f" from {unnest(_EVENT)} join won on won.ord = t.ord)"
        )
    moved = " + ".join(f"(select count(*) from moved_{name})" for name in TABLES if name in changed) or "0"
    return (
        f"with {', '.join(parts)} select c.ord, c.locked, c.live, ready.ord is not null, won.ord is not null,"
        " clock_timestamp()"
        " from c left join ready on ready.ord = c.ord left join won on won.ord = c.ord"
        f" where 1 = 1 / (case when (select coalesce(sum(moves), 0) from won) = {moved} then 1 else 0 end)"
    )


def _ready(new: frozenset[str], changed: frozenset[str]) -> str:
    """The commands whose rows are all locked at their versions, and whose parents are there."""
    text = "ready as materialized (select c.* from c"
    where = ["c.locked", "c.live"]
    for name, count, tables in (
        ("l", "moves", [f"locked_{table}" for table in TABLES if table in changed]),
        ("p", "parents", [f"parents_{name}" for name, table in TABLES.items() if name in new and table.parent]),
    ):
        if tables:
            rows = " union all ".join(f"select ord from {table}" for table in tables)
            text += f" left join (select ord, count(*) as n from ({rows}) u group by ord) {name} on {name}.ord = c.ord"
            where.append(f"coalesce({name}.n, 0) = c.{count}")
    return f"{text} where {' and '.join(where)})"


def _effects(new: frozenset[str], changed: frozenset[str]) -> Iterable[str]:
    for table in TABLES.values():
        if table.name in changed:
            values = ", ".join(f"{column.name} = n.{column.name}" for column in table.columns if column.changes)
            yield (
                f"moved_{table.name} as (update {table.name} r set {values}{table.touch}"
                f" from changed_{table.name} n join won on won.ord = n.ord"
                f" where r.tenant = won.tenant and r.id = n.id and {table.same_version} returning r.id)"
            )
        if table.name in new:
            names = ", ".join(column.name for column in table.columns)
            fields = ", ".join(f"n.{column.name}" for column in table.columns)
            yield (
                f"created_{table.name} as (insert into {table.name} (tenant, {names})"
                f" select won.tenant, {fields} from new_{table.name} n join won on won.ord = n.ord)"
            )
