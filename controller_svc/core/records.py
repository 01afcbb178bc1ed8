"""What is kept of an idempotency key, for operators: the guard in Postgres and the record of idempotency_svc."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from controller_svc.core.values import value_class

if TYPE_CHECKING:
    from datetime import datetime, timedelta
    from uuid import UUID


class RecordState(StrEnum):
    """Where a record stands; one that is absent has none."""

    IN_PROGRESS = "IN_PROGRESS"
    RELEASED = "RELEASED"
    COMPLETED = "COMPLETED"
    UNSPECIFIED = "UNSPECIFIED"
    """That of a newer idempotency_svc."""


@value_class(frozen=True, slots=True, kw_only=True)
class GuardFacts:
    """A guard without its answer."""

    command_id: UUID
    code: int
    """gRPC status code of the answer; 0 is OK."""
    fingerprints: bytes
    """As stored: packed, or a bare digest of kind 1."""
    answer_bytes: int
    create_time: datetime
    expire_time: datetime


@value_class(frozen=True, slots=True, kw_only=True)
class RecordFacts:
    """A record without its answer and without its owner's nonce."""

    state: RecordState
    ttl_left: timedelta
    age: timedelta | None
    """Since its last owner claimed it; None for a completed one, whose guard tells."""
    lease_left: timedelta | None
    """None unless it is in progress; zero when it may be taken over."""
    epoch: int
    code: int
    durable: bool
    timeline: int
    fingerprint_kinds: tuple[int, ...]
    answer_bytes: int


class GuardStore(Protocol):
    """Reads of guards."""

    async def facts(self, tenant: str, scope: bytes) -> GuardFacts | None:
        """Must answer the guard of this scope in this tenant; None if there is none, or if it is expired."""
        ...


class RecordCache(Protocol):
    """The records of idempotency_svc. Both methods raise Unavailable IDEMPOTENCY_UNAVAILABLE when it is not reached."""

    async def facts(self, scope: bytes) -> RecordFacts | None:
        """Must answer the record of this scope, None if there is none."""
        ...

    async def release_whoever(self, scope: bytes) -> bool:
        """Must end the ownership of a record in progress, whoever owns it; answers whether there was one."""
        ...
