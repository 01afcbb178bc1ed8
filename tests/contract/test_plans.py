"""How Postgres runs the hot statements on 200,000 rows: never by reading a table through, never by sorting what grows.

Each is run as a custom plan and as a generic one, for tenants of very different size, with what it read counted.
"""

from __future__ import annotations

import asyncio
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

from controller_svc.core.sessions import SessionState
from controller_svc.core.tasks import TaskState
from controller_svc.store import claims, read, write
from controller_svc.store import tasks as tasks_store
from controller_svc.store.audit import Audit
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks

Connection = psycopg.AsyncConnection[Any]

ROWS = 200_000
LIMIT = 101
"""A page of the largest size, and one row more to see whether another follows."""
TENANTS = ("big", "mid", "small-3", "nobody")
"""Of 90 %, 9 % and 0.05 % of the rows, and none."""
TABLES = {"sessions", "tasks", "audit_events", "idempotency_guards"}

# Rows come in blocks of ten of one tenant. A block's first session is ACTIVE, and its ten tasks are that session's.
LOAD = f"""
create temp table load as
select g, b,
  (lpad(to_hex(1700000000000 + g * 1000), 12, '0') || '70008' || substr(md5(g::text), 1, 15))::uuid as id,
  (lpad(to_hex(1700000000000 + (b * 10 + 1) * 1000), 12, '0') || '70008' || substr(md5((b * 10 + 1)::text), 1, 15))::uuid
    as first_id,
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
  case when leased then 1 else 0 end, 3, 1000000, 30000000, null, state, case when state = 'SUCCEEDED' then '{{}}'::jsonb end,
  null, null, case when leased then gen_random_uuid() end, case when leased then 'worker' else '' end,
  case when state = 'RUNNING' then now() + case when h = 905 then interval '-1 second' else interval '1 hour' end end,
  t, t, case when leased then t end, case when state in ('SUCCEEDED', 'DEAD', 'CANCELLED') then t end
from (
  select *, state in ('RUNNING', 'SUCCEEDED') as leased from (
    select *, case when h < 850 then 'SUCCEEDED' when h < 900 then 'PENDING' when h < 906 then 'RUNNING'
      when h < 910 then 'BLOCKED' when h < 999 then 'CANCELLED' else 'DEAD' end as state
    from load
  ) s
) s;

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
            if "Sort" in node["Node Type"]:
                assert node["Actual Rows"] * node["Actual Loops"] <= (LIMIT if rows is None else rows), self
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
    """Stands in for the database: statements are explained with what running them has read, and answer no row."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.plans: list[Plan] = []

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Explaining]:
        yield self

    def now(self) -> datetime:
        return datetime.now(UTC)

    def cursor(self, *, binary: bool) -> Explaining:
        return self

    async def execute(self, text: str, values: Mapping[str, Any]) -> Explaining:
        names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        for number, name in enumerate(names, 1):
            text = text.replace(f"%({name})s", f"${number}")
        return await self.explain(text, [values[name] for name in names])

    async def explain(self, text: str, values: Sequence[Any], *, run: bool = True) -> Explaining:
        """Plans `text`, with values for $1 and on, as it is planned when it was prepared; runs it and takes that back."""
        options = sql.SQL("analyze, buffers, timing off, format json" if run else "format json")
        literals = sql.SQL(", ").join(map(sql.Literal, values))
        async with self._connection.transaction(force_rollback=True):
            await self._connection.execute(f"prepare hot as {text}")
            cursor = await self._connection.execute(
                sql.SQL("explain ({}) execute hot({})").format(options, literals)
                if values
                else sql.SQL("explain ({}) execute hot").format(options)
            )
            row = await cursor.fetchone()
            await self._connection.execute("deallocate hot")
        assert row is not None
        self.plans.append(Plan(text, row[0][0]["Plan"]))
        return self

    async def fetchall(self) -> list[Any]:
        return []


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


async def middle_of(loaded: Any, table: str, tenant: str) -> Any:
    """An id with as many of the tenant's rows before as after it."""
    cursor = await loaded._connection.execute(
        f"select id from {table} where tenant = %s order by id limit 1"
        f" offset (select count(*) / 2 from {table} where tenant = %s)",
        (tenant, tenant),
    )
    row = await cursor.fetchone()
    return row[0] if row else None


def subsets(filters: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All ways to set some of the filters, each to each of its values; the others are None."""
    for size in range(len(filters) + 1):
        for names in combinations(filters, size):
            for number in range(max((len(filters[name]) for name in names), default=1)):
                yield dict.fromkeys(filters) | {name: filters[name][number % len(filters[name])] for name in names}


@pytest.mark.parametrize("tenant", TENANTS)
async def test_list_sessions(database: Any, tenant: str) -> None:
    sessions = Sessions(database)
    filters = {
        "agent_role": ("role-0", "role-96", "role-none"),
        "state": tuple(SessionState),
        "task_id": (await middle_of(database, "sessions", tenant) or uuid4(), uuid4()),
    }
    for chosen in subsets(filters):
        for before in (None, await middle_of(database, "sessions", tenant)):
            await sessions.list(tenant, **chosen, before=before, limit=LIMIT)
            last(database).check(rows=LIMIT if len(chosen) - list(chosen.values()).count(None) <= 1 else None)
