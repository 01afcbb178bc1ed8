"""The fault proxy of tests/system does what its faults are named after, each direction for itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from tests.oracle import eventually
from tests.system.proxy import BLACK_HOLE, CLEAR, Proxy, Weather


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """A proxy before a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    made = Proxy(*server.sockets[0].getsockname())
    yield made
    await asyncio.to_thread(made.stop)
    server.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes = b"x") -> bytes:
    writer.write(said)
    return await reader.read(1024)


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


@pytest.mark.parametrize("way", ["questions", "answers"])
async def test_what_is_held_arrives_when_it_heals(proxy: Proxy, way: str) -> None:
    reader, writer = await connect(proxy)
    assert await ask(reader, writer) == b"x"
    setattr(proxy, way, BLACK_HOLE)
    waiting = asyncio.create_task(ask(reader, writer, b"held"))
    await eventually(lambda: proxy.affected == 1)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    proxy.heal()
    assert await waiting == b"held"
    writer.close()


async def test_delay_and_jitter(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    proxy.answers = Weather(delay=0.05, jitter=0.05)
    started = asyncio.get_running_loop().time()
    assert await ask(reader, writer) == b"x"
    assert asyncio.get_running_loop().time() - started >= 0.05
    assert proxy.questions == CLEAR and proxy.affected == 1
    writer.close()


async def test_cut_and_reset_and_refusal(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    assert await ask(reader, writer) == b"x"
    assert await asyncio.to_thread(proxy.cut) == 1
    assert await reader.read(1) == b""
    writer.close()

    reader, writer = await connect(proxy)
    assert await ask(reader, writer) == b"x"
    assert await asyncio.to_thread(lambda: proxy.cut(reset=True)) == 1
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.close()

    proxy.refusing = True
    with pytest.raises(ConnectionResetError):  # already of connecting, or only of asking
        await ask(*await connect(proxy))
    assert proxy.affected == 3
    proxy.heal()
    reader, writer = await connect(proxy)
    assert await ask(reader, writer) == b"x"
    writer.close()


async def test_it_can_be_pointed_elsewhere(proxy: Proxy) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        proxy.to = other.getsockname()
        _, writer = await connect(proxy)
        accepted, _ = await asyncio.to_thread(other.accept)
        accepted.close()
        writer.close()
