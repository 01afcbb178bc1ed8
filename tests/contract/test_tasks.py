"""What core.tasks.TaskStore asks, of the store on Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from controller_svc.core.mutations import Key
from controller_svc.core.sessions import ENDED, Session, SessionState
from controller_svc.core.tasks import UNFINISHED, HeartbeatResult, Task, TaskError, TaskState
from controller_svc.store import database as module
from controller_svc.store import tasks as store
from svckit.errors import Aborted, FailedPrecondition, NotFound, PermissionDenied, Unavailable
from tests.contract.rows import NOW, TENANT, insert, new_session, new_task

if TYPE_CHECKING:
    from controller_svc.store.database import Database
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


# -- heartbeat --


def running(session: Session, **changes: Any) -> Task:
    now = datetime.now(UTC)
    return new_task(
        session, TaskState.RUNNING, **({"start_time": now, "lease_expire_time": now + timedelta(seconds=5)} | changes)
    )


async def heartbeat(tasks: Tasks, task: Task, **changes: Any) -> HeartbeatResult:
    values: dict[str, Any] = {
        "tenant": task.tenant,
        "task_id": task.id,
        "lease_id": task.lease_id,
        "subject": task.lease_holder,
        "progress": None,
    }
    return await tasks.heartbeat(**(values | changes))


Beat = Callable[..., Coroutine[Any, Any, HeartbeatResult]]


@pytest.fixture(params=["alone", "with company"])
async def beat(request: pytest.FixtureRequest, connection: Connection, session: Session) -> Beat:
    """A heartbeat; with company, those of others share its statement."""
    if request.param == "alone":
        return heartbeat
    others = [running(session), running(session)]
    await insert(connection, *others)

    async def beat(tasks: Tasks, task: Task, **changes: Any) -> HeartbeatResult:
        first, own, last = await asyncio.gather(
            heartbeat(tasks, others[0]),
            heartbeat(tasks, task, **changes),
            heartbeat(tasks, others[1], progress={"of": "another"}),
            return_exceptions=True,
        )
        assert isinstance(first, HeartbeatResult)
        assert isinstance(last, HeartbeatResult)
        if isinstance(own, BaseException):
            raise own
        return own

    return beat


async def test_heartbeat_extends_the_lease_and_nothing_else(
    connection: Connection, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task, bystander = running(session, progress={"percent": 1}), running(session)
    await insert(connection, task, bystander)
    xid = await (await connection.execute("select xid from tasks where id = %s", (task.id,))).fetchone()
    before = datetime.now(UTC)
    result = await beat(tasks, task)
    after = datetime.now(UTC)
    assert not result.cancelled
    assert result.lease_expire_time is not None
    assert before + task.lease_timeout <= result.lease_expire_time <= after + task.lease_timeout
    assert await tasks.get(TENANT, task.id) == replace(task, beat=1, lease_expire_time=result.lease_expire_time)
    assert await tasks.get(TENANT, bystander.id) == bystander
    assert await (await connection.execute("select xid from tasks where id = %s", (task.id,))).fetchone() == xid


async def test_heartbeat_sets_progress(connection: Connection, tasks: Tasks, session: Session, beat: Beat) -> None:
    task = running(session)
    await insert(connection, task)
    for number, (progress, stored) in enumerate(
        [({"percent": 10, "note": "é"}, {"percent": 10, "note": "é"}), (None, {"percent": 10, "note": "é"}), ({}, {})],
        1,
    ):
        await beat(tasks, task, progress=progress)
        found = await tasks.get(TENANT, task.id)
        assert found is not None
        assert (found.progress, found.beat, found.version) == (stored, number, task.version)


async def test_no_heartbeat_goes_beyond_the_attempt_timeout(
    connection: Connection, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session, attempt_timeout=timedelta(seconds=9))
    await insert(connection, task)
    assert task.start_time is not None
    assert (await beat(tasks, task)).lease_expire_time == task.start_time + timedelta(seconds=9)


async def test_no_heartbeat_shortens_a_lease(
    connection: Connection, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session, lease_expire_time=datetime.now(UTC) + HOUR)
    await insert(connection, task)
    assert (await beat(tasks, task)).lease_expire_time == task.lease_expire_time


async def test_heartbeat_of_a_cancelled_lease(
    connection: Connection, tasks: Tasks, session: Session, beat: Beat
) -> None:
    lease = uuid4()
    task = new_task(session, TaskState.CANCELLED, lease_id=lease, lease_holder="worker-1", start_time=NOW)
    await insert(connection, task)
    assert await beat(tasks, task) == HeartbeatResult(lease_expire_time=None, cancelled=True)
    with pytest.raises(FailedPrecondition) as caught:
        await beat(tasks, task, lease_id=uuid4())
    assert caught.value.reason == "LEASE_LOST"
    assert await tasks.get(TENANT, task.id) == task


@pytest.mark.parametrize(
    ("changes", "call", "error", "reason"),
    [
        ({}, {"task_id": UUID(int=1)}, NotFound, "TASK_NOT_FOUND"),
        ({}, {"tenant": "other"}, NotFound, "TASK_NOT_FOUND"),
        ({}, {"lease_id": UUID(int=1)}, FailedPrecondition, "LEASE_LOST"),
        ({}, {"subject": "worker-2"}, PermissionDenied, "LEASE_NOT_HELD"),
        ({"lease_expire_time": NOW - HOUR}, {}, FailedPrecondition, "LEASE_LOST"),
        ({"state": TaskState.PENDING, "lease_expire_time": None}, {}, FailedPrecondition, "LEASE_LOST"),
        (
            {"state": TaskState.SUCCEEDED, "lease_expire_time": None, "result": {}, "end_time": NOW},
            {},
            FailedPrecondition,
            "LEASE_LOST",
        ),
    ],
)
async def test_heartbeat_of_a_lease_that_is_not_held(
    connection: Connection,
    tasks: Tasks,
    session: Session,
    beat: Beat,
    changes: dict[str, Any],
    call: dict[str, Any],
    error: type[Exception],
    reason: str,
) -> None:
    task = replace(running(session), **changes)
    await insert(connection, task)
    with pytest.raises(error) as caught:
        await beat(tasks, task, **call)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert await tasks.get(TENANT, task.id) == task


async def test_many_heartbeats_at_once_are_all_counted(
    connection: Connection, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session)
    await insert(connection, task)
    results = await asyncio.gather(*(beat(tasks, task) for _ in range(20)))
    found = await tasks.get(TENANT, task.id)
    assert found is not None
    assert found.beat == 20
    assert found.lease_expire_time == max(result.lease_expire_time for result in results if result.lease_expire_time)


async def test_a_lease_that_ends_while_the_heartbeat_waits_is_lost(
    connection: Connection, tasks: Tasks, session: Session, database_url: str, beat: Beat
) -> None:
    task = running(session, lease_expire_time=datetime.now(UTC) + timedelta(seconds=1.5))
    await insert(connection, task)
    async with await psycopg.AsyncConnection.connect(database_url) as holding:
        await holding.execute("select from tasks for no key update")
        # It waits for the row less than a heartbeat may, and the lease ends meanwhile.
        assert task.lease_expire_time is not None
        await asyncio.sleep((task.lease_expire_time - datetime.now(UTC)).total_seconds() - 0.08)
        waiting = asyncio.create_task(beat(tasks, task))
        await asyncio.sleep(0.14)
        await holding.execute("update tasks set description = 'moved, so that the condition is looked at again'")
        await holding.commit()
    with pytest.raises(FailedPrecondition) as caught:
        await waiting
    assert caught.value.reason == "LEASE_LOST"


async def test_heartbeats_at_the_same_time_share_a_statement(
    connection: Connection, tasks: Tasks, session: Session, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own progress and its own end; whose row is held by a stranger keeps nobody else waiting."""
    leases = [timedelta(seconds=10 + n) for n in range(10)]
    running_ = [running(session, lease_timeout=lease) for lease in leases]
    await insert(connection, *running_)
    used: list[str] = []

    def counted(name: str) -> None:
        use = getattr(database, name)

        def noted() -> Any:
            used.append(name)
            return use()

        monkeypatch.setattr(database, name, noted)

    counted("beating")
    counted("beating_alone")
    async with connection.transaction():
        await connection.execute("select from tasks where id = %s for no key update", (running_[3].id,))
        beats = [asyncio.create_task(heartbeat(tasks, task, progress={"n": n})) for n, task in enumerate(running_)]
        results = [await beats[n] for n in range(10) if n != 3]
        with pytest.raises(Aborted, match="RESOURCE_BUSY"):
            await beats[3]
    assert used == ["beating", "beating_alone"], "all together, and the held one alone"
    del running_[3], leases[3]
    for task, lease, result in zip(running_, leases, results, strict=True):
        found = await tasks.get(TENANT, task.id)
        assert found == replace(
            task, beat=1, progress={"n": int(lease.total_seconds()) - 10}, lease_expire_time=result.lease_expire_time
        )
    ends = [result.lease_expire_time for result in results if result.lease_expire_time]
    assert ends == sorted(set(ends))


async def test_a_held_row_delays_no_other_heartbeats(connection: Connection, tasks: Tasks, session: Session) -> None:
    """Neither those that succeed nor those that are refused; and who waits for it is told within about a second."""
    held, free = running(session), running(session)
    await insert(connection, held, free)
    async with connection.transaction():
        await connection.execute("select from tasks where id = %s for no key update", (held.id,))
        waiting = [asyncio.create_task(heartbeat(tasks, held)) for _ in range(30)]
        while (await waiting_for_locks(connection)) < 2:
            await asyncio.sleep(0)
        for _ in range(10):
            await heartbeat(tasks, free)
            with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
                await heartbeat(tasks, free, lease_id=uuid4())
        told = {getattr(error, "reason", "") for error in await asyncio.gather(*waiting, return_exceptions=True)}
        assert told == {"RESOURCE_BUSY", "DATABASE_BUSY"}


async def test_a_lease_that_is_being_extended_is_not_lost(
    connection: Connection, tasks: Tasks, session: Session
) -> None:
    """What a snapshot says of its end may be over: a commit may wait for a standby longer than the lease lasts."""
    task = running(session, lease_expire_time=datetime.now(UTC) - timedelta(seconds=1))
    await insert(connection, task)
    async with connection.transaction():
        await connection.execute(
            "update tasks set lease_expire_time = now() + interval '9 s' where id = %s", (task.id,)
        )
        beat = asyncio.create_task(heartbeat(tasks, task))
        while not await waiting_for_locks(connection):
            await asyncio.sleep(0)
    assert (await beat).lease_expire_time is not None


async def waiting_for_locks(connection: Connection) -> int:
    await connection.execute("select pg_stat_clear_snapshot()")
    cursor = await connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    )
    [(number,)] = await cursor.fetchall()
    return int(number)


async def test_a_dead_connection_does_not_stop_all_heartbeats(
    connection: Connection, tasks: Tasks, session: Session, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut, and they go on with another; told that Postgres is away are they when that one is dead too."""
    monkeypatch.setattr(module, "WATCHDOG_SECONDS", 0.3)
    running_ = [running(session) for _ in range(5)]
    await insert(connection, *running_)
    async with database.beating() as dead:
        await connection.execute("select pg_terminate_backend(%s)", (dead.info.backend_pid,))
    await asyncio.gather(*(heartbeat(tasks, task) for task in running_))
    answering = store.HEARTBEATS
    silent = "select from pg_sleep(3), unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::jsonb[])"
    monkeypatch.setattr(store, "HEARTBEATS", silent)
    for beat in [asyncio.create_task(heartbeat(tasks, task)) for task in running_]:
        with pytest.raises(Unavailable, match="DATABASE_UNAVAILABLE"):
            await beat
    monkeypatch.setattr(store, "HEARTBEATS", answering)
    await asyncio.gather(*(heartbeat(tasks, task) for task in running_))
    assert [found.beat for task in running_ if (found := await tasks.get(TENANT, task.id))] == [2] * 5


async def test_who_has_left_beats_no_more(
    connection: Connection, tasks: Tasks, session: Session, database: Database
) -> None:
    """Neither those of the group that waits for a connection, nor those of the next one."""
    leaving, staying = [running(session) for _ in range(2)], running(session)
    await insert(connection, *leaving, staying)
    async with database.beating():  # the only connection of the groups
        beats = [asyncio.create_task(heartbeat(tasks, task)) for task in (leaving[0], staying)]
        while not tasks._beats.busy or len(tasks._beats):
            await asyncio.sleep(0)
        beats += [asyncio.create_task(heartbeat(tasks, task)) for task in (leaving[1], staying)]
        while len(tasks._beats) < 2:
            await asyncio.sleep(0)
        for beat in beats[::2]:
            beat.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*beats[1::2])
    found = [await tasks.get(TENANT, task.id) for task in (*leaving, staying)]
    assert [task.beat for task in found if task] == [0, 0, 2]


async def test_heartbeats_need_no_connection_of_reads(
    connection: Connection, tasks: Tasks, session: Session, database: Database
) -> None:
    """Slow lists keep none from its answer: neither the second one of a lease nor one that is refused."""
    task = running(session)
    await insert(connection, task)
    async with AsyncExitStack() as used:
        for _ in range(4):
            await used.enter_async_context(database.reading())
        await asyncio.gather(*(heartbeat(tasks, task) for _ in range(3)))
        with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
            await heartbeat(tasks, task, lease_id=uuid4())


async def test_heartbeats_that_fail_together_are_tried_alone(
    connection: Connection, tasks: Tasks, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "select 'x'::int from unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::jsonb[])"
    monkeypatch.setattr(store, "HEARTBEATS", refused)
    running_ = [running(session) for _ in range(5)]
    await insert(connection, *running_)
    await asyncio.gather(*(heartbeat(tasks, task) for task in running_))
    assert [found.beat for task in running_ if (found := await tasks.get(TENANT, task.id))] == [1] * 5


@pytest.mark.parametrize("together", [False, True])
async def test_a_heartbeat_writes_to_no_index(connection: Connection, session: Session, together: bool) -> None:
    task = running(session)
    await insert(connection, task)
    beat = {"tenant": TENANT, "id": task.id, "lease_id": task.lease_id, "subject": task.lease_holder}
    async with connection.transaction():
        for number in range(10):
            values = beat | {"progress": Jsonb({"percent": number})}
            if together:
                await psycopg.AsyncRawCursor(connection).execute(store.HEARTBEATS, [[one] for one in values.values()])
            else:
                await connection.execute(store.HEARTBEAT, values)
        cursor = await connection.execute(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables where relname = 'tasks'"
        )
        assert await cursor.fetchone() == (10, 10)


async def ended_sessions(connection: Connection, tenant: str) -> list[UUID]:
    cursor = await connection.execute("select id from sessions where tenant = %s and end_time is not null", (tenant,))
    return [id_ for (id_,) in await cursor.fetchall()]


def key_of(task: Task) -> Key:
    return Key("tasks", task.tenant, task.id)
