"""Starts the controller: configuration → Postgres → channel → door → servicers → serve."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from importlib.metadata import version

from controller_svc.claims import Claims
from controller_svc.config import ControllerSettings
from controller_svc.core.sessions import SessionMutations
from controller_svc.core.tasks import TaskMutations
from controller_svc.idempotency import Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.pages import PageTokens
from controller_svc.records import Records
from controller_svc.servicers.audit import AuditServicer
from controller_svc.servicers.records import RecordServicer
from controller_svc.servicers.sessions import SessionServicer
from controller_svc.servicers.status import StatusServicer
from controller_svc.servicers.tasks import TaskServicer
from controller_svc.store.audit import Audit
from controller_svc.store.database import Database
from controller_svc.store.guards import Guards
from controller_svc.store.heartbeats import Heartbeats
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks
from controller_svc.sweepers import Sweepers
from orchestrator.controller.v1 import (
    audit_service_pb2,
    record_service_pb2,
    session_service_pb2,
    status_service_pb2,
    task_service_pb2,
)
from orchestrator.idempotency.v1.idempotency_service_pb2_grpc import IdempotencyServiceStub
from svckit.auth import TokenSigner, TokenVerifier
from svckit.client import ClientTls, ServiceChannel, open_channel
from svckit.config import load
from svckit.server import Server, run
from svckit.telemetry import configure_logging

LOOK_SECONDS = 2.0
"""For which the start waits for Postgres at most: who calls at once is answered then, not refused."""


def main() -> None:
    """Serves until a signal.

    Exits with 2 and one line per fault when the environment is wrong, with 1 when it cannot listen.
    """
    settings = load(ControllerSettings)
    configure_logging(settings.log_level, "controller_svc")
    run(lambda: serve(settings), processes=settings.processes)


async def serve(settings: ControllerSettings) -> None:
    """Serves; returns when every accepted call is answered and what was under way is written."""
    server = Server(
        settings, TokenVerifier.for_users(settings), host=settings.controller_host, port=settings.controller_port
    )
    announcements: set[asyncio.Task[None]] = set()

    def announce(up: bool) -> None:
        task = asyncio.get_running_loop().create_task(server.set_ready(up))
        announcements.add(task)
        task.add_done_callback(announcements.discard)

    database = Database(settings.database_url.get_secret_value(), lanes=settings.write_lanes, on_change=announce)
    channel = _channel(settings)
    stub = None if channel is None else IdempotencyServiceStub(channel)
    idempotency = Idempotency(stub, ttl=settings.idempotency_ttl_seconds)
    session_mutations = SessionMutations(timedelta(days=settings.session_retention_days))
    task_mutations = TaskMutations()
    sessions, tasks = Sessions(database), Tasks(database)
    door = Door(
        database,
        idempotency,
        Lifetimes(settings.idempotency_ttl_seconds, settings.idempotency_error_ttl_seconds),
        lanes=settings.write_lanes,
        near_bytes=settings.near_replay_bytes,
        always_require_key=settings.idempotency_require_key == "all",
        on_written=lambda row: claims.written(row),  # noqa: PLW0108 - claims needs the door first
    )
    claims = Claims(database, door, task_mutations)
    sweepers = Sweepers(
        database,
        door,
        sessions=sessions,
        session_mutations=session_mutations,
        tasks=tasks,
        task_mutations=task_mutations,
    )
    pages = PageTokens(settings.page_token_key.get_secret_value().encode())

    replay = door.known if settings.near_replay_bytes else None
    for file, name, servicer in (
        (session_service_pb2, "SessionService", SessionServicer(door, sessions, session_mutations, pages)),
        (
            task_service_pb2,
            "TaskService",
            TaskServicer(door, tasks, task_mutations, pages, claims=claims, heartbeats=Heartbeats(database)),
        ),
        (audit_service_pb2, "AuditService", AuditServicer(Audit(database), pages)),
        (
            record_service_pb2,
            "RecordService",
            RecordServicer(Guards(database), Records(stub, ttl=settings.idempotency_ttl_seconds)),
        ),
        (status_service_pb2, "StatusService", StatusServicer(database, idempotency, version("orchestrator"))),
    ):
        server.register(file.DESCRIPTOR.services_by_name[name], servicer, replay)

    await database.open()
    await database.looked(LOOK_SECONDS)
    await server.start()
    claims.start()
    sweepers.start()
    await server.stopping.wait()
    claims.stop()
    await sweepers.stop()
    await server.wait()
    await claims.close()
    await door.close()
    await idempotency.close()
    if channel is not None:
        await channel.close()
    await database.close()


def _channel(settings: ControllerSettings) -> ServiceChannel | None:
    """The way to idempotency_svc; None when it is switched off."""
    if not settings.idempotency_enabled or settings.service_key_file is None:
        return None
    tls = None
    if settings.idempotency_ca_file is not None:
        tls = ClientTls(settings.idempotency_ca_file, settings.idempotency_cert_file, settings.idempotency_key_file)
    return open_channel(
        settings.idempotency_target,
        signer=TokenSigner.for_service(settings, settings.service_key_file),
        tls=tls,
        allow_plaintext=settings.allow_plaintext,
    )


if __name__ == "__main__":
    main()
