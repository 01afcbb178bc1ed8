"""The claim of tasks: in transactions of its own, because an answer is known only after its rows are chosen.

Claims of one role share a transaction, as writes share a statement: together they wait for no other claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any

from psycopg import AsyncRawCursor

from controller_svc.store import tasks
from controller_svc.store.arrays import Array, Blobs, Ints, Longs, Spans, Texts, Uuids
from controller_svc.store.read import Guard, read_guards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

    import psycopg

    from controller_svc.core.tasks import Task

MAX_ANSWER_BYTES = 1024 * 1024
"""Of a transaction, all its answers together: more would keep everything else in the process waiting."""

CLAIM = f"""
with recursive calls as materialized (
  select c.* from unnest(
    $5::bytea[], $6::int[], $7::text[], $8::text[], $9::text[], $10::text[], $11::bytea[], $12::uuid[]
  ) with ordinality as c(scope, max_tasks, subject, acting_role, on_behalf_of, trace_id, key_hash, command_id, ord)
  where c.ord = any (string_to_array(current_setting('orchestrator.ours', true), ',')::bigint[]) and not exists (
    select from idempotency_guards g where g.tenant = $1 and g.scope = c.scope and g.expire_time > clock_timestamp()
  )
), places as materialized (
  select c.*, row_number() over (order by c.ord) as place from calls c cross join generate_series(1, c.max_tasks)
), priorities(priority) as (
  (
    select priority from tasks where tenant = $1 and target_role = $2 and state = 'PENDING'
      and exists (select from calls)
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
    limit (select count(*) from places)
    for no key update of t skip locked
  ) due
  limit (select count(*) from places)
), given as (
  select p.id, p.size, n.* from places n join (
    select id, size, row_number() over (order by priority desc, schedule_time, id) as place from picked
  ) p using (place)
), kept as (
  select * from (
    select given.*, sum(size) over (order by place) - size as before from given
  ) g where before = 0 or before + 65536 <= $3
), claimed as (
  update tasks t set state = 'RUNNING', version = t.version + 1, attempt = t.attempt + 1,
    lease_id = gen_random_uuid(), lease_holder = k.subject,
    lease_expire_time = statement_timestamp()
      + least(t.lease_timeout_us, t.attempt_timeout_us) * interval '1 microsecond',
    start_time = statement_timestamp(), update_time = greatest(t.update_time, statement_timestamp()),
    xid = greatest(t.xid, pg_current_xact_id())
  from kept k where t.tenant = $1 and t.id = k.id
  returning k.ord, k.place, k.acting_role, k.on_behalf_of, k.trace_id as claim_trace_id, k.key_hash, k.command_id, t.*
), audited as (
  insert into audit_events (tenant, xid, method, resource_type, resource_id, version_before, version_after,
  state_before, state_after, subject, role, on_behalf_of, trace_id, key_hash, command_id) select tenant, xid, $4,
  'task', id, version - 1, version, 'PENDING', 'RUNNING', lease_holder, acting_role, on_behalf_of, claim_trace_id,
  key_hash, command_id from claimed
) select {tasks.COLUMNS}, ord, (select count(*) from given) > (select count(*) from kept) from claimed order by place
"""

GUARD = """
insert into idempotency_guards as k (tenant, scope, command_id, fingerprint, code, answer, create_time, expire_time)
select $1, c.scope, c.command_id, c.fingerprint, 0, c.answer,
  clock_timestamp(), clock_timestamp() + c.lifetime * interval '1 microsecond'
from unnest($2::bytea[], $3::uuid[], $4::bytea[], $5::bytea[], $6::bigint[])
  as c(scope, command_id, fingerprint, answer, lifetime)
on conflict (tenant, scope) do update set command_id = excluded.command_id, fingerprint = excluded.fingerprint,
  code = excluded.code, answer = excluded.answer, create_time = excluded.create_time, expire_time = excluded.expire_time
"""

# Which scopes are ours is told to the claim by a setting that lasts as long as the transaction, so that both statements
# are sent at once.
_LOCK = (
    "select set_config('orchestrator.ours', coalesce(string_agg(ord::text, ','), ''), true)"
    " from unnest($1::bigint[]) with ordinality as t(lock, ord) where "
)
LOCK = _LOCK + "pg_advisory_xact_lock(lock)::text is not null"
TRY_LOCK = _LOCK + "pg_try_advisory_xact_lock(lock)"

LOCK_GUARDS = """
select from idempotency_guards g join unnest($1::text[], $2::bytea[]) as k(tenant, scope)
  on g.tenant = k.tenant and g.scope = k.scope
order by g.tenant, g.scope for no key update of g
"""

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
    """How many tasks are claimed, by whom, and the guard that makes it once."""

    max_tasks: int
    subject: str
    acting_role: str
    on_behalf_of: str
    trace_id: str
    scope: bytes
    fingerprints: bytes
    key_hash: bytes | None
    command_id: UUID
    lifetime: timedelta
    respond: Callable[[list[Task]], bytes]
    """The answer for the tasks it is given."""


Claimed = tuple[list["Task"], bytes]
"""Tasks, highest priority first, and the answer for them; without tasks there is no answer either."""


class NotNow(Enum):
    """Why nothing is known yet of a scope, or of what its claim might get."""

    HELD = "held"
    """Another transaction holds the scope."""
    NO_ROOM = "no room"
    """There are tasks, and no room for them among the answers of the transaction."""


async def claim_tasks(
    connection: psycopg.AsyncConnection[Any],
    tenant: str,
    role: str,
    method: str,
    claims: Sequence[TaskClaim],
    *,
    wait: bool,
) -> list[Guard | Claimed | NotNow]:
    """Claims tasks and commits them with their audit events and the guards that hold the answers.

    The earlier claims are given tasks of higher priority. Returns for each of them the guard if its scope has one; else
    its tasks with their answer, where no tasks means that nothing is written for it; or why it has to be made again.
    With `wait`, scopes that others hold are waited for. Raises psycopg.Error; when the connection is lost, `recorded`
    tells afterwards what happened.
    """
    # Without tasks it commits nothing, and rolls nothing back: psycopg would forget what it has prepared.
    async with connection.pipeline(), connection.transaction():
        locks, cursor = AsyncRawCursor(connection), AsyncRawCursor(connection)
        # The claim takes its snapshot when the scopes are ours: it sees a guard of before, and then claims nothing.
        await locks.execute(LOCK if wait else TRY_LOCK, (_locks([claim.scope for claim in claims]),))
        await cursor.execute(
            CLAIM,
            (
                tenant,
                role,
                MAX_ANSWER_BYTES,
                method,
                Blobs.of([claim.scope for claim in claims]),
                Ints.of([claim.max_tasks for claim in claims]),
                Texts.of([claim.subject for claim in claims]),
                Texts.of([claim.acting_role for claim in claims]),
                Texts.of([claim.on_behalf_of for claim in claims]),
                Texts.of([claim.trace_id for claim in claims]),
                Blobs.of([claim.key_hash for claim in claims]),
                Uuids.of([claim.command_id for claim in claims]),
            ),
            binary=True,
        )
        given: list[list[Task]] = [[] for _ in claims]
        cut = False
        for *row, ord_, cut in await cursor.fetchall():  # noqa: B007 - the same in each row
            given[ord_ - 1].append(tasks.from_row(row))
        ours = await _ours(locks)
        keyed = [
            claim.scope for claim, got in zip(claims, given, strict=True) if not got and claim.key_hash is not None
        ]
        guards = await read_guards(connection, [(tenant, scope) for scope in keyed]) if keyed else {}
        outcomes: list[Guard | Claimed | NotNow] = []
        written: list[tuple[TaskClaim, bytes]] = []
        for place, (claim, got) in enumerate(zip(claims, given, strict=True)):
            if got:
                answer = claim.respond(got)
                written.append((claim, answer))
                outcomes.append((got, answer))
            elif claim.scope in guards:
                outcomes.append(guards[claim.scope])
            elif place not in ours:
                outcomes.append(NotNow.HELD)
            else:
                outcomes.append(NotNow.NO_ROOM if cut else ([], b""))
        if written:
            await _guard(connection, tenant, written)
    return outcomes


async def _guard(
    connection: psycopg.AsyncConnection[Any], tenant: str, written: Sequence[tuple[TaskClaim, bytes]]
) -> None:
    """Writes the guards with their answers. Any guard it meets has expired: the scopes are ours."""
    await AsyncRawCursor(connection).execute(
        GUARD,
        (
            tenant,
            Blobs.of([claim.scope for claim, _ in written]),
            Uuids.of([claim.command_id for claim, _ in written]),
            Blobs.of([claim.fingerprints for claim, _ in written]),
            Blobs.of([answer for _, answer in written]),
            Spans.of([claim.lifetime for claim, _ in written]),
        ),
    )


async def recorded(
    connection: psycopg.AsyncConnection[Any], scopes: Sequence[tuple[str, bytes]]
) -> list[Guard | NotNow | None]:
    """After a lost connection, what happened: each (tenant, scope)'s guard if it has one; HELD while it is held.

    The guards are locked, so that this COMMIT waits for a synchronous standby to have them too.
    """
    async with connection.transaction():
        locks = AsyncRawCursor(connection)
        await locks.execute(TRY_LOCK, (_locks([scope for _, scope in scopes]),))
        ours = await _ours(locks)
        free = [pair for place, pair in enumerate(scopes) if place in ours]
        guards: dict[bytes, Guard] = {}
        if free:
            columns = Texts.of([tenant for tenant, _ in free]), Blobs.of([scope for _, scope in free])
            await AsyncRawCursor(connection).execute(LOCK_GUARDS, columns)
            guards = await read_guards(connection, free)
    return [guards.get(scope) if place in ours else NotNow.HELD for place, (_, scope) in enumerate(scopes)]


async def _ours(locks: AsyncRawCursor[Any]) -> set[int]:
    """The places of the scopes that LOCK or TRY_LOCK got."""
    [(ords,)] = await locks.fetchall()
    return {int(ord_) - 1 for ord_ in ords.split(",") if ord_}


def _locks(scopes: Sequence[bytes]) -> Array:
    """The same locks as the writing statement's."""
    return Longs.of([int.from_bytes(scope[:8], "big", signed=True) for scope in scopes])


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
