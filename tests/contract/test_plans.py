"""How Postgres runs the hot statements on 200,000 rows: never by reading a table through, never by sorting what grows.

Each is run as a custom plan and as a generic one, for tenants of very different size, with what it read counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from controller_svc.core.mutations import Key
from controller_svc.core.sessions import SessionState
from controller_svc.core.tasks import TaskState
from controller_svc.store import claims, guards, heartbeats, read, write
from controller_svc.store import tasks as tasks_store
from controller_svc.store.audit import Audit
from controller_svc.store.guards import Guards
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks

Connection = psycopg.AsyncConnection[Any]

ROWS = 200_000
LIMIT = 101
"""A page of the largest size, and one row more to see whether another follows."""
TENANTS = ("big", "mid", "small-3")
"""Of 90 %, 9 % and 0.05 % of the rows."""
TABLES = {"sessions", "tasks", "audit_events", "idempotency_guards"}

# Rows come in blocks of ten of one tenant. A block's first session is ACTIVE, and its ten tasks are that session's.
LOAD = f"""
create temp table load as
select g, b,
  (lpad(to_hex(1700000000000 + g * 1000), 12, '0') || '70008' || substr(md5(g::text), 1, 15))::uuid as id,
  (lpad(to_hex(1700000000000 + (b * 10 + 1) * 1000), 12, '0') || '70008'
    || substr(md5((b * 10 + 1)::text), 1, 15))::uuid as first_id,
  case when b % 100 < 90 then 'big' when b % 100 < 99 then 'mid' else 'small-' || b / 100 % 20 end as tenant,
  g * 7919::bigint % 1000 as h,
  'role-' || case when g % 10 < 6 then 0 else g % 97 end as role,
  now() - interval '30 days' + g * interval '10 seconds' as t
from (select g, (g - 1) / 10 as b from generate_series(1, {ROWS}) g) numbered;

insert into sessions
select tenant, id, 1, role, state, case when g % 10 = 2 then first_id end, '{{}}', t, t,
  case when h % 100 = 7 then now() - interval '1 hour' else now() + interval '5 days' end,
  case when state not in ('PENDING', 'EXPIRED') then t end, case when state = 'PAUSED' then t end,
  case when state in ('COMPLETED', 'FAILED', 'EXPIRED') then t end
from (
  select *, case when g % 10 = 1 then 'ACTIVE' when h < 800 then 'COMPLETED' when h < 900 then 'EXPIRED'
    when h < 950 then 'PENDING' when h < 999 then 'FAILED' else 'PAUSED' end as state
  from load
) s;

insert into tasks
select tenant, id, 1, 0, first_id, case when g % 50 = 0 then 'APPROVAL' else 'ROUTING' end, 'role-0', role, 'Do it.',
  '{{"a": 1}}', '{{}}', repeat('a', 32), g % 3, t + case when h < 880 then interval '0' else interval '60 days' end,
  case when leased then 1 else 0 end, 3, 1000000, 30000000, null, state,
  case when state = 'SUCCEEDED' then '{{}}'::jsonb end, null, null,
  case when leased then gen_random_uuid() end, case when leased then 'worker' else '' end,
  case when state = 'RUNNING' then now() + case when h = 905 then interval '-1 second' else interval '1 hour' end end,
  t, t, case when leased then t end, case when state in ('SUCCEEDED', 'DEAD', 'CANCELLED') then t end
from (
  select *, state in ('RUNNING', 'SUCCEEDED') as leased from (
    select *, case when h < 850 then 'SUCCEEDED' when h < 900 then 'PENDING' when h < 906 then 'RUNNING'
      when h < 910 then 'BLOCKED' when h < 999 then 'CANCELLED' else 'DEAD' end as state
    from load
  ) s
) s;

insert into sessions
values ('later', '{UUID(int=1)}', 1, 'role-0', 'PENDING', null, '{{}}', now(), now(), now() + interval '7 days');
insert into tasks (tenant, id, version, beat, session_id, type, from_role, target_role, description, data, context,
  trace_id, priority, schedule_time, attempt, max_attempts, retry_backoff_us, lease_timeout_us, state, lease_holder,
  create_time, update_time)
select 'later', id, 1, 0, '{UUID(int=1)}', 'ROUTING', 'role-0', 'role-0', '', '{{}}', '{{}}', '', g % 5,
  now() + g * interval '1 minute', 0, 3, 0, 1000000, 'PENDING', '', t, t
from load where g between 1000 and 20999;

insert into audit_events (tenant, create_time, method, resource_type, resource_id, version_before, version_after,
  state_before, state_after, subject, role, on_behalf_of, trace_id, key_hash, command_id)
select tenant, t, '/a.B/' || case when h < 900 then 'Usual' when h < 999 then 'Some' else 'Rare' end, 'session',
  case when g % 10 = 5 then '{UUID(int=0)}'::uuid else first_id end, 1, 2, 'PENDING', 'ACTIVE',
  'agent-' || case when g % 10 < 6 then 0 else g % 97 end, '', '', '', null, gen_random_uuid()
from load order by g;

insert into idempotency_guards
select tenant, sha256(g::text::bytea), gen_random_uuid(), sha256(''), 0, '\\x00', now() - interval '1 day',
  case when h < 5 then now() - interval '1 hour' else now() + interval '1 hour' end
from load;

drop table load;
vacuum (analyze) sessions;
vacuum (analyze) tasks;
vacuum (analyze) audit_events;
vacuum (analyze) idempotency_guards;
"""


@dataclass(frozen=True)
class Plan:
    """A statement's plan and what running it has read."""

    text: str
    root: dict[str, Any]

    def nodes(self) -> Iterator[dict[str, Any]]:
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            waiting += node.get("Plans", [])
            yield node

    def check(self, *, rows: int | None = None, every_tenant: bool = False) -> None:
        """Asserts: no table read through, each scan within a tenant, and at most so many rows read, and pages for them.

        Without `rows` only sorts are bounded, by LIMIT.
        """
        assert rows is None or self.rows_read() <= rows, self
        # Down an index for each row, and the row itself; what is deleted but not yet vacuumed comes on top.
        assert rows is None or self.root["Shared Hit Blocks"] + self.root["Shared Read Blocks"] <= 10 * rows + 100, self
        for node in self.nodes():
            assert node["Node Type"] != "Seq Scan", self
            if "Sort" in node["Node Type"] and "Actual Rows" in node:
                [sorted_] = (child for child in node["Plans"] if child["Parent Relationship"] == "Outer")
                sorted_rows = sorted_["Actual Rows"] * sorted_["Actual Loops"]
                assert sorted_rows <= (LIMIT if rows is None else rows), self
            if node.get("Relation Name") in TABLES and not every_tenant and node["Node Type"] != "ModifyTable":
                conditions = [node.get(name, "") for name in ("Index Cond", "Recheck Cond", "Filter")]
                assert any("tenant" in condition for condition in conditions), self

    def rows_read(self) -> int:
        names = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        return sum(
            round(node["Actual Loops"] * sum(node.get(name, 0) for name in names))
            for node in self.nodes()
            if node.get("Relation Name") in TABLES and node["Node Type"] != "ModifyTable"
        )

    def __str__(self) -> str:
        return f"{self.text}\nread {self.rows_read()} rows\n{json.dumps(self.root, indent=1)}"


class Explaining:
    """Stands in for the database: each statement is also explained with what running it reads, and takes no effect."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.plans: list[Plan] = []
        self._rows: list[Any] = []

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Explaining]:
        yield self

    beating = reading

    async def row(self, key: Key) -> None:
        await self.explain(read.ROWS[key.table][0], [[key.tenant], [key.id]])

    def cursor(self, *, binary: bool) -> Explaining:
        return self

    async def execute(self, text: str, values: Mapping[str, Any]) -> Explaining:
        names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        for number, name in enumerate(names, 1):
            text = text.replace(f"%({name})s", f"${number}")
        return await self.explain(text, [values[name] for name in names])

    async def explain(self, text: str, values: Sequence[Any], *, run: bool = True) -> Explaining:
        """Runs `text`, with values for $1 and on, as it is run when it was prepared; only plans it if not `run`."""
        options = sql.SQL("analyze, buffers, timing off, format json" if run else "format json")
        arguments = sql.SQL(", ").join(
            value if isinstance(value, sql.Composable) else sql.Literal(value) for value in values
        )
        execute = sql.SQL("execute hot({})").format(arguments)
        await self.connection.execute(f"prepare hot as {text}")
        async with self.connection.transaction(force_rollback=True):
            cursor = await self.connection.execute(sql.SQL("explain ({}) {}").format(options, execute))
            [(found,)] = await cursor.fetchall()
            self.plans.append(Plan(text, found[0]["Plan"]))
        async with self.connection.transaction(force_rollback=True):
            cursor = await self.connection.execute(execute if run else "select")
            self._rows = await cursor.fetchall() if cursor.description else []
        await self.connection.execute("deallocate hot")
        return self

    async def fetchall(self) -> list[Any]:
        return self._rows


@pytest.fixture(scope="session")
def loaded_url(new_database: Callable[..., str]) -> str:
    """A database with ROWS rows in every table."""
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in LOAD.split(";\n"):
            connection.execute(statement)
    return url


@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
async def database(loaded_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(loaded_url, autocommit=True) as connection:
        await connection.execute("select set_config('plan_cache_mode', %s, false)", (request.param,))
        await connection.execute("set jit = off")
        yield Explaining(connection)


def last(loaded: Any) -> Plan:
    plan: Plan = loaded.plans[-1]
    return plan


async def one(loaded: Any, text: str, *values: object) -> Any:
    """The first value of the first row; a new id if there is none."""
    row = await (await loaded.connection.execute(text, values)).fetchone()
    return row[0] if row else uuid4()


async def middle_of(loaded: Any, table: str, tenant: str) -> Any:
    """An id with as many of the tenant's rows before as after it."""
    text = f"select id from {table} where tenant = %s order by id limit 1"
    return await one(loaded, f"{text} offset (select count(*) / 2 from {table} where tenant = %s)", tenant, tenant)


def subsets(filters: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All ways to set some of the filters, each to each of its values; the others are None."""
    for size in range(len(filters) + 1):
        for names in combinations(filters, size):
            for number in range(max((len(filters[name]) for name in names), default=1)):
                yield dict.fromkeys(filters) | {name: filters[name][number % len(filters[name])] for name in names}


def is_single(filters: Mapping[str, Any]) -> bool:
    return len(filters) - list(filters.values()).count(None) <= 1


@pytest.mark.parametrize("tenant", TENANTS)
async def test_list_sessions(database: Any, tenant: str) -> None:
    sessions = Sessions(database)
    middle = await middle_of(database, "sessions", tenant)
    filters = {
        "agent_role": ("role-0", "role-96", "role-none"),
        "state": tuple(SessionState),
        "task_id": (
            await one(database, "select task_id from sessions where tenant = %s and task_id > %s", tenant, middle),
        ),
    }
    for chosen in subsets(filters):
        for before in (None, middle):
            await sessions.list(tenant, **chosen, before=before, limit=LIMIT)
            last(database).check(rows=2 * LIMIT if is_single(chosen) else None)


@pytest.mark.parametrize("tenant", TENANTS)
async def test_list_tasks(database: Any, tenant: str) -> None:
    tasks = Tasks(database)
    middle = await middle_of(database, "tasks", tenant)
    filters = {
        "session_id": (
            await one(database, "select session_id from tasks where tenant = %s and id = %s", tenant, middle),
        ),
        "target_role": ("role-0", "role-96", "role-none"),
        "state": tuple(TaskState),
        "task_type": ("ROUTING", "APPROVAL", "NOTIFICATION"),
    }
    for chosen in subsets(filters):
        for before in (None, middle):
            await tasks.list(tenant, **chosen, before=before, limit=LIMIT)
            last(database).check(rows=2 * LIMIT if is_single(chosen) else None)


@pytest.mark.parametrize("tenant", TENANTS)
async def test_list_audit_events(database: Any, tenant: str) -> None:
    audit = Audit(database)
    now = datetime.now(UTC)
    filters = {
        "resource_id": (UUID(int=0), await middle_of(database, "sessions", tenant)),
        "method": ("/a.B/Usual", "/a.B/Some", "/a.B/Rare", "/a.B/None"),
        "subject": ("agent-0", "agent-96", "agent-none"),
    }
    spans: tuple[dict[str, Any], ...] = (
        {"start_time": None, "end_time": None},
        {"start_time": now - timedelta(days=25), "end_time": now - timedelta(days=20)},
        {"start_time": None, "end_time": now - timedelta(days=29)},
    )
    for chosen in subsets(filters):
        for span in spans:
            for before in (None, await middle_of(database, "audit_events", tenant)):
                await audit.list(tenant, **chosen, **span, before=before, limit=LIMIT)
                last(database).check(rows=2 * LIMIT if is_single(chosen) else None)


async def test_get_and_heartbeat(database: Any) -> None:
    session_id, task_id = await middle_of(database, "sessions", "big"), await middle_of(database, "tasks", "big")
    await Sessions(database).get("big", session_id)
    last(database).check(rows=1)
    await Tasks(database).get("big", task_id)
    last(database).check(rows=1)
    cursor = await database.connection.execute(
        "select id, lease_id, lease_holder from tasks where state = 'RUNNING' and lease_expire_time > now() limit 1"
    )
    id_, lease_id, subject = await cursor.fetchone()
    values = {"tenant": "big", "id": id_, "lease_id": lease_id, "subject": subject, "progress": None}
    await database.execute(heartbeats.HEARTBEAT, values)
    last(database).check(rows=1)


async def test_heartbeats_together(database: Any) -> None:
    cursor = await database.connection.execute(
        "select tenant, id, lease_id, lease_holder, null::jsonb from tasks where state = 'RUNNING' limit 64"
    )
    columns = [list(column) for column in zip(*await cursor.fetchall(), strict=True)]
    await database.explain(heartbeats.HEARTBEATS, columns)
    last(database).check(rows=2 * len(columns[0]))


# -- sweeps: of all tenants --


async def test_sweep_of_idle_sessions(database: Any) -> None:
    await Sessions(database).expirable(100)
    # A session that is due and has unfinished tasks is looked at, and passed over.
    last(database).check(rows=1000, every_tenant=True)


async def test_sweep_of_lost_leases(database: Any) -> None:
    await Tasks(database).lost_leases(100)
    # All that are running, not all there are.
    last(database).check(rows=ROWS * 6 // 1000 + 1, every_tenant=True)


async def test_sweep_of_orphans(database: Any) -> None:
    for _ in range(2):
        await Tasks(database).orphans(100)
        for plan in database.plans[-2:]:
            plan.check(rows=2 * tasks_store.ROUND_PAGE, every_tenant=True)


async def test_purge_of_guards(database: Any) -> None:
    await database.explain(guards.PURGE.replace("%s", "$1"), [100])
    last(database).check(rows=300, every_tenant=True)


# -- the door's statements --


@pytest.mark.parametrize("size", [1, 64])
async def test_reads_of_a_group(database: Any, size: int) -> None:
    cursor = await database.connection.execute(
        "select tenant, id, session_id from tasks order by md5(id::text) limit 64"
    )
    found = (await cursor.fetchall())[:size]
    tenants = [tenant for tenant, _, _ in found]
    for text, _ in read.ROWS.values():
        await database.explain(text, [tenants, [id_ for _, id_, _ in found]])
        last(database).check(rows=size)
    for text in read.LOOKUPS.values():
        await database.explain(text, [tenants, [session_id for _, _, session_id in found]])
        last(database).check(rows=size)
    cursor = await database.connection.execute(
        "select tenant, scope from idempotency_guards where expire_time > now() order by scope limit 64"
    )
    found = (await cursor.fetchall())[:size]
    await database.explain(read.GUARDS, [[tenant for tenant, _ in found], [scope for _, scope in found]])
    last(database).check(rows=size)
    assert await Guards(database).facts(*found[0]) is not None
    last(database).check(rows=1)


SETS_OF_TABLES = [frozenset(names) for size in range(3) for names in combinations(write.TABLES, size)]


@pytest.mark.parametrize("new", SETS_OF_TABLES, ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize("changed", SETS_OF_TABLES, ids=lambda names: "+".join(sorted(names)))
async def test_write_of_a_group(database: Any, new: frozenset[str], changed: frozenset[str]) -> None:
    for size in (1, 64):
        text = write.statement((new, changed, bool(new or changed)), False)
        types = dict(re.findall(r"\$(\d+)::(\w+)\[\]", text))
        arrays = [
            sql.SQL("array_fill(null::{}, array[{}])").format(sql.SQL(types[str(number)]), size)
            for number in range(1, len(types) + 1)
        ]
        await database.explain(text, arrays, run=False)
        last(database).check()


def claim_values(tenant: str, role: str, size: int) -> list[Any]:
    """The parameters of CLAIM, for some calls that claim `size` tasks in all."""
    calls = min(size, 10)
    columns = [b"s" * 32, size // calls, "worker", role, "", "", None, uuid4()]
    return [tenant, role, claims.MAX_ANSWER_BYTES, "/a.B/C", *([value] * calls for value in columns)]


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("role", ["role-0", "role-96", "role-none"])
async def test_claim(database: Any, tenant: str, role: str) -> None:
    await database.connection.execute("select set_config('orchestrator.ours', '1,2,3,4,5,6,7,8,9,10', false)")
    for size in (1, 20):
        await database.explain(claims.CLAIM, claim_values(tenant, role, size))
        last(database).check(rows=5 * size)


async def test_claim_passes_over_what_is_scheduled_for_later(database: Any) -> None:
    """However much of it there is, and of whatever priority."""
    await database.connection.execute("select set_config('orchestrator.ours', '1', false)")
    await database.explain(claims.CLAIM, claim_values("later", "role-0", 1))
    last(database).check(rows=10)
    await database.explain(claims.CLAIMABLE, [["later"], ["role-0"]])
    last(database).check(rows=10)


@pytest.mark.parametrize("size", [1, 100])
async def test_claimable(database: Any, size: int) -> None:
    roles = [f"role-{number}" for number in range(size)]
    await database.explain(claims.CLAIMABLE, [["mid"] * size, roles])
    last(database).check(rows=5 * size)
