"""Heartbeats: those that come together extend their leases in one statement."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncRawCursor
from psycopg.types.json import Jsonb

from controller_svc.core.tasks import HeartbeatResult, lease_refusal
from controller_svc.store.arrays import Jsons, Texts, Uuids
from controller_svc.store.database import STALE_SECONDS, is_unknown, resource_busy
from controller_svc.store.tasks import COLUMNS, from_row
from svckit.errors import Aborted, ResourceExhausted, ServiceError, Unavailable
from svckit.groups import Asked, Groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from controller_svc.store.database import Connection, Database

# clock_timestamp(), because the statement may have waited for the row: a lease that ran out meanwhile is not extended.
_EXTEND = """
  beat = t.beat + 1,
  lease_expire_time = greatest(t.lease_expire_time, least(
    clock_timestamp() + t.lease_timeout_us * interval '1 microsecond',
    t.start_time + t.attempt_timeout_us * interval '1 microsecond'
  ))
"""
LOCK = "select from tasks where tenant = %(tenant)s and id = %(id)s for no key update"
HEARTBEAT = f"""
update tasks t set {_EXTEND}, progress = coalesce(%(progress)s, t.progress)
where t.tenant = %(tenant)s and t.id = %(id)s and t.lease_id = %(lease_id)s and t.lease_holder = %(subject)s
  and t.state = 'RUNNING' and t.lease_expire_time > clock_timestamp()
returning t.lease_expire_time
"""

# Rows are locked in the order of their keys, and passed over when they are locked by others.
HEARTBEATS = f"""
with asked as materialized (
  select * from unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::jsonb[])
    with ordinality as a(tenant, id, lease_id, subject, progress, ord)
), held as materialized (
  select a.* from tasks t join asked a on t.tenant = a.tenant and t.id = a.id
  where t.lease_id = a.lease_id and t.lease_holder = a.subject and t.state = 'RUNNING'
  order by t.tenant, t.id for no key update of t skip locked
)
update tasks t set {_EXTEND}, progress = coalesce(h.progress, t.progress)
from held h where t.tenant = h.tenant and t.id = h.id and t.lease_id = h.lease_id and t.lease_holder = h.subject
  and t.state = 'RUNNING' and t.lease_expire_time > clock_timestamp()
returning h.ord, t.lease_expire_time
"""

NOW_AND_TASKS = f"""
select clock_timestamp(), {", ".join(f"t.{name}" for name in COLUMNS.split(", "))}
from unnest($1::text[], $2::uuid[]) with ordinality as a(tenant, id, ord)
left join tasks t on t.tenant = a.tenant and t.id = a.id order by a.ord
"""


class Heartbeats:
    """The contract core.tasks.HeartbeatStore on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._groups: Groups[_Beat] = Groups("beat", self._beat_together, _failed)

    async def beat(
        self, tenant: str, task_id: UUID, lease_id: UUID, subject: str, progress: dict[str, Any] | None
    ) -> HeartbeatResult:
        """Extends a lease that is held; a task cancelled under it answers cancelled.

        Heartbeats that come together share a statement. Raises what core.tasks.lease_refusal finds for any other lease,
        and Unavailable OUTCOME_UNKNOWN when a connection was lost that may have extended it.
        """
        beat = _Beat(tenant, task_id, lease_id, subject, progress)
        self._groups.put(beat)
        try:
            result = await beat.answer
            return await self._beat_alone(beat) if result is None else result
        except (Unavailable, ResourceExhausted, Aborted) as error:
            if not beat.in_doubt:
                raise
            raise Unavailable(
                "OUTCOME_UNKNOWN",
                "The database did not confirm the heartbeat; the lease may have been extended. Send another one.",
                retry_after=1.0,
            ) from error

    async def _beat_alone(self, beat: _Beat) -> HeartbeatResult:
        """What comes of it once nobody else is changing the row. Raises as `beat` does."""
        values = {
            "tenant": beat.tenant,
            "id": beat.task_id,
            "lease_id": beat.lease_id,
            "subject": beat.subject,
            "progress": None if beat.progress is None else Jsonb(beat.progress),
        }
        async with self._database.beating_alone() as connection:
            with _under_way([beat]):
                async with connection.transaction():
                    await connection.execute(LOCK, values)  # so that HEARTBEAT sees what others have made of the lease
                    row = await (await connection.cursor(binary=True).execute(HEARTBEAT, values)).fetchone()
                    if row is not None:
                        return HeartbeatResult(lease_expire_time=row[0], cancelled=False)
                    [outcome] = await _without_effect(connection, [beat], locked=True)
        if isinstance(outcome, HeartbeatResult):
            return outcome
        raise outcome or resource_busy()  # held after all: Postgres' clock was set back meanwhile

    async def _beat_together(self, group: Sequence[_Beat]) -> None:
        """Extends the leases that are held and that nobody else is changing; tells the others why not."""
        loop = asyncio.get_running_loop()
        until = loop.time() + STALE_SECONDS
        try:
            await self._extend(group)
        except Unavailable:
            if loop.time() > until:
                raise
            await self._extend(group)  # the connection was dead already, as after a restart of Postgres

    async def _extend(self, group: Sequence[_Beat]) -> None:
        async with self._database.beating() as connection:
            beats = _unanswered(group)
            if not beats:
                return
            arrays = (
                Texts.of([beat.tenant for beat in beats]),
                Uuids.of([beat.task_id for beat in beats]),
                Uuids.of([beat.lease_id for beat in beats]),
                Texts.of([beat.subject for beat in beats]),
                Jsons.of([beat.progress for beat in beats]),
            )
            cursor = AsyncRawCursor(connection)
            with _under_way(beats):
                await cursor.execute(HEARTBEATS, arrays, binary=True)
                extended = await cursor.fetchall()
            for ord_, lease_expire_time in extended:
                beats[ord_ - 1].give(HeartbeatResult(lease_expire_time=lease_expire_time, cancelled=False))
            beats = _unanswered(beats)
            for beat, outcome in zip(beats, await _without_effect(connection, beats, locked=False), strict=True):
                if isinstance(outcome, ServiceError):
                    beat.fail(outcome)
                else:
                    beat.give(outcome)


@dataclass(slots=True, eq=False)
class _Beat(Asked["HeartbeatResult | None"]):
    """A heartbeat that waits for what comes of it; None: it has to go alone."""

    tenant: str
    task_id: UUID
    lease_id: UUID
    subject: str
    progress: dict[str, Any] | None
    in_doubt: bool = field(init=False, default=False)
    """Whether a statement that nobody knows the outcome of may have extended the lease."""


@contextmanager
def _under_way(beats: Sequence[_Beat]) -> Iterator[None]:
    """Puts the heartbeats in doubt when the connection is lost: Postgres may have extended their leases.

    A statement that was cancelled was rolled back, though its code is of a class that `is_unknown` doubts.
    """
    try:
        yield
    except psycopg.Error as error:
        if is_unknown(error) and not isinstance(error, psycopg.errors.QueryCanceled):
            for beat in beats:
                beat.in_doubt = True
        raise


def _unanswered(beats: Sequence[_Beat]) -> list[_Beat]:
    """Those whose callers have not left either."""
    return [beat for beat in beats if not beat.answer.done()]


def _failed(beat: _Beat, error: Exception) -> None:
    """Tells that Postgres is away, busy or was lost. A value that it refused may be another's: this one goes alone."""
    if isinstance(error, Unavailable):
        beat.fail(error)
    else:
        beat.give(None)


async def _without_effect(
    connection: Connection, beats: Sequence[_Beat], *, locked: bool
) -> list[HeartbeatResult | ServiceError | None]:
    """What comes of heartbeats that extended nothing. None: nobody knows before the row is locked.

    The lease is held, and somebody else had locked its row; or it has run out, unless who locked it has extended it.
    """
    if not beats:
        return []
    keys = (Texts.of([beat.tenant for beat in beats]), Uuids.of([beat.task_id for beat in beats]))
    cursor = AsyncRawCursor(connection)
    await cursor.execute(NOW_AND_TASKS, keys, binary=True)
    outcomes: list[HeartbeatResult | ServiceError | None] = []
    for beat, (now, *row) in zip(beats, await cursor.fetchall(), strict=True):
        task = None if row[0] is None else from_row(row)
        refusal = lease_refusal(task, beat.task_id, beat.lease_id, beat.subject, now)
        reason = refusal and refusal.reason
        if reason == "TASK_CANCELLED":
            outcomes.append(HeartbeatResult(lease_expire_time=None, cancelled=True))
        elif reason == "LEASE_LOST" and not locked and task is not None and task.lease_id == beat.lease_id:
            outcomes.append(None)
        else:
            outcomes.append(refusal)
    return outcomes
