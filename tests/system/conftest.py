"""What tests of a running pair share: a pair per module, and one per test for those that break it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from deploy.local.processes import free_port
from deploy.local.servers import Valkey
from tests.client import Tenant
from tests.conftest import ServiceKeys
from tests.oracle import Tables
from tests.system.pair import Pair


@dataclass(frozen=True, slots=True)
class World:
    """A running pair, its own Valkey, and its tables."""

    pair: Pair
    valkey: Valkey
    tables: Tables
    directory: Path


@pytest.fixture(scope="module")
def start_world(
    new_database: Callable[..., str],
    issuer: Issuer,
    service_keys: ServiceKeys,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., World]]:
    """A function that starts a pair with a database and a Valkey of its own, for the rest of the module.

    Its arguments are those of Pair.
    """
    started: list[World] = []

    def start(**settings: object) -> World:
        directory = tmp_path_factory.mktemp("world")
        valkey = Valkey(directory / "valkey", port=free_port(), log=directory / "valkey.log")
        valkey.start()
        url = new_database()
        pair = Pair(
            database_url=url,
            redis_url=valkey.url,
            issuer=issuer,
            service_key=service_keys.private,
            directory=directory,
            **settings,  # type: ignore[arg-type]
        )
        world = World(pair, valkey, Tables(url), directory)
        started.append(world)
        pair.start()
        return world

    yield start
    for world in started:
        world.pair.stop()
        world.valkey.stop()
        world.tables.close()


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """The module's pair, with one controller; a test that stops a part of it starts it again."""
    return start_world()


@pytest_asyncio.fixture
async def tenant(world: World, issuer: Issuer) -> AsyncIterator[Tenant]:
    """A tenant that only this test knows, on the module's pair."""
    own = Tenant(issuer, world.pair.controller_target)
    yield own
    await own.close()
