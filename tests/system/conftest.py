"""What tests of a running pair share: a pair per module, and one per test for those that break it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from deploy.local.processes import LOOPBACK, free_port
from deploy.local.servers import Valkey
from tests.client import Tenant
from tests.conftest import ServiceKeys
from tests.history import History, Traffic
from tests.oracle import Tables
from tests.system.pair import Pair
from tests.system.proxy import Proxy

NEAR_OFF = {"NEAR_REPLAY_BYTES": "0"}
"""So that each replay asks Redis or Postgres."""


def repeated(short: int, soak: int) -> pytest.MarkDecorator:
    """Gives a test its number of `rounds`: `short` in `make test`, `soak` in `make soak`."""
    marks = [pytest.mark.soak, pytest.mark.timeout(1800)]
    return pytest.mark.parametrize(
        "rounds", [pytest.param(short, id="short"), pytest.param(soak, id="soak", marks=marks)]
    )


def metric(world: World, service: str, name: str, **labels: str) -> float:
    """The value of a service's metric now; 0 while it has none with these labels."""
    return world.pair.metric(service, name, **labels)


def show(what: str, number: int, of: int) -> None:
    """Tells how far a long test has come, on one line."""
    print(f"\r{what}: {number} of {of}", end="" if number < of else "\n", flush=True)


@dataclass(frozen=True, slots=True)
class World:
    """A running pair, its own Valkey, its tables, and the proxies that were asked for, by what they stand before."""

    pair: Pair
    valkey: Valkey
    tables: Tables
    proxies: Mapping[str, Proxy]


@pytest.fixture(scope="module")
def start_world(
    new_database: Callable[..., str],
    issuer: Issuer,
    service_keys: ServiceKeys,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., World]]:
    """A function that starts a pair with a database and a Valkey of its own, for the rest of the module.

    `proxied` names what is reached through a proxy: `postgres`, `redis`, `idempotency`, `controller` (the first one;
    its clients then use the proxy's target). `redis_binary` runs in place of Valkey, `valkey_folder` has its files. The
    other arguments are those of Pair.
    """
    started: list[World] = []

    def start(
        *,
        proxied: Collection[str] = (),
        controller_env: Mapping[str, str] | None = None,
        database_url: str = "",
        redis_binary: Path | None = None,
        valkey_folder: Path | None = None,
        **settings: Any,
    ) -> World:
        directory = tmp_path_factory.mktemp("world")
        folder = valkey_folder or directory / "valkey"
        valkey = Valkey(folder, port=free_port(), log=directory / "valkey.log", binary=redis_binary)
        valkey.start()
        url, redis_url = database_url or new_database(), valkey.url
        proxies: dict[str, Proxy] = {}
        if "postgres" in proxied:
            behind, proxies["postgres"] = _behind(url)
            controller_env = {"DATABASE_URL": behind, **(controller_env or {})}
        if "redis" in proxied:
            redis_url, proxies["redis"] = _behind(redis_url)
        pair = Pair(
            database_url=url,
            redis_url=redis_url,
            issuer=issuer,
            service_key=service_keys.private,
            directory=directory,
            controller_env=controller_env,
            **settings,
        )
        if "idempotency" in proxied:
            proxy = proxies["idempotency"] = Proxy(LOOPBACK, pair.services["idempotency"].port)
            for name, service in pair.services.items():
                if name != "idempotency":
                    service.env = {**(service.env or {}), "IDEMPOTENCY_TARGET": proxy.target}
        if "controller" in proxied:
            proxies["controller"] = Proxy(LOOPBACK, pair.services["controller"].port)
        world = World(pair, valkey, Tables(url), proxies)
        started.append(world)
        pair.start()
        return world

    yield start
    for world in started:
        world.pair.stop()
        world.valkey.stop()
        world.tables.close()
        for proxy in world.proxies.values():
            proxy.stop()


def _behind(url: str) -> tuple[str, Proxy]:
    """The URL of the same server through a new proxy."""
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "", parts.port or 0)
    login = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{login}@{proxy.target}")), proxy


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


@pytest_asyncio.fixture
async def traffic(world: World, issuer: Issuer) -> AsyncIterator[Traffic]:
    """Traffic of a tenant of this test's own, at both controllers of the module's pair."""
    first, second = world.pair.controller_targets
    tenant = Tenant(issuer, first)
    made = Traffic(History(), [tenant.agent(connections=2), tenant.agent(target=second, connections=2)])
    await made.prepare()
    yield made
    await tenant.close()
