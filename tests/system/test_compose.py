"""What compose.yaml runs inside Postgres' and Redis' containers, run over the embedded servers."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local.processes import LOOPBACK, ROOT, Child, free_port
from deploy.local.servers import Postgres, embedded_postgres, embedded_valkey

FOLDER = ROOT / "deploy" / "compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]


def test_databases_have_an_owner_each(own_postgres: Postgres, tmp_path: Path) -> None:
    # The image's superuser is `postgres`; ours has the name that the script is about to create.
    server = urlsplit(own_postgres.url)

    def connect(user: str, password: str, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host=server.hostname, port=server.port, user=user, password=password, dbname=database, autocommit=True
        )

    with connect("orchestrator", str(server.password), "postgres") as connection:
        connection.execute("CREATE ROLE postgres SUPERUSER LOGIN PASSWORD 'given'")
    with connect("postgres", "given", "postgres") as connection:
        connection.execute("DROP DATABASE orchestrator")
        connection.execute("ALTER ROLE orchestrator RENAME TO boot")

    (tmp_path / "orchestrator_password").write_text('it\'s "one" $HOME\n')
    (tmp_path / "KC_DB_PASSWORD").write_text("another")
    environment = {
        "PATH": f"{embedded_postgres()}:{os.environ['PATH']}",
        "PGHOST": str(server.hostname),
        "PGPORT": str(server.port),
        "PGPASSWORD": "given",
        "POSTGRES_USER": "postgres",
        "SECRETS_DIR": str(tmp_path),
    }
    subprocess.run([FOLDER / "databases.sh"], env=environment, check=True)

    for user, password, other in (
        ("orchestrator", 'it\'s "one" $HOME', "keycloak"),
        ("keycloak", "another", "orchestrator"),
    ):
        with connect(user, password, user) as connection:
            connection.execute("CREATE TABLE public.mine (id int)")
            assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (
                False,
            )
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            connect(user, password, other)


def test_redis_has_the_password_and_keeps_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "redis-server").symlink_to(embedded_valkey())
    (tmp_path / "redis_password").write_text("secret\n")
    port = free_port()
    shell, option, script = SERVICES["redis"]["command"]
    script = script.replace("$$", "$").replace("/run/secrets", shlex.quote(str(tmp_path)))
    script = script.replace("dir /data", f"dir {tmp_path}\nport {port}\nbind {LOOPBACK}")
    server = Child(
        "Redis", [shell, option, script], log=tmp_path / "log", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    with redis.Redis(host=LOOPBACK, port=port, password="secret", retry=Retry(NoBackoff(), 0)) as client:
        server.start()
        try:
            server.wait_until(answers, seconds=60)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.set("key", "value")
            assert server.stop() == 0
            server.start()
            server.wait_until(answers, seconds=60)
            assert client.get("key") == b"value"
            with (
                redis.Redis(host=LOOPBACK, port=port, retry=Retry(NoBackoff(), 0)) as stranger,
                pytest.raises(redis.AuthenticationError),
            ):
                stranger.ping()
        finally:
            server.stop()
