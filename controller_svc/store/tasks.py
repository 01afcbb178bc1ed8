"""Tasks as they are read from Postgres; their rows are written by write.py, claims.py and heartbeats.py."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from controller_svc.core.mutations import Key
from controller_svc.core.tasks import Task, TaskError, TaskState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from controller_svc.store.database import Database

COLUMNS = (
    "tenant, id, version, beat, session_id, type, from_role, target_role, description, data, context, trace_id,"
    " priority, schedule_time, attempt, max_attempts, retry_backoff_us, lease_timeout_us, attempt_timeout_us,"
    " state, result, error, progress, lease_id, lease_holder, lease_expire_time, create_time, update_time,"
    " start_time, end_time"
)

LIST = "select " + COLUMNS + " from tasks where tenant = %(tenant)s and id < %(before)s"
COUNT = "select count(*) from tasks where tenant = %(tenant)s"
FILTERS = {
    "session_id": " and session_id = %(session_id)s",
    "target_role": " and target_role = %(target_role)s",
    "state": " and state = %(state)s",
    "type": " and type = %(type)s",
}
PAGE = " order by id desc limit %(limit)s"

# Looks at every running task: an index by lease_expire_time would be written to, with all others, by each heartbeat.
LOST_LEASES = """
select tenant, id from tasks where state = 'RUNNING' and lease_expire_time <= statement_timestamp() limit %(limit)s
"""

# A session ends while tasks are routed to it, and such a task may be committed after the end. Two looks find them all:
# one, soon, at the sessions that ended just now; the other, in pages, at all unfinished tasks, for whatever is missed.
RECENT_ORPHANS = """
select t.tenant, t.id from sessions s
join tasks t on t.tenant = s.tenant and t.session_id = s.id and t.state in ('PENDING', 'BLOCKED', 'RUNNING')
where s.end_time > statement_timestamp() - interval '10 seconds'
limit %(limit)s
"""
# Answers the page's orphans and, if the page is full, its last row as the place to go on from.
ROUND = """
with page as materialized (
  select t.tenant, t.session_id, t.id,
    (select s.end_time from sessions s where s.tenant = t.tenant and s.id = t.session_id) is not null as orphan
  from tasks t
  where t.state in ('PENDING', 'BLOCKED', 'RUNNING')
    and (t.tenant, t.session_id, t.id) > (%(tenant)s, %(session_id)s, %(id)s)
  order by t.tenant, t.session_id, t.id limit %(page)s
)
(select tenant, session_id, id, true from page where orphan order by tenant, session_id, id limit %(limit)s)
union all
(select tenant, session_id, id, false from page order by tenant, session_id, id offset %(page)s - 1)
"""
ROUND_PAGE = 1000

ABOVE_ALL_IDS = UUID(int=2**128 - 1)
_START: tuple[str, UUID, UUID] = ("", UUID(int=0), UUID(int=0))
_STATES = {str(state): state for state in TaskState}


def from_row(row: Sequence[Any]) -> Task:
    """The task of a row with the columns COLUMNS."""
    error, attempt_timeout = row[21], row[18]
    return Task(
        tenant=row[0],
        id=row[1],
        version=row[2],
        beat=row[3],
        session_id=row[4],
        type=row[5],
        from_role=row[6],
        target_role=row[7],
        description=row[8],
        data=row[9],
        context=row[10],
        trace_id=row[11],
        priority=row[12],
        schedule_time=row[13],
        attempt=row[14],
        max_attempts=row[15],
        retry_backoff=timedelta(microseconds=row[16]),
        lease_timeout=timedelta(microseconds=row[17]),
        attempt_timeout=None if attempt_timeout is None else timedelta(microseconds=attempt_timeout),
        state=_STATES[row[19]],
        result=row[20],
        error=None
        if error is None
        else TaskError(code=error["code"], message=error["message"], non_retryable=error["non_retryable"]),
        progress=row[22],
        lease_id=row[23],
        lease_holder=row[24],
        lease_expire_time=row[25],
        create_time=row[26],
        update_time=row[27],
        start_time=row[28],
        end_time=row[29],
    )


class Tasks:
    """The contract core.tasks.TaskStore on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._round = _START

    async def get(self, tenant: str, task_id: UUID) -> Task | None:
        """The tenant's task, None if it has no such task."""
        row: Task | None = await self._database.row(Key("tasks", tenant, task_id))
        return row

    async def list(
        self,
        tenant: str,
        *,
        session_id: UUID | None,
        target_role: str | None,
        state: TaskState | None,
        task_type: str | None,
        before: UUID | None,
        limit: int,
    ) -> Sequence[Task]:
        """At most `limit` tasks with an id below `before`, by id descending."""
        values: dict[str, object] = {
            "tenant": tenant,
            "session_id": session_id,
            "target_role": target_role,
            "state": state,
            "type": task_type,
        }
        page = {"before": before or ABOVE_ALL_IDS, "limit": limit}
        return [from_row(row) for row in await self._fetch(LIST + _filter(values) + PAGE, values | page)]

    async def count(
        self,
        tenant: str,
        *,
        session_id: UUID | None,
        target_role: str | None,
        state: TaskState | None,
        task_type: str | None,
    ) -> int:
        """How many tasks the same filters select."""
        values: dict[str, object] = {
            "tenant": tenant,
            "session_id": session_id,
            "target_role": target_role,
            "state": state,
            "type": task_type,
        }
        rows = await self._fetch(COUNT + _filter(values), values)
        return int(rows[0][0])

    async def lost_leases(self, limit: int) -> Sequence[Key]:
        """At most `limit` RUNNING tasks, of any tenant, whose lease has run out."""
        return [Key("tasks", *row) for row in await self._fetch(LOST_LEASES, {"limit": limit})]

    async def orphans(self, limit: int) -> Sequence[Key]:
        """At most `limit` unfinished tasks, of any tenant, whose session has ended.

        Each call finds those whose session ended in the last 10 s, and goes on with a round over all unfinished tasks,
        which finds every other one: of N unfinished tasks, within N / ROUND_PAGE + 1 calls.
        """
        recent = await self._fetch(RECENT_ORPHANS, {"limit": limit})
        keys = dict.fromkeys(Key("tasks", *row) for row in recent)
        if len(keys) < limit:
            keys |= dict.fromkeys(await self._next_of_round(limit - len(keys)))
        return tuple(keys)

    async def _next_of_round(self, limit: int) -> Sequence[Key]:
        tenant, session_id, id_ = self._round
        page = {"tenant": tenant, "session_id": session_id, "id": id_, "page": ROUND_PAGE, "limit": limit}
        orphans: list[tuple[str, UUID, UUID]] = []
        next_page = _START
        for *key, is_orphan in await self._fetch(ROUND, page):
            if is_orphan:
                orphans.append((key[0], key[1], key[2]))
            else:
                next_page = (key[0], key[1], key[2])
        self._round = orphans[-1] if len(orphans) == limit else next_page
        return [Key("tasks", tenant, id_) for tenant, _, id_ in orphans]

    async def _fetch(self, text: str, values: Mapping[str, object]) -> Sequence[tuple[Any, ...]]:
        async with self._database.reading() as connection:
            return await (await connection.cursor(binary=True).execute(text, values)).fetchall()


def _filter(values: Mapping[str, object]) -> str:
    """One text per set of filters, so that each is planned for itself, also when the plan is generic."""
    return "".join(text for name, text in FILTERS.items() if values[name] is not None)
