"""Brings a database to this code's schema: numbered SQL files, each applied once, in order, never changed after."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import psycopg

MIGRATIONS = Path(__file__).parent / "migrations"
OLDEST_SERVER = 150000
LOCK = 0x6F72636865737472
"""Advisory lock that one migrating process holds in this database."""


class MigrationError(Exception):
    """The database cannot be brought to, or does not have, a schema that this code can run on."""


class Migration(NamedTuple):
    """One file `NNNN_name.sql`."""

    version: int
    name: str
    text: str

    @property
    def sha256(self) -> bytes:
        """By which a change after it was applied is noticed."""
        return hashlib.sha256(self.text.encode()).digest()


def migrations(directory: Path = MIGRATIONS) -> list[Migration]:
    """All migrations of a directory, by version."""
    files = sorted(directory.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    return [Migration(int(file.name[:4]), file.stem[5:], file.read_text("utf-8")) for file in files]


async def migrate(connection: psycopg.AsyncConnection[Any], directory: Path = MIGRATIONS) -> list[int]:
    """Applies what is missing, in one transaction, and returns the versions applied. Many processes may run it at once.

    Migrations that are newer than this code's newest are left alone: old code runs on the newer schema. Raises
    MigrationError if the server is too old or the database not in UTF-8, or if the database's history differs from this
    code's up to its newest version.
    """
    if connection.info.server_version < OLDEST_SERVER:
        raise MigrationError("Postgres 15 or newer is required")
    if connection.info.parameter_status("server_encoding") != "UTF8":
        raise MigrationError("the database's encoding must be UTF8")
    known = migrations(directory)
    async with connection.transaction():
        await connection.execute("set local statement_timeout = 0")
        await connection.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
        # Whoever waits for a table's lock makes all who come later wait too: better to give up and be started again.
        await connection.execute("set local lock_timeout = '5s'")
        await connection.execute(
            "create table if not exists schema_migrations ("
            " version int constraint schema_migrations_pkey primary key, name text not null, sha256 bytea not null,"
            " apply_time timestamptz not null default clock_timestamp())"
        )
        cursor = await connection.execute("select version, name, sha256 from schema_migrations order by version")
        missing = _missing(known, {version: (name, sha256) for version, name, sha256 in await cursor.fetchall()})
        for migration in missing:
            await connection.execute(migration.text)
            await connection.execute(
                "insert into schema_migrations (version, name, sha256) values (%s, %s, %s)",
                (migration.version, migration.name, migration.sha256),
            )
    return [migration.version for migration in missing]


def _missing(known: list[Migration], applied: dict[int, tuple[str, bytes]]) -> list[Migration]:
    newest = max((migration.version for migration in known), default=0)
    for version in sorted(applied.keys() - {migration.version for migration in known}):
        if version < newest:
            raise MigrationError(f"migration {version:04} ({applied[version][0]}) was applied and is unknown here")
    missing = []
    for migration in known:
        label = f"migration {migration.version:04} ({migration.name})"
        if migration.version not in applied:
            if any(version > migration.version for version in applied):
                raise MigrationError(f"{label} is older than what was applied")
            missing.append(migration)
        elif applied[migration.version][1] != migration.sha256:
            raise MigrationError(f"{label} was changed after it was applied")
    return missing
