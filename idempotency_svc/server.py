"""One Redis server that takes writes: connections to it, whether it is to be used, and calls of scripts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from prometheus_client import Counter, Histogram
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio.connection import AbstractConnection

_log = structlog.get_logger(__name__)

ERRORS = Counter("orchestrator_redis_errors", "Failed calls, probes and searches of Redis by cause.", ["cause"])
_SECONDS = Histogram(
    "orchestrator_redis_script_seconds",
    "Seconds until a batch had its answers, as seen from here.",
    ["step"],
    buckets=(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25),
)

PATIENCE = 5
"""How many times longer than a call a probe waits, before a silent server counts as away."""
TELL_SECONDS = 5.0
"""How long subscriptions may take to be sent."""
AGAIN_SECONDS = 0.5
"""After which a lost connection for signs is made again."""
_PROBE_UP_SECONDS = 1.0
_PROBE_DOWN_SECONDS = 0.2
_CONNECTIONS = 32
_ASKING = b"*1\r\n$6\r\nASKING\r\n"

# By the first word of an error. Any other is a defect in the call, not a state of Redis, and fails that call alone.
_CAUSES = {
    "ASK": "ask",
    "BUSY": "busy",
    "CLUSTERDOWN": "clusterdown",
    "LOADING": "loading",
    "MASTERDOWN": "masterdown",
    "MISCONF": "misconf",
    "MOVED": "moved",
    "NOAUTH": "auth",
    "NOPERM": "auth",
    "NOREPLICAS": "noreplicas",
    "NOSCRIPT": "noscript",
    "OOM": "oom",
    "READONLY": "readonly",
    "TRYAGAIN": "tryagain",
    "WRONGPASS": "auth",
}
DEFECT = "defect"
LATE = "late"
_STARTING = "starting"
# With them another server may have what this one has not: its caller, who knows them, looks there first.
_ELSEWHERE = frozenset({"ask", "moved", "readonly", "tryagain"})


class Address(NamedTuple):
    """Where a server listens; the path and 0 for a unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


class Script:
    """One step: its Lua text, its hash, and how long it takes."""

    def __init__(self, step: str) -> None:
        folder = Path(__file__).parent
        text = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("record.lua", f"{step}.lua"))
        self.text = text.encode()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest().encode()
        self.seconds = _SECONDS.labels(step)


class Call:
    """One call of a script: with it, which server was asked, and what it said."""

    __slots__ = ("command", "error", "places", "reply", "script", "server", "slot")

    def __init__(
        self, script: Script, slot: int, places: Sequence[int], keys: Sequence[bytes], *arguments: bytes
    ) -> None:
        self.script = script
        self.slot = slot
        self.places = places
        self.command = _packed(b"EVALSHA", script.sha, b"%d" % len(keys), *keys, *arguments)
        self.server: Server | None = None
        self.reply: bytes | None = None
        self.error: Exception | None = None


class Signs:
    """What the scripts publish about keys: one subscription for each key, on a connection of its own.

    That is made when it is first needed, and again, after a moment, when it is lost while anybody listens. Meanwhile
    signs are missing. `connect` makes a connection to the server.
    """

    def __init__(self, connect: Callable[[], AbstractConnection]) -> None:
        self._connect = connect
        self._events: dict[bytes, asyncio.Event] = {}
        self._connection: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None

    async def listen(self, key: bytes, event: asyncio.Event) -> None:
        """Sets the event when the subscription stands, when a sign comes, and when the connection is lost."""
        self._events[key] = event
        if self._reader is None:
            self._start()
        else:
            await self._tell(b"SSUBSCRIBE", key)

    async def forget(self, key: bytes, event: asyncio.Event) -> None:
        """Ends that, unless another event has taken its place."""
        if self._events.get(key) is event:
            del self._events[key]
            await self._tell(b"SUNSUBSCRIBE", key)

    async def stop(self) -> None:
        """Closes the connection."""
        await end(self._reader)

    def _start(self) -> None:
        self._reader = asyncio.create_task(self._read(), name="redis signs")

    async def _tell(self, *command: bytes) -> None:
        """A broken connection is the reader's to find. One that takes no more bytes is broken, too."""
        connection = self._connection
        if connection is None:
            return
        try:
            async with asyncio.timeout(TELL_SECONDS):
                await _send(connection, [_packed(*command)])
        except TimeoutError:
            if connection is self._connection:
                await end(self._reader)
                self._start()
        except (RedisError, OSError):
            pass

    async def _read(self) -> None:
        """While anybody listens."""
        while self._events:
            connection = self._connect()
            try:
                async with asyncio.timeout(TELL_SECONDS):
                    await connection.connect()  # type: ignore[no-untyped-call]
                    self._connection = connection
                    # These are in the stream before anybody else can write to it.
                    await _send(connection, [_packed(b"SSUBSCRIBE", key) for key in self._events])
                while True:
                    with suppress(ResponseError):  # the key is another server's, or must not be listened to
                        _, key, *_ = await connection.read_response(disable_decoding=True)
                        if event := self._events.get(key):
                            event.set()
            except Exception as error:  # whatever it was: a reader that ended would leave all without signs
                ERRORS.labels(cause_of(error)).inc()
            finally:
                self._connection = None
                await connection.disconnect(nowait=True)
                for event in self._events.values():
                    event.set()
            await asyncio.sleep(AGAIN_SECONDS)
        self._reader = None


class ServerAway(Exception):  # noqa: N818
    """The error of a call that a server was not asked, or did not answer in time. It says why in one word."""


class Server:
    """One server (Redis 7.0 or later, or Valkey), away until a probe has found it in order.

    It is away when it cannot be reached, refuses writes, or may evict records. Calls then fail at once, without asking
    it, until a probe finds it back, which has loaded `scripts` there. After a call that came too late nothing is asked
    either until a probe, which has PATIENCE times as long, says whether it is away.

    `connect` makes a connection to it; `probe_key` is a key that it has, None if it has no slots; `in_cluster` is
    whether it may be a node of a cluster; `timeout` are the seconds of one call; `changed` is called when `cause` has
    changed.
    """

    def __init__(
        self,
        address: Address,
        scripts: Sequence[Script],
        *,
        connect: Callable[[], AbstractConnection],
        in_cluster: bool,
        timeout: float,
        changed: Callable[[], None],
    ) -> None:
        self.address = address
        self.cause: str | None = _STARTING
        """Why it is away, None while it is in use."""
        self.evicted = 0
        self.probe_key: bytes | None = None
        self.connect = connect
        self.signs = Signs(connect)
        self._scripts = scripts
        self._in_cluster = in_cluster
        self._patience = PATIENCE * timeout
        self._changed = changed
        self._doubted = False
        self._idle: list[AbstractConnection] = []
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._policy_hidden = False
        self._look = asyncio.Event()
        self._known = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks at it from now on."""
        self._watcher = asyncio.create_task(self._watch(), name=f"redis probe {self.address}")

    async def known(self) -> None:
        """Returns once it was looked at."""
        await self._known.wait()

    async def stop(self) -> None:
        """Looks at it no more and closes all connections that no call is using. Calls made later fail."""
        await end(self._watcher)
        self.cause = "stopped"
        self._known.set()
        await self.signs.stop()
        await self._close_idle()

    async def run(self, calls: Sequence[Call], deadline: float, *, asking: bool = False) -> None:
        """Leaves in each call its reply or its error, at the latest at `deadline` (in the loop's time).

        They go in one write and are answered in their order. Never raises for the server's state. `asking`: the slot
        is on its way to this server.
        """
        try:
            async with asyncio.timeout_at(deadline), self._turns:
                if self.cause is not None:
                    await self._known.wait()
                if self.cause is not None or self._doubted:
                    raise ServerAway(self.cause or LATE)
                await self._evaluate(calls, asking)
        except ServerAway as error:
            _fail(calls, error)
        except TimeoutError:
            ERRORS.labels(LATE).inc()
            _fail(calls, ServerAway(LATE))
            self._doubted = True
            self._look.set()
        except (RedisError, OSError) as error:
            _fail(calls, error)
            self._judge(error)
        else:
            for call in calls:
                if call.error is not None:
                    self._judge(call.error)

    def set_away(self, cause: str, detail: str) -> None:
        """Passes no calls on until a probe, which is made now, finds it in order."""
        self._look.set()
        if cause != self.cause:
            # One warning for one outage: its cause may change, as from a closed connection to a server that loads.
            tell = _log.warning if self.cause in (None, _STARTING) else _log.info
            self.cause = cause
            tell("redis_away", server=str(self.address), cause=cause, detail=detail)
            self._changed()

    def _judge(self, error: Exception) -> None:
        cause = cause_of(error)
        ERRORS.labels(cause).inc()
        if cause == DEFECT:
            _log.error("redis_call_failed", server=str(self.address), error=str(error))
        elif cause not in _ELSEWHERE:
            self.set_away(cause, str(error))

    async def _evaluate(self, calls: Sequence[Call], asking: bool) -> None:
        fresh = not self._idle
        connection = self.connect() if fresh else self._idle.pop()
        try:
            return await self._exchange(connection, calls, asking)
        except RedisConnectionError:
            if fresh:
                raise
        # Redis may have restarted since this connection was last used. Every step may be repeated.
        await self._close_idle()
        left = [call for call in calls if call.reply is None]
        return await self._exchange(self.connect(), left, asking)

    async def _exchange(self, connection: AbstractConnection, calls: Sequence[Call], asking: bool) -> None:
        """Fills the calls. The connection is kept for the next ones if it can serve them."""
        try:
            await _fill(connection, calls, asking)
            unknown = [call for call in calls if isinstance(call.error, NoScriptError)]
            if unknown:
                ERRORS.labels("noscript").inc()
                await ask(connection, b"SCRIPT", b"LOAD", unknown[0].script.text)
                await _fill(connection, unknown, asking)
        except BaseException:
            # Nobody knows what would be read from it next.
            await connection.disconnect(nowait=True)
            raise
        if self.cause is None:
            self._idle.append(connection)
        else:
            await connection.disconnect(nowait=True)

    async def _watch(self) -> None:
        """Nothing but cancellation ends this loop."""
        while True:
            self._look.clear()
            await self._probe()
            self._known.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_UP_SECONDS if self.cause is None else _PROBE_DOWN_SECONDS):
                    await self._look.wait()

    async def _probe(self) -> None:
        """Finds out whether the server is to be used."""
        connection = self.connect()
        try:
            async with asyncio.timeout(self._patience):
                await self._write(connection)
                trouble = await self._look_at_memory(connection)
                if self.cause is not None and trouble is None:
                    for script in self._scripts:
                        await ask(connection, b"SCRIPT", b"LOAD", script.text)
        except Exception as error:
            cause = cause_of(error)
            ERRORS.labels(cause).inc()
            trouble = cause, detail_of(error)
        finally:
            await connection.disconnect(nowait=True)
        self._doubted = False
        if trouble is not None:
            self.set_away(*trouble)
            self._look.clear()
            await self._close_idle()
        elif self.cause is not None:
            await self._close_idle()
            self.cause = None
            _log.info("redis_ready", server=str(self.address))
            self._changed()

    async def _write(self, connection: AbstractConnection) -> None:
        """A server that only answers reads is of no use: OOM, READONLY, MISCONF, CLUSTERDOWN show here."""
        if self.probe_key is None:
            return
        try:
            await ask(connection, b"SET", self.probe_key, b"1", b"PX", b"1000")
        except AskError:
            # Since it was asked which slots it has, this one went, or is on its way.
            if not self._in_cluster:
                raise

    async def _look_at_memory(self, connection: AbstractConnection) -> tuple[str, str] | None:
        """Why the server must not be trusted, if so. From INFO, because hosted servers forbid CONFIG."""
        try:
            info: bytes = await ask(connection, b"INFO", b"memory", b"stats", b"cluster")
        except ResponseError as error:
            if not self._policy_hidden:
                self._policy_hidden = True
                _log.warning("redis_policy_hidden", error=str(error), advice="make sure of maxmemory-policy noeviction")
            return None
        facts = dict(line.split(b":", 1) for line in info.split(b"\r\n") if b":" in line)
        self.evicted = int(facts.get(b"evicted_keys", 0))
        if facts.get(b"cluster_enabled") == b"1" and not self._in_cluster:
            return "cluster", "it is a node of a cluster: REDIS_URL must be redis+cluster://"
        policy = facts.get(b"maxmemory_policy", b"unknown").decode()
        if policy != "noeviction":
            return "eviction", f"maxmemory-policy is {policy}, it must be noeviction"
        return None

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)


async def ask(connection: AbstractConnection, *command: bytes) -> Any:
    """One command and its answer, connecting first if need be. Raises RedisError or OSError."""
    await _send(connection, [_packed(*command)])
    return await connection.read_response(disable_decoding=True)


async def end(task: asyncio.Task[None] | None) -> None:
    """Cancels a task, if there is one, and waits for its end."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def cause_of(error: Exception) -> str:
    """A short name for metrics and logs."""
    if isinstance(error, ServerAway):
        return str(error)
    if isinstance(error, ResponseError | BusyLoadingError | AuthenticationError):
        word = getattr(error, "status_code", None) or str(error).partition(" ")[0]
        return _CAUSES.get(word, DEFECT)
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, MasterNotFoundError):
        return "nomaster"
    if isinstance(error, RedisConnectionError | OSError):
        return "refused" if isinstance(error.__context__, ConnectionRefusedError) else "connection"
    return DEFECT


def detail_of(error: Exception) -> str:
    """What an error says, for logs. redis-py's have only their kind in their repr, others only there."""
    return str(error) or repr(error)


def _packed(*command: bytes) -> bytes:
    """RESP, as redis-py packs it, in a quarter of the time."""
    return b"*%d\r\n" % len(command) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in command])


async def _send(connection: AbstractConnection, commands: Sequence[bytes]) -> None:
    try:
        await connection.send_packed_command(commands, check_health=False)
    except RuntimeError as error:  # uvloop, when the other side has reset the connection
        raise RedisConnectionError(str(error)) from error


async def _fill(connection: AbstractConnection, calls: Sequence[Call], asking: bool) -> None:
    if asking:
        await _send(connection, [part for call in calls for part in (_ASKING, call.command)])
    else:
        await _send(connection, [call.command for call in calls])
    for call in calls:
        call.error = None
        if asking:
            await connection.read_response(disable_decoding=True)
        try:
            call.reply = await connection.read_response(disable_decoding=True)
        except ResponseError as error:
            call.error = error


def _fail(calls: Sequence[Call], error: Exception) -> None:
    for call in calls:
        if call.reply is None:
            call.error = error
