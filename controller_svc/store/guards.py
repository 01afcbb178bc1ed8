"""Guards beside the door: what operators are told of one, and the purge of expired ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from controller_svc.core.records import GuardFacts

if TYPE_CHECKING:
    import psycopg

    from controller_svc.store.database import Database

FACTS = """
select command_id, code, fingerprint, length(answer), create_time, expire_time from idempotency_guards
where tenant = %(tenant)s and scope = %(scope)s and expire_time > clock_timestamp()
"""

PURGE = """
delete from idempotency_guards g using (
  select tenant, scope from idempotency_guards where expire_time <= statement_timestamp()
  order by expire_time limit %s for update skip locked
) expired
where g.tenant = expired.tenant and g.scope = expired.scope
"""


class Guards:
    """The contract core.records.GuardStore on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def facts(self, tenant: str, scope: bytes) -> GuardFacts | None:
        """The guard of a scope, without its answer; None if there is none that is not expired."""
        async with self._database.reading() as connection:
            cursor = await connection.cursor(binary=True).execute(FACTS, {"tenant": tenant, "scope": scope})
            rows = await cursor.fetchall()
        if not rows:
            return None
        row = rows[0]
        return GuardFacts(
            command_id=row[0],
            code=row[1],
            fingerprints=row[2],
            answer_bytes=row[3],
            create_time=row[4],
            expire_time=row[5],
        )


async def purge(connection: psycopg.AsyncConnection[Any], limit: int) -> int:
    """Deletes up to `limit` expired guards, oldest first, and says how many.

    What a writer holds is left for the next time.
    """
    return (await connection.execute(PURGE, (limit,))).rowcount
