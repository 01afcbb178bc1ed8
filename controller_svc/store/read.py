"""What a group needs to have read before it can be decided: rows, bounded look-ups and guards, without locks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from psycopg import AsyncRawCursor

from controller_svc.core.mutations import Key, Lookup
from controller_svc.store import sessions, tasks
from controller_svc.store.arrays import Blobs, Texts, Uuids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

    import psycopg

_BY_KEY = (
    "select {columns} from {table} r join unnest($1::text[], $2::uuid[]) as k(tenant, id)"
    " on r.tenant = k.tenant and r.id = k.id"
)


def _select(table: str, columns: str) -> str:
    return _BY_KEY.format(table=table, columns=", ".join(f"r.{name.strip()}" for name in columns.split(",")))


ROWS: dict[str, tuple[str, Callable[[Sequence[Any]], Any]]] = {
    "sessions": (_select("sessions", sessions.COLUMNS), sessions.from_row),
    "tasks": (_select("tasks", tasks.COLUMNS), tasks.from_row),
}

LOOKUPS: dict[str, str] = {
    "unfinished_tasks": (
        "select k.tenant, k.id, (select count(*) from ("
        "select from tasks t where t.tenant = k.tenant and t.session_id = k.id"
        " and t.state in ('PENDING', 'BLOCKED', 'RUNNING') limit 1) u)"
        " from unnest($1::text[], $2::uuid[]) as k(tenant, id)"
    ),
}

GUARDS = (
    "select g.scope, g.command_id, g.fingerprint, g.code, g.answer, g.expire_time"
    " from idempotency_guards g join unnest($1::text[], $2::bytea[]) as k(tenant, scope)"
    " on g.tenant = k.tenant and g.scope = k.scope where g.expire_time > clock_timestamp()"
)


@dataclass(frozen=True, slots=True)
class Guard:
    """The record, in the effect's own transaction, of what a scope's command was answered."""

    command_id: UUID
    fingerprints: bytes
    """Packed (controller_svc/fingerprint.py), or a bare digest of kind 1."""
    code: int
    answer: bytes
    expire_time: datetime


async def read_rows(connection: psycopg.AsyncConnection[Any], keys: Iterable[Key | Lookup]) -> dict[Key | Lookup, Any]:
    """Each key's row or look-up, None where there is none."""
    found: dict[Key | Lookup, Any] = dict.fromkeys(keys)
    asked: dict[str, list[Key | Lookup]] = {}
    for key in found:
        asked.setdefault(key[0], []).append(key)
    for name, group in asked.items():
        arrays = [Texts.of([key.tenant for key in group]), Uuids.of([key.id for key in group])]
        if name in ROWS:
            text, from_row = ROWS[name]
            for values in await _fetch(connection, text, arrays):
                row = from_row(values)
                found[Key(row.table, row.tenant, row.id)] = row
        else:
            for tenant, id_, value in await _fetch(connection, LOOKUPS[name], arrays):
                found[Lookup(group[0].name, tenant, id_)] = value  # type: ignore[union-attr]
    return found


async def read_guards(
    connection: psycopg.AsyncConnection[Any], scopes: Sequence[tuple[str, bytes]]
) -> dict[bytes, Guard]:
    """The guards of these (tenant, scope) pairs that are not expired, by scope."""
    arrays = [Texts.of([tenant for tenant, _ in scopes]), Blobs.of([scope for _, scope in scopes])]
    return {row[0]: Guard(*row[1:]) for row in await _fetch(connection, GUARDS, arrays)}


async def _fetch(connection: psycopg.AsyncConnection[Any], text: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
    cursor = AsyncRawCursor(connection)
    await cursor.execute(text, parameters, binary=True)
    return await cursor.fetchall()
