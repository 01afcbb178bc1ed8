"""Audit events as they are read from Postgres; write.py and claims.py write them with the changes they tell of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from controller_svc.core.audit import RecordedAuditEvent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from controller_svc.store.database import Database

COLUMNS = (
    "tenant, id, create_time, method, resource_type, resource_id, version_before, version_after, state_before,"
    " state_after, subject, role, on_behalf_of, trace_id, key_hash, command_id"
)

# By time, not by id alone, so that a span of time is a range of every index.
LIST = "select " + COLUMNS + " from audit_events where tenant = %(tenant)s and (create_time, id) < (%(time)s, %(id)s)"
TIME = "select create_time from audit_events where tenant = %(tenant)s and id = %(id)s"
COUNT = "select count(*) from audit_events where tenant = %(tenant)s"
FILTERS = {
    "resource_id": " and resource_id = %(resource_id)s",
    "method": " and method = %(method)s",
    "subject": " and subject = %(subject)s",
    "start_time": " and create_time >= %(start_time)s",
    "end_time": " and create_time < %(end_time)s",
}
PAGE = " order by create_time desc, id desc limit %(limit)s"

AFTER_ALL = datetime.max.replace(tzinfo=UTC)


def from_row(row: Sequence[Any]) -> RecordedAuditEvent:
    """The event of a row with the columns COLUMNS."""
    return RecordedAuditEvent(
        tenant=row[0],
        id=row[1],
        create_time=row[2],
        method=row[3],
        resource_type=row[4],
        resource_id=row[5],
        version_before=row[6],
        version_after=row[7],
        state_before=row[8],
        state_after=row[9],
        subject=row[10],
        role=row[11],
        on_behalf_of=row[12],
        trace_id=row[13],
        key_hash=row[14],
        command_id=row[15],
    )


class Audit:
    """The contract core.audit.AuditStore on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
        """At most `limit` events that come after the event `before` when the newest is first.

        Ordered by create_time, then id, descending: the order of ids, but for events recorded in the same moment.
        """
        values: dict[str, object] = {
            "tenant": tenant,
            "resource_id": resource_id,
            "method": method,
            "subject": subject,
            "start_time": start_time,
            "end_time": end_time,
        }
        # An index is entered at one bound, so there is but one: `end_time`, or the event to go on from.
        time, id_ = end_time or AFTER_ALL, 0
        if before is not None:
            found = await self._fetch(TIME, {"tenant": tenant, "id": before})
            if not found:
                return []
            if found[0][0] < time:
                time, id_ = found[0][0], before
        page = {"time": time, "id": id_, "limit": limit}
        text = LIST + _filter(values | {"end_time": None}) + PAGE
        return [from_row(row) for row in await self._fetch(text, values | page)]

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
        """How many events the same filters select."""
        values: dict[str, object] = {
            "tenant": tenant,
            "resource_id": resource_id,
            "method": method,
            "subject": subject,
            "start_time": start_time,
            "end_time": end_time,
        }
        rows = await self._fetch(COUNT + _filter(values), values)
        return int(rows[0][0])

    async def _fetch(self, text: str, values: Mapping[str, object]) -> Sequence[tuple[Any, ...]]:
        async with self._database.reading() as connection:
            return await (await connection.cursor(binary=True).execute(text, values)).fetchall()


def _filter(values: Mapping[str, object]) -> str:
    """One text per set of filters, so that each is planned for itself, also when the plan is generic."""
    return "".join(text for name, text in FILTERS.items() if values[name] is not None)
