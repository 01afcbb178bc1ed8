"""Which Redis servers take writes, and for which slots: one server, those that Sentinel names, or a cluster's."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import AbstractConnection, ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from idempotency_svc.server import Address, ask

if TYPE_CHECKING:
    from collections.abc import Iterable

SLOTS = 16384
"""Every key is in one of so many slots; without a cluster, one server has them all."""
_SENTINEL_PORT = 26379
_REDIS_PORT = 6379


class Span(NamedTuple):
    """The slots first to last, and the primary that has them."""

    first: int
    last: int
    primary: Address


class Topology(ABC):
    """Says where the primaries are. `sharded`: a key's slot decides which of them has it."""

    sharded = False

    def __init__(self, connections: ConnectionPool) -> None:
        # The pool is only asked how to make connections: lending them would cost more than an exchange does.
        self._connections = connections

    def connection(self, address: Address) -> AbstractConnection:
        """A new connection to a server; its first command connects it."""
        settings = {**self._connections.connection_kwargs, "host": address.host, "port": address.port}
        return self._connections.connection_class(**settings)

    @abstractmethod
    async def find(self) -> list[Span]:
        """Who has which slots, as far as anybody says so now. Raises RedisError or OSError when nobody does."""

    async def close(self) -> None:  # noqa: B027 - most keep nothing open
        """Gives up what `find` keeps open."""


def parse(url: str, *, timeout: float) -> Topology:
    """The topology that a URL names. `timeout`: seconds that one server may take to answer a question about it.

    - `redis://`, `rediss://` and `unix://`, as redis-py takes them: one server.
    - `redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]`: the master that these sentinels name.
      They are told `sentinel_username` and `sentinel_password`, if the URL has such options.
    - `redis+cluster://[user:password@]host[:port][,host[:port]…]`: a cluster with these nodes, and others.

    `rediss+…` is over TLS. All other options are redis-py's. Raises ValueError for any other URL.
    """
    scheme, _, rest = url.partition("://")
    match scheme:
        case "redis+sentinel" | "rediss+sentinel":
            made = _Sentinels.of(scheme.partition("+")[0], rest, timeout)
        case "redis+cluster" | "rediss+cluster":
            made = _Cluster.of(scheme.partition("+")[0], rest, timeout)
        case _:
            made = _Alone(_pool(url, timeout))
    try:
        made.connection(Address("localhost", _REDIS_PORT))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return made


class _Alone(Topology):
    """One server."""

    def connection(self, address: Address) -> AbstractConnection:
        return cast("AbstractConnection", self._connections.make_connection())  # type: ignore[no-untyped-call]

    async def find(self) -> list[Span]:
        settings = self._connections.connection_kwargs
        if "path" in settings:
            address = Address(settings["path"], 0)
        else:
            address = Address(settings.get("host", "localhost"), settings.get("port", _REDIS_PORT))
        return [Span(0, SLOTS - 1, address)]


class _Sentinels(Topology):
    """The master of a service, as one of its sentinels names it."""

    def __init__(self, connections: ConnectionPool, sentinels: list[Address], service: str, timeout: float) -> None:
        settings = connections.connection_kwargs
        login = {name: settings.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        super().__init__(connections)
        self._service = service
        self._sentinels = Sentinel(  # type: ignore[no-untyped-call]
            sentinels,
            sentinel_kwargs={
                **login,
                **{name: value for name, value in settings.items() if name.startswith("ssl_")},
                "ssl": connections.connection_class is SSLConnection,
                "protocol": 2,
                "driver_info": None,
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
                "retry": Retry(NoBackoff(), 0),
            },
        )

    @classmethod
    def of(cls, way: str, rest: str, timeout: float) -> Topology:
        login, hosts, path, options = _split(rest, _SENTINEL_PORT)
        service, _, database = path.partition("/")
        if not service:
            raise ValueError("names no service: …/service[/db]")
        if database and not database.isdecimal():
            raise ValueError("the database is no number: …/service[/db]")
        return cls(_pool(f"{way}://{login}localhost/{database}{options}", timeout), hosts, unquote(service), timeout)

    async def find(self) -> list[Span]:
        master = await self._sentinels.discover_master(self._service)
        return [Span(0, SLOTS - 1, Address(*master))]

    async def close(self) -> None:
        await self._sentinels.aclose()


class _Cluster(Topology):
    """The primaries of a cluster, as one of its nodes names them."""

    sharded = True

    def __init__(self, connections: ConnectionPool, nodes: Iterable[Address], timeout: float) -> None:
        super().__init__(connections)
        self._timeout = timeout
        self._seeds = tuple(nodes)
        self._nodes = list(self._seeds)

    @classmethod
    def of(cls, way: str, rest: str, timeout: float) -> Topology:
        login, hosts, path, options = _split(rest, _REDIS_PORT)
        if path not in ("", "0"):
            raise ValueError("a cluster has no database but 0")
        return cls(_pool(f"{way}://{login}localhost{options}", timeout), hosts, timeout)

    async def find(self) -> list[Span]:
        """Asks one node after another. One that is cut off from the others is believed only when there is no better."""
        doubtful: list[Span] | None = None
        failure: Exception = RedisConnectionError("no node of the cluster answers")
        for node in tuple(self._nodes):
            try:
                well, spans, nodes = await self._ask(node)
            except (RedisError, OSError) as error:
                failure = error
            else:
                if well:
                    self._nodes = list(dict.fromkeys((node, *nodes, *self._seeds)))
                    return spans
                doubtful = doubtful or spans
            self._nodes.append(self._nodes.pop(self._nodes.index(node)))
        if doubtful is None:
            raise failure
        return doubtful

    async def _ask(self, node: Address) -> tuple[bool, list[Span], set[Address]]:
        """What a node says: whether its cluster is well, who has which slots, and which nodes there are."""
        connection = self.connection(node)
        try:
            async with asyncio.timeout(self._timeout):
                state: bytes = await ask(connection, b"CLUSTER", b"INFO")
                shards: list[list[Any]] = await ask(connection, b"CLUSTER", b"SLOTS")
        finally:
            await connection.disconnect(nowait=True)
        spans, nodes = [], set()
        for first, last, *members in shards:
            # A node that does not know its own name or address means: the one under which it was asked.
            addresses = [Address((host or b"").decode() or node.host, port) for host, port, *_ in members]
            spans.append(Span(first, last, addresses[0]))
            nodes.update(addresses)
        return b"cluster_state:ok" in state, spans, nodes


def _pool(url: str, timeout: float) -> ConnectionPool:
    return ConnectionPool.from_url(
        url, protocol=2, socket_timeout=None, socket_connect_timeout=timeout, driver_info=None
    )


def _split(rest: str, port: int) -> tuple[str, list[Address], str, str]:
    """`user:pw@a,b:1/path?x=y` → `user:pw@`, [a:port, b:1], `path`, `?x=y`."""
    before, mark, query = rest.partition("?")
    netloc, _, path = before.partition("/")
    login, at, hosts = netloc.rpartition("@")
    addresses = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            raise ValueError("names no host: host[:port][,host[:port]…]")
        addresses.append(Address(parts.hostname, parts.port or port))
    return login + at, addresses, path.strip("/"), mark + query
