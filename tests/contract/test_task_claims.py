"""Claims of tasks on a real Postgres: what those that share a transaction get, and what each of them is told."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from controller_svc import claims as module
from controller_svc.claims import Claims
from controller_svc.core.sessions import Session, SessionState
from controller_svc.core.tasks import ClaimTasks, Task, TaskMutations
from controller_svc.idempotency import Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.store import claims as store
from controller_svc.store.claims import CLAIM, NotNow, TaskClaim, claim_tasks, recorded
from controller_svc.store.database import Database, OutcomeUnknownError
from controller_svc.store.read import Guard, read_guards
from orchestrator.controller.v1 import task_service_pb2
from orchestrator.controller.v1.task_service_pb2 import ClaimTasksRequest
from svckit.auth import Principal
from svckit.errors import Aborted, InvalidArgument, Unavailable
from svckit.interceptors import Admission, Call
from svckit.options import policies
from svckit.telemetry import new_trace
from tests.contract.rows import TENANT, insert, lock_scope, new_session, new_task
from tests.contract.test_door import ACTOR
from tests.oracle import eventually

Connection = psycopg.AsyncConnection[Any]
METHOD = "/orchestrator.controller.v1.TaskService/ClaimTasks"
POLICY = policies(task_service_pb2.DESCRIPTOR.services_by_name["TaskService"], 16384)[METHOD]
EVENTS = (
    "select resource_id, subject, role, on_behalf_of, trace_id, key_hash, command_id, method, version_before,"
    " version_after, state_before, state_after from audit_events order by id"
)


def respond(tasks: Sequence[Task]) -> bytes:
    return " ".join(str(task.id) for task in tasks).encode()


def one_claim(max_tasks: int = 1, **changes: Any) -> TaskClaim:
    """A claim with a key, unlike any other."""
    mark = secrets.token_hex(4)
    claim = TaskClaim(
        max_tasks=max_tasks,
        subject=f"subject-{mark}",
        acting_role=f"role-{mark}",
        on_behalf_of=f"behalf-{mark}",
        trace_id=f"trace-{mark}",
        scope=secrets.token_bytes(32),
        fingerprints=secrets.token_bytes(66),
        key_hash=secrets.token_bytes(32),
        command_id=uuid4(),
        lifetime=timedelta(hours=1),
        respond=respond,
    )
    return replace(claim, **changes)


async def take(database: Database, *claims: TaskClaim, wait: bool = False) -> list[Any]:
    async with database.claims.connection() as connection:
        return list(await claim_tasks(connection, TENANT, "coder", METHOD, claims, wait=wait))


async def guard_of(database: Database, claim: TaskClaim) -> Guard | None:
    async with database.looking() as connection:
        return (await read_guards(connection, [(TENANT, claim.scope)])).get(claim.scope)


async def count(connection: Connection, what: str) -> int:
    row = await (await connection.execute(f"select count(*) from {what}")).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
async def session(connection: Connection) -> Session:
    session = new_session(SessionState.ACTIVE)
    await insert(connection, session)
    return session


async def fill(connection: Connection, session: Session, number: int, **values: Any) -> list[Task]:
    """Pending tasks, the first of them of the highest priority."""
    tasks = [new_task(session, priority=number - n, **values) for n in range(number)]
    await insert(connection, *tasks)
    return tasks


async def test_claims_share_what_is_there_in_order(
    connection: Connection, database: Database, session: Session
) -> None:
    tasks = await fill(connection, session, 7)
    claims = [one_claim(2), one_claim(1, key_hash=None), one_claim(3), one_claim(2), one_claim(1)]
    claims = [replace(claim, lifetime=timedelta(hours=n)) for n, claim in enumerate(claims, 1)]
    outcomes = await take(database, *claims)
    ids = [[task.id for task in given] for given, _ in outcomes]
    expected = [task.id for task in tasks]
    assert ids == [expected[:2], expected[2:3], expected[3:6], expected[6:], []]
    events = iter(await (await connection.execute(EVENTS)).fetchall())
    found = {event[0]: event[1:] for event in events}
    for claim, (given, answer) in zip(claims, outcomes, strict=True):
        guard = await guard_of(database, claim)
        assert (guard is not None) == bool(given)
        if guard is not None:
            assert (guard.command_id, guard.fingerprints, guard.code, guard.answer) == (
                claim.command_id, claim.fingerprints, 0, answer,
            )  # fmt: skip
            assert guard.expire_time - given[0].update_time == pytest.approx(claim.lifetime, abs=timedelta(minutes=1))
        for task in given:
            assert (task.state, task.version, task.attempt, task.lease_holder) == ("RUNNING", 2, 1, claim.subject)
            assert found.pop(task.id) == (
                claim.subject, claim.acting_role, claim.on_behalf_of, claim.trace_id, claim.key_hash, claim.command_id,
                METHOD, 1, 2, "PENDING", "RUNNING",
            )  # fmt: skip
    assert found == {}
    assert len({task.lease_id for given, _ in outcomes for task in given}) == 7


async def test_what_has_a_guard_is_told_it_and_takes_no_place(
    connection: Connection, database: Database, session: Session
) -> None:
    first = one_claim(3)
    await fill(connection, session, 5)
    [(_, answer)] = await take(database, first)
    again, other = replace(first, command_id=uuid4()), one_claim(5)
    guard, (given, _) = await take(database, again, other)
    assert (guard.command_id, guard.answer) == (first.command_id, answer)
    assert len(given) == 2
    assert await count(connection, "audit_events") == 5
    [alone] = await take(database, again, wait=True)
    assert alone == guard


async def test_an_expired_guard_gives_way(connection: Connection, database: Database, session: Session) -> None:
    await fill(connection, session, 2)
    claim = one_claim()
    [(before, _)] = await take(database, claim)
    await connection.execute(
        "update idempotency_guards set create_time = now() - interval '2 hours', expire_time = now() - interval '1 s'"
    )
    later = replace(claim, command_id=uuid4())
    [(after, answer)] = await take(database, later)
    assert before != after
    guard = await guard_of(database, later)
    assert guard is not None
    assert (guard.command_id, guard.answer) == (later.command_id, answer)


async def test_a_scope_that_is_held_keeps_nobody_waiting(
    connection: Connection, database: Database, session: Session
) -> None:
    tasks = await fill(connection, session, 3)
    held, free = one_claim(2), one_claim(2)
    async with connection.transaction():
        await lock_scope(connection, held.scope)
        outcome, (given, _) = await take(database, held, free)
        assert outcome is NotNow.HELD
        assert [task.id for task in given] == [task.id for task in tasks[:2]]
        assert await take(database, held) == [NotNow.HELD]
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await take(database, held, wait=True)
    [(given, _)] = await take(database, held, wait=True)
    assert [task.id for task in given] == [tasks[2].id]


async def test_nothing_to_claim_writes_nothing(connection: Connection, database: Database, session: Session) -> None:
    await fill(connection, session, 2, target_role="other")
    claims = [one_claim(), one_claim(key_hash=None)]
    assert await take(database, *claims) == [([], b""), ([], b"")]
    assert await take(database, claims[0], wait=True) == [([], b"")]
    assert await count(connection, "idempotency_guards") == await count(connection, "audit_events") == 0


async def test_answers_are_cut_together_and_who_got_nothing_comes_again(
    connection: Connection, database: Database, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(connection, session, 9, description="x" * 1000)
    monkeypatch.setattr(store, "MAX_ANSWER_BYTES", 65536 + 7000)  # the fifth would begin beyond it
    outcomes = await take(database, one_claim(3), one_claim(3), one_claim(3), one_claim(1, key_hash=None))
    assert [len(given) for given, _ in outcomes[:2]] == [3, 1]
    assert outcomes[2:] == [NotNow.NO_ROOM] * 2
    monkeypatch.setattr(store, "MAX_ANSWER_BYTES", 10)
    (given, _), outcome = await take(database, one_claim(4), one_claim(4))
    assert (len(given), outcome) == (1, NotNow.NO_ROOM)
    assert await count(connection, "tasks where state = 'PENDING'") == 4


class Worker:
    """Claims through the servicers' object, and sees which claims shared a transaction."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        lifetimes = Lifetimes(ok=86400, error=600)
        self.door = Door(database, Idempotency(None, ttl=86400), lifetimes, lanes=1, near_bytes=1 << 20)
        self.claims = Claims(database, self.door, TaskMutations())
        self.transactions: list[list[TaskClaim]] = []
        self.waited: list[bool] = []
        """Which of them waited for their scopes."""
        self.company: Exception | None = None
        """Raised instead of every transaction of more than one claim."""
        self.always: Exception | None = None
        """Raised instead of every transaction."""
        self.after: list[Exception] = []
        """Raised once the next ones are committed."""
        self.warned = False
        """Whether Postgres warns when the next ones are committed."""
        self.held: dict[str, asyncio.Event] = {}
        """By role: for what its claims wait."""
        monkeypatch.setattr(module, "claim_tasks", self._claim_tasks)

    async def _claim_tasks(
        self, connection: Any, tenant: str, role: str, method: str, claims: Sequence[TaskClaim], *, wait: bool
    ) -> Any:
        self.transactions.append(list(claims))
        self.waited.append(wait)
        if role in self.held:
            await self.held[role].wait()
        if len(claims) > 1 and self.company is not None:
            raise self.company
        if self.always:
            raise self.always
        outcomes = await claim_tasks(connection, tenant, role, method, claims, wait=wait)
        connection.warned, self.warned = self.warned, False
        if self.after:
            raise self.after.pop()
        return outcomes

    async def claim(
        self,
        key: str = "",
        *,
        max_tasks: int = 1,
        seconds: float = 30,
        wait: float = 0,
        role: str = "coder",
        tenant: str = TENANT,
    ) -> list[str]:
        """The ids of the tasks it gets."""
        request = ClaimTasksRequest(role=role, max_tasks=max_tasks)
        actor = replace(ACTOR, tenant=tenant)
        call = Call(
            policy=POLICY,
            raw=request.SerializeToString(),
            metadata=(("idempotency-key", key),) if key else (),
            deadline=asyncio.get_running_loop().time() + seconds,
            trace=new_trace(),
            principal=Principal("i", tenant, "s", frozenset({role}), frozenset()),
            admission=Admission(1000, 1000),
            request=request,
        )
        command = ClaimTasks(actor=actor, role=role, max_tasks=max_tasks, wait_seconds=wait)
        known = self.door.known(call)
        if known is None:
            known = self.claims.claim(command, call, lambda tasks: respond([task for task, _ in tasks]))
        answer = await known
        return answer.decode().split()

    @property
    def sizes(self) -> list[int]:
        return [len(claims) for claims in self.transactions]


@pytest.fixture
async def worker(database: Database, monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(database, monkeypatch)


async def test_calls_at_the_same_time_share_a_transaction(
    connection: Connection, worker: Worker, session: Session
) -> None:
    tasks = await fill(connection, session, 40)
    answers = await asyncio.gather(*(worker.claim(f"key-{n}" if n % 2 else "") for n in range(40)))
    assert sorted(id_ for ids in answers for id_ in ids) == sorted(str(task.id) for task in tasks)
    assert len(worker.sizes) <= 3
    before = len(worker.transactions)
    assert await asyncio.gather(*(worker.claim(f"key-{n}") for n in range(1, 40, 2))) == answers[1::2]
    assert len(worker.transactions) == before, "what was answered on this timeline is replayed from memory"


async def test_a_poll_whose_retry_was_given_tasks_is_told_the_same(
    connection: Connection, worker: Worker, session: Session
) -> None:
    poll = asyncio.create_task(worker.claim("k", wait=20))
    await eventually(lambda: bool(worker.claims._sleepers))
    [task] = await fill(connection, session, 1)
    assert await worker.claim("k") == [str(task.id)]
    before = len(worker.transactions)
    assert await poll == [str(task.id)]
    assert len(worker.transactions) == before


async def test_tenants_share_nothing(connection: Connection, worker: Worker, session: Session) -> None:
    other = new_session(SessionState.ACTIVE, tenant="other")
    await insert(connection, other)
    ours = {str(task.id) for task in await fill(connection, session, 3)}
    theirs = {str(task.id) for task in await fill(connection, other, 3)}
    answers = await asyncio.gather(*(worker.claim(tenant=(TENANT, "other")[n % 2]) for n in range(8)))
    assert {id_ for ids in answers[::2] for id_ in ids} == ours
    assert {id_ for ids in answers[1::2] for id_ in ids} == theirs


async def test_a_transaction_takes_no_more_tasks_than_it_may(
    connection: Connection, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TASKS", 5)
    await fill(connection, session, 30)
    answers = await asyncio.gather(*(worker.claim(max_tasks=n) for n in (1, 2, 2, 9, 1, 4)))
    assert sorted(map(len, answers)) == [1, 1, 2, 2, 4, 9]
    for claims in worker.transactions:
        assert len(claims) == 1 or sum(claim.max_tasks for claim in claims) <= 5


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.NumericValueOutOfRange("one of them"),
        psycopg.DataError("as the driver raises it"),
        ValueError("the same"),
        psycopg.errors.DeadlockDetected(),
    ],
)
async def test_the_fault_of_one_is_not_its_companys(
    error: Exception, connection: Connection, worker: Worker, session: Session
) -> None:
    tasks = await fill(connection, session, 10)
    worker.company = error
    answers = await asyncio.gather(*(worker.claim() for _ in range(10)))
    assert sorted(id_ for ids in answers for id_ in ids) == sorted(str(task.id) for task in tasks)
    assert worker.sizes[-10:] == [1] * 10


async def test_whose_own_fault_it_is_is_told(connection: Connection, worker: Worker, session: Session) -> None:
    await fill(connection, session, 1)
    for always in (psycopg.errors.NumericValueOutOfRange(), psycopg.DataError("as the driver raises it")):
        worker.always = always
        with pytest.raises(InvalidArgument, match="VALUE_REFUSED"):
            await worker.claim()
    worker.always = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        await worker.claim()
    assert worker.sizes == [1] * 6, "each once more by itself"


@pytest.mark.parametrize("cause", [psycopg.OperationalError("lost"), OutcomeUnknownError("lost"), None])
async def test_a_lost_answer_is_found_by_each(
    cause: Exception | None, connection: Connection, worker: Worker, session: Session
) -> None:
    """`cause`: None is a warning that came with the commit, as when no standby has it."""
    tasks = await fill(connection, session, 20)
    worker.after = [cause] * 2 if cause else []
    worker.warned = cause is None
    answers = await asyncio.gather(*(worker.claim(f"key-{n}") for n in range(20)))
    assert sorted(id_ for ids in answers for id_ in ids) == sorted(str(task.id) for task in tasks)
    assert sum(worker.sizes) == 20, "nothing is claimed again"
    assert await count(connection, "audit_events") == 20


async def test_a_held_key_delays_its_own_callers_alone(
    connection: Connection, worker: Worker, session: Session
) -> None:
    assert await worker.claim("held") == []
    scope = worker.transactions[0][0].scope
    await fill(connection, session, 10)
    async with connection.transaction():
        await lock_scope(connection, scope)
        held = asyncio.create_task(worker.claim("held"))
        for other in [asyncio.create_task(worker.claim()) for _ in range(5)]:
            assert len(await other) == 1
        assert not held.done()
        before = len(worker.transactions)
        while len(worker.transactions) < before + 2:  # it waits for the lock, again and again
            await asyncio.sleep(0.01)
        assert worker.waited[before:] == [True] * (len(worker.transactions) - before)
    assert len(await held) == 1


async def test_no_role_keeps_another_waiting(
    connection: Connection, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LINES", 2)
    for role in ("slow", "a", "b", "c"):
        await fill(connection, session, 2, target_role=role)
    worker.held["slow"] = asyncio.Event()
    slow = [asyncio.create_task(worker.claim(role="slow")) for _ in range(2)]
    for role in ("a", "b", "c", "a", "b", "c"):
        assert len(await worker.claim(role=role)) == 1
    assert not any(call.done() for call in slow)
    assert len(worker.claims._lines) <= 3
    worker.held["slow"].set()
    assert [len(await call) for call in slow] == [1, 1]


async def test_who_got_no_room_is_given_the_rest(
    connection: Connection, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that there are no tasks while there are, and who comes later is given later ones."""
    monkeypatch.setattr(store, "MAX_ANSWER_BYTES", 65536 + 3000)
    tasks = await fill(connection, session, 10, description="x" * 1000)
    worker.held["coder"] = asyncio.Event()
    claims = [asyncio.create_task(worker.claim(max_tasks=n)) for n in (9, 1, 1, 1, 1, 1, 1, 1)]
    while not worker.transactions:
        await asyncio.sleep(0.01)
    claims.append(asyncio.create_task(worker.claim()))
    while not len(worker.claims._line(TENANT, "coder")):
        await asyncio.sleep(0.01)
    worker.held["coder"].set()
    answers = [await claim for claim in claims]
    assert [len(ids) for ids in answers] == [2] + [1] * 8
    assert [id_ for ids in answers for id_ in ids] == [str(task.id) for task in tasks], "in the order of the claims"


async def test_an_empty_claim_leaves_its_statement_prepared(
    connection: Connection, database: Database, session: Session
) -> None:
    async with database.claims.connection() as own:
        for _ in range(3):
            assert await claim_tasks(own, TENANT, "coder", METHOD, [one_claim(key_hash=None)], wait=False) == [
                ([], b"")
            ]
        cursor = await own.execute("select count(*) from pg_prepared_statements where statement = %s", (CLAIM,))
        assert await cursor.fetchall() == [(1,)]


async def test_many_in_doubt_are_settled_together(
    connection: Connection, database: Database, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the lost backend holds their scopes, they use one connection and keep no other role waiting."""
    await fill(connection, session, 20)
    await fill(connection, session, 5, target_role="other")
    worker.after = [psycopg.OperationalError("lost")] * 2
    settled: list[int] = []

    async def held_at_first(connection: Any, scopes: Any) -> Any:
        settled.append(len(scopes))
        return [NotNow.HELD] * len(scopes) if len(settled) < 3 else await recorded(connection, scopes)

    monkeypatch.setattr(module, "recorded", held_at_first)
    claims = [asyncio.create_task(worker.claim(f"key-{n}")) for n in range(20)]
    while not settled:
        await asyncio.sleep(0.01)
    worker.after.clear()
    for _ in range(5):
        assert len(await worker.claim(role="other")) == 1
    assert len({id_ for call in claims for id_ in await call}) == 20
    assert len(settled) < 10
    assert sum(worker.sizes) == 25


@pytest.mark.parametrize("error", [psycopg.OperationalError("away"), RuntimeError("a defect")])
async def test_what_cannot_be_found_out_stays_open(
    error: Exception, connection: Connection, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that nothing was written; who asks again gets what was."""
    monkeypatch.setattr(module, "RESEND_SECONDS", 0.2)
    [task] = await fill(connection, session, 1)
    worker.after = [psycopg.OperationalError("lost")]

    async def failing(connection: Any, scopes: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "recorded", failing)
    with pytest.raises(Unavailable, match="OUTCOME_UNKNOWN"):
        await worker.claim("key")
    assert await worker.claim("key") == [str(task.id)]
    assert await count(connection, "audit_events") == 1


async def test_what_is_recorded(connection: Connection, database: Database, session: Session) -> None:
    await fill(connection, session, 1)
    made, unmade, held = one_claim(), one_claim(), one_claim()
    [(_, answer)] = await take(database, made)
    async with connection.transaction(), database.claims.connection() as other:
        await lock_scope(connection, held.scope)
        guard, *rest = await recorded(other, [(TENANT, claim.scope) for claim in (made, held, unmade)])
        assert isinstance(guard, Guard)
        assert (guard.command_id, guard.answer) == (made.command_id, answer)
        assert rest == [NotNow.HELD, None]
        assert await recorded(other, [("other", made.scope)]) == [None]


async def test_who_is_late_by_its_turn_claims_nothing(connection: Connection, worker: Worker, session: Session) -> None:
    await fill(connection, session, 3)
    worker.held["coder"] = asyncio.Event()
    first = asyncio.create_task(worker.claim())
    while not worker.transactions:
        await asyncio.sleep(0.01)
    late, in_time = asyncio.create_task(worker.claim("late", seconds=0.3)), asyncio.create_task(worker.claim())
    await asyncio.sleep(0.4)
    worker.held["coder"].set()
    with pytest.raises(Aborted, match="RESOURCE_BUSY"):
        await late
    assert [len(ids) for ids in (await first, await in_time)] == [1, 1]
    assert await count(connection, "audit_events") == 2


async def test_without_a_connection_nothing_was_sent(
    connection: Connection, database: Database, worker: Worker, session: Session
) -> None:
    await fill(connection, session, 1)
    async with AsyncExitStack() as used:
        for _ in range(database.claims.max_size):
            await used.enter_async_context(database.claims.connection())
        with pytest.raises(Unavailable, match="DATABASE_BUSY"):
            await worker.claim(seconds=0.5)
    assert worker.transactions == []
    assert len(await worker.claim()) == 1


async def test_who_has_time_waits_for_a_connection(
    connection: Connection, database: Database, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTION_SECONDS", 0.05)
    await fill(connection, session, 3)
    async with AsyncExitStack() as used:
        for _ in range(database.claims.max_size):
            await used.enter_async_context(database.claims.connection())
        patient = [asyncio.create_task(worker.claim(key)) for key in ("", "key")]
        with pytest.raises(Unavailable, match="DATABASE_BUSY"):
            await worker.claim(seconds=0.5)
        assert worker.transactions == []
    assert [len(await claim) for claim in patient] == [1, 1]


async def test_who_got_no_room_may_have_to_wait_for_a_connection(
    connection: Connection, database: Database, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTION_SECONDS", 0.05)
    monkeypatch.setattr(store, "MAX_ANSWER_BYTES", 65536 + 3000)
    tasks = await fill(connection, session, 8, description="x" * 1000)
    worker.held["coder"] = asyncio.Event()
    claims = [asyncio.create_task(worker.claim()) for _ in range(8)]
    while not worker.transactions:
        await asyncio.sleep(0.01)
    async with AsyncExitStack() as used:
        for _ in range(database.claims.max_size - 1):
            await used.enter_async_context(database.claims.connection())
        last = asyncio.create_task(used.enter_async_context(database.claims.connection()))  # before the group asks anew
        await asyncio.sleep(0)
        worker.held["coder"].set()
        await last
        await asyncio.sleep(0.2)
        assert len(worker.transactions) == 1
    answers = [await claim for claim in claims]
    assert sorted(id_ for ids in answers for id_ in ids) == sorted(str(task.id) for task in tasks)
    assert await count(connection, "audit_events") == 8


async def test_without_a_connection_a_group_fails_as_one(
    connection: Connection, database: Database, worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come after the first transaction: not each of them waits anew."""
    monkeypatch.setattr(module, "MOST_TASKS", 1)
    await fill(connection, session, 1)
    groups: list[tuple[int, int]] = []
    """Of each its size, and how often it waited for a connection."""
    waits = 0
    in_group, connect = worker.claims._in_group, database.claims.connection

    def counted(timeout: float) -> Any:
        nonlocal waits
        waits += 1
        return connect(timeout)

    async def noted(tenant: str, role: str, group: Any) -> None:
        before = waits
        await in_group(tenant, role, group)
        groups.append((len(group), waits - before))

    monkeypatch.setattr(worker.claims, "_in_group", noted)
    async with AsyncExitStack() as used:
        for _ in range(database.claims.max_size):
            await used.enter_async_context(database.claims.connection())
        monkeypatch.setattr(database.claims, "connection", counted)
        claims = await asyncio.gather(*(worker.claim(seconds=0.5) for _ in range(10)), return_exceptions=True)
    assert {getattr(error, "reason", "") for error in claims} <= {"DATABASE_BUSY", "RESOURCE_BUSY"}
    assert max(size for size, _ in groups) > 1
    assert max(waited for _, waited in groups) == 1


@pytest.mark.parametrize("key", ["", "key"])
async def test_who_leaves_before_the_transaction_takes_nothing_without_a_key(
    key: str, connection: Connection, worker: Worker, session: Session
) -> None:
    """With a key it does: a retry is answered."""
    await fill(connection, session, 3)
    worker.held["coder"] = asyncio.Event()
    first = asyncio.create_task(worker.claim())
    while not worker.transactions:
        await asyncio.sleep(0.01)
    leaving, staying = asyncio.create_task(worker.claim(key)), asyncio.create_task(worker.claim())
    while len(worker.claims._line(TENANT, "coder")) < 2:
        await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.sleep(0)
    worker.held["coder"].set()
    await asyncio.gather(first, staying)
    await worker.claims.close()
    assert await count(connection, "audit_events") == 2 + bool(key)
    assert await count(connection, "tasks where state = 'PENDING'") == 1 - bool(key)
    if key:
        assert len(await worker.claim(key)) == 1
