"""Disks that are full, and logs that nobody takes: what callers are told meanwhile, and that all goes on by itself."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from google.protobuf.message import Message

from deploy.local.issuer import Issuer
from deploy.local.processes import free_port
from deploy.local.servers import Postgres
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, WORKER, Agent, Answer, Tenant, struct
from tests.conftest import ServiceKeys
from tests.history import Traffic
from tests.oracle import Tables, eventually
from tests.system.conftest import NEAR_OFF, World, metric, repeated, show
from tests.system.pair import Pair

FULL = ("RESOURCE_EXHAUSTED", "DATABASE_FULL")


class SmallDisk:
    """A file system with little room, to be filled up and emptied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Leave no room, but what the owners of the files have reserved already."""
        with (self.folder / "filling").open("wb", buffering=0) as filling:
            while True:
                try:
                    filling.write(bytes(65536))
                except OSError:
                    return

    def empty(self) -> None:
        """Give the room back."""
        (self.folder / "filling").unlink()


@contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """So much memory as a file system; where none can be mounted, the test is skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0755", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "small", 160) as disk:
        yield disk


def create(name: str) -> sessions_pb.CreateSessionRequest:
    """A request that takes some room, and is the same for the same name."""
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name, "text": name * 100}))


def new_name() -> str:
    return secrets.token_hex(16)


async def becomes(agent: Agent, wanted: str) -> None:
    async def is_wanted() -> bool:
        return await agent.health() == wanted

    await eventually(is_wanted)


class TestPostgres:
    """With all that Postgres has on the small disk."""

    @pytest.fixture
    def postgres(self, small_disk: SmallDisk, tmp_path: Path) -> Iterator[Postgres]:
        server = Postgres(
            small_disk.folder / "postgres", port=free_port(), log=tmp_path / "postgres.log", durable=False
        )
        server.start()
        yield server
        server.stop()

    @pytest.fixture
    def world(self, postgres: Postgres, start_world: Callable[..., World]) -> World:
        return start_world(database_url=postgres.url, controller_env=NEAR_OFF)

    async def test_writes_are_refused_at_once_and_reads_go_on(
        self, world: World, tenant: Tenant, small_disk: SmallDisk
    ) -> None:
        agent = tenant.agent()
        kept = new_name()
        answers = {kept: await agent.insist(create(kept), key=kept)}
        session = answers[kept].response.session
        for _ in range(3):
            await agent.route(session.id)
        (claimed,) = (await agent.ask(tasks_pb.ClaimTasksRequest(role=WORKER), key=new_name())).response.tasks
        small_disk.fill()
        try:
            while all(answer.ok for answer in answers.values()):
                names = [new_name() for _ in range(16)]
                told = await asyncio.gather(*(agent.ask(create(name), key=name) for name in names))
                answers.update(zip(names, told, strict=True))
            refused = [answer for answer in answers.values() if not answer.ok]
            assert {answer.refusal for answer in refused} == {FULL}
            assert all(answer.retry_after > 0 for answer in refused)

            status = await agent.status()
            assert status.health == status_pb.HEALTH_DEGRADED and "No space left" in status.postgres.detail
            assert status.postgres.state == status_pb.Component.STATE_UP
            assert (await agent.ask(sessions_pb.GetSessionRequest(session_id=session.id))).ok
            assert (await agent.ask(sessions_pb.ListSessionsRequest())).ok
            again = await agent.ask(create(kept), key=kept)
            assert again.said == answers[kept].said and again.replayed
            # These may find room in pages that there are.
            for request, key in (
                (tasks_pb.HeartbeatTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id), ""),
                (tasks_pb.ClaimTasksRequest(role=WORKER), "claim"),
            ):
                answer = await agent.ask(request, key=key)
                assert answer.ok or answer.refusal == FULL
        finally:
            small_disk.empty()
        for name, answer in answers.items():
            again = await agent.insist(create(name), key=name)
            assert again.ok and (not answer.ok or again.said == answer.said)
        await becomes(agent, "HEALTH_HEALTHY")
        assert world.tables.sessions(tenant.name) == len(answers)
        world.tables.check()


class TestLog:
    """With Postgres' write-ahead log on the small disk, and the tables elsewhere."""

    @pytest.fixture
    def small_disk(self, rounds: int, tmp_path: Path) -> Iterator[SmallDisk]:
        with mounted(tmp_path / "small", 100 + 32 * rounds) as disk:  # each leaves a file or two
            yield disk

    @pytest.fixture
    def postgres(self, small_disk: SmallDisk, own_postgres: Postgres, tmp_path: Path) -> Postgres:
        own_postgres.stop()
        log = tmp_path / "own-postgres" / "data" / "pg_wal"
        shutil.move(log, small_disk.folder / "pg_wal")
        log.symlink_to(small_disk.folder / "pg_wal")
        own_postgres.start()
        return own_postgres

    @pytest.fixture
    def world(self, postgres: Postgres, start_world: Callable[..., World]) -> World:
        return start_world(database_url=postgres.url, controllers=2)

    @repeated(short=1, soak=15)
    async def test_what_is_in_it_counts(
        self, rounds: int, world: World, traffic: Traffic, postgres: Postgres, small_disk: SmallDisk
    ) -> None:
        """The server ends where it cannot go on with its log; the last commits may be in it, or not."""
        history, ended = traffic.history, 0
        for number in range(rounds):
            small_disk.fill()
            self._use_up(postgres)
            stop = asyncio.Event()
            calls = asyncio.create_task(traffic.until(stop, callers=16))
            await eventually(lambda: "PANIC" in postgres.child.output())
            ended += 1
            stop.set()
            await calls
            small_disk.empty()
            await asyncio.to_thread(self._start_again, postgres)
            await history.settle()
            show("full logs", number + 1, rounds)
        await history.again()
        print(dict(history.verdicts()))
        history.enough(10 * rounds, {"PANIC": ended})
        tables = Tables(postgres.url)
        history.check(tables)
        tables.close()

    def _use_up(self, postgres: Postgres) -> None:
        """Leave about 100 KiB of the log's last file, of 16 MiB."""
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            while True:
                [(left, files)] = connection.execute(
                    "select 16777216 - ((lsn - '0/0') % 16777216)::int, (select count(*) from pg_ls_waldir()"
                    " where length(name) = 24 and name > pg_walfile_name(lsn)) from pg_current_wal_insert_lsn() as lsn"
                ).fetchall()
                if not files and left < 150_000:
                    return
                size = min(left if files else left - 100_000, 1_000_000)
                connection.execute("select pg_logical_emit_message(false, 'test', repeat('x', %s))", (size,))

    def _start_again(self, postgres: Postgres) -> None:
        """It may be starting by itself, or have given up for want of room."""
        postgres.child.kill()
        postgres.start()


@contextmanager
def no_room(world: World) -> Iterator[None]:
    """While inside, Postgres refuses each change of a session or task as if it were full."""
    rows = world.tables.rows
    rows(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise 'no room' using errcode = 'disk_full'; end $$"
    )
    for table in ("sessions", "tasks"):
        rows(f"create trigger refuse before insert or update on {table} for each row execute function refuse()")
    try:
        yield
    finally:
        rows("drop function refuse cascade")


async def test_every_write_is_told_that_nothing_was_written(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    session = await agent.create()
    for _ in range(3):
        await agent.route(session.id)
    (claimed,) = (await agent.ask(tasks_pb.ClaimTasksRequest(role=WORKER))).response.tasks
    lease = {"task_id": claimed.task.id, "lease_id": claimed.lease_id}
    requests: list[Message] = [
        create("other"),
        sessions_pb.ActivateSessionRequest(session_id=session.id),
        tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role=WORKER),
        tasks_pb.ClaimTasksRequest(role=WORKER),
        tasks_pb.HeartbeatTaskRequest(**lease, progress=struct({"half": "way"})),
        tasks_pb.CompleteTaskRequest(**lease),
    ]
    before = world.tables.content(tenant.name)
    with no_room(world):
        for request in requests:
            answer = await agent.ask(request, key=request.DESCRIPTOR.name)
            assert answer.refusal == FULL and answer.retry_after > 0, f"{request}: {answer}"
        answers = await asyncio.gather(*(agent.ask(create(str(n)), key=str(n)) for n in range(64)))
        assert {answer.refusal for answer in answers} == {FULL}
        assert (await agent.status()).postgres.detail.startswith("no room")
    assert world.tables.content(tenant.name) == before
    for request in requests:
        answer = await agent.insist(request, key=request.DESCRIPTOR.name)
        assert answer.ok and not answer.replayed, f"{request}: {answer}"


class TestRedis:
    """With all that Redis has on the small disk."""

    @pytest.fixture
    def world(self, small_disk: SmallDisk, start_world: Callable[..., World]) -> World:
        return start_world(valkey_folder=small_disk.folder / "valkey", controller_env=NEAR_OFF)

    async def test_it_costs_no_call(self, world: World, tenant: Tenant, small_disk: SmallDisk) -> None:
        agent = tenant.agent()
        answers: dict[str, Answer] = {}

        async def write() -> None:
            name = new_name()
            answers[name] = await agent.ask(create(name), key=name)

        async def is_degraded() -> bool:
            await asyncio.gather(*(write() for _ in range(16)))
            return await agent.health() == "HEALTH_DEGRADED"

        await becomes(agent, "HEALTH_HEALTHY")
        small_disk.fill()
        try:
            await eventually(is_degraded)
            assert metric(world, "idempotency", "orchestrator_redis_errors_total", cause="misconf") > 0
            for _ in range(20):
                await write()
        finally:
            small_disk.empty()
        await becomes(agent, "HEALTH_HEALTHY")
        await write()
        assert [str(answer) for answer in answers.values() if not answer.ok] == []
        for name, answer in answers.items():
            again = await agent.ask(create(name), key=name)
            assert again.said == answer.said and again.replayed
        assert world.tables.sessions(tenant.name) == world.tables.audits(tenant.name) == len(answers)


async def test_logs_that_nobody_takes_cost_no_call(
    new_database: Callable[..., str], redis_url: str, issuer: Issuer, service_keys: ServiceKeys, tmp_path: Path
) -> None:
    """One process logs to a full disk, one to a pipe whose reader stands still, and one to a pipe whose reader left."""
    stopped = tmp_path / "stopped"
    os.mkfifo(stopped)
    logs = {"controller": "/dev/full", "controller-2": str(stopped), "idempotency": ">(true)"}
    pair = Pair(
        database_url=new_database(),
        redis_url=redis_url,
        issuer=issuer,
        service_key=service_keys.private,
        directory=tmp_path,
        controllers=2,
    )
    for name, service in pair.services.items():
        service.command = ("bash", "-c", f'exec "$@" 2> {logs[name]}', name, *service.command)
    tenant = Tenant(issuer, pair.controller_target)
    with ExitStack() as cleanup:
        cleanup.callback(os.close, os.open(stopped, os.O_RDONLY | os.O_NONBLOCK))
        cleanup.callback(pair.stop)
        pair.start()
        writer = os.open(stopped, os.O_WRONLY | os.O_NONBLOCK)
        cleanup.callback(os.close, writer)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)

        agents = [tenant.agent(target=target) for target in pair.controller_targets]
        pair.kill("idempotency")
        for agent in agents:
            for _ in range(10):
                name = new_name()
                assert (await agent.ask(create(name), key=name)).ok
            refused = await agent.ask(sessions_pb.CreateSessionRequest())
            assert refused.code.name == "INVALID_ARGUMENT"
            await becomes(agent, "HEALTH_DEGRADED")  # the completions have told
        await asyncio.to_thread(pair.start, "idempotency")
        for agent in agents:
            await becomes(agent, "HEALTH_HEALTHY")
        for name in logs:
            assert pair.metric(name, "orchestrator_log_lines_lost_total") > 0, name
        assert set(pair.stop().values()) == {0}
    await tenant.close()
