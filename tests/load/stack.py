"""What is measured, as processes with fresh data: Postgres, Valkey, the pair, and the bare echo."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from psycopg import sql

from deploy.local.issuer import Issuer, private_key
from deploy.local.processes import LOOPBACK, ROOT, Child, LocalError, free_port, port_is_free
from deploy.local.servers import Postgres, Valkey
from tests.load.calls import ROLES
from tests.system.pair import Pair


@dataclass(frozen=True)
class Stack:
    """Where everything is that runs; `folder` takes files of this run."""

    folder: Path
    database_url: str
    redis_url: str
    target: str
    echo_target: str
    metrics_url: str
    token: str
    pids: dict[str, int | None]
    """By process: controller, idempotency, Postgres, Redis, echo. None: it does not run on this machine."""


@contextmanager
def running() -> Iterator[Stack]:
    """Start everything, stop everything. Raises LocalError when something is in the way.

    DATABASE_URL and REDIS_URL name servers to use instead of own ones: a new database of the first, an empty one of
    the second.
    """
    local = ROOT / ".local"  # on disk, where /tmp may be memory: fsync has to cost what it costs
    local.mkdir(exist_ok=True)
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="load-", dir=local)))
        database_url = cleanup.enter_context(_postgres(folder))
        redis_url = cleanup.enter_context(_redis(folder))
        issuer = Issuer(folder / "issuer.pem", port=free_port())
        issuer.start()
        cleanup.callback(issuer.stop)
        private_key(folder / "service.pem")
        pair = Pair(
            database_url=database_url,
            redis_url=redis_url,
            issuer=issuer,
            service_key=folder / "service.pem",
            directory=folder,
            env={"DRAIN_SECONDS": "0"},  # nobody has to move away at the end
        )
        cleanup.callback(pair.stop)
        pair.start()
        echo_port = free_port()
        echo = Child("echo", [sys.executable, "-m", "tests.load.echo", str(echo_port)], log=folder / "echo.log")
        cleanup.callback(echo.stop)
        echo.start()
        echo.wait_until(lambda: not port_is_free(echo_port), seconds=30)
        yield Stack(
            folder=folder,
            database_url=database_url,
            redis_url=redis_url,
            target=pair.controller_target,
            echo_target=f"{LOOPBACK}:{echo_port}",
            metrics_url=f"http://{LOOPBACK}:{pair.metrics_ports['controller']}/metrics",
            token=issuer.token(subject="load", roles=ROLES, seconds=6 * 3600),
            pids={
                "controller": pair.services["controller"].pid,
                "idempotency": pair.services["idempotency"].pid,
                "Postgres": _postgres_pid(database_url),
                "Redis": _redis_pid(redis_url),
                "echo": echo.pid,
            },
        )


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    """The URL of an empty database."""
    given = os.environ.get("DATABASE_URL")
    if not given:
        server = Postgres(folder / "postgres", port=free_port(), log=folder / "postgres.log")
        try:
            server.start()
            yield server.url
        finally:
            server.stop()
        return
    name = f"orchestrator_load_{secrets.token_hex(4)}"
    try:
        connection = psycopg.connect(given, autocommit=True)
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    except psycopg.Error as error:
        raise LocalError(f"DATABASE_URL: {str(error).splitlines()[0]}") from None
    with connection:
        try:
            yield urlunsplit(urlsplit(given)._replace(path=f"/{name}"))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """The URL of an empty database."""
    given = os.environ.get("REDIS_URL")
    if not given:
        server = Valkey(folder / "valkey", port=free_port(), log=folder / "valkey.log")
        try:
            server.start()
            yield server.url
        finally:
            server.stop()
        return
    for number in range(15, -1, -1):
        url = urlunsplit(urlsplit(given)._replace(path=f"/{number}"))
        with redis.Redis.from_url(url) as connection:
            try:
                if connection.dbsize():
                    continue
            except redis.ResponseError:  # this server has fewer databases
                continue
            except redis.ConnectionError as error:
                raise LocalError(f"REDIS_URL: {error}") from None
            try:
                yield url
            finally:
                connection.flushdb()
            return
    raise LocalError("REDIS_URL: that server has no empty database")


def _postgres_pid(url: str) -> int | None:
    """The process that all backends are children of."""
    with psycopg.connect(url) as connection:
        backend = connection.info.backend_pid
        if connection.info.hostaddr not in ("", LOOPBACK, "::1") or not _is(backend, "postgres"):
            return None
        status = Path(f"/proc/{backend}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


def _redis_pid(url: str) -> int | None:
    with redis.Redis.from_url(url) as connection:
        pid = int(connection.info("server")["process_id"])
    on_this_machine = urlsplit(url).hostname in (LOOPBACK, "localhost", "::1")
    return pid if on_this_machine and (_is(pid, "valkey-server") or _is(pid, "redis-server")) else None


def _is(pid: int, name: str) -> bool:
    command = Path(f"/proc/{pid}/comm")
    return command.exists() and command.read_text().strip() == name
