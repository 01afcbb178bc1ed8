"""The door on a real Postgres: one effect and one answer per key, whatever callers and connections do.

No idempotency_svc here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.pq import DiagnosticField

from controller_svc import mutation
from controller_svc.core.ids import new_id
from controller_svc.core.mutations import Actor, Key
from controller_svc.core.sessions import ChangeSession, CreateSession, Session, SessionMutations, UpdateSession
from controller_svc.core.tasks import TaskMutations
from controller_svc.idempotency import Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.store import database as store
from controller_svc.store.database import Database, resource_busy
from controller_svc.store.read import read_guards, read_rows
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks
from controller_svc.store.write import Outcome, write
from controller_svc.sweepers import Sweepers
from deploy.local.servers import Postgres
from orchestrator.controller.v1 import session_service_pb2 as pb
from svckit.auth import Principal
from svckit.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServiceError,
    StoredAnswer,
    Unavailable,
)
from svckit.interceptors import Admission, Call
from svckit.options import policies
from svckit.telemetry import new_trace

ACTOR = Actor(issuer="i", tenant="t", subject="s", roles=frozenset({"finance"}), operate=False)
PRINCIPAL = Principal(issuer="i", tenant="t", subject="s", roles=frozenset({"finance"}), permissions=frozenset())
POLICIES = policies(pb.DESCRIPTOR.services_by_name["SessionService"], 16384)
SERVICE = "/orchestrator.controller.v1.SessionService/"
MUTATIONS = SessionMutations(timedelta(days=7))


def create_request(**data: Any) -> pb.CreateSessionRequest:
    """The request of Client.create."""
    request = pb.CreateSessionRequest(agent_role="finance")
    request.metadata.update(data)
    return request


@dataclass
class Client:
    """Calls the door as the chain and a servicer do."""

    door: Door
    database: Database
    url: str
    answer_suffix: str = ""

    async def create(
        self,
        key: str | None = None,
        *,
        seconds: float = 20,
        principal: Principal = PRINCIPAL,
        more: tuple[tuple[str, str], ...] = (),
        **data: Any,
    ) -> str:
        """A CreateSession, with `more` metadata; answers the session's id."""
        command = CreateSession(actor=ACTOR, id=new_id(), agent_role="finance", task_id=None, metadata=data)
        request = create_request(**data)
        return await self._write(MUTATIONS.create, command, "CreateSession", request, key, seconds, principal, more)

    async def move(
        self, verb: str, session_id: Any, key: str | None = None, *, seconds: float = 20, etag: str = ""
    ) -> str:
        """A verb; answers state and version."""
        command = ChangeSession(actor=ACTOR, id=session_id, etag=etag)
        request = pb.ActivateSessionRequest(session_id=str(session_id), etag=etag)
        return await self._write(getattr(MUTATIONS, verb.lower()), command, f"{verb}Session", request, key, seconds)

    async def update(
        self, session_id: Any, key: str | None = None, *, etag: str = "", seconds: float = 20, **data: Any
    ) -> str:
        """An UpdateSession; answers state and version."""
        command = UpdateSession(actor=ACTOR, id=session_id, etag=etag, paths=("metadata",), metadata=data, task_id=None)
        request = pb.UpdateSessionRequest(session_id=str(session_id), etag=etag)
        request.metadata.update(data)
        return await self._write(MUTATIONS.update, command, "UpdateSession", request, key, seconds)

    async def _write(
        self,
        mutation: Any,
        command: Any,
        method: str,
        request: Any,
        key: str | None,
        seconds: float,
        principal: Principal = PRINCIPAL,
        more: tuple[tuple[str, str], ...] = (),
    ) -> str:
        call = self.call(method, request, key, seconds, principal, more)

        def respond(session: Session) -> bytes:
            return f"{session.id} {session.state} {session.version}{self.answer_suffix}".encode()

        known = self.door.known(call)
        body = await (self.door.write(mutation, command, call, respond) if known is None else known)
        return body.decode() + (" replayed" if call.trailers else "")

    def call(
        self,
        method: str,
        request: Any,
        key: str | None,
        seconds: float = 20,
        principal: Principal = PRINCIPAL,
        more: tuple[tuple[str, str], ...] = (),
    ) -> Call:
        """A call of SessionService as the chain makes it."""
        return Call(
            policy=POLICIES[SERVICE + method],
            raw=request.SerializeToString(),
            metadata=more if key is None else (("idempotency-key", key), *more),
            deadline=asyncio.get_running_loop().time() + seconds,
            trace=new_trace(),
            principal=principal,
            admission=Admission(10_000, 10_000),
            request=request,
        )

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What a stranger reads."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
            return await (await connection.execute(query)).fetchall()

    async def session(self) -> Any:
        """The id of a new PENDING session."""
        return UUID((await self.create()).split(" ")[0])


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[Client]:
    """A door on a fresh database."""
    async with _client(database_url) as client:
        yield client


class _client:
    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Client:
        self.database = Database(self.url, lanes=2)
        await self.database.open()
        async with asyncio.timeout(10):
            while not self.database.ready:
                await asyncio.sleep(0.01)
        door = Door(self.database, Idempotency(None, ttl=86400), Lifetimes(ok=86400, error=600), lanes=2)
        return Client(door, self.database, self.url)

    async def __aexit__(self, *exc: object) -> None:
        await self.database.close()


def numbered(n: int) -> dict[str, Any]:
    """Metadata of its own."""
    return {f"k{n}": n}


async def settled(*calls: Any) -> list[Any]:
    """Each call's answer, or its error."""
    return await asyncio.gather(*calls, return_exceptions=True)


def without_mark(answers: list[Any]) -> set[str]:
    """The answers as the client compares them: the mark of a replay is a trailer."""
    return {answer.removesuffix(" replayed") for answer in answers}


async def test_same_key_same_answer_one_row(client: Client) -> None:
    first = await client.create("k")
    assert await client.create("k") == first + " replayed"
    assert await client.create("other") != first
    assert await client.create() != await client.create()
    assert await client.rows("select count(*) from sessions") == [(4,)]
    assert await client.rows("select count(*) from audit_events") == [(4,)]


async def test_who_is_taken_out_of_line_is_not_written(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the turn of the loop between the forming of its group and the group's first step."""
    groups = client.door._groups
    launch = groups._launch

    def launch_and_leave() -> None:
        group = list(groups._waiting)
        launch()
        for attempt in group:
            client.door._leave(attempt, resource_busy())

    monkeypatch.setattr(groups, "_launch", launch_and_leave)
    for key in (None, "k"):
        with pytest.raises(Aborted) as told:
            await client.create(key)
        assert told.value.reason == "RESOURCE_BUSY"
    await client.door.close()
    assert await client.rows("select count(*) from sessions") == [(0,)]
    monkeypatch.undo()
    assert not (await client.create("k")).endswith("replayed")


async def test_any_json_survives_being_read_and_written_again(client: Client) -> None:
    values: dict[str, Any] = {
        "numbers": [1e300, -1e300, 5e-324, 0.1, 2**53 - 1, float(2**53), 1e19, -1e19, float(2**64), 123456789012.5],
        "texts": ["é😀", '"\\\n\x01\x7f\u2028', ""],
        "others": [None, True, False, {}, [], {"": {"é": [[]]}}],
    }
    session_id = UUID((await client.create(**values)).split(" ")[0])
    await client.update(session_id, more=1)
    await client.move("Activate", session_id)
    await client.update(session_id, more=2)
    found = await Sessions(client.database).get("t", session_id)
    assert found is not None
    assert (found.version, found.metadata) == (4, {**values, "more": 2})


async def test_json_that_cannot_be_written_fails_alone(client: Client) -> None:
    """None gets past the servicer; the group would end with it."""
    answers = await settled(*(client.create(f"k{n}", a=2**64 if n == 2 else n) for n in range(5)))
    assert [type(answer) for answer in answers] == [str, str, InvalidArgument, str, str]
    assert answers[2].reason == "VALUE_REFUSED"
    assert await client.rows("select count(*) from sessions") == [(4,)]


async def test_200_at_once_with_one_key(client: Client) -> None:
    answers = await asyncio.gather(*(client.create("k") for _ in range(200)))
    assert len(without_mark(answers)) == 1
    assert sum(answer.endswith("replayed") for answer in answers) == 199
    assert await client.rows("select count(*) from sessions") == [(1,)]


async def test_another_body_another_principal_another_method(client: Client) -> None:
    await client.create("k", a=1)
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as refused:
            await client.create("k", a=2)
        assert refused.value.reason == "IDEMPOTENCY_KEY_REUSED"
    mine, theirs = await settled(client.create("racing", a=1), client.create("racing", a=2))
    assert isinstance(theirs, FailedPrecondition) and isinstance(mine, str)
    await client.create("k", principal=replace(PRINCIPAL, subject="another"))
    session = await client.session()
    assert await client.move("Activate", session, "k") == f"{session} ACTIVE 2"


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "ü", "a\x00"])
async def test_a_malformed_key_is_refused(client: Client, key: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await client.create(key)
    assert refused.value.reason == "IDEMPOTENCY_KEY_INVALID"
    assert await client.rows("select count(*) from idempotency_guards") == [(0,)]


async def test_a_refusal_by_state_is_kept_and_never_in_place_of_an_ok(client: Client) -> None:
    session = await client.session()
    for _ in range(2):
        with pytest.raises(StoredAnswer) as refused:
            await client.move("Pause", session, "early")
        assert refused.value.code == 9
    await client.move("Activate", session)
    with pytest.raises(StoredAnswer):
        await client.move("Pause", session, "early")
    done = await client.move("Complete", session, "complete")
    with pytest.raises(FailedPrecondition):
        await client.move("Fail", session)
    assert await client.move("Complete", session, "complete") == done + " replayed"


async def test_an_etag_mismatch_is_not_kept_but_a_committed_ok_is_told_before_it(client: Client) -> None:
    session = await client.session()
    with pytest.raises(Aborted):
        await client.update(session, "k", etag="2", a=1)
    await client.move("Activate", session)
    assert await client.update(session, "k", etag="2", a=1) == f"{session} ACTIVE 3"
    assert await client.update(session, "k", etag="2", a=1) == f"{session} ACTIVE 3 replayed"


async def test_a_keyless_refusal_and_a_keyless_no_change_write_nothing(client: Client) -> None:
    session = await client.session()
    before = await client.rows("select count(*) from idempotency_guards")
    with pytest.raises(FailedPrecondition):
        await client.move("Pause", session)
    with pytest.raises(NotFound):
        await client.move("Pause", new_id())
    await client.move("Activate", session)
    assert await client.move("Activate", session) == f"{session} ACTIVE 2"
    assert await client.rows("select count(*) - 1 from idempotency_guards") == before


async def test_many_changes_of_one_row_are_all_made_one_after_the_other(client: Client) -> None:
    session = await client.session()
    answers = await asyncio.gather(*(client.update(session, f"k{n}", **numbered(n)) for n in range(60)))
    assert sorted(int(answer.split(" ")[2]) for answer in answers) == list(range(2, 62))
    assert await client.rows("select version, (select count(*) from jsonb_object_keys(metadata)) from sessions") == [
        (61, 60)
    ]


async def test_two_processes_at_one_row_and_one_key(client: Client) -> None:
    async with _client(client.url) as other:
        session = await client.session()
        answers = await asyncio.gather(
            *(who.update(session, f"k{n}", **numbered(n)) for n in range(40) for who in (client, other))
        )
        assert len(without_mark(answers)) == 40
        assert await client.rows("select version from sessions") == [(41,)]


async def test_a_row_held_by_a_stranger_delays_only_its_own_callers(client: Client) -> None:
    held, free = await client.session(), await client.session()
    async with await psycopg.AsyncConnection.connect(client.url) as stranger:
        await stranger.execute("select from sessions where id = %s for update", (held,))
        waiting = [asyncio.create_task(client.update(held, f"h{n}", a=n)) for n in range(5)]
        hopeless = asyncio.create_task(client.update(held, "hopeless", seconds=0.8, a=1))
        for n in range(100):
            await client.update(free, f"f{n}", a=n)
            await client.create(f"c{n}")
        assert not any(task.done() for task in waiting)
        with pytest.raises(Aborted) as busy:
            await hopeless
        assert busy.value.reason == "RESOURCE_BUSY"
    assert len(await asyncio.gather(*waiting)) == 5
    assert await client.rows(f"select version from sessions where id = '{held}'") == [(6,)]


async def test_one_poisonous_command_of_a_group_fails_alone(client: Client) -> None:
    async with await psycopg.AsyncConnection.connect(client.url, autocommit=True) as connection:
        await connection.execute("alter table sessions add constraint poison check (metadata ->> 'x' <> 'poison')")
    answers = await settled(*(client.create(f"k{n}", x="poison" if n == 20 else "fine") for n in range(50)))
    refused = [(n, answer) for n, answer in enumerate(answers) if isinstance(answer, Exception)]
    assert [n for n, _ in refused] == [20]
    assert isinstance(refused[0][1], InvalidArgument) and refused[0][1].reason == "VALUE_REFUSED"
    assert await client.rows("select count(*) from sessions") == [(49,)]


async def test_ended_backends_double_nothing(client: Client) -> None:
    async with await psycopg.AsyncConnection.connect(client.url, autocommit=True) as killer:
        answers: list[Any] = []
        for round_ in range(8):
            calls = asyncio.gather(
                *(client.create(None if n % 4 == 0 else f"{round_}-{n}", n=n) for n in range(40)),
                return_exceptions=True,
            )
            await asyncio.sleep(0.004 * round_ / 8)
            await killer.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name = 'controller_svc groups'"
            )
            answers += await calls
    assert {type(answer) for answer in answers} <= {str, Unavailable}
    told = [answer.split(" ")[0] for answer in answers if isinstance(answer, str)]
    assert len(set(told)) == len(told)
    ids = {str(row[0]) for row in await client.rows("select id from sessions")}
    assert set(told) <= ids
    assert await client.rows("select count(*) from audit_events") == [(len(ids),)]
    assert len(ids) <= len(answers)


async def test_a_caller_that_leaves_before_the_start_is_taken_out_and_after_it_its_answer_is_kept(
    client: Client,
) -> None:
    session = await client.session()
    async with await psycopg.AsyncConnection.connect(client.url) as stranger:
        await stranger.execute("select from sessions where id = %s for update", (session,))
        first = asyncio.create_task(client.update(session, "first", a=1))
        await _row_is_waited_for(client)
        second = asyncio.create_task(client.update(session, "second", a=2))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()
        await settled(first, second)
    async with asyncio.timeout(60):
        while await client.rows("select version from sessions") != [(2,)]:
            await asyncio.sleep(0.05)
    assert await client.update(session, "first", a=1) == f"{session} PENDING 2 replayed"
    assert await client.update(session, "second", a=2) == f"{session} PENDING 3"


async def test_the_followers_of_a_caller_that_leaves_go_on(client: Client) -> None:
    session = await client.session()
    async with await psycopg.AsyncConnection.connect(client.url) as stranger:
        await stranger.execute("select from sessions where id = %s for update", (session,))
        blocker = asyncio.create_task(client.update(session, "blocker", b=1))
        await asyncio.sleep(0.1)
        owner = asyncio.create_task(client.update(session, "k", a=1))
        await asyncio.sleep(0.05)
        followers = [asyncio.create_task(client.update(session, "k", a=1)) for _ in range(5)]
        await asyncio.sleep(0.05)
        owner.cancel()
    answers = await asyncio.gather(*followers)
    await blocker
    assert without_mark(answers) == {f"{session} PENDING 3"}


async def test_a_stopped_standby_makes_the_outcome_unknown_and_the_retry_settles_it(own_postgres: Postgres) -> None:
    """A COMMIT that waits for a standby answers nothing: nothing is cancelled or doubled, and the key converges."""

    async with _client(own_postgres.url) as client:
        await client.create("before")
        await _set_standbys(own_postgres, "ghost")
        with pytest.raises(ServiceError) as unknown:
            await client.create("k", seconds=29)
        assert unknown.value.reason == "OUTCOME_UNKNOWN"
        # Ended by somebody else, the waiting COMMIT reports success, with a warning: that is no confirmation.
        impatient = asyncio.create_task(client.create("cancelled", seconds=29))
        async with asyncio.timeout(60):
            while not await client.rows(
                "select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'"
                " and application_name = 'controller_svc groups' and query_start > now() - interval '3 seconds'"
            ):
                await asyncio.sleep(0.1)
        with pytest.raises(ServiceError) as unknown:
            await impatient
        assert unknown.value.reason == "OUTCOME_UNKNOWN"
        await _set_standbys(own_postgres, "")
        for key in ("k", "cancelled"):
            assert (await client.create(key, seconds=29)).endswith("replayed")
        assert await client.rows("select count(*) from sessions") == [(3,)]


async def test_a_command_alone_whose_outcome_is_unknown_is_not_told_that_nothing_was_written(
    own_postgres: Postgres,
) -> None:
    """It waits alone for a held row; when it has it, its COMMIT waits for a standby that does not answer."""
    async with _client(own_postgres.url) as client:
        session = await client.session()
        async with await psycopg.AsyncConnection.connect(own_postgres.url) as stranger:
            await stranger.execute("select from sessions where id = %s for update", (session,))
            keyed = asyncio.create_task(client.update(session, "k", seconds=29, a=1))
            await _row_is_waited_for(client)
            await _set_standbys(own_postgres, "ghost")
            await stranger.rollback()
        with pytest.raises(ServiceError) as unknown:
            await keyed
        assert unknown.value.reason == "OUTCOME_UNKNOWN"
        await _set_standbys(own_postgres, "")
        assert await client.update(session, "k", seconds=29, a=1) == f"{session} PENDING 2 replayed"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["from the start", "meanwhile"])
async def test_what_is_answered_is_on_disk_whatever_the_database_is_set_to(
    meanwhile: bool, own_postgres: Postgres
) -> None:
    """With synchronous_commit off, Postgres by itself answers before it has written anything."""

    async def switch_off() -> None:
        async with await psycopg.AsyncConnection.connect(own_postgres.url, autocommit=True) as connection:
            for setting in ("synchronous_commit = off", "wal_writer_delay = '10s'"):
                await connection.execute(f"alter system set {setting}")
            await connection.execute("select pg_reload_conf()")
        await asyncio.sleep(0.3)

    if not meanwhile:
        await switch_off()
    async with _client(own_postgres.url) as client:
        if meanwhile:
            await switch_off()
        answers = [await client.create(f"k{n}") for n in range(10)]
        own_postgres.child.kill()
        await asyncio.to_thread(own_postgres.start)
        async with await psycopg.AsyncConnection.connect(own_postgres.url) as stranger:
            rows = await (await stranger.execute("select id from sessions order by id")).fetchall()
        assert [f"{row[0]} PENDING 1" for row in rows] == answers


async def _row_is_waited_for(client: Client) -> None:
    waiting = (
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        " and application_name like 'controller_svc%'"
    )
    async with asyncio.timeout(60):
        while await client.rows(waiting) == [(0,)]:
            await asyncio.sleep(0.01)


async def _set_standbys(server: Postgres, names: str) -> None:
    async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as connection:
        await connection.execute(f"alter system set synchronous_standby_names = '{names}'")
        await connection.execute("select pg_reload_conf()")
    await asyncio.sleep(0.3)


async def test_a_written_command_whose_guard_cannot_be_read_is_not_told_that_nothing_was_written(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to its statement is lost, and so is every look at the guard that it met when it was sent again."""
    answers: Iterator[bool] = iter([])  # one goes wrong for each True that is left
    looks: Iterator[bool] = iter([])

    async def lossy(connection: Any, writes: Any, *, wait: bool) -> Any:
        outcome = await write(connection, writes, wait=wait)
        if next(answers, False):
            raise psycopg.OperationalError("the answer is lost")
        return outcome

    async def blind(connection: Any, scopes: Any) -> Any:
        if next(looks, False):
            raise psycopg.OperationalError("the connection is lost")
        return await read_guards(connection, scopes)

    monkeypatch.setattr(mutation, "write", lossy)
    monkeypatch.setattr(mutation, "read_guards", blind)
    for key in (None, "k"):
        answers, looks = iter([True]), itertools.repeat(True)
        with pytest.raises(Unavailable) as unknown:
            await client.create(key)
        assert unknown.value.reason == "OUTCOME_UNKNOWN"
    looks = iter([])
    assert await client.rows("select count(*) from sessions") == [(2,)]
    assert (await client.create("k")).endswith("replayed")


def full(severity: str) -> psycopg.errors.DiskFull:
    """ERROR: the statement was rolled back; PANIC: the log could not be written, and the server ends."""
    return psycopg.errors.DiskFull("no room", info={DiagnosticField.SEVERITY_NONLOCALIZED: severity.encode()})


def end_writes_with(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """The next statements are written, and then answered with these errors, one each."""
    left = iter(errors)

    async def written_and_lost(connection: Any, writes: Any, *, wait: bool) -> Any:
        outcome = await write(connection, writes, wait=wait)
        for error in left:
            raise error
        return outcome

    monkeypatch.setattr(mutation, "write", written_and_lost)


@pytest.mark.parametrize("key", [None, "k"])
async def test_what_a_full_log_has_already_is_found_there(
    key: str | None, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends for want of room says so as one that refuses does; but it may have written the commit."""
    end_writes_with(monkeypatch, full("PANIC"))
    created = await client.create(key)
    assert await client.rows("select id from sessions") == [(UUID(created.split(" ")[0]),)]


async def test_what_was_sent_before_may_be_written_though_there_is_no_room_now(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_writes_with(monkeypatch, psycopg.OperationalError("the answer is lost"), full("ERROR"))
    with pytest.raises(Unavailable, match="OUTCOME_UNKNOWN"):
        await client.create("k")
    assert (await client.create("k")).endswith("replayed")


async def test_who_finds_no_room_for_reading_is_refused_at_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, reads = await client.session(), 0

    async def refused(connection: Any, keys: Any) -> Any:
        nonlocal reads
        reads += 1
        raise full("ERROR")

    monkeypatch.setattr(mutation, "read_rows", refused)
    with pytest.raises(ResourceExhausted, match="DATABASE_FULL") as told:
        await client.update(session, a=1)
    assert reads == 1 and told.value.retry_after
    assert client.database.component().detail == "no room"


async def test_decided_again_a_write_may_happen_no_longer_than_before(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has become of the clock: what was sent first may be under way still when the second is told too late."""
    sent: list[datetime] = []

    async def stale_at_first(connection: Any, writes: Any, *, wait: bool) -> Any:
        sent.extend(one.not_after for one in writes)
        if len(sent) == 1:
            return [Outcome.STALE], datetime.now(UTC) - timedelta(seconds=3)
        return await write(connection, writes, wait=wait)

    monkeypatch.setattr(mutation, "write", stale_at_first)
    await client.create("k")
    assert len(sent) == 2 and sent[0] == sent[1]


async def test_a_change_is_made_at_a_time_after_what_it_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await client.session()
    late = datetime.now(UTC) + timedelta(seconds=30)

    async def slow(connection: Any, keys: Any) -> Any:
        found = await read_rows(connection, keys)
        client.database.learn(late)
        return found

    monkeypatch.setattr(mutation, "read_rows", slow)
    await client.update(session, "k", a=1)
    ((updated,),) = await client.rows("select update_time from sessions")
    assert updated >= late


async def test_a_connection_that_is_dead_when_a_group_reads_is_cut(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group goes on with another: nothing was sent yet."""
    session = await client.session()
    monkeypatch.setattr(store, "WATCHDOG_SECONDS", 0.3)
    reads = 0

    async def dead_at_first(connection: Any, keys: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 1:
            await connection.execute("select pg_sleep(3)")
        return await read_rows(connection, keys)

    monkeypatch.setattr(mutation, "read_rows", dead_at_first)
    assert (await client.update(session, "k", a=1)).startswith(f"{session} PENDING 2")
    assert reads == 2


async def test_each_command_of_a_group_is_counted(client: Client) -> None:
    won = mutation.OUTCOMES[Outcome.WON]
    before = won._value.get()
    await asyncio.gather(*(client.create(f"k{n}") for n in range(30)))
    assert won._value.get() == before + 30


async def test_an_attempt_whose_caller_left_is_settled_when_its_group_is_tried_again(client: Client) -> None:
    """Its key and its row are free afterwards, whatever became of its first connection."""
    session = await client.session()
    async with AsyncExitStack() as taken:
        for _ in range(3):
            await taken.enter_async_context(client.database.groups.connection())
        leaving = asyncio.create_task(client.update(session, "k", a=1))
        await asyncio.sleep(0.3)
        leaving.cancel()
        await settled(leaving)
        await asyncio.sleep(1)  # the pool has refused a connection: the group is tried again
    async with asyncio.timeout(60):
        while client.door._owners or client.door._slots._held:
            await asyncio.sleep(0.05)
    assert (await client.update(session, "k", a=1)).startswith(f"{session} PENDING 2")
    assert (await client.update(session, "other", a=2)).startswith(f"{session} PENDING 3")


async def test_a_held_row_keeps_neither_reads_nor_sweeps(client: Client) -> None:
    session = await client.session()
    ids = [new_id(), new_id()]
    async with await psycopg.AsyncConnection.connect(client.url, autocommit=True) as connection:
        for id_ in ids:
            await connection.execute(
                "insert into tasks (tenant, id, version, beat, session_id, type, from_role, target_role, description,"
                " data, context, trace_id, priority, schedule_time, attempt, max_attempts, retry_backoff_us,"
                " lease_timeout_us, state, lease_id, lease_holder, lease_expire_time, create_time, update_time,"
                " start_time)"
                " values ('t', %s, 2, 0, %s, 'X', 'finance', 'r', '', '{}', '{}', '', 0, now(), 1, 3, 0, 1000000,"
                " 'RUNNING', gen_random_uuid(), 's', now() - interval '1 second', now(), now(), now())",
                (id_, session),
            )
    tasks, task_mutations = Tasks(client.database), TaskMutations()
    sweepers = Sweepers(
        client.database,
        client.door,
        sessions=Sessions(client.database),
        session_mutations=MUTATIONS,
        tasks=tasks,
        task_mutations=task_mutations,
    )
    async with await psycopg.AsyncConnection.connect(client.url) as stranger:
        await stranger.execute("select from tasks where id = %s for update", (ids[0],))
        assert await client.database.row(Key("sessions", "t", session)) is not None
        sweepers.start()
        async with asyncio.timeout(60):
            while (await client.rows(f"select state from tasks where id = '{ids[1]}'")) != [("PENDING",)]:
                await asyncio.sleep(0.05)
    async with asyncio.timeout(60):
        while (await client.rows(f"select state from tasks where id = '{ids[0]}'")) != [("PENDING",)]:
            await asyncio.sleep(0.05)
    await sweepers.stop()


async def test_without_postgres_the_answer_is_unavailable_and_nothing_is_written(client: Client) -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nothing", lanes=1)
    await database.open()
    door = Door(database, Idempotency(None, ttl=86400), Lifetimes(ok=86400, error=600), lanes=1)
    with pytest.raises(Unavailable) as away:
        await Client(door, database, "").create("k")
    assert away.value.reason == "DATABASE_UNAVAILABLE"
    await database.close()
