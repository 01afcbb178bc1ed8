"""The stores on a real Postgres, over the database object that the service itself uses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from controller_svc.store.audit import Audit
from controller_svc.store.database import Database
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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
def tasks(database: Database) -> Tasks:
    return Tasks(database)


@pytest.fixture
def audit(database: Database) -> Audit:
    return Audit(database)
