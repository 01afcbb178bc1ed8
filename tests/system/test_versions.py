"""A deployment that rolls: two versions of the controller on one database, of which one knows a field more."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2 as reflection_pb

from deploy.local.issuer import Issuer
from deploy.local.processes import ROOT
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PLANNER, Agent, Tenant, struct
from tests.history import History, Traffic
from tests.system.conftest import NEAR_OFF, World

MODULE = "orchestrator/controller/v1/session_service_pb2.py"
ADDED = 90
"""The number of the field `note` that the newer version's CreateSessionRequest and Session have."""

METHOD = sessions_pb.DESCRIPTOR.services_by_name["SessionService"].methods_by_name["CreateSession"]
Two = tuple[Agent, Agent]


def newer(folder: Path) -> Path:
    """A copy of gen/ in which two messages have a field more."""
    shutil.copytree(ROOT / "gen", folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = FileDescriptorProto.FromString(sessions_pb.DESCRIPTOR.serialized_pb)
    for message in file.message_type:
        if message.name in ("CreateSessionRequest", "Session"):
            message.field.add(
                name="note",
                json_name="note",
                number=ADDED,
                type=FieldDescriptorProto.TYPE_STRING,
                label=FieldDescriptorProto.LABEL_OPTIONAL,
            )
    module = folder / MODULE
    code, count = re.subn(
        r"AddSerializedFile\(b'.*'\)",
        lambda _: f"AddSerializedFile({file.SerializeToString()!r})",
        module.read_text(),
    )
    assert count == 1
    module.write_text(code)
    return folder


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> World:
    """The first controller is of this version, the second of the next one."""
    world = start_world(controllers=2, failpoints=True, controller_env=NEAR_OFF)
    service = world.pair.services["controller-2"]
    env = dict(service.env or {})
    gen = newer(tmp_path_factory.mktemp("newer") / "gen")
    service.env = {**env, "PYTHONPATH": f"{gen}{os.pathsep}{env['PYTHONPATH']}"}
    world.pair.restart("controller-2")
    return world


@pytest_asyncio.fixture
async def agents(world: World, issuer: Issuer) -> AsyncIterator[Two]:
    """One subject at the older and at the newer version."""
    older, later = world.pair.controller_targets
    tenant = Tenant(issuer, older)
    yield tenant.agent(), tenant.agent(target=later)
    await tenant.close()


def encoded(note: str, *, backwards: bool = False) -> bytes:
    """A CreateSession of a newer client; `backwards` puts its map and its fields in another order."""
    names = ["a", "b", "c"]
    metadata = struct({name: name for name in (reversed(names) if backwards else names)})
    head = sessions_pb.CreateSessionRequest(agent_role=PLANNER).SerializeToString()
    tail = sessions_pb.CreateSessionRequest(metadata=metadata).SerializeToString()
    text = note.encode()
    new = bytes([(ADDED << 3 | 2) & 0x7F | 0x80, (ADDED << 3) >> 7, len(text)]) + text if note else b""
    return new + tail + head if backwards else head + tail + new


async def test_only_the_newer_version_knows_the_field(agents: Two) -> None:
    """As its reflection says; else both were one version, and this file would prove nothing."""
    request = reflection_pb.ServerReflectionRequest(file_containing_symbol="orchestrator.controller.v1.Session")
    known = []
    for agent in agents:
        call = agent.channels[0].stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb.ServerReflectionResponse.FromString,
        )
        answers = call(iter([request]), timeout=10)
        answer: Any = await answers.read()
        file = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        fields = {field.name for message in file.message_type for field in message.field}
        known.append("note" in fields)
    assert known == [False, True]


@pytest.mark.parametrize("note", ["", "new"])
@pytest.mark.parametrize("first", [0, 1], ids=["older first", "newer first"])
@pytest.mark.parametrize("backwards", [False, True], ids=["same bytes", "encoded anew"])
async def test_a_retry_at_the_other_version_is_a_replay(
    note: str, first: int, backwards: bool, world: World, agents: Two
) -> None:
    """By Redis and by the guard alone; and a request with another note is another request to both."""
    key = [("idempotency-key", "k")]
    made = await agents[first].send(METHOD, encoded(note), metadata=key)
    assert made.ok and not made.replayed
    for forgotten in (False, True):
        if forgotten:
            await agents[first].change("Activate", made.response.session.id)  # the answer is that of then
            world.valkey.stop()
        try:
            for agent in (agents[1 - first], agents[first]):
                again = await agent.send(METHOD, encoded(note, backwards=backwards), metadata=key)
                assert again.body == made.body and again.replayed
                other = await agent.send(METHOD, encoded(note + "other"), metadata=key)
                assert other.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
        finally:
            if forgotten:
                world.valkey.start()
    assert world.tables.sessions(agents[0].tenant) == 1


async def test_traffic_across_versions(world: World, agents: Two) -> None:
    """Every call of mixed traffic is asked again at the other version."""
    history = History()
    traffic = Traffic(history, agents)
    await traffic.prepare()
    await traffic.burst(60)
    await history.settle()
    for agent in agents:
        for call in [call for call in history.calls if call.lasting and not call.intent.key.startswith("keyless")]:
            if call.target != agent.target:
                await history.insist([agent], call.request, call.intent.key)
    history.enough(60, {"at both": len({call.target for call in history.calls}) - 1})
    history.check(world.tables)
