"""The way to Redis: a batch's keys sorted to the servers that have them, and their answers brought together."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Gauge
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, ReadOnlyError

from idempotency_svc.server import DEFECT, ERRORS, PATIENCE, Address, Call, Server, ServerAway, cause_of, detail_of, end
from idempotency_svc.topology import SLOTS, parse
from svckit.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from idempotency_svc.server import Script
    from idempotency_svc.topology import Span

_log = structlog.get_logger(__name__)

_UP = Gauge("orchestrator_redis_up", "1 while every primary of Redis answers, takes writes and evicts nothing.")
_SLOTS_AWAY = Gauge("orchestrator_redis_slots_away", "Slots (of 16384) whose keys have no primary that is in use.")
_EVICTED = Gauge("orchestrator_redis_evicted_keys", "Keys that Redis evicted since its start; anything but 0 is wrong.")

_REFRESH_SECONDS = 1.0
_REFRESH_AWAY_SECONDS = 0.2
_UNCOVERED = "uncovered"


class Link:
    """The way to the Redis that `url` names, as topology.parse says: one server, Sentinel's master, or a cluster.

    It is ready while at least one primary is in use. `on_ready` is told when that changes; before `start` it is not.
    `timeout`: seconds in which a call is answered, whatever Redis does; a server that is silent for PATIENCE times as
    long is away.
    """

    def __init__(
        self,
        url: str,
        scripts: Sequence[Script],
        *,
        timeout: float,
        on_ready: Callable[[bool], Awaitable[None]] | None,
    ) -> None:
        self._topology = parse(url, timeout=PATIENCE * timeout)
        self._scripts = scripts
        self._timeout = timeout
        self._on_ready = on_ready
        self._servers: dict[Address, Server] = {}
        self._leaving: list[Server] = []
        self._slots: list[Server | None] = [None] * SLOTS
        self._lost: str | None = None
        self._ready = False
        self._whole = False
        self._told = False
        self._changed = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether calls are passed on to any server."""
        return self._ready

    async def start(self) -> None:
        """Looks for Redis once, then goes on looking in the background. Never raises for its state."""
        await self._refresh()
        await asyncio.gather(*(server.known() for server in self._servers.values()))
        await self._tell()
        self._watcher = asyncio.create_task(self._watch(), name="redis topology")

    async def stop(self) -> None:
        """Ends that and closes all connections that no call is using. Calls made later fail."""
        await end(self._watcher)
        await end(self._refreshing)
        for server in (*self._servers.values(), *self._leaving):
            await server.stop()
        await self._topology.close()
        self._see()

    async def run(
        self, script: Script, keys: Sequence[bytes], items: Sequence[bytes], *arguments: bytes
    ) -> tuple[Sequence[int], bytes]:
        """Runs a script over keys, with their items, joined, and `arguments` as its arguments.

        On one server in one call; on a cluster in one for each key, all of a server in one write. Answers the places
        of the keys that were treated, in the order of their replies, and these, joined. The others have no server in
        use, or one that was not in time: they may have been treated. Raises Unavailable (REDIS_UNAVAILABLE) when no
        server is in use, or when the call itself is at fault.
        """
        if not self._ready:
            raise self._unavailable()
        started = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._timeout
        if self._topology.sharded:
            calls = self._sharded(script, keys, items, arguments)
        else:
            calls = [Call(script, 0, range(len(keys)), keys, b"".join(items), *arguments)]
        await self._ask(calls, deadline)
        if elsewhere := [call for call in calls if isinstance(call.error, AskError)]:
            await self._follow(elsewhere, deadline)
        if readonly := [call for call in calls if isinstance(call.error, ReadOnlyError)]:
            await self._ask_new_primary(readonly, deadline)
        script.seconds.observe(time.perf_counter() - started)
        if len(calls) == 1 and calls[0].reply is not None:
            return calls[0].places, calls[0].reply
        places: list[int] = []
        replies: list[bytes] = []
        for call in calls:
            if call.reply is not None:
                places += call.places
                replies.append(call.reply)
            elif call.error is not None:
                cause = cause_of(call.error)
                if not self._ready or cause == DEFECT:
                    raise _unavailable(cause) from call.error
        return places, b"".join(replies)

    def _sharded(
        self, script: Script, keys: Sequence[bytes], items: Sequence[bytes], arguments: Sequence[bytes]
    ) -> list[Call]:
        """A call for each key, not for each slot: a slot on its way to another server has keys on both."""
        by_key: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, key in enumerate(keys):
            by_key[key].append(place)
        return [
            Call(
                script,
                key_slot(key),
                places,
                [key] * len(places),
                b"".join([items[place] for place in places]),
                *arguments,
            )
            for key, places in by_key.items()
        ]

    @asynccontextmanager
    async def signs(self, key: bytes) -> AsyncIterator[asyncio.Event]:
        """While inside, the event is set by each sign of the key, if the server that has it now is in use."""
        event = asyncio.Event()
        server = self._slots[key_slot(key) if self._topology.sharded else 0]
        if server is None:
            yield event
            return
        await server.signs.listen(key, event)
        try:
            yield event
        finally:
            await server.signs.forget(key, event)

    async def _ask(self, calls: Sequence[Call], deadline: float) -> None:
        """Has each call answered by the server of its slot; the servers work side by side."""
        by_server: defaultdict[Server, list[Call]] = defaultdict(list)
        for call in calls:
            call.server = self._slots[call.slot]
            if call.server is not None:
                by_server[call.server].append(call)
            else:
                ERRORS.labels(_UNCOVERED).inc()
                call.error = ServerAway(_UNCOVERED)
        await _side_by_side([server.run(its, deadline) for server, its in by_server.items()])

    async def _follow(self, calls: Sequence[Call], deadline: float) -> None:
        """Makes calls again, once, at the servers that have their keys according to those that were asked."""
        by_server: defaultdict[tuple[Server, bool], list[Call]] = defaultdict(list)
        for call in calls:
            error = call.error
            assert isinstance(error, AskError) and call.server is not None
            # A server that does not know the host means its own.
            call.server = self._server(Address(error.host or call.server.address.host, error.port))
            moved = isinstance(error, MovedError)
            if moved:
                self._slots[call.slot] = call.server
                self._changed.set()
            by_server[call.server, moved].append(call)
        await _side_by_side([server.run(its, deadline, asking=not moved) for (server, moved), its in by_server.items()])

    async def _ask_new_primary(self, calls: Sequence[Call], deadline: float) -> None:
        """Makes calls again, once, after servers have said that they are replicas; who has no successor is away."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._refresh()
                await self._refresh()  # the first may have been under way, and have asked too early
        for call in calls:
            if call.server is not None and self._slots[call.slot] is call.server:
                call.server.set_away("readonly", str(call.error))
        await self._ask(calls, deadline)

    def _server(self, address: Address) -> Server:
        """The server there; one that is new is looked at before it is used."""
        server = self._servers.get(address)
        if server is None:
            server = self._servers[address] = Server(
                address,
                self._scripts,
                connect=lambda: self._topology.connection(address),
                in_cluster=self._topology.sharded,
                timeout=self._timeout,
                changed=self._see,
            )
            server.start()
        return server

    async def _watch(self) -> None:
        """Nothing but cancellation ends this loop."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_SECONDS if self._whole else _REFRESH_AWAY_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            await self._tell()
            await self._refresh()
            await self._tell()

    async def _refresh(self) -> None:
        """Finds out who the primaries are, one search at a time: who comes during one has its result."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._find(), name="redis search")
        await asyncio.shield(self._refreshing)

    async def _find(self) -> None:
        try:
            spans = await self._topology.find()
        except Exception as error:
            cause = cause_of(error)
            ERRORS.labels(cause).inc()
            if cause != self._lost:
                self._lost = cause
                _log.warning("redis_not_found", cause=cause, detail=detail_of(error))
        else:
            self._lost = None
            await self._take(spans)
        self._see()

    async def _take(self, spans: Sequence[Span]) -> None:
        """Uses these primaries from now on, and no others."""
        primaries = {span.primary for span in spans}
        gone = self._servers.keys() - primaries
        if self._servers and (gone or primaries - self._servers.keys()):
            _log.info("redis_primaries", servers=sorted(map(str, primaries)))
        slots: list[Server | None] = [None] * SLOTS
        for first, last, primary in spans:
            slots[first : last + 1] = [self._server(primary)] * (last + 1 - first)
        self._slots = slots
        self._leaving += [self._servers.pop(address) for address in gone]
        # Before anything is awaited: a new server is looked at from then on, and to be written to from the first look.
        for server in self._servers.values():
            if server.probe_key is None or (self._topology.sharded and slots[key_slot(server.probe_key)] is not server):
                server.probe_key = self._probe_key(server)
        while self._leaving:
            await self._leaving[-1].stop()
            self._leaving.pop()

    def _probe_key(self, server: Server) -> bytes | None:
        """A key that the server has, None if it has so few slots that this would take long to find."""
        if not self._topology.sharded:
            return b"idem:probe"
        keys = (b"idem:probe:{%d}" % number for number in range(4096))
        return next((key for key in keys if self._slots[key_slot(key)] is server), None)

    def _see(self) -> None:
        """Looks at the servers' states."""
        self._ready = any(server.cause is None for server in self._servers.values())
        away = sum(
            slots for server, slots in Counter(self._slots).items() if server is None or server.cause is not None
        )
        if self._whole != (away == 0):
            self._changed.set()
        self._whole = away == 0
        _UP.set(self._whole)
        _SLOTS_AWAY.set(away)
        _EVICTED.set(sum(server.evicted for server in self._servers.values()))
        if self._ready != self._told:
            self._changed.set()

    async def _tell(self) -> None:
        if self._told != self._ready:
            self._told = self._ready
            if self._on_ready is not None:
                await self._on_ready(self._told)

    def _unavailable(self) -> Unavailable:
        causes = [server.cause for server in self._servers.values() if server.cause is not None]
        return _unavailable([*causes, self._lost or "starting"][0])


async def _side_by_side(runs: Sequence[Coroutine[None, None, None]]) -> None:
    if len(runs) == 1:
        await runs[0]
    else:
        await asyncio.gather(*runs)


def _unavailable(cause: str) -> Unavailable:
    return Unavailable("REDIS_UNAVAILABLE", f"Redis is not available: {cause}.", metadata={"cause": cause})
