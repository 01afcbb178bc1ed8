"""The way to Redis: connections, whether it is to be used, and scripts run over keys."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog
from prometheus_client import Counter, Gauge, Histogram
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import AuthenticationError, BusyLoadingError, NoScriptError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from svckit.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_log = structlog.get_logger(__name__)

_ERRORS = Counter("orchestrator_redis_errors", "Failed calls and probes of Redis by cause.", ["cause"])
_SECONDS = Histogram(
    "orchestrator_redis_script_seconds",
    "Seconds a script call took, as seen from here.",
    ["step"],
    buckets=(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
)
_UP = Gauge("orchestrator_redis_up", "1 while Redis answers, takes writes and evicts nothing.")
_EVICTED = Gauge("orchestrator_redis_evicted_keys", "Keys that Redis evicted since its start; anything but 0 is wrong.")

_PROBE_UP_SECONDS = 1.0
_PROBE_DOWN_SECONDS = 0.2
_PROBE_KEY = "idem:probe"
_CONNECTIONS = 32

# By the first word of an error. Any other is a defect in the call, not a state of Redis, and fails that call alone.
_CAUSES = {
    "ASK": "moved",
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
    "TRYAGAIN": "clusterdown",
    "WRONGPASS": "auth",
}
_DEFECT = "defect"


class Script:
    """One step: its Lua text, its hash, and how long it takes."""

    def __init__(self, step: str) -> None:
        folder = Path(__file__).parent
        self.text = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("record.lua", f"{step}.lua"))
        self.sha = sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        self.seconds = _SECONDS.labels(step)


class Link:
    """The way to one Redis (7.0 or later, or Valkey), named by a redis://, rediss:// or unix:// URL.

    Redis is away when it cannot be reached, refuses writes, or may evict records. Calls then fail at once, without
    asking it, until a probe finds it back, which has loaded `scripts` there. `on_ready` is told when that changes;
    before `start` it is away. `timeout`: seconds for one exchange with Redis, connecting included.
    """

    def __init__(
        self,
        url: str,
        scripts: Sequence[Script],
        *,
        timeout: float,
        on_ready: Callable[[bool], Awaitable[None]] | None,
    ) -> None:
        # The pool is only asked to make connections: lending them would cost it more than an exchange costs us.
        self._factory = ConnectionPool.from_url(
            url, protocol=2, socket_timeout=None, socket_connect_timeout=timeout, driver_info=None
        )
        self._timeout = timeout
        self._on_ready = on_ready
        self._idle: list[AbstractConnection] = []
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._away: str | None = "starting"
        self._told = False
        self._look = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._policy_hidden = False
        self._scripts = scripts

    @property
    def ready(self) -> bool:
        """Whether calls are passed on to Redis."""
        return self._away is None

    async def start(self) -> None:
        """Looks for Redis once, then goes on looking in the background. Never raises for its state."""
        await self._probe()
        self._watcher = asyncio.create_task(self._watch(), name="redis probe")

    async def stop(self) -> None:
        """Ends the probe and closes all connections that no call is using. Calls made later fail."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        self._away = "stopped"
        await self._close_idle()

    async def run(self, script: Script, keys: Sequence[bytes], *arguments: bytes) -> bytes:
        """The reply of a script; raises Unavailable (REDIS_UNAVAILABLE) when there is none."""
        async with self._slots:
            if self._away is not None:
                raise _unavailable(self._away)
            started = time.perf_counter()
            try:
                async with asyncio.timeout(self._timeout):
                    reply = await self._evaluate(script, b"%d" % len(keys), *keys, *arguments)
            except (RedisError, OSError) as error:
                cause = _cause(error)
                _ERRORS.labels(cause).inc()
                if cause == _DEFECT:
                    _log.error("redis_call_failed", error=str(error))
                else:
                    self._set_away(cause, str(error))
                    self._look.set()
                raise _unavailable(cause) from error
            script.seconds.observe(time.perf_counter() - started)
            return reply

    def _connection(self) -> AbstractConnection:
        """A new one; its first command connects it."""
        return cast("AbstractConnection", self._factory.make_connection())  # type: ignore[no-untyped-call]

    async def _evaluate(self, script: Script, *arguments: bytes) -> bytes:
        fresh = not self._idle
        connection = self._connection() if fresh else self._idle.pop()
        try:
            return await self._exchange(connection, script, arguments)
        except RedisConnectionError:
            if fresh:
                raise
        # Redis may have restarted since this connection was last used. Every step may be repeated.
        await self._close_idle()
        return await self._exchange(self._connection(), script, arguments)

    async def _exchange(self, connection: AbstractConnection, script: Script, arguments: Sequence[bytes]) -> bytes:
        """The script's reply. The connection is kept for the next call if it can serve one."""
        try:
            try:
                reply = await _ask(connection, "EVALSHA", script.sha, *arguments)
            except NoScriptError:
                _ERRORS.labels("noscript").inc()
                await _ask(connection, "SCRIPT", "LOAD", script.text)
                reply = await _ask(connection, "EVALSHA", script.sha, *arguments)
        except ResponseError:
            await self._keep(connection)
            raise
        except BaseException:
            # Nobody knows what would be read from it next.
            await connection.disconnect(nowait=True)
            raise
        await self._keep(connection)
        return cast("bytes", reply)

    async def _keep(self, connection: AbstractConnection) -> None:
        if self.ready:
            self._idle.append(connection)
        else:
            await connection.disconnect(nowait=True)

    async def _watch(self) -> None:
        """Nothing but cancellation ends this loop."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_UP_SECONDS if self.ready else _PROBE_DOWN_SECONDS):
                    await self._look.wait()
            self._look.clear()
            await self._probe()

    async def _probe(self) -> None:
        """Finds out whether Redis is to be used, and says so if that has changed."""
        connection = self._connection()
        try:
            async with asyncio.timeout(self._timeout):
                # A write, because a Redis that only answers reads is of no use: OOM, READONLY, MISCONF show here.
                await _ask(connection, "SET", _PROBE_KEY, "1", "PX", 1000)
                policy = await self._look_at_evictions(connection)
                if not self.ready:
                    for script in self._scripts:
                        await _ask(connection, "SCRIPT", "LOAD", script.text)
        except Exception as error:
            cause = _cause(error)
            _ERRORS.labels(cause).inc()
            self._set_away(cause, repr(error))
        else:
            if policy != "noeviction":
                self._set_away("eviction", f"maxmemory-policy is {policy}, it must be noeviction")
            elif not self.ready:
                await self._close_idle()
                self._set_ready()
        finally:
            await connection.disconnect(nowait=True)
        if not self.ready:
            await self._close_idle()
        if self._told != self.ready:
            self._told = self.ready
            if self._on_ready is not None:
                await self._on_ready(self._told)

    async def _look_at_evictions(self, connection: AbstractConnection) -> str:
        """The eviction policy; noeviction when Redis hides it. From INFO, because hosted servers forbid CONFIG."""
        try:
            info: bytes = await _ask(connection, "INFO", "memory", "stats")
        except ResponseError as error:
            if not self._policy_hidden:
                self._policy_hidden = True
                _log.warning("redis_policy_hidden", error=str(error), advice="make sure of maxmemory-policy noeviction")
            return "noeviction"
        facts = dict(line.split(b":", 1) for line in info.split(b"\r\n") if b":" in line)
        _EVICTED.set(int(facts.get(b"evicted_keys", 0)))
        return facts.get(b"maxmemory_policy", b"unknown").decode()

    def _set_ready(self) -> None:
        self._away = None
        _UP.set(1)
        _log.info("redis_ready")

    def _set_away(self, cause: str, detail: str) -> None:
        if cause != self._away:
            self._away = cause
            _UP.set(0)
            _log.warning("redis_away", cause=cause, detail=detail)

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)


async def _ask(connection: AbstractConnection, *command: bytes | str | int) -> Any:
    """One command and its answer, connecting first if need be. Raises RedisError or OSError."""
    try:
        await connection.send_packed_command(connection.pack_command(*command), check_health=False)
    except RuntimeError as error:  # uvloop, when the other side has reset the connection
        raise RedisConnectionError(str(error)) from error
    return await connection.read_response(disable_decoding=True)


def _cause(error: Exception) -> str:
    """A short name for metrics and logs."""
    if isinstance(error, ResponseError | BusyLoadingError | AuthenticationError):
        word = getattr(error, "status_code", None) or str(error).partition(" ")[0]
        return _CAUSES.get(word, _DEFECT)
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, RedisConnectionError | OSError):
        return "refused" if isinstance(error.__context__, ConnectionRefusedError) else "connection"
    return _DEFECT


def _unavailable(cause: str) -> Unavailable:
    return Unavailable("REDIS_UNAVAILABLE", f"Redis is not available: {cause}.", metadata={"cause": cause})
