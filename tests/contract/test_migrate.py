"""Migrations: each applied once whoever starts them, a changed history refused, a newer one tolerated."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import psycopg
import pytest

from controller_svc.store.migrate import LOCK, MIGRATIONS, MigrationError, migrate, migrations

ALL = [migration.version for migration in migrations()]

pytestmark = pytest.mark.timeout(60)


async def connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(url, autocommit=True)


async def applied(connection: psycopg.AsyncConnection[Any]) -> list[int]:
    cursor = await connection.execute("select version from schema_migrations order by version")
    return [version for (version,) in await cursor.fetchall()]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the first migration, to change and to add to."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    shutil.copy(MIGRATIONS / "0001_initial.sql", folder)
    return folder


def test_versions_are_1_to_n_without_gaps() -> None:
    assert [migration.version for migration in migrations()] == list(range(1, len(migrations()) + 1))


async def test_applies_each_once_and_in_order(empty_database_url: str, directory: Path) -> None:
    (directory / "0002_second.sql").write_text("alter table first_of_two add column b int; create table x (y int);")
    (directory / "0001_initial.sql").write_text("create table first_of_two (a int);")
    async with await connect(empty_database_url) as connection:
        assert await migrate(connection, directory) == [1, 2]
        assert await migrate(connection, directory) == []
        await connection.execute("select a, b from first_of_two, x")
        (directory / "0003_third.sql").write_text("drop table x;")
        assert await migrate(connection, directory) == [3]
        assert await applied(connection) == [1, 2, 3]


async def test_four_that_start_at_once(empty_database_url: str) -> None:
    connections = [await connect(empty_database_url) for _ in range(4)]
    results = await asyncio.gather(*(migrate(connection) for connection in connections))
    assert sorted(results) == [[], [], [], ALL]
    assert await applied(connections[0]) == ALL
    for connection in connections:
        await connection.close()


async def test_a_failure_leaves_nothing(empty_database_url: str, directory: Path) -> None:
    (directory / "0002_wrong.sql").write_text("create table half (a int); select 1 / 0;")
    async with await connect(empty_database_url) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await migrate(connection, directory)
        cursor = await connection.execute("select relname from pg_class where relnamespace = 'public'::regnamespace")
        assert await cursor.fetchall() == []
        (directory / "0002_wrong.sql").write_text("create table half (a int);")
        assert await migrate(connection, directory) == [1, 2]


async def test_a_changed_migration_is_refused(database_url: str, directory: Path) -> None:
    with (directory / "0001_initial.sql").open("a") as file:
        file.write("-- changed\n")
    async with await connect(database_url) as connection:
        with pytest.raises(MigrationError, match=r"0001 \(initial\) was changed after it was applied"):
            await migrate(connection, directory)


async def test_a_newer_unknown_version_is_tolerated(database_url: str) -> None:
    async with await connect(database_url) as connection:
        await connection.execute("insert into schema_migrations (version, name, sha256) values (9000, 'later', '')")
        assert await migrate(connection) == []


async def test_another_history_is_refused(empty_database_url: str, directory: Path) -> None:
    async with await connect(empty_database_url) as connection:
        await migrate(connection, directory)
        (directory / "0003_third.sql").write_text("select 1;")
        await connection.execute("insert into schema_migrations (version, name, sha256) values (2, 'theirs', '')")
        with pytest.raises(MigrationError, match=r"0002 \(theirs\) was applied and is unknown here"):
            await migrate(connection, directory)
        await connection.execute("update schema_migrations set version = 4 where version = 2")
        with pytest.raises(MigrationError, match=r"0003 \(third\) is older than what was applied"):
            await migrate(connection, directory)


async def test_the_lock_of_a_migrator_that_died_is_free(empty_database_url: str) -> None:
    dying = await psycopg.AsyncConnection.connect(empty_database_url)
    await dying.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
    async with await connect(empty_database_url) as living, await connect(empty_database_url) as killer:
        waiting = asyncio.create_task(migrate(living))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await killer.execute("select pg_terminate_backend(%s)", (dying.info.backend_pid,))
        assert await waiting == ALL
    await dying.close()


async def test_a_database_that_is_not_utf8_is_refused(postgres_engine: str) -> None:
    async with await connect(postgres_engine) as server:
        await server.execute("drop database if exists orchestrator_test_ascii")
        await server.execute(
            "create database orchestrator_test_ascii"
            " template template0 encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C'"
        )
        try:
            parameters = psycopg.conninfo.conninfo_to_dict(postgres_engine) | {"dbname": "orchestrator_test_ascii"}
            async with await connect(psycopg.conninfo.make_conninfo("", **parameters)) as connection:
                with pytest.raises(MigrationError, match="UTF8"):
                    await migrate(connection)
        finally:
            await server.execute("drop database orchestrator_test_ascii with (force)")
