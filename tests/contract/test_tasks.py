"""What core.tasks.TaskStore asks, of the store on Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest

from controller_svc.core.mutations import Key
from controller_svc.core.sessions import ENDED, Session, SessionState
from controller_svc.core.tasks import UNFINISHED, Task, TaskError, TaskState
from controller_svc.store import tasks as store
from tests.contract.rows import NOW, TENANT, insert, new_session, new_task

if TYPE_CHECKING:
    from controller_svc.store.tasks import Tasks

Connection = psycopg.AsyncConnection[Any]
NONE: dict[str, Any] = {"session_id": None, "target_role": None, "state": None, "task_type": None}
HOUR = timedelta(hours=1)


@pytest.fixture
async def session(connection: Connection) -> Session:
    session = new_session(SessionState.ACTIVE)
    await insert(connection, session)
    return session


@pytest.mark.parametrize("state", TaskState)
async def test_get_gives_back_what_was_stored(
    connection: Connection, tasks: Tasks, session: Session, state: TaskState
) -> None:
    plain = new_task(session, state)
    full = new_task(
        session,
        state,
        version=4,
        beat=9,
        priority=-7,
        data={"text": "zażółć 🙂", "n": [1.5, None, {"deep": [True]}]},
        context={"k": "v"},
        attempt_timeout=timedelta(hours=2, microseconds=1),
        error=TaskError(code="BROKEN", message="It broke.", non_retryable=True),
        progress={"percent": 50},
        update_time=NOW + timedelta(microseconds=1),
    )
    await insert(connection, plain, full)
    assert await tasks.get(TENANT, plain.id) == plain
    found = await tasks.get(TENANT, full.id)
    assert found == full
    assert isinstance(found.state, TaskState)


async def test_get_of_none_and_of_another_tenant(connection: Connection, tasks: Tasks, session: Session) -> None:
    task = new_task(session)
    await insert(connection, task)
    assert await tasks.get(TENANT, uuid4()) is None
    assert await tasks.get("other", task.id) is None


async def test_list_pages_newest_first(connection: Connection, tasks: Tasks, session: Session) -> None:
    rows = [new_task(session) for _ in range(7)]
    other = new_session(tenant="other")
    await insert(connection, *rows, other, new_task(other))
    pages = []
    before = None
    while page := await tasks.list(TENANT, **NONE, before=before, limit=3):
        pages.append(page)
        before = page[-1].id
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [row for page in pages for row in page] == rows[::-1]
    assert await tasks.count(TENANT, **NONE) == 7


async def test_every_filter_and_all_together(connection: Connection, tasks: Tasks, session: Session) -> None:
    second = new_session(SessionState.ACTIVE)
    rows = [
        new_task(of, state, target_role=role, type=type_)
        for of in (session, second)
        for state in (TaskState.PENDING, TaskState.SUCCEEDED)
        for role in ("coder", "tester")
        for type_ in ("ROUTING", "NOTIFICATION")
    ]
    await insert(connection, second, *rows)
    for session_id in (None, session.id, uuid4()):
        for role in (None, "coder", "Coder"):
            for state in (None, TaskState.SUCCEEDED, TaskState.DEAD):
                for type_ in (None, "NOTIFICATION", "APPROVAL"):
                    filters: dict[str, Any] = {
                        "session_id": session_id,
                        "target_role": role,
                        "state": state,
                        "task_type": type_,
                    }
                    expected = [
                        row
                        for row in reversed(rows)
                        if session_id in (None, row.session_id)
                        and role in (None, row.target_role)
                        and state in (None, row.state)
                        and type_ in (None, row.type)
                    ]
                    assert await tasks.list(TENANT, **filters, before=None, limit=100) == expected
                    assert await tasks.count(TENANT, **filters) == len(expected)


async def test_lost_leases(connection: Connection, tasks: Tasks, session: Session) -> None:
    other = new_session(tenant="other")
    lost = [
        new_task(session, TaskState.RUNNING, lease_expire_time=NOW - HOUR, start_time=NOW - 2 * HOUR),
        new_task(other, TaskState.RUNNING, lease_expire_time=NOW - 2 * HOUR, start_time=NOW - 3 * HOUR),
    ]
    held = new_task(session, TaskState.RUNNING, lease_expire_time=NOW + HOUR, start_time=NOW - 4 * HOUR)
    await insert(
        connection, other, *lost, held, *(new_task(session, s) for s in TaskState if s is not TaskState.RUNNING)
    )
    assert set(await tasks.lost_leases(100)) == {key_of(task) for task in lost}
    assert len(await tasks.lost_leases(1)) == 1


# -- orphans --


async def test_orphans(connection: Connection, tasks: Tasks) -> None:
    orphans = set()
    for session_state in SessionState:
        for tenant in (TENANT, "other"):
            session = new_session(session_state, tenant=tenant)
            rows = [new_task(session, state) for state in TaskState]
            await insert(connection, session, *rows)
            if session_state in ENDED:
                orphans |= {key_of(row) for row in rows if row.state in UNFINISHED}
    found = await tasks.orphans(100)
    assert set(found) == orphans
    assert len(found) == len(orphans)
    assert len(await tasks.orphans(5)) == 5


async def test_an_orphan_of_a_session_that_ended_long_ago(connection: Connection, tasks: Tasks) -> None:
    """As of a task that was committed late, or of a server that was away."""
    session = new_session(SessionState.FAILED, end_time=NOW - 10 * HOUR, create_time=NOW - 11 * HOUR)
    task = new_task(session)
    await insert(connection, session, task)
    assert await tasks.orphans(100) == (key_of(task),)


async def test_no_orphan_is_missed_among_many_unfinished_tasks(
    connection: Connection, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROUND_PAGE", 7)
    orphans, unfinished = set(), 0
    for number in range(25):
        ended = number % 3 == 0
        long_ago = NOW - HOUR if ended else None
        session = new_session(
            SessionState.COMPLETED if ended else SessionState.ACTIVE,
            tenant=f"tenant-{number % 4}",
            end_time=long_ago,
            create_time=NOW - 2 * HOUR,
        )
        rows = [new_task(session, TaskState.BLOCKED) for _ in range(number % 5)]
        await insert(connection, session, *rows)
        unfinished += len(rows)
        orphans |= {key_of(row) for row in rows if ended}
    for limit in (100, 2):
        for _ in range(2):  # the second round as the first
            found: set[Key] = set()
            for _ in range(unfinished // min(7, limit) + 1):
                found |= set(await tasks.orphans(limit))
            assert found == orphans
    late = new_task(session, tenant="tenant-0", session_id=next(iter(await ended_sessions(connection, "tenant-0"))))
    await insert(connection, late)
    found = set()
    for _ in range((unfinished + 1) // 7 + 2):
        found |= set(await tasks.orphans(100))
    assert found == orphans | {key_of(late)}


async def test_a_task_routed_while_its_session_ends_is_found(
    connection: Connection, tasks: Tasks, database_url: str
) -> None:
    """It reads the session open, the session ends and is swept, and only then the task is committed."""
    session = new_session(SessionState.ACTIVE)
    await insert(connection, session)
    task = new_task(session)
    async with await psycopg.AsyncConnection.connect(database_url) as routing:
        await insert(routing, task)
        await connection.execute("update sessions set state = 'COMPLETED', end_time = clock_timestamp()")
        assert await tasks.orphans(100) == ()
        await connection.execute("update sessions set end_time = end_time - interval '1 hour'")
        await routing.commit()
    assert await tasks.orphans(100) == (key_of(task),)


async def ended_sessions(connection: Connection, tenant: str) -> list[UUID]:
    cursor = await connection.execute("select id from sessions where tenant = %s and end_time is not null", (tenant,))
    return [id_ for (id_,) in await cursor.fetchall()]


def key_of(task: Task) -> Key:
    return Key("tasks", task.tenant, task.id)
