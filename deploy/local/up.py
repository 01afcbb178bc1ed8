"""`make up`: starts the pair with all it needs, shows a first job, and stays up until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

import grpc
import psycopg

from deploy.local import services
from deploy.local.first_job import first_job
from deploy.local.folder import Folder, port, refuse_busy_ports
from deploy.local.issuer import Issuer
from deploy.local.processes import LOOPBACK, ROOT, Child, LocalError
from deploy.local.servers import Postgres, Valkey

TOKEN_HOURS = 12
TOKEN_ROLES = ["orchestrator.agent", "orchestrator.audit", "orchestrator.operate", "planner", "reviewer"]


def main() -> None:
    """Run until Ctrl-C, SIGTERM or SIGHUP; raises LocalError with the one line that says why it cannot."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    folder = Folder()
    with folder.locked(), ExitStack() as running:
        try:
            _watch(_start(folder, running))
        except KeyboardInterrupt:
            _say("\nstopping; Ctrl-C again kills")
    _say("stopped; the data stay for the next `make up`")


def _start(folder: Folder, running: ExitStack) -> list[Child]:
    database_url, redis_url = os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL")
    ports = [
        "CONTROLLER_PORT",
        "IDEMPOTENCY_PORT",
        "CONTROLLER_METRICS_PORT",
        "IDEMPOTENCY_METRICS_PORT",
        "ISSUER_PORT",
    ]
    refuse_busy_ports(*ports, *["POSTGRES_PORT"] * (not database_url), *["VALKEY_PORT"] * (not redis_url))
    children: list[Child] = []

    if database_url:
        _check_database(database_url)
    else:
        postgres = Postgres(folder.data / "postgres", port=port("POSTGRES_PORT"), log=folder.logs / "postgres.log")
        running.callback(postgres.stop)
        postgres.start()
        children.append(postgres.child)
        database_url = postgres.url
        _say(f"Postgres         {LOOPBACK}:{port('POSTGRES_PORT')}, data in {folder.data / 'postgres'}")
    if redis_url:
        _check_redis(redis_url)
    else:
        valkey = Valkey(folder.data / "valkey", port=port("VALKEY_PORT"), log=folder.logs / "valkey.log")
        running.callback(valkey.stop)
        valkey.start()
        children.append(valkey.child)
        redis_url = valkey.url
        _say(f"Valkey           {LOOPBACK}:{port('VALKEY_PORT')}, data in {folder.data / 'valkey'}")

    issuer = folder.issuer()
    issuer.start()
    running.callback(issuer.stop)
    _say(f"token issuer     {issuer.url}")

    # Nobody has to move away before Ctrl-C.
    env = {"DRAIN_SECONDS": os.environ.get("DRAIN_SECONDS", "0")}
    idempotency = services.idempotency(
        port=port("IDEMPOTENCY_PORT"),
        metrics_port=port("IDEMPOTENCY_METRICS_PORT"),
        redis_url=redis_url,
        service_key=folder.service_key,
        log=folder.logs / "idempotency_svc.log",
        env=env,
    )
    controller = services.controller(
        port=port("CONTROLLER_PORT"),
        metrics_port=port("CONTROLLER_METRICS_PORT"),
        database_url=database_url,
        idempotency_target=idempotency.target,
        issuer=issuer,
        service_key=folder.service_key,
        page_token_key=folder.page_token_key(),
        log=folder.logs / "controller_svc.log",
        env=env,
    )
    for service in (idempotency, controller):
        running.callback(service.stop)
        service.start()
    for service in (idempotency, controller):
        service.wait()
        _say(f"{service.name:<16} {service.target}, log in {service.log}")
        children.append(service)

    _say("\nThe first job:")
    try:
        asyncio.run(first_job(controller.target, issuer, lambda step: _say(f"  {step}")))
    except (grpc.RpcError, AssertionError) as error:
        detail = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else error
        raise LocalError(f"the first job failed, {detail} (logs: {folder.logs})") from None
    _tell_how_to_call(controller.target, issuer)
    return children


def _tell_how_to_call(target: str, issuer: Issuer) -> None:
    token = issuer.token(subject="local-user", roles=TOKEN_ROLES, seconds=TOKEN_HOURS * 3600)
    header = shlex.quote(f"authorization: Bearer {token}")
    key, body = shlex.quote("idempotency-key: my-first-key"), shlex.quote('{"agent_role": "planner"}')
    method = "orchestrator.controller.v1.SessionService/CreateSession"
    in_tools = ROOT / ".local" / "bin" / "grpcurl"
    grpcurl = str(in_tools) if in_tools.exists() else "grpcurl"
    buf = shlex.quote(str(ROOT / ".venv" / "bin" / "buf"))
    _say(f"\nA token for {TOKEN_HOURS} hours, roles {', '.join(TOKEN_ROLES)} (others: make token ROLE=…):\n\n{token}")
    _say("\nCalls to paste into another terminal; pasted twice, the second is answered with the first one's bytes:\n")
    _say(f"{grpcurl} -plaintext -H {header} -H {key} -d {body} {target} {method}\n")
    _say(
        f"{buf} curl --protocol grpc --http2-prior-knowledge -H {header} -H {key} -d {body} http://{target}/{method}\n"
    )
    if shutil.which(grpcurl) is None:
        _say("(grpcurl is not installed: with Go, `make tools` gets it, and then its line is printed with its path.)\n")
    _say("Up. Ctrl-C stops everything.")


def _watch(children: list[Child]) -> NoReturn:
    while True:
        time.sleep(0.3)
        for child in children:
            if not child.running:
                lines = "\n".join(f"  {line}" for line in child.output().strip().splitlines()[-10:])
                raise LocalError(
                    f"{child.name} ended by itself with code {child.exit_code}, so everything is stopped;"
                    f" its last lines ({child.log}):\n{lines}"
                )


def _check_database(url: str) -> None:
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            where = f"{connection.info.host}:{connection.info.port}"
    except psycopg.Error as error:
        raise LocalError(f"DATABASE_URL: {str(error).strip().splitlines()[-1]}") from None
    _say(f"Postgres         {where}, from DATABASE_URL")


def _check_redis(url: str) -> None:
    parts = urlsplit(url)
    host, number = parts.hostname or LOOPBACK, parts.port or 6379
    try:
        socket.create_connection((host, number), timeout=5).close()
    except OSError as error:
        raise LocalError(f"REDIS_URL: {host}:{number} cannot be reached: {error.strerror or error}") from None
    _say(f"Redis            {host}:{number}, from REDIS_URL")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (LocalError, OSError) as fault:
        print(f"make up: {fault}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
