"""What core.tasks.HeartbeatStore asks, of the store on Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from controller_svc.core.sessions import Session, SessionState
from controller_svc.core.tasks import HeartbeatResult, Task, TaskState
from controller_svc.store import database as module
from controller_svc.store import heartbeats as store
from svckit.errors import Aborted, FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from tests.contract.rows import NOW, TENANT, insert, new_session, new_task

if TYPE_CHECKING:
    from controller_svc.store.database import Database
    from controller_svc.store.heartbeats import Heartbeats
    from controller_svc.store.tasks import Tasks

Connection = psycopg.AsyncConnection[Any]
HOUR = timedelta(hours=1)


@pytest.fixture
async def session(connection: Connection) -> Session:
    session = new_session(SessionState.ACTIVE)
    await insert(connection, session)
    return session


def running(session: Session, **changes: Any) -> Task:
    now = datetime.now(UTC)
    return new_task(
        session, TaskState.RUNNING, **({"start_time": now, "lease_expire_time": now + timedelta(seconds=5)} | changes)
    )


async def heartbeat(heartbeats: Heartbeats, task: Task, **changes: Any) -> HeartbeatResult:
    values: dict[str, Any] = {
        "tenant": task.tenant,
        "task_id": task.id,
        "lease_id": task.lease_id,
        "subject": task.lease_holder,
        "progress": None,
    }
    return await heartbeats.beat(**(values | changes))


Beat = Callable[..., Coroutine[Any, Any, HeartbeatResult]]


@pytest.fixture(params=["alone", "with company"])
async def beat(request: pytest.FixtureRequest, connection: Connection, session: Session) -> Beat:
    """A heartbeat; with company, those of others share its statement."""
    if request.param == "alone":
        return heartbeat
    others = [running(session), running(session)]
    await insert(connection, *others)

    async def beat(heartbeats: Heartbeats, task: Task, **changes: Any) -> HeartbeatResult:
        first, own, last = await asyncio.gather(
            heartbeat(heartbeats, others[0]),
            heartbeat(heartbeats, task, **changes),
            heartbeat(heartbeats, others[1], progress={"of": "another"}),
            return_exceptions=True,
        )
        assert isinstance(first, HeartbeatResult)
        assert isinstance(last, HeartbeatResult)
        if isinstance(own, BaseException):
            raise own
        return own

    return beat


async def test_heartbeat_extends_the_lease_and_nothing_else(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task, bystander = running(session, progress={"percent": 1}), running(session)
    await insert(connection, task, bystander)
    xid = await (await connection.execute("select xid from tasks where id = %s", (task.id,))).fetchone()
    before = datetime.now(UTC)
    result = await beat(heartbeats, task)
    after = datetime.now(UTC)
    assert not result.cancelled
    assert result.lease_expire_time is not None
    assert before + task.lease_timeout <= result.lease_expire_time <= after + task.lease_timeout
    assert await tasks.get(TENANT, task.id) == replace(task, beat=1, lease_expire_time=result.lease_expire_time)
    assert await tasks.get(TENANT, bystander.id) == bystander
    assert await (await connection.execute("select xid from tasks where id = %s", (task.id,))).fetchone() == xid


async def test_heartbeat_sets_progress(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session)
    await insert(connection, task)
    for number, (progress, stored) in enumerate(
        [({"percent": 10, "note": "é"}, {"percent": 10, "note": "é"}), (None, {"percent": 10, "note": "é"}), ({}, {})],
        1,
    ):
        await beat(heartbeats, task, progress=progress)
        found = await tasks.get(TENANT, task.id)
        assert found is not None
        assert (found.progress, found.beat, found.version) == (stored, number, task.version)


async def test_no_heartbeat_goes_beyond_the_attempt_timeout(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session, attempt_timeout=timedelta(seconds=9))
    await insert(connection, task)
    assert task.start_time is not None
    assert (await beat(heartbeats, task)).lease_expire_time == task.start_time + timedelta(seconds=9)


async def test_no_heartbeat_shortens_a_lease(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session, lease_expire_time=datetime.now(UTC) + HOUR)
    await insert(connection, task)
    assert (await beat(heartbeats, task)).lease_expire_time == task.lease_expire_time


async def test_heartbeat_of_a_cancelled_lease(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    lease = uuid4()
    task = new_task(session, TaskState.CANCELLED, lease_id=lease, lease_holder="worker-1", start_time=NOW)
    await insert(connection, task)
    assert await beat(heartbeats, task) == HeartbeatResult(lease_expire_time=None, cancelled=True)
    with pytest.raises(FailedPrecondition) as caught:
        await beat(heartbeats, task, lease_id=uuid4())
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
    heartbeats: Heartbeats,
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
        await beat(heartbeats, task, **call)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert await tasks.get(TENANT, task.id) == task


async def test_many_heartbeats_at_once_are_all_counted(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, beat: Beat
) -> None:
    task = running(session)
    await insert(connection, task)
    results = await asyncio.gather(*(beat(heartbeats, task) for _ in range(20)))
    found = await tasks.get(TENANT, task.id)
    assert found is not None
    assert found.beat == 20
    assert found.lease_expire_time == max(result.lease_expire_time for result in results if result.lease_expire_time)


async def test_a_lease_that_ends_while_the_heartbeat_waits_is_lost(
    connection: Connection, heartbeats: Heartbeats, session: Session, database: Database, database_url: str, beat: Beat
) -> None:
    task = running(session, lease_expire_time=datetime.now(UTC) + HOUR)
    await insert(connection, task)
    await let_wait(database)
    async with await psycopg.AsyncConnection.connect(database_url) as holding:
        await holding.execute("select from tasks where id = %s for no key update", (task.id,))
        waiting = asyncio.create_task(beat(heartbeats, task))
        while not waiting.done() and not await waiting_for_locks(connection):
            await asyncio.sleep(0)
        assert not waiting.done()
        # After the heartbeat's transaction has begun, and before it gets the row.
        await holding.execute("update tasks set lease_expire_time = clock_timestamp() where id = %s", (task.id,))
        await holding.commit()
    with pytest.raises(FailedPrecondition) as caught:
        await waiting
    assert caught.value.reason == "LEASE_LOST"


async def let_wait(database: Database) -> None:
    """Lets the next heartbeat that goes alone wait for its row: on the pool's one connection, before there are more."""
    async with database.beating_alone() as connection:
        await connection.execute("set lock_timeout = '30s'")


async def test_heartbeats_at_the_same_time_share_a_statement(
    connection: Connection,
    heartbeats: Heartbeats,
    tasks: Tasks,
    session: Session,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
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
        beats = [asyncio.create_task(heartbeat(heartbeats, task, progress={"n": n})) for n, task in enumerate(running_)]
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


async def test_a_held_row_delays_no_other_heartbeats(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session
) -> None:
    """Neither those that succeed nor those that are refused; and who waits for it is told within about a second."""
    held, free = running(session), running(session)
    await insert(connection, held, free)
    async with connection.transaction():
        await connection.execute("select from tasks where id = %s for no key update", (held.id,))
        waiting = [asyncio.create_task(heartbeat(heartbeats, held)) for _ in range(30)]
        while (await waiting_for_locks(connection)) < 2 and not all(beat.done() for beat in waiting):
            await asyncio.sleep(0)
        for _ in range(10):
            await heartbeat(heartbeats, free)
            with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
                await heartbeat(heartbeats, free, lease_id=uuid4())
        told = {getattr(error, "reason", "") for error in await asyncio.gather(*waiting, return_exceptions=True)}
        assert told == {"RESOURCE_BUSY", "DATABASE_BUSY"}


async def test_a_lease_that_is_being_extended_is_not_lost(
    connection: Connection, heartbeats: Heartbeats, session: Session, database: Database
) -> None:
    """What a snapshot says of its end may be over: a commit may wait for a standby longer than the lease lasts."""
    task = running(session, lease_expire_time=datetime.now(UTC) - timedelta(seconds=1))
    await insert(connection, task)
    await let_wait(database)
    async with connection.transaction():
        await connection.execute(
            "update tasks set lease_expire_time = now() + interval '9 s' where id = %s", (task.id,)
        )
        beat = asyncio.create_task(heartbeat(heartbeats, task))
        while not beat.done() and not await waiting_for_locks(connection):
            await asyncio.sleep(0)
    assert (await beat).lease_expire_time is not None


async def waiting_for_locks(connection: Connection) -> int:
    await connection.execute("select pg_stat_clear_snapshot()")
    cursor = await connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        " and application_name like 'controller_svc%'"
    )
    [(number,)] = await cursor.fetchall()
    return int(number)


async def test_a_dead_connection_does_not_stop_all_heartbeats(
    connection: Connection,
    heartbeats: Heartbeats,
    tasks: Tasks,
    session: Session,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is cut, and they go on with another; nobody is told that nothing was written when that one is dead too."""
    monkeypatch.setattr(module, "WATCHDOG_SECONDS", 0.3)
    running_ = [running(session) for _ in range(5)]
    await insert(connection, *running_)
    async with database.beating() as dead:
        await connection.execute("select pg_terminate_backend(%s)", (dead.info.backend_pid,))
    await asyncio.gather(*(heartbeat(heartbeats, task) for task in running_))
    answering = store.HEARTBEATS
    silent = "select from pg_sleep(3), unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::jsonb[])"
    monkeypatch.setattr(store, "HEARTBEATS", silent)
    for beat in [asyncio.create_task(heartbeat(heartbeats, task)) for task in running_]:
        with pytest.raises(Unavailable, match="OUTCOME_UNKNOWN"):
            await beat
    monkeypatch.setattr(store, "HEARTBEATS", answering)
    await asyncio.gather(*(heartbeat(heartbeats, task) for task in running_))
    assert [found.beat for task in running_ if (found := await tasks.get(TENANT, task.id))] == [2] * 5


async def test_who_has_left_beats_no_more(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, database: Database
) -> None:
    """Neither those of the group that waits for a connection, nor those of the next one."""
    leaving, staying = [running(session) for _ in range(2)], running(session)
    await insert(connection, *leaving, staying)
    async with database.beating():  # the only connection of the groups
        beats = [asyncio.create_task(heartbeat(heartbeats, task)) for task in (leaving[0], staying)]
        while not heartbeats._groups.busy or len(heartbeats._groups):
            await asyncio.sleep(0)
        beats += [asyncio.create_task(heartbeat(heartbeats, task)) for task in (leaving[1], staying)]
        while len(heartbeats._groups) < 2:
            await asyncio.sleep(0)
        for beat in beats[::2]:
            beat.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*beats[1::2])
    found = [await tasks.get(TENANT, task.id) for task in (*leaving, staying)]
    assert [task.beat for task in found if task] == [0, 0, 2]


async def test_heartbeats_need_no_connection_of_reads(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, database: Database
) -> None:
    """Slow lists keep none from its answer: neither the second one of a lease nor one that is refused."""
    task = running(session)
    await insert(connection, task)
    async with AsyncExitStack() as used:
        for _ in range(4):
            await used.enter_async_context(database.reading())
        await asyncio.gather(*(heartbeat(heartbeats, task) for _ in range(3)))
        with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
            await heartbeat(heartbeats, task, lease_id=uuid4())


CUT = "select pg_terminate_backend(pg_backend_pid()), pg_sleep(9)"
CANCELLED = "select pg_cancel_backend(pg_backend_pid()), pg_sleep(9)"
OF_NONE = " from unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::jsonb[])"


def one_after_another(statements: Sequence[str], database: Database, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has each attempt at heartbeats together send another of these; answers those that are left."""
    beating, left = database.beating, list(statements)

    def next_statement() -> Any:
        monkeypatch.setattr(store, "HEARTBEATS", left.pop(0))
        return beating()

    monkeypatch.setattr(database, "beating", next_statement)
    return left


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        ((CUT + OF_NONE, CUT + OF_NONE), "OUTCOME_UNKNOWN"),
        ((CUT + OF_NONE, CANCELLED + OF_NONE), "OUTCOME_UNKNOWN"),
        ((CANCELLED + OF_NONE, CUT + OF_NONE), "OUTCOME_UNKNOWN"),
        ((CUT + OF_NONE, store.HEARTBEATS), "OUTCOME_UNKNOWN"),
        ((CANCELLED + OF_NONE, CANCELLED + OF_NONE), "DATABASE_BUSY"),
        ((CANCELLED + OF_NONE, store.HEARTBEATS), "RESOURCE_BUSY"),
    ],
)
async def test_nobody_is_told_that_nothing_was_written_who_may_have_extended_the_lease(
    statements: tuple[str, str],
    told: str,
    connection: Connection,
    heartbeats: Heartbeats,
    session: Session,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever of the attempts it was; the last one goes alone, and somebody else has locked the row."""
    task = running(session)
    await insert(connection, task)
    left = one_after_another(statements, database, monkeypatch)
    async with connection.transaction():
        await connection.execute("select from tasks where id = %s for no key update", (task.id,))
        with pytest.raises((Aborted, Unavailable), match=told):
            await heartbeat(heartbeats, task)
    assert not left


REFUSED = "select 'x'::int" + OF_NONE


async def test_a_heartbeat_that_is_lost_alone_may_have_extended_its_lease(
    connection: Connection, heartbeats: Heartbeats, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = running(session)
    await insert(connection, task)
    monkeypatch.setattr(store, "HEARTBEATS", REFUSED)
    monkeypatch.setattr(store, "HEARTBEAT", CUT)
    with pytest.raises(Unavailable, match="OUTCOME_UNKNOWN"):
        await heartbeat(heartbeats, task)


@pytest.mark.parametrize(("first", "told"), [(CUT + OF_NONE, "OUTCOME_UNKNOWN"), (None, "DATABASE_FULL")])
async def test_a_full_disk_says_nothing_of_what_was_sent_before(
    first: str | None,
    told: str,
    connection: Connection,
    heartbeats: Heartbeats,
    session: Session,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = running(session)
    await insert(connection, task)
    await connection.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise 'no room' using errcode = 'disk_full'; end $$"
    )
    await connection.execute("create trigger refuse before update on tasks for each row execute function refuse()")
    one_after_another([first or store.HEARTBEATS, store.HEARTBEATS], database, monkeypatch)
    with pytest.raises((ResourceExhausted, Unavailable), match=told):
        await heartbeat(heartbeats, task)


async def test_heartbeats_that_fail_together_are_tried_alone(
    connection: Connection, heartbeats: Heartbeats, tasks: Tasks, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "HEARTBEATS", REFUSED)
    running_ = [running(session) for _ in range(5)]
    await insert(connection, *running_)
    await asyncio.gather(*(heartbeat(heartbeats, task) for task in running_))
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
