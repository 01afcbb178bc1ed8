"""What tests of a running pair share: a pair per module, and one per test for those that break it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from deploy.local.processes import LOOPBACK, free_port
from deploy.local.servers import Valkey
from tests.client import Tenant
from tests.conftest import ServiceKeys
from tests.oracle import Tables
from tests.system.pair import Pair
from tests.system.proxy import Proxy


@dataclass(frozen=True, slots=True)
class World:
    """A running pair, its own Valkey, its tables, and what stands before Postgres if that was asked for."""

    pair: Pair
    valkey: Valkey
    tables: Tables
    proxy: Proxy | None


@pytest.fixture(scope="module")
def start_world(
    new_database: Callable[..., str],
    issuer: Issuer,
    service_keys: ServiceKeys,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., World]]:
    """A function that starts a pair with a database and a Valkey of its own, for the rest of the module.

    With `proxied=True` its controllers reach Postgres through a proxy. The other arguments are those of Pair.
    """
    started: list[World] = []

    def start(*, proxied: bool = False, controller_env: Mapping[str, str] | None = None, **settings: Any) -> World:
        directory = tmp_path_factory.mktemp("world")
        valkey = Valkey(directory / "valkey", port=free_port(), log=directory / "valkey.log")
        valkey.start()
        url = new_database()
        parts = urlsplit(url)
        proxy = Proxy(parts.hostname or "", parts.port or 5432) if proxied else None
        if proxy is not None:
            login = parts.netloc.rpartition("@")[0]
            behind = urlunsplit(parts._replace(netloc=f"{login}@{LOOPBACK}:{proxy.port}"))
            controller_env = {"DATABASE_URL": behind, **(controller_env or {})}
        pair = Pair(
            database_url=url,
            redis_url=valkey.url,
            issuer=issuer,
            service_key=service_keys.private,
            directory=directory,
            controller_env=controller_env,
            **settings,
        )
        world = World(pair, valkey, Tables(url), proxy)
        started.append(world)
        pair.start()
        return world

    yield start
    for world in started:
        world.pair.stop()
        world.valkey.stop()
        world.tables.close()
        if world.proxy is not None:
            world.proxy.stop()


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
