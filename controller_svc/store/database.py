"""Postgres as this process sees it: pools, readiness, its clock, and what the driver's errors mean."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import structlog
from psycopg import errors as pg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from controller_svc.core.status import Component
from controller_svc.store import arrays
from controller_svc.store.migrate import MigrationError, migrate
from controller_svc.store.read import read_rows
from svckit.errors import Aborted, InvalidArgument, ResourceExhausted, ServiceError, Unavailable
from svckit.groups import Asked, Groups

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from controller_svc.core.mutations import Key

log = structlog.get_logger(__name__)

PING_SECONDS = 0.5
CONNECT_SECONDS = 2
STATEMENT_SECONDS = 4
WATCHDOG_SECONDS = STATEMENT_SECONDS + 2.0
"""After which a connection in use is cut: `statement_timeout` ends no COMMIT, and no wait for a server that is gone."""
STALE_SECONDS = 0.5
"""Within which a connection that was dead before it was used says so, as after a restart of Postgres: try another."""
FULL_SECONDS = 5.0
"""For which Postgres counts as full after it last refused a statement for that reason."""
LOCK_MILLISECONDS = 250
"""How long a statement that may wait (a command alone, a claim) waits for one lock."""

_TRIPWIRE = "22012"
"""Division by zero: the writing statement found itself inconsistent (store/write.py).

A defect, not a caller's bad value.
"""


class OutcomeUnknownError(Exception):
    """The connection was lost, or the commit not confirmed: what was sent may or may not have happened."""


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that remembers a warning, and can be cut."""

    warned = False
    is_cut = False
    timeline = 0
    """Postgres' timeline when this was connected; it grows with each failover. 0: unknown."""

    def take_note(self, notice: psycopg.errors.Diagnostic) -> None:
        """Notices that something was not as it should be: a COMMIT that no standby has confirmed is reported so."""
        if notice.sqlstate is not None and notice.sqlstate.startswith("01"):
            self.warned = True
            log.warning("postgres warned", sqlstate=notice.sqlstate, message=notice.message_primary)

    def cut(self) -> None:
        """Ends the socket in both directions; whoever waits for it is told at once that the connection is lost."""
        self.is_cut = True
        if not self.closed:
            with socket.socket(fileno=os.dup(self.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)


class Database:
    """The pools of one process, opened and kept by a task of its own.

    `reading()` and `looking()` are for reads, `beating()` and `beating_alone()` for heartbeats, `groups` for writes in
    groups (`lanes`, and one connection to send a statement again), `alone` for commands that wait for locks, `claims`
    for claims of tasks. None can starve another.
    """

    def __init__(self, url: str, *, lanes: int, on_change: Callable[[bool], None] = lambda up: None) -> None:
        self._url = url
        self._on_change = on_change
        self._component = Component(False, "not connected yet", datetime.now(UTC))
        self.timeline = 0
        """Postgres' timeline as the newest connection found it."""
        self._offset: float | None = None
        self._full, self._full_until = "", 0.0
        self._keeper: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._reads = self._pool("reads", 4)
        self._asks: Groups[_Ask] = Groups("read", self._read, _Ask.fail, lanes=2)
        self.groups = self._pool("groups", lanes + 1)
        self._looks = self._pool("looks", 2)
        self._beats = self._pool("beats", 1)
        self._beats_alone = self._pool("beats alone", 2, lock_timeout=LOCK_MILLISECONDS)
        self.alone = self._pool("alone", 4, lock_timeout=LOCK_MILLISECONDS)
        self.claims = self._pool("claims", 4, lock_timeout=LOCK_MILLISECONDS)

    # -- life --

    async def open(self) -> None:
        """Starts to connect, in the background. Never waits for Postgres and never raises because it is away."""
        for pool in self._pools():
            await pool.open(wait=False)
        self._keeper = asyncio.create_task(self._keep())

    async def looked(self, seconds: float) -> None:
        """Returns when it is known whether Postgres is there, at the latest after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._looked.wait()

    async def close(self) -> None:
        """Closes every connection."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for pool in self._pools():
            await pool.close(timeout=2)

    def _pools(self) -> tuple[AsyncConnectionPool[Connection], ...]:
        return (
            self._reads,
            self._looks,
            self._beats,
            self._beats_alone,
            self.groups,
            self.alone,
            self.claims,
        )

    @property
    def ready(self) -> bool:
        """True while Postgres answers and has our schema."""
        return bool(self._component.up)

    def component(self) -> Component:
        """For StatusService; up with a detail for as long as Postgres is known to be full."""
        if self._component.up and time.monotonic() < self._full_until:
            return replace(self._component, detail=self._full)
        return self._component

    def refusal(self, error: BaseException) -> ServiceError:
        """What a caller is told about a driver's error where nothing was written. Takes note of a full Postgres."""
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, (pg.QueryCanceled, PoolTimeout)):
            return Unavailable("DATABASE_BUSY", "The database did not answer in time.", retry_after=0.5)
        if is_lock_timeout(error):
            return resource_busy()
        if is_bad_data(error):
            log.error("value refused by the database", error=str(error))
            return InvalidArgument("VALUE_REFUSED", "The database cannot store one of the request's values.")
        if is_full(error):
            self._note_full(_first_line(error))
            return ResourceExhausted(
                "DATABASE_FULL",
                "The database has no room left. Nothing was written; retry later.",
                retry_after=random.uniform(1, 3),  # noqa: S311 - lest they come back together
            )
        if not is_unknown(error):
            log.error("refused by the database", sqlstate=getattr(error, "sqlstate", None), error=str(error))
        return unavailable()

    def _note_full(self, detail: str) -> None:
        now = time.monotonic()
        if now >= self._full_until:
            log.error("postgres is full", detail=detail)
        self._full, self._full_until = detail, now + FULL_SECONDS

    def now(self) -> datetime:
        """Postgres' clock: its last answer's time, carried on by this process's monotonic clock."""
        if self._offset is None:
            raise unavailable()
        return datetime.fromtimestamp(time.monotonic() + self._offset, UTC)

    def learn(self, told: datetime) -> None:
        """Takes note of the time a statement returned."""
        self._offset = told.timestamp() - time.monotonic()

    # -- use --

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode for reads.

        Raises ServiceError for whatever the database refuses or fails at.
        """
        async with self._using(self._reads) as connection:
            yield connection

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[Connection]:
        """As `reading`, for the door's looks at guards, which no long list may keep waiting."""
        async with self._using(self._looks) as connection:
            yield connection

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[Connection]:
        """As `reading`, for heartbeats together, which wait for no lock."""
        async with self._using(self._beats) as connection:
            yield connection

    @asynccontextmanager
    async def beating_alone(self) -> AsyncIterator[Connection]:
        """As `reading`, for a heartbeat that waits for its row a moment: Aborted RESOURCE_BUSY after it."""
        async with self._using(self._beats_alone) as connection:
            yield connection

    @asynccontextmanager
    async def _using(self, pool: AsyncConnectionPool[Connection]) -> AsyncIterator[Connection]:
        if not self.ready:
            raise unavailable()
        try:
            async with pool.connection() as connection:
                with watched(connection):
                    yield connection
        except psycopg.Error as error:
            raise self.refusal(error) from error

    async def row(self, key: Key) -> Any:
        """The key's row as it is now, None if there is none. Calls at the same time share one statement.

        Raises ServiceError as `reading` does.
        """
        ask = _Ask(key)
        self._asks.put(ask)
        return await ask.answer

    async def _read(self, asks: list[_Ask]) -> None:
        async with self.reading() as connection:
            found = await read_rows(connection, {ask.key for ask in asks})
        for ask in asks:
            ask.give(found[ask.key])

    async def _keep(self) -> None:
        """Connects, migrates, and asks for the time twice a second; tells what changes."""
        while True:
            connected = False
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, connect_timeout=CONNECT_SECONDS, prepare_threshold=None
                ) as connection:
                    # Before anything is replayed: after a failover the pools may not have made connections yet.
                    self.timeline = await timeline_of(connection)
                    applied = await migrate(connection)
                    if applied:
                        log.info("migrated", versions=applied)
                    while True:
                        async with asyncio.timeout(STATEMENT_SECONDS):
                            row = await (
                                await connection.execute("select clock_timestamp(), pg_is_in_recovery()")
                            ).fetchone()
                        assert row is not None
                        if row[1]:
                            raise OSError("the server is a standby, and takes no writes")
                        connected = True
                        self.learn(row[0])
                        self._tell(True, "")
                        await asyncio.sleep(PING_SECONDS)
            except Exception as error:
                if not isinstance(error, (psycopg.Error, OSError, MigrationError)):
                    log.exception("keeping the connection to postgres failed")
                if connected and isinstance(error, psycopg.Error):
                    continue  # a connection may end while Postgres goes on; only a refused new one says that it is away
                self._tell(False, _first_line(error))
                await asyncio.sleep(PING_SECONDS)

    def _tell(self, up: bool, detail: str) -> None:
        """Keeps the state, and tells its changes: to the log every new detail, to `on_change` only up and away."""
        self._looked.set()
        was = self._component
        if (up, detail) == (was.up, was.detail):
            return
        self._component = Component(up, detail, was.since if up == was.up else datetime.now(UTC))
        if up:
            log.info("postgres up")
        else:
            log.warning("postgres away", detail=detail)
        if up != was.up:
            self._on_change(up)

    def _pool(self, name: str, size: int, **settings: int) -> AsyncConnectionPool[Connection]:
        async def configure(connection: Connection) -> None:
            arrays.register(connection)
            connection.add_notice_handler(connection.take_note)
            connection.prepare_threshold = 0
            connection.prepared_max = 200
            values = {
                "statement_timeout": STATEMENT_SECONDS * 1000,
                "idle_in_transaction_session_timeout": 10_000,
                "timezone": "UTC",
                # Each text is for one set of filters or tables: planned for its values it is no better, only dearer.
                "plan_cache_mode": "force_generic_plan",
                # Plans over large tables look dear enough to be compiled, which takes longer than running them.
                "jit": "off",
                **settings,
            }
            for setting, value in values.items():
                await connection.execute("select set_config(%s, %s, false)", (setting, str(value)))
            # What is answered is on disk, also should the setting be changed meanwhile. Any value but "off" is about
            # standbys, and the database's own.
            await connection.execute(
                "select set_config('synchronous_commit', case when now = 'off' then 'on' else now end, false)"
                " from current_setting('synchronous_commit') as now"
            )
            connection.timeline = self.timeline = await timeline_of(connection)

        return AsyncConnectionPool(
            self._url,
            connection_class=Connection,
            name=name,
            min_size=1,
            max_size=size,
            open=False,
            timeout=1.0,
            reconnect_timeout=1.0,
            configure=configure,
            kwargs={
                "autocommit": True,
                "connect_timeout": CONNECT_SECONDS,
                "application_name": f"controller_svc {name}",
            },
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


async def timeline_of(connection: psycopg.AsyncConnection[Any]) -> int:
    """The timeline that the server writes on now; 0 for a standby.

    Not from pg_control_checkpoint(), which after a failover tells the one of before until the next checkpoint.
    """
    cursor = await connection.execute(
        "select case when pg_is_in_recovery() then 0"
        " else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint end"
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


@dataclass(slots=True, eq=False)
class _Ask(Asked[Any]):
    """A caller that waits for a row."""

    key: Key


def unavailable() -> Unavailable:
    """Postgres is away, and nothing was written."""
    return Unavailable(
        "DATABASE_UNAVAILABLE", "The database is not reachable. Nothing was written; retry.", retry_after=1.0
    )


FAILURES = (psycopg.Error, OutcomeUnknownError, ValueError, OverflowError)
"""What a write may fail with that is no defect of ours; the last two are the driver's, for a value it cannot send."""


def is_bad_data(error: BaseException) -> bool:
    """One value of a group that the database, or the driver before it, refuses (SQLSTATE classes 22 and 23)."""
    if isinstance(error, psycopg.Error):
        state = error.sqlstate or ""
        if not state:
            return isinstance(error, psycopg.DataError)
        return state[:2] in ("22", "23") and state != _TRIPWIRE
    return isinstance(error, (ValueError, UnicodeError, OverflowError))


def is_collision(error: BaseException) -> bool:
    """A deadlock or a serialization failure: the transaction was rolled back whole and may be run again."""
    return isinstance(error, (pg.DeadlockDetected, pg.SerializationFailure))


def is_unknown(error: BaseException) -> bool:
    """Whether what was sent may have happened all the same: the connection was lost, or the commit not confirmed.

    An error that ended the session or the server leaves that open, whatever its cause: a server that cannot write its
    log (PANIC) may find the commit in it when it starts again. Any other that Postgres reports says that the
    transaction was rolled back.
    """
    if isinstance(error, psycopg.Error):
        state = error.sqlstate
        if state is None:
            return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        ended = error.diag.severity_nonlocalized in ("FATAL", "PANIC")
        return ended or state[:2] in ("08", "57") or state == "40003"
    return isinstance(error, OutcomeUnknownError)


def is_full(error: BaseException) -> bool:
    """Postgres had no disk space or memory left for it (SQLSTATE class 53), and rolled it back."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith("53") and not is_unknown(error)


def is_lock_timeout(error: BaseException) -> bool:
    """Somebody held the lock longer than this statement may wait. Nothing was written."""
    return isinstance(error, pg.LockNotAvailable)


def resource_busy() -> Aborted:
    """Locks were held by others for as long as this call may wait."""
    return Aborted("RESOURCE_BUSY", "The resource is being changed by others. Nothing was written.", retry_after=0.5)


@contextmanager
def confirmed(connection: Connection) -> Iterator[None]:
    """Around a write: its outcome counts only if Postgres confirmed it, within WATCHDOG_SECONDS.

    When somebody else cancels a COMMIT, only a warning says so. Raises OutcomeUnknownError.
    """
    connection.warned = False
    with watched(connection):
        yield
    if connection.warned:
        connection.pgconn.finish()
        raise OutcomeUnknownError("a warning came with the commit")


@contextmanager
def watched(connection: Connection) -> Iterator[None]:
    """Cuts the socket after WATCHDOG_SECONDS, instead of cancelling the statement.

    Cancelled in COMMIT, Postgres reports success for what no standby has.
    """
    watchdog = asyncio.get_running_loop().call_later(WATCHDOG_SECONDS, connection.cut)
    try:
        yield
    finally:
        watchdog.cancel()
        if connection.is_cut:  # though its answer was still read: it must not go back to the pool
            connection.pgconn.finish()
