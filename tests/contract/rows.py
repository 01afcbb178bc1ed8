"""Rows to put into a database: resources that agree with themselves, and ways to insert them past the writer."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from controller_svc.core.ids import new_id
from controller_svc.core.sessions import ENDED, Session, SessionState
from controller_svc.core.tasks import UNFINISHED, Task, TaskState

if TYPE_CHECKING:
    import psycopg

NOW = datetime.now(UTC)
TENANT = "acme"


def new_session(state: SessionState = SessionState.PENDING, **changes: Any) -> Session:
    """A session in `state` that agrees with itself."""
    started = state not in (SessionState.PENDING, SessionState.EXPIRED)
    values: dict[str, Any] = {
        "tenant": TENANT,
        "id": new_id(),
        "version": 1,
        "agent_role": "planner",
        "task_id": None,
        "metadata": {"goal": "grüße", "depth": [1, {"a": None}]},
        "create_time": NOW,
        "update_time": NOW,
        "expire_time": NOW + timedelta(days=7),
        "start_time": NOW if started else None,
        "pause_time": NOW if state is SessionState.PAUSED else None,
        "end_time": NOW if state in ENDED else None,
    }
    return Session(state=state, **(values | changes))


def new_task(session: Session, state: TaskState = TaskState.PENDING, **changes: Any) -> Task:
    """A task of `session` in `state` that agrees with itself."""
    leased = state in (TaskState.RUNNING, TaskState.SUCCEEDED)
    values: dict[str, Any] = {
        "tenant": session.tenant,
        "id": new_id(),
        "version": 1,
        "beat": 0,
        "session_id": session.id,
        "type": "ROUTING",
        "from_role": session.agent_role,
        "target_role": "coder",
        "description": "Write it.",
        "data": {"file": "a.py", "lines": 3},
        "context": {},
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "priority": 0,
        "schedule_time": NOW,
        "attempt": 1 if leased else 0,
        "max_attempts": 3,
        "retry_backoff": timedelta(milliseconds=1500),
        "lease_timeout": timedelta(seconds=30),
        "attempt_timeout": None,
        "result": {"ok": True} if state is TaskState.SUCCEEDED else None,
        "error": None,
        "progress": None,
        "lease_id": uuid4() if leased else None,
        "lease_holder": "worker-1" if leased else "",
        "lease_expire_time": NOW + timedelta(seconds=30) if state is TaskState.RUNNING else None,
        "create_time": NOW,
        "update_time": NOW,
        "start_time": NOW if leased else None,
        "end_time": None if state in UNFINISHED else NOW,
    }
    return Task(state=state, **(values | changes))


async def insert(connection: psycopg.AsyncConnection[Any], *rows: Session | Task) -> None:
    """Put resources into the database as they are."""
    for row in rows:
        values = {}
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if isinstance(value, timedelta) or field.name == "attempt_timeout":
                microseconds = None if value is None else value // timedelta(microseconds=1)
                values[f"{field.name}_us"] = microseconds
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                values[field.name] = Jsonb(dataclasses.asdict(value))
            else:
                values[field.name] = Jsonb(value) if isinstance(value, dict) else value
        await insert_values(connection, row.table, values)


async def lock_scope(connection: psycopg.AsyncConnection[Any], scope: bytes) -> None:
    """Hold a scope as a transaction of another process does, until this one's ends."""
    await connection.execute("select pg_advisory_xact_lock(%s)", (int.from_bytes(scope[:8], "big", signed=True),))


async def insert_values(connection: psycopg.AsyncConnection[Any], table: str, values: dict[str, Any]) -> None:
    """Put one row of any table into the database."""
    names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
    await connection.execute(f"insert into {table} ({names}) values ({places})", values)
