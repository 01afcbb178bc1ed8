"""One running pair for all tests of this folder; each test has a tenant of its own on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from deploy.local.issuer import Issuer
from tests.client import Agent, Tenant
from tests.conftest import ServiceKeys
from tests.oracle import Tables
from tests.system.pair import Pair


@pytest.fixture(scope="session")
def shared_database_url(new_database: Callable[..., str]) -> str:
    """The database of the shared pair."""
    return new_database()


@pytest.fixture(scope="session")
def shared_pair(
    shared_database_url: str,
    redis_engine: str,
    issuer: Issuer,
    service_keys: ServiceKeys,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    """Both services as processes. Nobody stops them or breaks their database."""
    services = Pair(
        database_url=shared_database_url,
        redis_url=redis_engine,
        issuer=issuer,
        service_key=service_keys.private,
        directory=tmp_path_factory.mktemp("shared-pair"),
    )
    services.start()
    yield services
    codes = services.stop()
    assert set(codes.values()) == {0}, codes


@pytest.fixture(scope="session")
def tables(shared_database_url: str) -> Iterator[Tables]:
    """The tables of the shared pair; at the end they must be consistent, whatever the tests did."""
    seen = Tables(shared_database_url)
    yield seen
    seen.check()
    seen.close()


@pytest_asyncio.fixture
async def tenant(shared_pair: Pair, issuer: Issuer) -> AsyncIterator[Tenant]:
    """A tenant that only this test knows."""
    own = Tenant(issuer, shared_pair.controller_target)
    yield own
    await own.close()


@pytest.fixture
def agent(tenant: Tenant) -> Agent:
    """An agent of that tenant, with every permission and the roles `planner` and `worker`."""
    return tenant.agent()
