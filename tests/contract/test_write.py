"""The statement that writes, one rule of its docstring at a time, on a real Postgres."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from controller_svc.core.audit import AuditEvent
from controller_svc.core.ids import new_id
from controller_svc.core.mutations import Actor, Decision, Key
from controller_svc.core.sessions import ChangeSession, CreateSession, Session, SessionMutations
from controller_svc.core.tasks import CancelTask, RouteTask, TaskMutations
from controller_svc.store import arrays
from controller_svc.store.read import read_guards, read_rows
from controller_svc.store.write import Outcome, Write, write

Connection = psycopg.AsyncConnection[Any]

ACTOR = Actor(issuer="i", tenant="t", subject="s", roles=frozenset({"finance"}), operate=False)
SESSIONS = SessionMutations(timedelta(days=7))
TASKS = TaskMutations()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """One connection as the pools have it."""
    async with await _connect(database_url) as connection:
        yield connection


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A stranger's connection."""
    async with await _connect(database_url) as connection:
        yield connection


async def _connect(url: str) -> Connection:
    connection = await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=0)
    arrays.register(connection)
    await connection.execute("set lock_timeout = 250")
    return connection


def created() -> Decision:
    """A new session."""
    command = CreateSession(
        actor=ACTOR, id=new_id(), agent_role="finance", task_id=None, metadata={"a": ["ü", 1.5, None]}
    )
    return SESSIONS.create.decide(command, {}, datetime.now(UTC))


def activated(session: Session) -> Decision:
    """A PENDING session made ACTIVE."""
    key = Key("sessions", session.tenant, session.id)
    return SESSIONS.activate.decide(ChangeSession(actor=ACTOR, id=session.id), {key: session}, datetime.now(UTC))


def routed(session: Session) -> Decision:
    """A new task of a session."""
    command = RouteTask(
        actor=ACTOR,
        id=new_id(),
        session_id=session.id,
        type="ROUTING",
        target_role="engineering",
        description="",
        data={},
        context={},
        trace_id="",
        priority=0,
        schedule_time=None,
        max_attempts=3,
        retry_backoff=timedelta(seconds=1),
        lease_timeout=timedelta(seconds=30),
        attempt_timeout=None,
    )
    return TASKS.route.decide(command, {Key("sessions", "t", session.id): session}, datetime.now(UTC))


def write_of(decision: Decision | None = None, **changes: Any) -> Write:
    """A decision with a scope of its own; `changes` to the Write's fields."""
    command_id = uuid4()
    values: dict[str, Any] = {
        "command_id": command_id,
        "tenant": "t",
        "scope": hashlib.sha256(command_id.bytes).digest(),
        "fingerprints": b"f" * 32,
        "code": 0,
        "answer": b"answer",
        "lifetime": timedelta(hours=48),
        "not_after": datetime.now(UTC) + timedelta(seconds=60),
        "method": "/test/Method",
        "subject": "s",
        "on_behalf_of": "",
        "trace_id": "",
        "key_hash": b"k" * 32,
        "rows": decision.rows if decision else (),
        "events": decision.events if decision else (),
    }
    return Write(**{**values, **changes})


async def outcomes(connection: Connection, *writes: Write, wait: bool = False) -> list[Outcome]:
    """Runs the statement for a group."""
    return (await write(connection, writes, wait=wait))[0]


async def session_in(connection: Connection) -> Session:
    """A stored PENDING session."""
    decision = created()
    assert await outcomes(connection, write_of(decision)) == [Outcome.WON]
    return decision.rows[0]  # type: ignore[return-value]


async def count(connection: Connection, table: str) -> int:
    """Rows of a table."""
    row = await (await connection.execute(f"select count(*) from {table}")).fetchone()
    assert row is not None
    return int(row[0])


async def counts(connection: Connection) -> tuple[int, int, int, int]:
    """Sessions, tasks, audit rows, guards."""
    sessions, tasks = await count(connection, "sessions"), await count(connection, "tasks")
    return sessions, tasks, await count(connection, "audit_events"), await count(connection, "idempotency_guards")


async def test_what_is_written_is_what_was_decided(connection: Connection) -> None:
    session, new = await session_in(connection), created()
    changed, task = activated(session), routed(session)
    group = [write_of(changed), write_of(new), write_of(task), write_of(None, code=9, answer=b"refused")]
    assert await outcomes(connection, *group) == [Outcome.WON] * 4
    for row in (changed.rows[0], new.rows[0], task.rows[0]):
        key = Key(row.table, row.tenant, row.id)
        assert (await read_rows(connection, [key]))[key] == row
    guards = await read_guards(connection, [(w.tenant, w.scope) for w in group])
    assert [(guards[w.scope].command_id, guards[w.scope].code, guards[w.scope].answer) for w in group] == [
        (w.command_id, w.code, w.answer) for w in group
    ]
    assert await counts(connection) == (2, 1, 4, 5)


async def test_an_audit_row_says_who_what_and_by_which_command(connection: Connection) -> None:
    session = await session_in(connection)
    command = write_of(activated(session), on_behalf_of="o", trace_id="abc")
    await outcomes(connection, command)
    cursor = await connection.execute(
        "select tenant, method, resource_type, resource_id, version_before, version_after, state_before, state_after,"
        " subject, role, on_behalf_of, trace_id, key_hash, command_id from audit_events order by id desc limit 1"
    )
    assert await cursor.fetchone() == (
        *("t", "/test/Method", "session", session.id, 1, 2, "PENDING", "ACTIVE", "s", "finance", "o", "abc"),
        *(b"k" * 32, command.command_id),
    )


async def test_a_scope_is_won_once_and_lost_ever_after(connection: Connection) -> None:
    first = write_of(created())
    second = write_of(created(), scope=first.scope)
    assert await outcomes(connection, first) == [Outcome.WON]
    assert await outcomes(connection, second, write_of(created())) == [Outcome.LOST, Outcome.WON]
    assert await outcomes(connection, first) == [Outcome.LOST], (
        "the identical statement again is recognised by command id"
    )
    guard = (await read_guards(connection, [("t", first.scope)]))[first.scope]
    assert guard.command_id == first.command_id
    assert await counts(connection) == (2, 0, 2, 2)


async def test_a_refusal_that_is_kept_stops_a_stalled_first_owner(connection: Connection) -> None:
    session = await session_in(connection)
    stalled = write_of(activated(session))
    refused = write_of(None, scope=stalled.scope, code=9, answer=b"refused")
    assert await outcomes(connection, refused) == [Outcome.WON]
    assert await outcomes(connection, stalled) == [Outcome.LOST]
    assert await counts(connection) == (1, 0, 1, 2)


async def test_a_row_that_moved_leaves_no_guard(connection: Connection) -> None:
    session = await session_in(connection)
    decision = activated(session)
    assert await outcomes(connection, write_of(decision)) == [Outcome.WON]
    late = write_of(decision)
    assert await outcomes(connection, late, write_of(created())) == [Outcome.STALE, Outcome.WON]
    assert await read_guards(connection, [("t", late.scope)]) == {}


async def test_a_heartbeat_between_reading_and_writing_makes_a_task_stale(connection: Connection) -> None:
    session = await session_in(connection)
    routing = routed(session)
    assert await outcomes(connection, write_of(routing)) == [Outcome.WON]
    await connection.execute("update tasks set beat = beat + 1")
    key = Key("tasks", "t", routing.rows[0].id)
    command = CancelTask(actor=ACTOR, id=routing.rows[0].id, reason="")
    cancelled = TASKS.cancel.decide(command, {key: routing.rows[0]}, datetime.now(UTC))
    assert await outcomes(connection, write_of(cancelled)) == [Outcome.STALE]
    now = (await read_rows(connection, [key]))[key]
    cancelled = TASKS.cancel.decide(command, {key: now}, datetime.now(UTC))
    assert await outcomes(connection, write_of(cancelled)) == [Outcome.WON]


async def test_a_group_never_waits_for_a_row_a_parent_or_a_scope(connection: Connection, other: Connection) -> None:
    held, free = await session_in(connection), await session_in(connection)
    scope = write_of(created())
    async with other.transaction():
        await other.execute("select from sessions where id = %s for update", (held.id,))
        await other.execute("select pg_advisory_xact_lock(%s)", (int.from_bytes(scope.scope[:8], "big", signed=True),))
        group = [
            write_of(activated(held)),
            write_of(routed(held)),
            scope,
            write_of(activated(free)),
            write_of(routed(free)),
        ]
        assert await outcomes(connection, *group) == [
            *(Outcome.STALE, Outcome.STALE, Outcome.BUSY),
            *(Outcome.WON, Outcome.WON),
        ]
    assert await outcomes(connection, *group[:3]) == [Outcome.WON] * 3


async def test_a_command_alone_waits_for_its_row_but_not_for_ever(connection: Connection, other: Connection) -> None:
    held = await session_in(connection)
    command = write_of(activated(held))
    async with other.transaction():
        await other.execute("select from sessions where id = %s for update", (held.id,))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await outcomes(connection, command, wait=True)
    await connection.execute("set lock_timeout = '30s'")
    async with other.transaction() as transaction:
        await other.execute("update sessions set metadata = '{}' where id = %s", (held.id,))
        waiting = asyncio.create_task(outcomes(connection, command, wait=True))
        await asyncio.sleep(0.05)
        transaction.force_rollback = True
    assert await waiting == [Outcome.WON]


async def test_what_a_waiting_command_was_decided_on_must_still_hold_when_it_gets_its_lock(
    connection: Connection, other: Connection
) -> None:
    held = await session_in(connection)
    command = write_of(activated(held))
    await connection.execute("set lock_timeout = '30s'")
    async with other.transaction():
        await other.execute("update sessions set version = version + 1 where id = %s", (held.id,))
        waiting = asyncio.create_task(outcomes(connection, command, wait=True))
        await asyncio.sleep(0.05)
    assert await waiting == [Outcome.STALE]
    assert await read_guards(connection, [("t", command.scope)]) == {}


async def test_a_scope_won_while_it_was_waited_for_is_lost(connection: Connection, other: Connection) -> None:
    mine = write_of(created())
    theirs = write_of(created(), scope=mine.scope)
    await connection.execute("set lock_timeout = '30s'")
    async with other.transaction():
        assert await outcomes(other, theirs) == [Outcome.WON]
        waiting = asyncio.create_task(outcomes(connection, mine, wait=True))
        await asyncio.sleep(0.05)
    assert await waiting == [Outcome.LOST]
    assert await counts(connection) == (1, 0, 1, 1)


async def test_too_late_is_told_apart_from_busy(connection: Connection) -> None:
    late = write_of(created(), not_after=datetime.now(UTC) - timedelta(seconds=1))
    assert await outcomes(connection, late, write_of(created())) == [Outcome.EXPIRED, Outcome.WON]
    assert await read_guards(connection, [("t", late.scope)]) == {}


async def test_an_expired_guard_is_absent_for_reading_and_writing(connection: Connection) -> None:
    brief = write_of(created(), lifetime=timedelta(microseconds=1))
    assert await outcomes(connection, brief) == [Outcome.WON]
    assert await read_guards(connection, [("t", brief.scope)]) == {}
    again = write_of(created(), scope=brief.scope)
    assert await outcomes(connection, again) == [Outcome.WON]
    assert (await read_guards(connection, [("t", brief.scope)]))[brief.scope].command_id == again.command_id


async def test_the_same_number_in_another_tenant_is_another_row(connection: Connection) -> None:
    session = await session_in(connection)
    foreign = write_of(activated(session), tenant="other")
    task = write_of(routed(session), tenant="other")
    assert await outcomes(connection, foreign, task) == [Outcome.STALE, Outcome.STALE]


async def test_one_bad_value_fails_the_statement_and_nothing_is_written(connection: Connection) -> None:
    event = AuditEvent(
        resource_type="session",
        resource_id=uuid4(),
        version_before=0,
        version_after=5,
        state_before="",
        state_after="PENDING",
        role="",
    )
    with pytest.raises(psycopg.errors.CheckViolation):
        await outcomes(connection, write_of(created()), write_of(None, events=(event,)))
    assert await counts(connection) == (0, 0, 0, 0)
