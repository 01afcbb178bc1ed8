"""What is called: the requests of the ghz configurations, which are those of the aio client too."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FileDescriptor

from orchestrator.controller.v1 import session_service_pb2, task_service_pb2

CONNECTIONS = 8
ECHOES = ("echo", "echo-keyed")
"""Answered by the echo; the second is sent what CreateSession is sent, token and key included."""
TIMEOUT_SECONDS = 20.0
REPLAYS = 1000
"""Sessions that are there before anything is measured, with the keys `replay-0`, `replay-1`, … of replay.json."""

ROLES = ("orchestrator.agent", "planner", "queue", "loop", "mix")
"""What the token holds. Tasks for `queue` are those of route and claim; `loop` and `mix` have roles of their own."""

_FOLDER = Path(__file__).parent / "ghz"
_SERVICES = (session_service_pb2.DESCRIPTOR, task_service_pb2.DESCRIPTOR)  # imported, they are in the descriptor pool


def config(name: str, **values: str) -> dict[str, Any]:
    """The ghz configuration of this name, with its $NAMES replaced by `values`; those without a value stay."""
    text = (_FOLDER / f"{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(Template(text).safe_substitute(values))
    return loaded


def path(name: str) -> str:
    """The HTTP/2 path of the method that this configuration calls."""
    service, _, method = config(name)["call"].rpartition(".")
    return f"/{service}/{method}"


def protoset() -> bytes:
    """The protos of all these methods, with what they import, as a serialised FileDescriptorSet."""
    files: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        if file.name not in files:
            for imported in file.dependencies:
                add(imported)
            files[file.name] = file

    for file in _SERVICES:
        add(file)
    protos = descriptor_pb2.FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(protos.file.add())
    return protos.SerializeToString()


def request(name: str, **values: str) -> bytes:
    """The serialised request of this configuration."""
    loaded = config(name, **values)
    method = descriptor_pool.Default().FindMethodByName(loaded["call"])
    message = json_format.ParseDict(loaded["data"], message_factory.GetMessageClass(method.input_type)())
    return message.SerializeToString(deterministic=True)


def example_answer() -> bytes:
    """An answer of CreateSession's size."""
    asked = session_service_pb2.CreateSessionRequest.FromString(request("create"))
    session = session_service_pb2.Session(
        id="0" * 36,
        agent_role=asked.agent_role,
        state=session_service_pb2.Session.STATE_PENDING,
        metadata=asked.metadata,
        etag="1",
    )
    for time in (session.create_time, session.update_time, session.expire_time):
        time.FromMicroseconds(1_800_000_000_123_456)
    return session_service_pb2.CreateSessionResponse(session=session).SerializeToString()
