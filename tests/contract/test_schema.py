"""The schema as it is in a database: what it refuses, by constraint name, and that docs/SCHEMA.md tells the same.

`UPDATE_SCHEMA=1 pytest tests/contract/test_schema.py` writes docs/SCHEMA.md anew.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from controller_svc.core.sessions import Session, SessionState
from controller_svc.core.tasks import Task, TaskState
from controller_svc.store import audit, sessions, tasks
from tests.contract.rows import NOW, TENANT, insert, insert_values, new_session, new_task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

Connection = psycopg.AsyncConnection[Any]

SCHEMA = Path(__file__).parents[2] / "docs" / "SCHEMA.md"

SESSION = new_session()
RUNNING = new_task(SESSION, TaskState.RUNNING)
EVENT: dict[str, Any] = {
    "tenant": TENANT,
    "method": "/a.B/C",
    "resource_type": "session",
    "resource_id": SESSION.id,
    "version_before": 1,
    "version_after": 2,
    "state_before": "PENDING",
    "state_after": "ACTIVE",
    "subject": "agent-1",
    "role": "planner",
    "on_behalf_of": "",
    "trace_id": "",
    "key_hash": None,
    "command_id": uuid4(),
}
GUARD: dict[str, Any] = {
    "tenant": TENANT,
    "scope": bytes(32),
    "command_id": uuid4(),
    "fingerprint": bytes(32),
    "code": 0,
    "answer": b"",
    "create_time": NOW,
    "expire_time": NOW + timedelta(hours=1),
}


@pytest.fixture(scope="session")
def schema_url(new_database: Callable[..., str]) -> str:
    return new_database()


@pytest.fixture
async def connection(schema_url: str) -> AsyncIterator[Connection]:
    """A connection in a transaction that is rolled back: one database serves all tests here."""
    async with (
        await psycopg.AsyncConnection.connect(schema_url, autocommit=True) as connection,
        connection.transaction(force_rollback=True),
    ):
        yield connection


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("sessions_tenant_check", {"tenant": ""}),
        ("sessions_version_check", {"version": 0}),
        ("sessions_agent_role_check", {"agent_role": ""}),
        ("sessions_agent_role_check", {"agent_role": "r" * 65}),
        ("sessions_state_check", {"state": "IDLE", "start_time": NOW}),
        ("sessions_metadata_check", {"metadata": Jsonb([])}),
        ("sessions_update_time_check", {"update_time": NOW - timedelta(seconds=1)}),
        ("sessions_start_time_check", {"start_time": NOW}),
        ("sessions_start_time_check", {"state": "ACTIVE"}),
        ("sessions_pause_time_check", {"state": "PAUSED", "start_time": NOW}),
        ("sessions_end_time_check", {"state": "EXPIRED"}),
        ("sessions_end_time_check", {"end_time": NOW}),
    ],
)
async def test_sessions_refuse(connection: Connection, constraint: str, changes: dict[str, Any]) -> None:
    await refuses(connection, SESSION, constraint, changes)


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("tasks_session_id_fkey", {"session_id": uuid4()}),
        ("tasks_session_id_fkey", {"tenant": "other"}),
        ("tasks_version_check", {"version": 0}),
        ("tasks_beat_check", {"beat": -1}),
        ("tasks_type_check", {"type": "T" * 64}),
        ("tasks_from_role_check", {"from_role": ""}),
        ("tasks_target_role_check", {"target_role": ""}),
        ("tasks_description_check", {"description": "d" * 4097}),
        ("tasks_data_check", {"data": Jsonb(1)}),
        ("tasks_context_check", {"context": Jsonb(None)}),
        ("tasks_priority_check", {"priority": 101}),
        ("tasks_attempt_check", {"attempt": 4}),
        ("tasks_attempt_check", {"attempt": -1}),
        ("tasks_attempt_check", {"state": "PENDING", "lease_expire_time": None, "attempt": 3}),
        ("tasks_max_attempts_check", {"max_attempts": 101}),
        ("tasks_retry_backoff_check", {"retry_backoff": timedelta(hours=1, microseconds=1)}),
        ("tasks_lease_timeout_check", {"lease_timeout": timedelta(milliseconds=999)}),
        ("tasks_attempt_timeout_check", {"attempt_timeout": timedelta(hours=25)}),
        ("tasks_state_check", {"state": "LOST", "lease_expire_time": None}),
        ("tasks_result_check", {"result": Jsonb({})}),
        ("tasks_error_check", {"error": Jsonb({"code": "X", "message": ""})}),
        ("tasks_progress_check", {"progress": Jsonb([])}),
        ("tasks_lease_check", {"lease_expire_time": None}),
        ("tasks_lease_check", {"state": "PENDING"}),
        ("tasks_lease_check", {"lease_id": None, "lease_holder": ""}),
        ("tasks_lease_holder_check", {"lease_holder": ""}),
        ("tasks_lease_holder_check", {"start_time": None}),
        ("tasks_update_time_check", {"update_time": NOW - timedelta(seconds=1)}),
        ("tasks_end_time_check", {"end_time": NOW}),
        ("tasks_end_time_check", {"state": "DEAD", "lease_expire_time": None}),
    ],
)
async def test_tasks_refuse(connection: Connection, constraint: str, changes: dict[str, Any]) -> None:
    await insert(connection, SESSION)
    await refuses(connection, RUNNING, constraint, changes)


async def refuses(connection: Connection, row: Session | Task, constraint: str, changes: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.IntegrityError) as caught:
        await insert(connection, replace(row, **changes))
    assert caught.value.diag.constraint_name == constraint


@pytest.mark.parametrize("state", SessionState)
async def test_every_state_of_a_session_fits(connection: Connection, state: SessionState) -> None:
    await insert(connection, new_session(state))


@pytest.mark.parametrize("state", TaskState)
async def test_every_state_of_a_task_fits(connection: Connection, state: TaskState) -> None:
    await insert(connection, SESSION, new_task(SESSION, state))


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("audit_events_resource_type_check", {"resource_type": "agent"}),
        ("audit_events_version_check", {"version_after": 3}),
        ("audit_events_state_check", {"state_before": ""}),
        ("audit_events_state_check", {"version_before": 0, "version_after": 1}),
    ],
)
async def test_audit_events_refuse(connection: Connection, constraint: str, changes: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        await insert_values(connection, "audit_events", EVENT | changes)
    assert caught.value.diag.constraint_name == constraint


async def test_a_command_is_audited_once_per_resource(connection: Connection) -> None:
    await insert_values(connection, "audit_events", EVENT)
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        async with connection.transaction():
            await insert_values(connection, "audit_events", EVENT)
    assert caught.value.diag.constraint_name == "audit_events_command_key"
    await insert_values(connection, "audit_events", EVENT | {"resource_id": uuid4()})
    await insert_values(connection, "audit_events", EVENT | {"tenant": "other"})


@pytest.mark.parametrize(
    "statement",
    [
        "update audit_events set subject = 'nobody' where tenant = 'acme'",
        "update audit_events set subject = 'nobody' where false",
        "delete from audit_events",
        "truncate audit_events",
    ],
)
async def test_audit_events_are_append_only(connection: Connection, statement: str) -> None:
    await insert_values(connection, "audit_events", EVENT)
    with pytest.raises(psycopg.errors.RestrictViolation) as caught:
        async with connection.transaction():
            await connection.execute(statement)
    assert caught.value.diag.constraint_name == "audit_events_append_only"
    assert await (await connection.execute("select subject from audit_events")).fetchall() == [("agent-1",)]


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("idempotency_guards_scope_check", {"scope": bytes(31)}),
        ("idempotency_guards_fingerprint_check", {"fingerprint": b""}),
        ("idempotency_guards_code_check", {"code": 17}),
        ("idempotency_guards_expire_time_check", {"expire_time": NOW}),
    ],
)
async def test_guards_refuse(connection: Connection, constraint: str, changes: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        await insert_values(connection, "idempotency_guards", GUARD | changes)
    assert caught.value.diag.constraint_name == constraint


async def test_active_sessions_shows_those_that_are_active(connection: Connection) -> None:
    rows = [new_session(state) for state in SessionState]
    await insert(connection, *rows)
    cursor = await connection.execute("select tenant, id, agent_role from active_sessions")
    assert await cursor.fetchall() == [(TENANT, row.id, "planner") for row in rows if row.state is SessionState.ACTIVE]


@pytest.mark.parametrize(
    ("table", "columns", "unread"),
    [
        ("sessions", sessions.COLUMNS, set()),
        ("tasks", tasks.COLUMNS, {"xid"}),
        ("audit_events", audit.COLUMNS, {"xid"}),
    ],
)
async def test_every_column_is_read(connection: Connection, table: str, columns: str, unread: set[str]) -> None:
    cursor = await connection.execute(
        "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped", (table,)
    )
    assert {name for (name,) in await cursor.fetchall()} == set(columns.split(", ")) | unread


async def test_every_constraint_and_index_is_tested_or_said_to_be_for(connection: Connection) -> None:
    tested = {
        mark.args[1][number][0]
        for test in (test_sessions_refuse, test_tasks_refuse, test_audit_events_refuse, test_guards_refuse)
        for mark in test.pytestmark
        for number in range(len(mark.args[1]))
    } | {"audit_events_command_key"}
    cursor = await connection.execute(
        "select conname from pg_constraint"
        " where connamespace = 'public'::regnamespace and contype not in ('p', 'n', 't')"
    )
    assert {name for (name,) in await cursor.fetchall()} == tested
    cursor = await connection.execute(
        "select indexrelid::regclass::text from pg_index join pg_class on oid = indexrelid"
        " where relnamespace = 'public'::regnamespace and obj_description(indexrelid, 'pg_class') is null"
    )
    assert await cursor.fetchall() == [("schema_migrations_pkey",)]


PARTS = {
    "Constraints": """
        select conname, pg_get_constraintdef(oid, true), '' from pg_constraint
        where conrelid = %s::regclass and contype not in ('n', 't') order by contype desc, conname
    """,
    "Indexes": r"""
        select indexrelid::regclass::text, regexp_replace(pg_get_indexdef(indexrelid), '^.* USING ', ''),
          coalesce(obj_description(indexrelid, 'pg_class'), '')
        from pg_index where indrelid = %s::regclass order by 1
    """,
    "Triggers": r"""
        select tgname, regexp_replace(pg_get_triggerdef(oid, true), '^CREATE TRIGGER \S+ ', ''), ''
        from pg_trigger where tgrelid = %s::regclass and not tgisinternal order by 1
    """,
}


async def test_schema_md_is_the_schema(connection: Connection) -> None:
    text = await describe(connection)
    if os.environ.get("UPDATE_SCHEMA"):
        SCHEMA.parent.mkdir(exist_ok=True)
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text, "UPDATE_SCHEMA=1 pytest tests/contract/test_schema.py writes it anew"


async def describe(connection: Connection) -> str:
    """The schema in words: what the catalogues hold, the same on every version of Postgres."""

    async def query(text: str, *values: object) -> list[tuple[Any, ...]]:
        return await (await connection.execute(text, values)).fetchall()

    lines = [
        "# Schema",
        "",
        "Generated from a database at the newest migration: `UPDATE_SCHEMA=1 pytest tests/contract/test_schema.py`.",
    ]
    relations = await query(
        "select oid::regclass::text, relkind::text, coalesce(obj_description(oid, 'pg_class'), '') from pg_class"
        " where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') order by relkind, relname"
    )
    for name, kind, comment in relations:
        lines += ["", f"## {name}" if kind == "r" else f"## {name} (view)", ""]
        lines += [comment, ""] if comment else []
        lines += ["| column | type | |", "|---|---|---|"]
        columns = await query(
            "select attname, format_type(atttypid, atttypmod), attnotnull, attidentity::text,"
            " pg_get_expr(adbin, adrelid), coalesce(col_description(attrelid, attnum), '')"
            " from pg_attribute left join pg_attrdef on (adrelid, adnum) = (attrelid, attnum)"
            " where attrelid = %s::regclass and attnum > 0 and not attisdropped order by attnum",
            name,
        )
        for column, type_, not_null, identity, default, meaning in columns:
            words = [type_.replace("timestamp with time zone", "timestamptz")]
            words += [] if not_null or kind == "v" else ["or null"]
            words += ["identity"] if identity else []
            words += [f"default `{default}`"] if default else []
            lines.append(f"| {column} | {', '.join(words)} | {meaning} |")
        for title, text in PARTS.items():
            found = await query(text, name)
            if found:
                lines += ["", f"{title}:", ""]
                for label, definition, meaning in found:
                    lines.append(f"- `{label}`: `{definition}`" + (f". {meaning}" if meaning else ""))
    return "\n".join(lines) + "\n"
