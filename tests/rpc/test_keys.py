"""Keys as no client of ours would send them, and keys where none is wanted."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from svckit.auth import AGENT, OPERATE
from tests.client import METHODS, PLANNER, WORKER, Agent, Tenant, full_method, struct
from tests.oracle import Tables
from tests.system.pair import Pair

METHOD = sessions_pb.DESCRIPTOR.services_by_name["SessionService"].methods_by_name["CreateSession"]
VISIBLE = {chr(code) for code in range(33, 127)}


@pytest.fixture
def near_replays(shared_pair: Pair) -> Callable[[], float]:
    """How many answers the controller has given from its own memory."""
    return lambda: shared_pair.metric("controller", "orchestrator_near_replays_total")


def is_good(key: str) -> bool:
    return 1 <= len(key) <= 255 and set(key) <= VISIBLE


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_is_sent_as_a_key_is_taken_or_refused(
    seed: int, agent: Agent, tenant: Tenant, tables: Tables
) -> None:
    """Random lengths, characters and numbers of keys: a good one has one effect, any other none and its own reason."""
    rng = random.Random(seed)
    alphabet = [chr(code) for code in range(32, 127)]  # what a client of gRPC lets pass
    request = sessions_pb.CreateSessionRequest(agent_role=PLANNER)
    effects: set[str] = set()
    for _ in range(60):
        keys = [
            "".join(
                rng.choices(
                    alphabet if rng.random() < 0.5 else sorted(VISIBLE), k=rng.choice((0, 1, 2, 9, 254, 255, 256, 4000))
                )
            )
            for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))
        ]
        answer = await agent.ask(request, metadata=[("idempotency-key", key) for key in keys])
        if len(keys) == 1 and is_good(keys[0]):
            assert answer.ok, f"{keys}: {answer}"
            effects.add(keys[0])
        else:
            assert answer.refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_INVALID"), f"{keys}: {answer}"
            assert answer.fields == ["idempotency-key"]
    assert tables.sessions(tenant.name) == tables.audits(tenant.name) == len(effects)


async def test_parts_of_a_scope_cannot_be_moved_into_one_another(tenant: Tenant, tables: Tables) -> None:
    """Whatever separators a subject and a key contain, no two pairs of them are one key."""
    request = sessions_pb.CreateSessionRequest(agent_role=PLANNER)
    bodies = set()
    for separator in (":", "/", "|", "\\0", ","):
        for subject, key in ((f"a{separator}b", "c"), ("a", f"b{separator}c"), (f"a{separator}", f"b{separator}c")):
            answer = await tenant.agent(subject).ask(request, key=key)
            assert answer.ok and not answer.replayed
            bodies.add(answer.body)
    assert len(bodies) == tables.sessions(tenant.name) == 15


async def test_a_retry_needs_the_rights_of_a_first_call(tenant: Tenant, tables: Tables) -> None:
    """An answer that the process remembers is told to the same caller with any token, but not past a lost role."""
    request = sessions_pb.CreateSessionRequest(agent_role=PLANNER)

    def agent(subject: str, *roles: str) -> Agent:
        return tenant.agent(subject, roles=roles, permissions=(AGENT,))

    first = await agent("a", PLANNER).ask(request, key="k")
    assert first.ok and not first.replayed
    with tables.unchanged(tenant.name):
        for same in (agent("a", PLANNER), agent("a", PLANNER, WORKER)):
            again = await same.ask(request, key="k")
            assert again.replayed and again.body == first.body
        for less in (agent("a", WORKER), agent("a")):
            without = await less.ask(request, key="k")
            assert without.refusal == ("PERMISSION_DENIED", "ROLE_NOT_HELD")
    other = await agent("b", PLANNER).ask(request, key="k")
    assert other.ok and not other.replayed and other.body != first.body

    operator = tenant.agent("operator", roles=(), permissions=(AGENT, OPERATE))
    assert (await operator.ask(request, key="k")).ok
    without = await tenant.agent("operator", roles=(), permissions=(AGENT,)).ask(request, key="k")
    assert without.refusal == ("PERMISSION_DENIED", "ROLE_NOT_HELD")


async def test_a_remembered_answer_is_given_to_the_same_content_only(
    agent: Agent, tables: Tables, near_replays: Callable[[], float]
) -> None:
    parts = [struct({name: value}).SerializeToString() for name, value in (("a", 1), ("b", "x"), ("b", "y"))]

    def request(*order: int) -> sessions_pb.CreateSessionRequest:
        made = sessions_pb.CreateSessionRequest(agent_role=PLANNER)
        made.metadata.MergeFromString(b"".join(parts[number] for number in order))
        return made

    first = await agent.ask(request(0, 1), key="k")
    assert first.ok and not first.replayed
    with tables.unchanged(agent.tenant):
        before = near_replays()
        for order in ((0, 1), (1, 0)):
            again = await agent.ask(request(*order), key="k")
            assert again.replayed and again.body == first.body
        assert near_replays() == before + 2
        assert (await agent.ask(request(0, 2), key="k")).refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
        late = await agent.ask(request(0, 1), key="k", metadata=[("idempotency-first-sent", "yesterday")])
        assert late.refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_FIRST_SENT_INVALID")
        for keys in (("k", "k"), ("k", "x"), ("x", "k")):
            twice = await agent.ask(request(0, 1), metadata=[("idempotency-key", key) for key in keys])
            assert twice.refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_INVALID")
        assert near_replays() == before + 2


async def test_a_field_that_is_no_part_of_the_fingerprint_is_looked_at_all_the_same(tenant: Tenant) -> None:
    agent = tenant.agent()
    session = (await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key="s")).response.session.id
    route = tasks_pb.RouteTaskRequest(session_id=session, type="ROUTING", target_role=WORKER)
    assert (await agent.ask(route, key="t")).ok

    def claim(wait: int) -> tasks_pb.ClaimTasksRequest:
        return tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=1, wait=Duration(seconds=wait))

    first = await agent.ask(claim(1), key="k")
    assert len(first.response.tasks) == 1
    for wait in (1, 2):
        again = await agent.ask(claim(wait), key="k")
        assert again.replayed and again.body == first.body
    for wait in (-1, 31):
        assert (await agent.ask(claim(wait), key="k")).refusal == ("INVALID_ARGUMENT", "FIELD_INVALID")


async def test_a_key_of_ten_megabytes(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """gRPC itself refuses it; the next call is served."""
    with tables.unchanged(tenant.name):
        answer = await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key="k" * (10 << 20))
        assert answer.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE), str(answer)
    assert (await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key="k")).ok


async def test_each_struct_counts_by_its_content(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """Each field of type Struct of each write: in another order it is the same request, another value makes another."""
    session = await agent.create()
    await agent.route(session.id, target_role=PLANNER)
    (claimed,) = await agent.claim(PLANNER)
    metadata, task_id = (field_mask_pb2.FieldMask(paths=[path]) for path in ("metadata", "task_id"))
    requests: list[tuple[Message, tuple[str, ...]]] = [
        (sessions_pb.CreateSessionRequest(agent_role=PLANNER), ("metadata",)),
        (sessions_pb.UpdateSessionRequest(session_id=session.id, update_mask=metadata), ("metadata",)),
        (
            sessions_pb.UpdateSessionRequest(session_id=session.id, update_mask=task_id, task_id=claimed.task.id),
            ("metadata",),  # which counts, though the mask says to leave it
        ),
        (
            tasks_pb.RouteTaskRequest(session_id=session.id, target_role=WORKER, type="ROUTING"),
            ("data", "context"),
        ),
        (tasks_pb.CompleteTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id), ("result",)),
    ]
    for request, names in requests:
        for name in names:
            getattr(request, name).update({name: 1, "list": [True, None, 0.5], "a": {"b": "c", "d": -7}})
        method = METHODS[request.DESCRIPTOR.full_name]
        raw = request.SerializeToString()
        key = [("idempotency-key", secrets.token_hex(8))]
        first = await agent.send(method, raw, metadata=key)
        assert first.ok and not first.replayed, f"{method.name}: {first}"
        with tables.unchanged(tenant.name):
            for again in (raw, in_pieces(request, names), in_pieces(request, names)):
                answer = await agent.send(method, again, metadata=key)
                assert answer.said == first.said and answer.replayed, f"{method.name}: {answer}"
            for name in names:
                for change in ({name: 2}, {"a": {"b": "c", "d": -8}}, {"": None}):
                    other = type(request).FromString(raw)
                    getattr(other, name).update(change)
                    answer = await agent.send(method, other.SerializeToString(), metadata=key)
                    assert answer.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED"), f"{name}: {answer}"


def in_pieces(request: Message, names: Iterable[str]) -> bytes:
    """Another encoding of the same request: the structs' entries one by one, in any order."""
    rest = type(request).FromString(request.SerializeToString())
    pieces = []
    for name in names:
        rest.ClearField(name)
        for key, value in getattr(request, name).fields.items():
            piece = type(request)()
            getattr(piece, name).fields[key].CopyFrom(value)
            pieces.append(piece.SerializeToString())
    random.shuffle(pieces)
    return b"".join([*pieces, rest.SerializeToString()])


# -- what no client of gRPC sends: frames made by hand --


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """HPACK: a literal that enters no table, without Huffman codes."""

    def text(raw: bytes) -> bytes:
        return bytes([len(raw)]) + raw if len(raw) < 127 else b"\x7f" + _more(len(raw) - 127) + raw

    return b"\0" + text(name) + text(value)


def _more(number: int) -> bytes:
    parts = bytearray()
    while number >= 128:
        parts.append(number % 128 | 128)
        number //= 128
    return bytes([*parts, number])


async def raw_call(agent: Agent, keys: Iterable[bytes], message: bytes) -> None:
    """Sends a CreateSession with these bytes as keys, and waits until the server ends the stream or the connection."""
    host, _, port = agent.target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", full_method(METHOD).encode()),
        (b":authority", agent.target.encode()),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", f"Bearer {agent.token}".encode()),
        *((b"idempotency-key", key) for key in keys),
    ]
    block = b"".join(header(name, value) for name, value in headers)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    writer.write(frame(1, 0x4, 1, block) + frame(0, 0x1, 1, body))
    await writer.drain()
    try:
        async with asyncio.timeout(30):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if stream == 1 and (kind == 3 or (kind == 1 and flags & 1)):  # RST_STREAM, or trailers
                    return
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def test_bytes_that_are_no_text(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """Control characters, NUL, what is no ASCII and no UTF-8, in any place: no effect, and the server goes on."""
    message = sessions_pb.CreateSessionRequest(agent_role=PLANNER).SerializeToString()
    await raw_call(agent, [b"good"], message)
    assert tables.sessions(tenant.name) == 1, "frames made by hand arrive"
    with tables.unchanged(tenant.name):
        for bad in (
            b"\0",
            b"\r\n",
            b"\n",
            b"\x7f",
            b"\x1b[2J",
            b"\xff\xfe",
            "é".encode(),
            "\u202e".encode(),
            b"\t",
            b"a b",
        ):
            for key in (bad, b"k" + bad + b"k", bad * 80):
                if key.strip(b" \t"):
                    await raw_call(agent, [key], message)
        await raw_call(agent, [b"one", b"two"], message)
        await raw_call(agent, [b"one,two", b"one"], message)
    again = await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key="good")
    assert again.ok and again.replayed


# -- where no key is wanted --


async def test_streams_and_reads_take_no_notice_of_a_key(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """Those there are, the servers' own included: whatever the key, each is answered anew, and nothing is kept."""
    key = (("idempotency-key", "k"),)
    session = await agent.create()
    stub = agent.channels[0]
    for verb in ("Activate", "Pause"):
        guards = tables.guards(tenant.name)
        watch = stub.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(), metadata=key, timeout=10)
        health: Any = await watch.read()
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        listed = stub.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=key, timeout=10)
        answer: Any = await listed.read()
        assert answer.list_services_response.service
        read = await agent.ask(sessions_pb.GetSessionRequest(session_id=session.id), key="k")
        assert read.response.session.etag == session.etag and not read.replayed
        assert tables.guards(tenant.name) == guards
        session = (await agent.change(verb, session.id)).response.session
