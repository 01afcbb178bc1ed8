"""What must be true of the tables after any history, asked of Postgres itself."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

_SESSION = {
    "": {"PENDING"},
    "PENDING": {"PENDING", "ACTIVE", "EXPIRED"},
    "ACTIVE": {"ACTIVE", "PAUSED", "COMPLETED", "FAILED", "EXPIRED"},
    "PAUSED": {"PAUSED", "ACTIVE", "EXPIRED"},
    "COMPLETED": {"COMPLETED"},
    "FAILED": {"FAILED"},
    "EXPIRED": {"EXPIRED"},
}
_TASK = {
    "": {"PENDING"},
    "PENDING": {"RUNNING", "CANCELLED"},
    "RUNNING": {"SUCCEEDED", "PENDING", "DEAD", "CANCELLED"},
}
LEGAL = {("session", before, after) for before, to in _SESSION.items() for after in to} | {
    ("task", before, after) for before, to in _TASK.items() for after in to
}


class Tables:
    """The tables of one database, seen by a stranger."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = psycopg.connect(url, autocommit=True)

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, or nothing for a statement that gives none."""
        cursor = self._connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def one(self, query: str, *parameters: Any) -> Any:
        """The only value of a query."""
        ((value,),) = self.rows(query, *parameters)
        return value

    def sessions(self, tenant: str) -> int:
        """How many sessions the tenant has."""
        return int(self.one("select count(*) from sessions where tenant = %s", tenant))

    def audits(self, tenant: str, resource_id: str | None = None) -> int:
        """How many audit events the tenant, or one of its resources, has."""
        return int(
            self.one(
                "select count(*) from audit_events where tenant = %s and (%s::uuid is null or resource_id = %s)",
                tenant,
                resource_id,
                resource_id,
            )
        )

    def content(self, tenant: str) -> str:
        """A digest of all that the tenant has but guards: equal before and after when nothing was written."""
        return str(
            self.one(
                "select md5(string_agg(content, ',')) from ("
                " (select s::text as content from sessions s where tenant = %s order by id) union all"
                " (select t::text from tasks t where tenant = %s order by id) union all"
                " (select a::text from audit_events a where tenant = %s order by id)) c",
                tenant,
                tenant,
                tenant,
            )
        )

    def guards(self, tenant: str) -> int:
        """How many answers are kept for the tenant."""
        return int(self.one("select count(*) from idempotency_guards where tenant = %s", tenant))

    @contextmanager
    def unchanged(self, tenant: str) -> Iterator[None]:
        """Fails if the tenant's resources or audit events differ at the end."""
        before = self.content(tenant)
        yield
        assert self.content(tenant) == before, "something was written"

    @contextmanager
    def locked(self, session_id: str) -> Iterator[None]:
        """While inside, a stranger holds the session's row."""
        with psycopg.connect(self.url) as stranger:
            stranger.execute("select from sessions where id = %s for update", (session_id,))
            yield
            stranger.rollback()

    def end_backends(self, *, only_active: bool = True) -> int:
        """Ends the controllers' connections to Postgres, those at work or all; answers how many."""
        return len(
            self.rows(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                " and application_name like 'controller_svc%%' and (state = 'active' or not %s)",
                only_active,
            )
        )

    def check(self) -> None:
        """Each change has one audit event, versions and states follow each other, and nothing was written twice."""
        assert (
            self.rows(
                "with r as (select tenant, id, version, state from sessions"
                "           union all select tenant, id, version, state from tasks),"
                " a as (select tenant, resource_id as id, count(*) as n, count(distinct version_after) as versions,"
                "         min(version_after) as low, max(version_after) as high,"
                "         (array_agg(state_after order by version_after desc))[1] as state"
                "       from audit_events group by tenant, resource_id)"
                " select * from r full join a using (tenant, id) where a.n is distinct from r.version"
                "   or a.versions <> a.n or a.low <> 1 or a.high is distinct from r.version or a.state <> r.state"
            )
            == []
        ), "changes and audit events differ"
        assert (
            self.rows(
                "select * from (select resource_id, version_before, state_before,"
                " lag(version_after, 1, 0::bigint) over w as version, lag(state_after, 1, '') over w as state"
                " from audit_events window w as (partition by tenant, resource_id order by version_after)) a"
                " where version_before <> version or state_before <> state"
            )
            == []
        ), "a change does not follow from the one before"
        moves = self.rows("select distinct resource_type, state_before, state_after from audit_events")
        assert set(moves) <= LEGAL, f"illegal: {set(moves) - LEGAL}"
        assert (
            self.rows(
                "select a.tenant, a.method, a.resource_id, g.code from audit_events a"
                " left join idempotency_guards g on g.tenant = a.tenant and g.command_id = a.command_id"
                " where g.code <> 0 or g.code is null and a.create_time > now() - interval '90 s'"
            )
            == []
        ), "a change without the guard of its command"
        assert self.one("select deadlocks from pg_stat_database where datname = current_database()") == 0

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


async def eventually(condition: Callable[[], Any], *, seconds: float = 30, pause: float = 0.02) -> Any:
    """Asks until the answer (awaited if it has to be) is true, and returns it; fails after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < until, f"not within {seconds} s"
        await asyncio.sleep(pause)
