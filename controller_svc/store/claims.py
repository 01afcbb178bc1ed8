"""The claim of tasks: a transaction of its own, because its answer is known only after its rows are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from psycopg import AsyncRawCursor

from controller_svc.store import tasks
from controller_svc.store.arrays import Texts
from controller_svc.store.read import Guard, read_guards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    import psycopg

    from controller_svc.core.tasks import Task

MAX_ANSWER_BYTES = 1024 * 1024

CLAIM = f"""
with recursive priorities(priority) as (
  (
    select priority from tasks where tenant = $1 and target_role = $2 and state = 'PENDING'
      and not exists (
        select from idempotency_guards g where g.tenant = $1 and g.scope = $12 and g.expire_time > clock_timestamp()
      )
    order by priority desc limit 1
  )
  union all
  select (
    select t.priority from tasks t
    where t.tenant = $1 and t.target_role = $2 and t.state = 'PENDING' and t.priority < p.priority
    order by t.priority desc limit 1
  )
  from priorities p where p.priority is not null
), picked as materialized (
  select due.* from priorities p cross join lateral (
    select t.id, t.priority, t.schedule_time,
      octet_length(t.description) + octet_length(t.data::text) + octet_length(t.context::text)
        + coalesce(octet_length(t.progress::text), 0) + 1024 as size
    from tasks t
    where t.tenant = $1 and t.target_role = $2 and t.state = 'PENDING' and t.priority = p.priority
      and t.schedule_time <= statement_timestamp()
      and (select s.state from sessions s where s.tenant = t.tenant and s.id = t.session_id) in ('PENDING', 'ACTIVE')
    order by t.schedule_time, t.id
    limit $3
    for no key update of t skip locked
  ) due
  limit $3
), kept as (
  select id from (
    select id, sum(size) over w - size as before from picked window w as (order by priority desc, schedule_time, id)
  ) p where before = 0 or before + 65536 <= $4
), claimed as (
  update tasks t set state = 'RUNNING', version = t.version + 1, attempt = t.attempt + 1,
    lease_id = gen_random_uuid(), lease_holder = $5,
    lease_expire_time = statement_timestamp()
      + least(t.lease_timeout_us, t.attempt_timeout_us) * interval '1 microsecond',
    start_time = statement_timestamp(), update_time = greatest(t.update_time, statement_timestamp()),
    xid = greatest(t.xid, pg_current_xact_id())
  from kept where t.tenant = $1 and t.id = kept.id
  returning t.*
), audited as (
  insert into audit_events (tenant, xid, method, resource_type, resource_id, version_before, version_after,
  state_before, state_after, subject, role, on_behalf_of, trace_id, key_hash, command_id) select tenant, xid, $6,
  'task', id, version - 1, version, 'PENDING', 'RUNNING', $5, $7, $8, $9, $10, $11 from claimed ) select {tasks.COLUMNS}
  from claimed order by priority desc, schedule_time, id
"""

GUARD = """
insert into idempotency_guards as k (tenant, scope, command_id, fingerprint, code, answer, create_time, expire_time)
values ($1, $2, $3, $4, 0, $5, clock_timestamp(), clock_timestamp() + $6::bigint * interval '1 microsecond')
on conflict (tenant, scope) do update set command_id = excluded.command_id, fingerprint = excluded.fingerprint,
  code = excluded.code, answer = excluded.answer, create_time = excluded.create_time, expire_time = excluded.expire_time
"""

LOCK_GUARD = "select from idempotency_guards where tenant = $1 and scope = $2 for no key update"

CLAIMABLE = """
select k.tenant, k.role from unnest($1::text[], $2::text[]) as k(tenant, role)
where exists (
  with recursive priorities(priority) as (
    (
      select priority from tasks t where t.tenant = k.tenant and t.target_role = k.role and t.state = 'PENDING'
      order by priority desc limit 1
    )
    union all
    select (
      select t.priority from tasks t
      where t.tenant = k.tenant and t.target_role = k.role and t.state = 'PENDING' and t.priority < p.priority
      order by t.priority desc limit 1
    )
    from priorities p where p.priority is not null
  )
  select from priorities p cross join lateral (
    select from tasks t
    where t.tenant = k.tenant and t.target_role = k.role and t.state = 'PENDING' and t.priority = p.priority
      and t.schedule_time <= statement_timestamp()
      and (select s.state from sessions s where s.tenant = t.tenant and s.id = t.session_id) in ('PENDING', 'ACTIVE')
    order by t.schedule_time limit 1
  ) due
)
"""


@dataclass(frozen=True, slots=True)
class TaskClaim:
    """What is claimed, by whom, and the guard that makes it once."""

    tenant: str
    role: str
    max_tasks: int
    subject: str
    acting_role: str
    on_behalf_of: str
    trace_id: str
    method: str
    scope: bytes
    fingerprints: bytes
    key_hash: bytes | None
    command_id: UUID
    lifetime: timedelta


async def claim_tasks(
    connection: psycopg.AsyncConnection[Any], claim: TaskClaim, respond: Callable[[list[Task]], bytes]
) -> Guard | tuple[list[Task], bytes]:
    """Claims tasks and commits them with their audit events and the guard that holds the answer.

    Returns the scope's guard if it has one; else the tasks, highest priority first, and `respond`'s answer for them. No
    tasks: nothing is written. Raises psycopg.Error; when the connection is lost, `recorded` tells afterwards what
    happened.
    """
    async with connection.pipeline(), connection.transaction() as transaction:
        # The claim takes its snapshot when the scope is ours: it sees a guard of before, and then claims nothing.
        await lock_scope(connection, claim.scope)
        cursor = AsyncRawCursor(connection)
        await cursor.execute(
            CLAIM,
            (
                claim.tenant,
                claim.role,
                claim.max_tasks,
                MAX_ANSWER_BYTES,
                claim.subject,
                claim.method,
                claim.acting_role,
                claim.on_behalf_of,
                claim.trace_id,
                claim.key_hash,
                claim.command_id,
                claim.scope,
            ),
            binary=True,
        )
        claimed = [tasks.from_row(row) for row in await cursor.fetchall()]
        if not claimed:
            transaction.force_rollback = True
            guard = None
            if claim.key_hash is not None:
                guard = (await read_guards(connection, [(claim.tenant, claim.scope)])).get(claim.scope)
            return guard or (claimed, respond(claimed))
        answer = respond(claimed)
        # Any guard it meets has expired: the scope is ours.
        await AsyncRawCursor(connection).execute(
            GUARD,
            (
                claim.tenant,
                claim.scope,
                claim.command_id,
                claim.fingerprints,
                answer,
                claim.lifetime // timedelta(microseconds=1),
            ),
        )
    return claimed, answer


async def recorded(connection: psycopg.AsyncConnection[Any], tenant: str, scope: bytes) -> Guard | None:
    """The scope's guard once no transaction holds the scope any more: after a lost connection, what happened.

    The guard is locked, so that this COMMIT waits for a synchronous standby to have it too.
    """
    async with connection.transaction():
        await lock_scope(connection, scope)
        await AsyncRawCursor(connection).execute(LOCK_GUARD, (tenant, scope))
        return (await read_guards(connection, [(tenant, scope)])).get(scope)


async def lock_scope(connection: psycopg.AsyncConnection[Any], scope: bytes) -> None:
    """Holds the scope until the transaction ends; the same lock as the writing statement's."""
    await AsyncRawCursor(connection).execute(
        "select pg_advisory_xact_lock($1::bigint)", (int.from_bytes(scope[:8], "big", signed=True),)
    )


async def claimable(
    connection: psycopg.AsyncConnection[Any], asked: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Those of the (tenant, role) pairs for which a task can be claimed now."""
    pairs = list(asked)
    cursor = AsyncRawCursor(connection)
    await cursor.execute(
        CLAIMABLE, (Texts.of([tenant for tenant, _ in pairs]), Texts.of([role for _, role in pairs])), binary=True
    )
    return await cursor.fetchall()
