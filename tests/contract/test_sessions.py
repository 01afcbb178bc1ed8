"""What core.sessions.SessionStore asks, of the store on Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from controller_svc.core.ids import new_id
from controller_svc.core.mutations import Key
from controller_svc.core.sessions import ENDED, Session, SessionState
from controller_svc.core.tasks import UNFINISHED, TaskState
from tests.contract.rows import NOW, TENANT, insert, new_session, new_task

if TYPE_CHECKING:
    from controller_svc.store.sessions import Sessions

Connection = psycopg.AsyncConnection[Any]
NONE: dict[str, Any] = {"agent_role": None, "state": None, "task_id": None}


@pytest.mark.parametrize("state", SessionState)
async def test_get_gives_back_what_was_stored(connection: Connection, sessions: Sessions, state: SessionState) -> None:
    session = new_session(state, version=7, task_id=uuid4(), update_time=NOW + timedelta(microseconds=1))
    await insert(connection, session, new_session())
    found = await sessions.get(TENANT, session.id)
    assert found == session
    assert isinstance(found.state, SessionState)


async def test_get_of_none_and_of_another_tenant(connection: Connection, sessions: Sessions) -> None:
    session = new_session()
    await insert(connection, session)
    assert await sessions.get(TENANT, uuid4()) is None
    assert await sessions.get("other", session.id) is None


async def test_list_pages_newest_first(connection: Connection, sessions: Sessions) -> None:
    rows = [new_session() for _ in range(7)]
    await insert(connection, *rows, new_session(tenant="other"))
    pages = []
    before = None
    while page := await sessions.list(TENANT, **NONE, before=before, limit=3):
        pages.append(page)
        before = page[-1].id
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [row for page in pages for row in page] == rows[::-1]
    assert await sessions.count(TENANT, **NONE) == 7


async def test_every_filter_and_all_together(connection: Connection, sessions: Sessions) -> None:
    task_ids = (uuid4(), uuid4())
    rows = [
        new_session(state, agent_role=role, task_id=task_id)
        for state in (SessionState.PENDING, SessionState.ACTIVE)
        for role in ("planner", "coder")
        for task_id in (None, *task_ids)
    ]
    await insert(connection, *rows, new_session(tenant="other", task_id=task_ids[0]))
    for agent_role in (None, "planner", "Planner"):
        for state in (None, SessionState.ACTIVE, SessionState.EXPIRED):
            for task_id in (None, task_ids[0], uuid4()):
                filters: dict[str, Any] = {"agent_role": agent_role, "state": state, "task_id": task_id}
                expected = [
                    row
                    for row in reversed(rows)
                    if agent_role in (None, row.agent_role)
                    and state in (None, row.state)
                    and task_id in (None, row.task_id)
                ]
                assert await sessions.list(TENANT, **filters, before=None, limit=100) == expected
                assert await sessions.count(TENANT, **filters) == len(expected)
                if len(expected) > 1:
                    after = await sessions.list(TENANT, **filters, before=expected[0].id, limit=100)
                    assert after == expected[1:]


async def test_a_tenant_without_sessions(sessions: Sessions) -> None:
    assert await sessions.list("nobody", **NONE, before=new_id(), limit=100) == []
    assert await sessions.count("nobody", **NONE) == 0


async def test_expirable(connection: Connection, sessions: Sessions) -> None:
    due: dict[str, Any] = {"expire_time": NOW - timedelta(hours=1)}
    expirable = [new_session(state, **due) for state in SessionState if state not in ENDED]
    expirable.append(new_session(tenant="other", **due))
    others = [new_session(state, **due) for state in ENDED]
    others.append(new_session(expire_time=NOW + timedelta(hours=1)))
    await insert(connection, *expirable, *others)
    for state in TaskState:
        session = new_session(**due)
        await insert(connection, session, new_task(session, state))
        if state not in UNFINISHED:
            expirable.append(session)
    assert set(await sessions.expirable(100)) == {key_of(session) for session in expirable}


async def test_expirable_is_longest_due_first_and_limited(connection: Connection, sessions: Sessions) -> None:
    rows = [new_session(expire_time=NOW - timedelta(hours=hours)) for hours in (1, 3, 2)]
    await insert(connection, *rows)
    assert await sessions.expirable(2) == [key_of(rows[1]), key_of(rows[2])]


def key_of(session: Session) -> Key:
    return Key("sessions", session.tenant, session.id)
