"""The controller has no effect outside Postgres, so that a guard covers every effect it has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import controller_svc
from svckit.options import WriteMode, policies
from tests.client import services

PACKAGE = Path(controller_svc.__file__).parent
REACHING_OUT = frozenset(
    {"aiohttp", "boto3", "ftplib", "http", "httpx", "kafka", "redis", "requests", "smtplib", "subprocess", "urllib"}
)
"""What a program reaches others with; controller_svc imports none of it."""


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_every_write_is_guarded_or_harmless_to_repeat() -> None:
    """The two that are not guarded change a lease and a record in Redis; neither is kept by a guard, nor needs one."""
    unguarded = {
        policy.full_method.rpartition("/")[2]
        for service in services()
        if service.full_name.startswith("orchestrator.controller.")
        for policy in policies(service, 1).values()
        if policy.write is WriteMode.UNGUARDED
    }
    assert unguarded == {"HeartbeatTask", "ReleaseRecord"}


def test_nothing_is_reached_but_postgres_and_idempotency_svc() -> None:
    """A new way out needs an outbox, and a key for the other side that is made from the guard's."""
    used = {file: set(imports(file)) for file in PACKAGE.rglob("*.py")}
    assert len(used) > 20
    for file, names in used.items():
        assert not {name.partition(".")[0] for name in names} & REACHING_OUT, file
    assert {file.name for file, names in used.items() if "svckit.client" in names} == {"__main__.py"}
    stubs = {name.split(".")[1] for file, names in used.items() for name in names if name.endswith("_pb2_grpc")}
    assert stubs == {"idempotency"}
