"""What core.records.GuardStore asks, of the store on Postgres."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg

from controller_svc.core.records import GuardFacts
from controller_svc.store.guards import Guards
from tests.contract.rows import NOW, TENANT, insert_values

if TYPE_CHECKING:
    from controller_svc.store.database import Database

Connection = psycopg.AsyncConnection[Any]


async def insert_guard(connection: Connection, **changes: Any) -> dict[str, Any]:
    guard = {
        "tenant": TENANT,
        "scope": b"s" * 32,
        "command_id": uuid4(),
        "fingerprint": b"f" * 32,
        "code": 9,
        "answer": b"the answer",
        "create_time": NOW,
        "expire_time": NOW + timedelta(hours=1),
    } | changes
    await insert_values(connection, "idempotency_guards", guard)
    return guard


async def test_the_facts_of_a_guard_are_those_that_were_stored(connection: Connection, database: Database) -> None:
    guard = await insert_guard(connection)
    assert await Guards(database).facts(TENANT, b"s" * 32) == GuardFacts(
        command_id=guard["command_id"],
        code=9,
        fingerprints=b"f" * 32,
        answer_bytes=10,
        create_time=NOW,
        expire_time=NOW + timedelta(hours=1),
    )


async def test_a_guard_is_found_by_its_whole_key_only(connection: Connection, database: Database) -> None:
    await insert_guard(connection)
    await insert_guard(connection, tenant="other", scope=b"o" * 32)
    guards = Guards(database)
    assert await guards.facts(TENANT, b"o" * 32) is None
    assert await guards.facts("other", b"s" * 32) is None
    assert await guards.facts("other", b"o" * 32) is not None


async def test_an_expired_guard_is_absent(connection: Connection, database: Database) -> None:
    await insert_guard(connection, create_time=NOW - timedelta(hours=2), expire_time=NOW - timedelta(seconds=1))
    assert await Guards(database).facts(TENANT, b"s" * 32) is None
