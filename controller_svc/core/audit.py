"""The audit trail: one event per change of a resource."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from controller_svc.core.values import value_class

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

ResourceType = Literal["session", "task"]


@value_class(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """What a mutation says about one change; the writer adds who, when and by which command."""

    resource_type: ResourceType
    resource_id: UUID
    version_before: int
    """0 for a creation."""
    version_after: int
    state_before: str
    """Empty for a creation."""
    state_after: str
    role: str
    """The agent role it was done in; empty if in none."""


@value_class(frozen=True, slots=True, kw_only=True)
class RecordedAuditEvent:
    """An event as it is stored."""

    tenant: str
    id: int
    create_time: datetime
    method: str
    resource_type: ResourceType
    resource_id: UUID
    version_before: int
    version_after: int
    state_before: str
    state_after: str
    subject: str
    role: str
    on_behalf_of: str
    trace_id: str
    key_hash: bytes | None
    """Hash of the idempotency key; None if the call had none."""
    command_id: UUID


class AuditStore(Protocol):
    """Reads of the audit trail. A filter that is None does not filter."""

    async def list(
        self,
        tenant: str,
        *,
        resource_id: UUID | None,
        method: str | None,
        subject: str | None,
        start_time: datetime | None,
        end_time: datetime | None,
        before: int | None,
        limit: int,
    ) -> Sequence[RecordedAuditEvent]:
        """Must answer at most `limit` events that come after the event `before`, by (create_time, id) descending.

        Their create_time is at or after `start_time` and before `end_time`.
        """
        ...

    async def count(
        self,
        tenant: str,
        *,
        resource_id: UUID | None,
        method: str | None,
        subject: str | None,
        start_time: datetime | None,
        end_time: datetime | None,
    ) -> int:
        """Must answer how many events the same filters select."""
        ...
