"""Sessions as they are read from Postgres; their rows are written by write.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from controller_svc.core.mutations import Key
from controller_svc.core.sessions import Session, SessionState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from controller_svc.store.database import Database

COLUMNS = (
    "tenant, id, version, agent_role, state, task_id, metadata, create_time, update_time, expire_time,"
    " start_time, pause_time, end_time"
)

LIST = "select " + COLUMNS + " from sessions where tenant = %(tenant)s and id < %(before)s"
COUNT = "select count(*) from sessions where tenant = %(tenant)s"
FILTERS = {
    "agent_role": " and agent_role = %(agent_role)s",
    "state": " and state = %(state)s",
    "task_id": " and task_id = %(task_id)s",
}
PAGE = " order by id desc limit %(limit)s"

# A subquery that is a value is run for each row that comes to it; a join could be turned round, to read all tasks.
EXPIRABLE = """
select s.tenant, s.id from sessions s
where s.end_time is null and s.expire_time <= statement_timestamp() and not (
  select exists (
    select from tasks t
    where t.tenant = s.tenant and t.session_id = s.id and t.state in ('PENDING', 'BLOCKED', 'RUNNING')
  )
)
order by s.expire_time limit %(limit)s
"""

ABOVE_ALL_IDS = UUID(int=2**128 - 1)
_STATES = {str(state): state for state in SessionState}


def from_row(row: Sequence[Any]) -> Session:
    """The session of a row with the columns COLUMNS."""
    return Session(
        tenant=row[0],
        id=row[1],
        version=row[2],
        agent_role=row[3],
        state=_STATES[row[4]],
        task_id=row[5],
        metadata=row[6],
        create_time=row[7],
        update_time=row[8],
        expire_time=row[9],
        start_time=row[10],
        pause_time=row[11],
        end_time=row[12],
    )


class Sessions:
    """The contract core.sessions.SessionStore on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, session_id: UUID) -> Session | None:
        """The tenant's session, None if it has no such session."""
        row: Session | None = await self._database.row(Key("sessions", tenant, session_id))
        return row

    async def list(
        self,
        tenant: str,
        *,
        agent_role: str | None,
        state: SessionState | None,
        task_id: UUID | None,
        before: UUID | None,
        limit: int,
    ) -> Sequence[Session]:
        """At most `limit` sessions with an id below `before`, by id descending."""
        values: dict[str, object] = {"tenant": tenant, "agent_role": agent_role, "state": state, "task_id": task_id}
        page = {"before": before or ABOVE_ALL_IDS, "limit": limit}
        return [from_row(row) for row in await self._fetch(LIST + _filter(values) + PAGE, values | page)]

    async def count(
        self, tenant: str, *, agent_role: str | None, state: SessionState | None, task_id: UUID | None
    ) -> int:
        """How many sessions the same filters select."""
        values: dict[str, object] = {"tenant": tenant, "agent_role": agent_role, "state": state, "task_id": task_id}
        rows = await self._fetch(COUNT + _filter(values), values)
        return int(rows[0][0])

    async def expirable(self, limit: int) -> Sequence[Key]:
        """At most `limit` sessions that are due to expire, of any tenant, longest due first."""
        return [Key("sessions", *row) for row in await self._fetch(EXPIRABLE, {"limit": limit})]

    async def _fetch(self, text: str, values: Mapping[str, object]) -> Sequence[tuple[Any, ...]]:
        async with self._database.reading() as connection:
            return await (await connection.cursor(binary=True).execute(text, values)).fetchall()


def _filter(values: Mapping[str, object]) -> str:
    """One text per set of filters, so that each is planned for itself, also when the plan is generic."""
    return "".join(text for name, text in FILTERS.items() if values[name] is not None)
