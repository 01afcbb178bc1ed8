"""The pools: how connections are set, that one that answers nothing is cut, and that none that is cut is used again."""

from __future__ import annotations

import psycopg
import pytest

from controller_svc.store import database as module
from controller_svc.store.database import Database
from svckit.errors import Unavailable


@pytest.mark.parametrize("use", ["reading", "looking", "beating", "beating_alone"])
async def test_who_waits_for_no_answer_is_told_so(
    use: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before statement_timeout: a server that is gone ends no statement."""
    monkeypatch.setattr(module, "WATCHDOG_SECONDS", 0.2)
    for _ in range(5):  # more than any pool has
        with pytest.raises(Unavailable, match="DATABASE_UNAVAILABLE"):
            async with getattr(database, use)() as connection:
                await connection.execute("select pg_sleep(3)")
    async with getattr(database, use)() as connection:
        await connection.execute("select 1")


async def test_a_connection_cut_too_late_is_not_used_again(database: Database) -> None:
    """Its answer was read all the same, by a loop that had stood still."""
    async with database.beating() as connection:
        await connection.execute("select 1")
        connection.cut()
    async with database.beating() as another:
        await another.execute("select 1")
    assert another is not connection


@pytest.fixture(params=["off", "local", "remote_apply"])
def commit(database_url: str, request: pytest.FixtureRequest) -> str:
    """What the database has as synchronous_commit by default; other defaults of it would slow calls down."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for setting in (f"synchronous_commit = {request.param}", "jit = on", "statement_timeout = 0"):
            connection.execute(f"alter database {connection.info.dbname} set {setting}")
    return str(request.param)


async def test_the_databases_defaults_neither_lose_writes_nor_slow_calls_down(commit: str, database: Database) -> None:
    for pool in (database.groups, database.alone, database.claims):
        async with pool.connection() as connection:
            cursor = await connection.execute(
                "select current_setting('synchronous_commit'), current_setting('jit'),"
                " current_setting('statement_timeout')"
            )
            found = await cursor.fetchone()
        assert found == ("on" if commit == "off" else commit, "off", f"{module.STATEMENT_SECONDS}s")
