"""One writer process of the stress test: the real servicers, door and store, without idempotency_svc or a socket.

    python -m tests.system.writer DATABASE_URL OUTPUT SEED KEYS SESSIONS

Calls with keys 0..KEYS-1 in any order, for ever; what a key asks for follows from its number alone, so that all writers
ask the same. Each answer is a line `key code digest` in OUTPUT, written before the next call.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from google.protobuf.struct_pb2 import Struct

from controller_svc.core.sessions import SessionMutations
from controller_svc.core.tasks import TaskMutations
from controller_svc.idempotency import Idempotency
from controller_svc.mutation import Door, Lifetimes
from controller_svc.pages import PageTokens
from controller_svc.servicers.sessions import SessionServicer
from controller_svc.servicers.tasks import TaskServicer
from controller_svc.store.database import Database
from controller_svc.store.sessions import Sessions
from controller_svc.store.tasks import Tasks
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from svckit.auth import Principal
from svckit.errors import ServiceError
from svckit.interceptors import Admission, Call
from svckit.options import Policy, policies
from svckit.statuses import code_of, status_of
from svckit.telemetry import new_trace

TENANT = "stress"
ROLE = "writer"
CONCURRENCY = 48

PRINCIPAL = Principal(
    issuer="stress",
    tenant=TENANT,
    subject="writer",
    roles=frozenset({ROLE}),
    permissions=frozenset({"orchestrator.agent"}),
)


def request_of(key: int, sessions: list[str]) -> tuple[str, Any]:
    """(method, request) of a key."""
    rng = random.Random(key)
    session_id = rng.choice(sessions)
    data = Struct()
    data.update({"key": key, "n": {"x": [1, 2, key]}})
    match rng.choice(
        ("Create", "Update", "Activate", "Pause", "Resume", "Activate", "Pause", "Resume", "Route", "Missing", "Etag")
    ):
        case "Create":
            return "CreateSession", sessions_pb.CreateSessionRequest(agent_role=ROLE, metadata=data)
        case "Update":
            request = sessions_pb.UpdateSessionRequest(session_id=session_id, metadata=data)
            request.update_mask.paths.append("metadata")
            return "UpdateSession", request
        case "Etag":
            request = sessions_pb.UpdateSessionRequest(
                session_id=session_id, metadata=data, etag=str(rng.randrange(1, 200))
            )
            request.update_mask.paths.append("metadata")
            return "UpdateSession", request
        case "Activate":
            return "ActivateSession", sessions_pb.ActivateSessionRequest(session_id=session_id)
        case "Pause":
            return "PauseSession", sessions_pb.PauseSessionRequest(session_id=session_id)
        case "Resume":
            return "ResumeSession", sessions_pb.ResumeSessionRequest(session_id=session_id)
        case "Missing":
            return "CompleteSession", sessions_pb.CompleteSessionRequest(
                session_id="01900000-0000-7000-8000-000000000000"
            )
        case _:
            return "RouteTask", tasks_pb.RouteTaskRequest(
                session_id=session_id, type="ROUTING", target_role="reader", data=data
            )


def call_of(policy: Policy, request: Any, key: int, seconds: float) -> Call:
    """The call as the interceptors would hand it on."""
    return Call(
        policy=policy,
        raw=request.SerializeToString(),
        metadata=(("idempotency-key", f"key-{key}"),),
        deadline=asyncio.get_running_loop().time() + seconds,
        trace=new_trace(),
        principal=PRINCIPAL,
        admission=ADMISSION,
        request=request,
    )


ADMISSION = Admission(max_in_flight=10_000, max_waiting=10_000)


async def main(url: str, output: str, seed: int, keys: int, sessions: list[str]) -> None:
    """Writes until it is killed."""
    database = Database(url, lanes=2)
    await database.open()
    while not database.ready:
        await asyncio.sleep(0.01)
    door = Door(database, Idempotency(None, ttl=86400), Lifetimes(ok=86400, error=600), lanes=2)
    pages = PageTokens(b"k" * 32)
    session_servicer = SessionServicer(door, Sessions(database), SessionMutations(timedelta(days=7)), pages)
    task_servicer = TaskServicer(
        door,
        Tasks(database),
        TaskMutations(),
        pages,
        claims=None,  # type: ignore[arg-type]
        heartbeats=None,  # type: ignore[arg-type]
    )
    table = {}
    for servicer, service in (
        (session_servicer, sessions_pb.DESCRIPTOR.services_by_name["SessionService"]),
        (task_servicer, tasks_pb.DESCRIPTOR.services_by_name["TaskService"]),
    ):
        for policy in policies(service, 16384).values():
            table[policy.full_method.rpartition("/")[2]] = (
                policy,
                getattr(servicer, policy.full_method.rpartition("/")[2]),
            )
    rng = random.Random(f"{seed}-{os.getpid()}")
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def caller() -> None:
        while True:
            key = rng.randrange(keys)
            name, request = request_of(key, sessions)
            policy, method = table[name]
            try:
                code, answer = (
                    0,
                    await method(request, call_of(policy, request, key, rng.choice((0.05, 0.5, 5.0, 30.0)))),
                )
            except ServiceError as error:
                code, answer = code_of(error).value[0], status_of(error).SerializeToString()
            os.write(descriptor, f"{key} {code} {hashlib.sha256(answer).hexdigest()[:24]}\n".encode())

    await asyncio.gather(*(caller() for _ in range(CONCURRENCY)))


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]).read_text().split())
    )
