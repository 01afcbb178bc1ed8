"""A TCP proxy that stands between two parts of the system and can be a bad network, switched while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from dataclasses import dataclass

from deploy.local.processes import LOOPBACK


@dataclass(frozen=True, slots=True)
class Weather:
    """How one direction is: each piece is late by `delay` plus up to `jitter` seconds; `held` lets nothing through.

    What is held is not lost: TCP would send it again, so it arrives when the hold is over, or its connection ends.
    """

    delay: float = 0
    jitter: float = 0
    held: bool = False


CLEAR = Weather()
BLACK_HOLE = Weather(held=True)


class Proxy:
    """Listens on a free port of this machine and passes everything on to `host:port`, in a thread of its own.

    `questions` and `answers` are the weather from and to those who connect, and may be set at any time; `affected`
    counts the pieces that were delayed or held and the connections that were cut or refused. While `refusing`, new
    connections are reset.
    """

    def __init__(self, host: str, port: int) -> None:
        self.to = (host, port)
        self.questions = CLEAR
        self.answers = CLEAR
        self.refusing = False
        self.affected = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._asked: set[asyncio.StreamWriter] = set()
        self._deaf: set[asyncio.StreamWriter] = set()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def target(self) -> str:
        """Where it listens, as host:port."""
        return f"{LOOPBACK}:{self.port}"

    def black_hole(self) -> None:
        """Nothing passes any more, in either direction; connections stay, and new ones are taken."""
        self.questions = self.answers = BLACK_HOLE

    def heal(self) -> None:
        """Everything passes again."""
        self.questions = self.answers = CLEAR
        self.refusing = False

    def cut(self, *, reset: bool = False) -> int:
        """Ends all connections, with `reset` by RST; what was on its way is lost. Gives how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(reset), self._loop).result()

    def lose_answers(self) -> int:
        """Clients that wait for an answer now never get it: when it comes, their connections end. Gives how many."""
        return asyncio.run_coroutine_threadsafe(self._lose(), self._loop).result()

    def stop(self) -> None:
        """Ends all connections and listens no more."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, LOOPBACK, 0)

    async def _lose(self) -> int:
        self._deaf |= self._asked
        return len(self._asked)

    async def _cut(self, reset: bool) -> int:
        connections = list(self._connections.items())
        for task, to_client in connections:
            if reset:
                _reset(to_client)
            task.cancel()
        self.affected += len(connections)
        await asyncio.gather(*(task for task, _ in connections), return_exceptions=True)
        return len(connections)

    async def _end(self) -> None:
        self._server.close()
        await asyncio.sleep(0.01)  # whoever was accepted just now is among the connections then
        await self._cut(reset=False)

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self.refusing:
            self.affected += 1
            _reset(to_client)
            return
        self._connections[task] = to_client
        to_server: asyncio.StreamWriter | None = None
        try:
            server, to_server = await asyncio.open_connection(*self.to)
            ways = [
                asyncio.ensure_future(self._questions(client, to_server, to_client)),
                asyncio.ensure_future(self._answers(server, to_client)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writers = [writer for writer in (to_client, to_server) if writer is not None]
            for writer in writers:  # all, before a wait that may be cancelled
                writer.close()
            for writer in writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            self._asked.discard(to_client)
            self._deaf.discard(to_client)
            self._connections.pop(task, None)

    async def _questions(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter, to_client: asyncio.StreamWriter
    ) -> None:
        while data := await client.read(65536):
            await self._pass("questions")
            self._asked.add(to_client)
            to_server.write(data)
            await to_server.drain()

    async def _answers(self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while data := await server.read(65536):
            await self._pass("answers")
            if to_client in self._deaf:
                self.affected += 1
                return
            self._asked.discard(to_client)
            to_client.write(data)
            await to_client.drain()

    async def _pass(self, way: str) -> None:
        weather: Weather = getattr(self, way)
        if weather == CLEAR:
            return
        self.affected += 1
        await asyncio.sleep(weather.delay + random.uniform(0, weather.jitter))
        while getattr(self, way).held:
            await asyncio.sleep(0.01)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
