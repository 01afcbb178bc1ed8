"""Calls of a Cache as its tests make them, one item at a time, and what they wait for."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from idempotency_svc.cache import ClaimItem, CompleteItem, ExtendItem, RedisCache, ReleaseItem
from svckit.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from idempotency_svc.cache import Cache, ClaimOutcome, Completed, Extended, Fingerprints, Released

LEASE = 60_000
TTL = 600_000
OWNER, OTHER, THIRD = b"o" * 16, b"x" * 16, b"t" * 16
SAME: Fingerprints = ((1, b"\x01" * 32),)
FOREIGN: Fingerprints = ((1, b"\x02" * 32),)


def new_scope() -> bytes:
    return os.urandom(32)


def key_of(scope: bytes) -> str:
    return f"idem:{{{base64.b64encode(scope[:16]).decode().rstrip('=')}}}"


def claim_item(
    scope: bytes,
    nonce: bytes = OWNER,
    fingerprints: Fingerprints = SAME,
    lease: int = LEASE,
    ttl: int = TTL,
) -> ClaimItem:
    return ClaimItem(scope, fingerprints, nonce, lease, ttl)


async def claim(
    cache: Cache,
    scope: bytes,
    nonce: bytes = OWNER,
    fingerprints: Fingerprints = SAME,
    lease: int = LEASE,
    ttl: int = TTL,
) -> ClaimOutcome:
    [outcome] = await cache.claim([claim_item(scope, nonce, fingerprints, lease, ttl)])
    return outcome


async def complete(
    cache: Cache,
    scope: bytes,
    nonce: bytes = OWNER,
    fingerprints: Fingerprints = SAME,
    *,
    code: int = 0,
    answer: bytes = b"answer",
    ttl: int = TTL,
    durable: bool = False,
    timeline: int = 0,
) -> Completed:
    [result] = await cache.complete([CompleteItem(scope, fingerprints, nonce, code, answer, ttl, durable, timeline)])
    return result


async def release(cache: Cache, scope: bytes, nonce: bytes = OWNER) -> Released:
    [result] = await cache.release([ReleaseItem(scope, nonce)])
    return result


async def extend(cache: Cache, scope: bytes, nonce: bytes = OWNER, lease: int = LEASE) -> Extended:
    [result] = await cache.extend([ExtendItem(scope, nonce, lease)])
    return result


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition is true; fails after a minute."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 60, "not in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def cache_on(
    url: str, *, timeout: float = 0.25, on_ready: Callable[[bool], Awaitable[None]] | None = None
) -> AsyncIterator[RedisCache]:
    cache = RedisCache(url, timeout=timeout, on_ready=on_ready)
    await cache.start()
    try:
        yield cache
    finally:
        await cache.stop()


def noting(changes: list[bool]) -> Callable[[bool], Awaitable[None]]:
    async def note(ready: bool) -> None:
        changes.append(ready)

    return note


async def refused(cache: Cache) -> str:
    """The cause with which a claim is refused."""
    with pytest.raises(Unavailable) as caught:
        await claim(cache, new_scope())
    assert caught.value.reason == "REDIS_UNAVAILABLE"
    return caught.value.metadata["cause"]
