"""Failovers of Postgres, between two servers of which each may be the primary: the controllers follow by themselves."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from deploy.local.processes import LOOPBACK, free_port
from deploy.local.servers import Postgres, embedded_postgres
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PLANNER, Answer, Tenant, struct
from tests.history import Traffic
from tests.oracle import Tables, eventually
from tests.system.conftest import World, repeated, show


class Servers:
    """A primary and its standby, on two ports; which of them is the primary changes with each failover."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [free_port(), free_port()]
        self._made = 0
        self.primary = self.standby = self._new()
        self.primary.start()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.standby.stop()
        self.primary.stop()

    @property
    def url(self) -> str:
        """The database on whichever of them takes writes."""
        parts = urlsplit(self.primary.url)
        login = parts.netloc.rpartition("@")[0]
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self._ports)
        return urlunsplit(parts._replace(netloc=f"{login}@{hosts}", query="target_session_attrs=read-write"))

    async def commit_on_both(self) -> None:
        """From now on the primary confirms nothing that the standby does not have."""

        def is_synchronous() -> bool:
            return connection.execute("select sync_state from pg_stat_replication").fetchall() == [("sync",)]

        with psycopg.connect(self.primary.url, autocommit=True) as connection:
            connection.execute("alter system set synchronous_standby_names = '*'")
            connection.execute("select pg_reload_conf()")
            await eventually(is_synchronous)

    def have_the_same(self, tenant: str) -> bool:
        """Whether the standby has all sessions of a tenant that the primary has."""
        counts = []
        for server in (self.primary, self.standby):
            with psycopg.connect(server.url) as connection:
                counts += connection.execute("select count(*) from sessions where tenant = %s", (tenant,)).fetchall()
        return counts[0] == counts[1]

    def fail_over(self) -> None:
        """SIGKILL to the primary; from now on the truth is what the standby has."""
        self.primary.child.kill()
        if not self.standby.child.running:
            self.standby.start()
        with psycopg.connect(self.standby.url, autocommit=True) as connection:
            connection.execute("select pg_promote()")
        self._ports.reverse()
        self.primary = self.standby

    def make_standby(self) -> None:
        """A new one, where there is none yet or the primary before was lost."""
        if self.standby is self.primary:
            self.standby = self._follow()

    def _new(self) -> Postgres:
        self._made += 1
        folder, port = self._folder / f"postgres-{self._made}", self._ports[self._made > 1]
        return Postgres(folder, port=port, log=self._folder / f"postgres-{self._made}.log", durable=False)

    def _follow(self) -> Postgres:
        """A copy of the primary, on the other port, that is sent all it writes."""
        standby = self._new()
        folder = self._folder / f"postgres-{self._made}"
        folder.mkdir(mode=0o700)
        (folder / "password").write_text(urlsplit(self.primary.url).password or "")
        subprocess.run(
            [
                embedded_postgres() / "pg_basebackup", f"--dbname={self.primary.url}", f"--pgdata={folder / 'data'}",
                "--write-recovery-conf", "--checkpoint=fast", "--no-sync",
            ],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        standby.start()
        return standby


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers")) as pair:
        yield pair


@pytest.fixture(scope="module")
def world(servers: Servers, start_world: Callable[..., World]) -> World:
    """Two controllers that know both servers."""
    return start_world(database_url=servers.url, controllers=2)


@repeated(short=2, soak=50)
async def test_a_standby_that_has_all_loses_nothing(
    rounds: int, world: World, servers: Servers, traffic: Traffic
) -> None:
    history = traffic.history
    failed_over = 0
    for number in range(rounds):
        await asyncio.to_thread(servers.make_standby)
        await servers.commit_on_both()
        stop = asyncio.Event()
        calls = asyncio.create_task(traffic.until(stop))
        await asyncio.sleep(0.7)
        await asyncio.to_thread(servers.fail_over)
        failed_over += 1
        told = history.verdicts()["ok"]
        await eventually(lambda told=told: history.verdicts()["ok"] > told + 50)  # type: ignore[misc]
        stop.set()
        await calls
        show("failovers", number + 1, rounds)
    await history.settle()
    await history.again()
    print(dict(history.verdicts()))
    history.enough(100 * rounds, {"failover": failed_over})
    tables = Tables(servers.url)
    history.check(tables)
    tables.close()


async def test_what_a_failover_lost_runs_anew(world: World, servers: Servers, tenant: Tenant) -> None:
    """Redis and the controllers have answers that the new primary never had: they do not pass for the truth."""
    agents = [tenant.agent(target=target) for target in world.pair.controller_targets]

    async def write_at_both(name: str) -> Answer:
        answers = [await agent.insist(create(name), key=name) for agent in agents]
        assert answers[0].ok and answers[0].said == answers[1].said
        return answers[0]

    kept = {name: await write_at_both(name) for name in (f"kept-{n}" for n in range(10))}
    await asyncio.to_thread(servers.make_standby)
    await eventually(lambda: servers.have_the_same(tenant.name))
    await asyncio.to_thread(servers.standby.stop)
    lost = {name: await write_at_both(name) for name in (f"lost-{n}" for n in range(10))}
    await asyncio.to_thread(servers.fail_over)
    for name in ("first", "second"):
        await write_at_both(name)  # both controllers have found the new primary
    for name, before in kept.items():
        assert (await write_at_both(name)).said == before.said
    for name, before in lost.items():
        assert (await write_at_both(name)).response.session.id != before.response.session.id
    tables = Tables(servers.url)
    assert tables.sessions(tenant.name) == tables.audits(tenant.name) == len(kept) + len(lost) + 2
    tables.check()
    tables.close()


def create(name: str) -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name}))
