"""A TCP proxy before Postgres that can lose answers: the server has done what it was asked, and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from deploy.local.processes import LOOPBACK


class Proxy:
    """Listens on a free port of this machine and passes everything on to `host:port`, in a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._asked: set[asyncio.StreamWriter] = set()
        self._deaf: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.sockets[0].getsockname()[1])

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

    async def _end(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        to_server: asyncio.StreamWriter | None = None
        try:
            server, to_server = await asyncio.open_connection(*self._to)
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
            for writer in (to_client, to_server):
                if writer is not None:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
            self._asked.discard(to_client)
            self._deaf.discard(to_client)
            self._connections.discard(task)

    async def _questions(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter, to_client: asyncio.StreamWriter
    ) -> None:
        while data := await client.read(65536):
            self._asked.add(to_client)
            to_server.write(data)
            await to_server.drain()

    async def _answers(self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while data := await server.read(65536):
            if to_client in self._deaf:
                return
            self._asked.discard(to_client)
            to_client.write(data)
            await to_client.drain()
