"""The stores on a real Postgres, over the database object that the service itself uses; the cache on a real Redis."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis.asyncio

from controller_svc.store.audit import Audit
from controller_svc.store.database import Database
from controller_svc.store.heartbeats import Heartbeats
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks
from deploy.local.processes import free_port
from deploy.local.servers import Valkey
from tests.conftest import REDIS_ENGINES, redis_binary
from tests.contract.caches import cache_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from idempotency_svc.cache import RedisCache

Connection = psycopg.AsyncConnection[Any]


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A connection of the test's own to the database, in autocommit mode."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The service's view of the database, ready."""
    database = Database(database_url, lanes=1)
    await database.open()
    try:
        async with asyncio.timeout(10):
            while not database.ready:
                await asyncio.sleep(0.01)
        yield database
    finally:
        await database.close()


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database)


@pytest.fixture
async def tasks(database: Database) -> Tasks:
    return Tasks(database)


@pytest.fixture
async def heartbeats(database: Database) -> Heartbeats:
    return Heartbeats(database)


@pytest.fixture
def audit(database: Database) -> Audit:
    return Audit(database)


@pytest.fixture(params=REDIS_ENGINES)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Valkey]:
    """A server for this test alone, of each engine."""
    binary = redis_binary(request.param)
    server = Valkey(tmp_path / "redis", port=free_port(), log=tmp_path / "redis.log", binary=binary, durable=False)
    server.start()
    yield server
    server.child.kill()


@pytest.fixture
async def own(server: Valkey) -> AsyncIterator[RedisCache]:
    """The cache on that server."""
    async with cache_on(server.url, timeout=1) as cache:  # a machine under load may stand still for 250 ms
        assert cache.ready
        yield cache


@pytest.fixture
async def admin(server: Valkey) -> AsyncIterator[redis.asyncio.Redis]:
    """A connection to that server that may do everything."""
    async with redis.asyncio.Redis.from_url(server.url) as client:
        yield client
