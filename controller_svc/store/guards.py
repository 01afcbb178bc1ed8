"""The purge of expired guards, beside the door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

PURGE = """
delete from idempotency_guards g using (
  select tenant, scope from idempotency_guards where expire_time <= statement_timestamp()
  order by expire_time limit %s for update skip locked
) expired
where g.tenant = expired.tenant and g.scope = expired.scope
"""


async def purge(connection: psycopg.AsyncConnection[Any], limit: int) -> int:
    """Deletes up to `limit` expired guards, oldest first, and says how many.

    What a writer holds is left for the next time.
    """
    return (await connection.execute(PURGE, (limit,))).rowcount
