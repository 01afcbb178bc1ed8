"""What every test can ask for: real servers, a fresh database, tokens, keys, and the pair as processes.

Servers start when a test first asks for one. Tests in tests/contract run once per engine (Postgres 18 and 15, Valkey 9
and Redis 7), all others on the embedded ones. With DATABASE_URL or REDIS_URL set, everything runs on the server named
there, in databases of the tests' own. Workers of pytest-xdist share nothing: each has its own servers and ports. With
CI=true a skipped test is a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis
from psycopg import sql

from deploy.local import processes
from deploy.local.issuer import Issuer, private_key, public_key_file
from deploy.local.processes import ROOT, free_port
from deploy.local.servers import Postgres, Valkey, embedded_valkey
from tests.system.pair import Pair

DEBIAN = ROOT / ".local" / "debian" / "bin"
"""Where `make tools` unpacks Debian 12's Postgres 15 and Redis 7."""

WORKER, WORKERS = (
    int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]),
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
)
"""Which worker of pytest-xdist this is, of how many."""

processes.FREE_PORTS = processes.FREE_PORTS[WORKER::WORKERS]

POSTGRES_ENGINES = {"postgres-18": None, "postgres-15": DEBIAN}
REDIS_ENGINES = {"valkey-9": None, "redis-7": DEBIAN / "redis-server"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the contract suites on every engine, unless one was given."""
    in_contract = (ROOT / "tests" / "contract") in metafunc.definition.path.parents
    for fixture, variable, engines in (
        ("postgres_engine", "DATABASE_URL", list(POSTGRES_ENGINES)),
        ("redis_engine", "REDIS_URL", list(REDIS_ENGINES)),
    ):
        if fixture == "redis_engine" and metafunc.definition.get_closest_marker("one_redis"):
            continue
        if fixture in metafunc.fixturenames and in_contract and not os.environ.get(variable):
            metafunc.parametrize(fixture, engines, indirect=True, scope="session")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run in which something was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("CI") != "true":
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped:
        reporter.write_line(f"\nCI=true: {skipped} skipped, which is a failure", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def postgres_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Postgres in which databases can be made: DATABASE_URL, or a server of this run's own."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield given
        return
    engine: str = getattr(request, "param", "postgres-18")
    binaries = POSTGRES_ENGINES[engine]
    if binaries is not None and not binaries.exists():
        pytest.skip(f"{engine} is not here: `make tools` gets it (on Debian 12)")
    folder = tmp_path_factory.mktemp(engine)
    server = Postgres(folder, port=free_port(), log=folder / "log", binaries=binaries, durable=False)
    server.start()
    yield server.url
    server.stop()


class Databases:
    """Makes databases on one server, and drops them."""

    def __init__(self, url: str, connection: psycopg.Connection) -> None:
        self._parts = urlsplit(url)
        self._connection = connection
        self._prefix = f"orchestrator_test_{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._made: list[str] = []
        self._template = self.create(migrated=False)
        _migrate(self._template)

    def create(self, *, migrated: bool = True) -> str:
        """The URL of a new database, at the newest schema or empty."""
        name = f"{self._prefix}_{next(self._numbers)}"
        template = _name(self._template) if migrated else "template0"
        self._connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        self._made.append(name)
        query = f"?{self._parts.query}" if self._parts.query else ""
        return f"{self._parts.scheme}://{self._parts.netloc}/{name}{query}"

    def drop(self, *urls: str) -> None:
        """Drop these databases, all when none is named, and end whatever is connected to them."""
        for name in [_name(url) for url in urls] or [*self._made]:
            self._connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            self._made.remove(name)


@pytest.fixture(scope="session")
def databases(postgres_engine: str) -> Iterator[Databases]:
    """The databases of this run."""
    with psycopg.connect(postgres_engine, autocommit=True) as connection:
        made = Databases(postgres_engine, connection)
        yield made
        made.drop()


@pytest.fixture(scope="session")
def new_database(databases: Databases) -> Callable[..., str]:
    """A function that makes a database and answers its URL: `new_database(migrated=True)`. It stays to the end."""
    return databases.create


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """The URL of a fresh database at the newest schema, for one test."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[str]:
    """The URL of a fresh database with nothing in it, for one test."""
    url = databases.create(migrated=False)
    yield url
    databases.drop(url)


def redis_binary(engine: str) -> Path:
    """The server program of one of REDIS_ENGINES; skips the test when it is not here."""
    binary = REDIS_ENGINES[engine] or embedded_valkey()
    if not binary.exists():
        pytest.skip(f"{engine} is not here: `make tools` gets it (on Debian 12)")
    return binary


@pytest.fixture(scope="session")
def redis_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis database that is this run's own: an empty one on REDIS_URL's server, or a server's of ours."""
    given = os.environ.get("REDIS_URL")
    if given:
        url = _empty_database_of(given)
        yield url
        _flush(url)
        return
    engine: str = getattr(request, "param", "valkey-9")
    folder = tmp_path_factory.mktemp(engine)
    server = Valkey(folder, port=free_port(), log=folder / "log", binary=redis_binary(engine), durable=False)
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def redis_url(redis_engine: str) -> str:
    """The URL of a Redis database that is empty when the test starts."""
    _flush(redis_engine)
    return redis_engine


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[Postgres]:
    """A running Postgres for this test alone, to be stopped, started and signalled; its database is empty."""
    server = Postgres(tmp_path / "own-postgres", port=free_port(), log=tmp_path / "own-postgres.log", durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A running Valkey for this test alone, to be stopped, started, signalled and configured."""
    server = Valkey(tmp_path / "own-valkey", port=free_port(), log=tmp_path / "own-valkey.log", durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    """An issuer that serves its key from a thread of this process: `.token(…)`, `.sign(…)` for what no issuer signs."""
    serving = Issuer(tmp_path_factory.mktemp("issuer") / "key.pem", port=free_port())
    serving.start()
    yield serving
    serving.stop()


class ServiceKeys(NamedTuple):
    """The PEM files of the controller's service identity."""

    private: Path
    public: Path


@pytest.fixture(scope="session")
def service_keys(tmp_path_factory: pytest.TempPathFactory) -> ServiceKeys:
    """The key that the controller signs its service tokens with, and the public half that idempotency_svc is given."""
    private = tmp_path_factory.mktemp("service") / "key.pem"
    private_key(private)
    return ServiceKeys(private, public_key_file(private))


@pytest.fixture
def pair(
    database_url: str, redis_url: str, issuer: Issuer, service_keys: ServiceKeys, tmp_path: Path
) -> Iterator[Pair]:
    """Both services as running processes on a fresh database and an empty Redis."""
    services = Pair(
        database_url=database_url,
        redis_url=redis_url,
        issuer=issuer,
        service_key=service_keys.private,
        directory=tmp_path,
    )
    services.start()
    yield services
    services.stop()


def _name(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def _migrate(url: str) -> None:
    from controller_svc.store.migrate import migrate

    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await migrate(connection)

    asyncio.run(run())


def _flush(url: str) -> None:
    with redis.Redis.from_url(url) as connection:
        connection.flushdb()


def _empty_database_of(url: str) -> str:
    """The URL of the last empty database of this server: nothing that is there already is touched."""
    parts = urlsplit(url)
    for number in range(15 - WORKER, -1, -WORKERS):
        candidate = urlunsplit(parts._replace(path=f"/{number}"))
        with redis.Redis.from_url(candidate) as connection:
            try:
                if connection.dbsize() == 0:
                    return candidate
            except redis.ResponseError:  # this server has fewer databases
                continue
    pytest.exit(f"REDIS_URL: no empty database at {parts.hostname}:{parts.port}, and tests empty the one they use", 2)
