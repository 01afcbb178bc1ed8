"""Bad input: a definite code, a reason, the field named, and nothing written."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import record_service_pb2 as records_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import AGENT, OPERATE, PLANNER, WORKER, Agent, Tenant, spans, struct
from tests.oracle import Tables

ID = "01900000-0000-7000-8000-000000000000"
"""A well-formed id that names nothing."""
BAD_IDS = ("x", ID[:-1], ID.replace("-", ""), f"{{{ID}}}", f"{ID}\0", "01900000-0000-7000-8000-00000000000g", f" {ID}")
BAD_ROLES = ("-x", ".", "a b", "a" * 65, "rôle", "a\0", "a\n", "a/b")
BAD_NAMES = ("routing", "1A", "A" * 64, "A-B", "Ä", "A\0", "_A")
BAD_STRUCTS = {
    "NUL in a string": struct({"a": "b\0"}),
    "NUL in a key": struct({"a\0": 1}),
    "NUL deep inside": struct({"a": [{"b": ["\0"]}]}),
    "NaN": struct({"a": float("nan")}),
    "infinity": struct({"a": [1, float("-inf")]}),
    "no kind": Struct(fields={"a": Value()}),
    "no kind in a list": Struct(fields={"a": Value(list_value=ListValue(values=[Value()]))}),
}


def nested(levels: int) -> Struct:
    """A struct of this depth."""
    values: dict[str, Any] = {}
    for _ in range(levels - 1):
        values = {"a": values}
    return struct(values)


def route(**fields: Any) -> tasks_pb.RouteTaskRequest:
    return tasks_pb.RouteTaskRequest(**{"session_id": ID, "type": "ROUTING", "target_role": WORKER, **fields})


def update(**fields: Any) -> sessions_pb.UpdateSessionRequest:
    return sessions_pb.UpdateSessionRequest(
        **{"session_id": ID, "update_mask": FieldMask(paths=["metadata"]), **fields}
    )


def fail(**error: Any) -> tasks_pb.FailTaskRequest:
    return tasks_pb.FailTaskRequest(task_id=ID, lease_id=ID, error=tasks_pb.TaskError(**{"code": "BROKEN", **error}))


def ahead(days: float) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(datetime.now(UTC) + timedelta(days=days))
    return made


Case = tuple[str, Message, str, str]
"""(what is wrong, the request, the reason, the field)."""


def ids(make: Callable[..., Message], field: str, *, required: bool = True) -> list[Case]:
    """The cases of a field that holds an id."""
    cases = [(f"{field} {bad!r}", make(**{field: bad}), "FIELD_INVALID", field) for bad in BAD_IDS]
    return [*cases, (f"no {field}", make(**{field: ""}), "FIELD_REQUIRED", field)] if required else cases


def roles(make: Callable[..., Message], field: str, *, required: bool = True) -> list[Case]:
    """The cases of a field that holds a role."""
    cases = [(f"{field} {bad!r}", make(**{field: bad}), "FIELD_INVALID", field) for bad in BAD_ROLES]
    return [*cases, (f"no {field}", make(**{field: ""}), "FIELD_REQUIRED", field)] if required else cases


def structs(make: Callable[..., Message], field: str) -> list[Case]:
    """The cases of a field that holds a struct."""
    cases = [
        (f"{field} with {name}", make(**{field: bad}), "FIELD_INVALID", field) for name, bad in BAD_STRUCTS.items()
    ]
    return [*cases, (f"{field} too deep", make(**{field: nested(33)}), "FIELD_INVALID", field)]


def numbers(make: Callable[..., Message], field: str, *bad: Any) -> list[Case]:
    """The cases of a field with limits."""
    return [(f"{field} {str(value).strip()}", make(**{field: value}), "FIELD_INVALID", field) for value in bad]


def pages(make: Callable[..., Message]) -> list[Case]:
    """The cases of what every list has."""
    return [
        ("page_size -1", make(page_size=-1), "FIELD_INVALID", "page_size"),
        ("page_size least", make(page_size=-(2**31)), "FIELD_INVALID", "page_size"),
        *(
            (f"page_token {bad!r}", make(page_token=bad), "PAGE_TOKEN_INVALID", "page_token")
            for bad in ("x", "=", "ä", "\0", "A" * 60, "A" * 4000)
        ),
    ]


def of_lease(make: Callable[..., Message]) -> list[Case]:
    """The cases of a task's and its lease's id."""
    return [
        *ids(lambda **fields: make(**{"lease_id": ID, **fields}), "task_id"),
        *ids(lambda **fields: make(**{"task_id": ID, **fields}), "lease_id"),
    ]


def of_key(kind: Callable[..., Message]) -> list[Case]:
    """The cases of what names a key."""
    service = "/orchestrator.controller.v1.SessionService"

    def make(**fields: Any) -> Message:
        return kind(**{"method": f"{service}/CreateSession", "subject": "s", "idempotency_key": "k", **fields})

    bad_methods = (
        "CreateSession", f"{service}/DropSession", f"{service}/GetSession", f"{service}.CreateSession", f"{service}/",
        f"{service[1:]}/CreateSession", f"/{service}/CreateSession", f"{service}/CreateSession/", "/", "ä", "a\0/b",
        "/orchestrator.controller.v1.TaskService/HeartbeatTask",
        "/orchestrator.idempotency.v1.IdempotencyService/Claim", "/grpc.health.v1.Health/Check",
    )  # fmt: skip
    bad_keys = ("a b", "a\n", "ä", "\x7f", "a\0", "a" * 256)
    return [
        *((f"{field} missing", make(**{field: ""}), "FIELD_REQUIRED", field) for field in ("method", "subject")),
        ("no key", make(idempotency_key=""), "FIELD_REQUIRED", "idempotency_key"),
        *((f"method {bad!r}", make(method=bad), "FIELD_INVALID", "method") for bad in bad_methods),
        *((f"key {bad!r}", make(idempotency_key=bad), "FIELD_INVALID", "idempotency_key") for bad in bad_keys),
        *(
            (f"{field} too long", make(**{field: "a" * 1025}), "FIELD_INVALID", field)
            for field in ("subject", "issuer")
        ),
        ("subject with NUL", make(subject="\0"), "FIELD_INVALID", "subject"),
    ]


def create(**fields: Any) -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(**{"agent_role": PLANNER, **fields})


def heartbeat(**fields: Any) -> tasks_pb.HeartbeatTaskRequest:
    return tasks_pb.HeartbeatTaskRequest(**{"task_id": ID, "lease_id": ID, **fields})


def complete(**fields: Any) -> tasks_pb.CompleteTaskRequest:
    return tasks_pb.CompleteTaskRequest(**{"task_id": ID, "lease_id": ID, **fields})


def claim(**fields: Any) -> tasks_pb.ClaimTasksRequest:
    return tasks_pb.ClaimTasksRequest(**{"role": WORKER, **fields})


CASES: dict[str, list[Case]] = {
    "CreateSession": [
        *roles(create, "agent_role"),
        *ids(create, "task_id", required=False),
        *structs(create, "metadata"),
        ("metadata too large", create(metadata=struct({"a": "\x01" * 2800})), "METADATA_TOO_LARGE", "metadata"),
    ],
    "GetSession": ids(sessions_pb.GetSessionRequest, "session_id"),
    "ListSessions": [
        *pages(sessions_pb.ListSessionsRequest),
        *roles(sessions_pb.ListSessionsRequest, "agent_role", required=False),
        *ids(sessions_pb.ListSessionsRequest, "task_id", required=False),
        *numbers(sessions_pb.ListSessionsRequest, "state", 7, -1, 2**31 - 1),
    ],
    "UpdateSession": [
        *ids(update, "session_id"),
        *ids(update, "task_id", required=False),
        *structs(update, "metadata"),
        ("metadata too large", update(metadata=struct({"a": "\x01" * 2800})), "METADATA_TOO_LARGE", "metadata"),
        ("no mask", update(update_mask=None), "FIELD_REQUIRED", "update_mask"),
        *(
            (f"mask {bad!r}", update(update_mask=FieldMask(paths=bad)), "FIELD_INVALID", "update_mask")
            for bad in (["state"], ["metadata."], ["metadata.a\0"], ["metadata", "metadata"], [""], ["metadata", "id"])
        ),
    ],
    **{
        f"{verb}Session": ids(getattr(sessions_pb, f"{verb}SessionRequest"), "session_id")
        for verb in ("Activate", "Pause", "Resume", "Complete", "Fail")
    },
    "RouteTask": [
        *ids(route, "session_id"),
        *((f"type {bad!r}", route(type=bad), "FIELD_INVALID", "type") for bad in BAD_NAMES),
        ("no type", route(type=""), "FIELD_REQUIRED", "type"),
        *roles(route, "target_role"),
        ("description too long", route(description="ä" * 4097), "FIELD_INVALID", "description"),
        ("description with NUL", route(description="a\0"), "FIELD_INVALID", "description"),
        *structs(route, "data"),
        *structs(route, "context"),
        *numbers(route, "priority", -101, 101, 2**31 - 1),
        *numbers(route, "max_attempts", -1, 101),
        *numbers(route, "retry_backoff", spans(-1), spans(3601), Duration(seconds=1, nanos=-1), Duration(nanos=10**9)),
        *numbers(route, "lease_timeout", spans(0), spans(0.999), spans(3601), Duration(seconds=2**62)),
        *numbers(route, "attempt_timeout", spans(0), spans(86401)),
        *numbers(route, "schedule_time", Timestamp(seconds=-(2**62)), Timestamp(nanos=10**9), Timestamp(seconds=2**38)),
    ],
    "GetTask": ids(tasks_pb.GetTaskRequest, "task_id"),
    "ListTasks": [
        *pages(tasks_pb.ListTasksRequest),
        *ids(tasks_pb.ListTasksRequest, "session_id", required=False),
        *roles(tasks_pb.ListTasksRequest, "target_role", required=False),
        *numbers(tasks_pb.ListTasksRequest, "state", 7, -1),
        *((f"type {bad!r}", tasks_pb.ListTasksRequest(type=bad), "FIELD_INVALID", "type") for bad in BAD_NAMES),
    ],
    "CancelTask": [
        *ids(tasks_pb.CancelTaskRequest, "task_id"),
        ("reason too long", tasks_pb.CancelTaskRequest(task_id=ID, reason="a" * 1025), "FIELD_INVALID", "reason"),
        ("reason with NUL", tasks_pb.CancelTaskRequest(task_id=ID, reason="\0"), "FIELD_INVALID", "reason"),
    ],
    "ClaimTasks": [
        *roles(claim, "role"),
        *numbers(claim, "max_tasks", -1, 101),
        *numbers(claim, "wait", spans(-1), Duration(seconds=30, nanos=1000), spans(3600)),
    ],
    "HeartbeatTask": [*of_lease(tasks_pb.HeartbeatTaskRequest), *structs(heartbeat, "progress")],
    "CompleteTask": [*of_lease(tasks_pb.CompleteTaskRequest), *structs(complete, "result")],
    "FailTask": [
        *of_lease(lambda **fields: tasks_pb.FailTaskRequest(error=tasks_pb.TaskError(code="BROKEN"), **fields)),
        ("no error", tasks_pb.FailTaskRequest(task_id=ID, lease_id=ID), "FIELD_REQUIRED", "error"),
        ("no code", fail(code=""), "FIELD_REQUIRED", "error.code"),
        *((f"code {bad!r}", fail(code=bad), "FIELD_INVALID", "error.code") for bad in BAD_NAMES),
        ("message too long", fail(message="a" * 4097), "FIELD_INVALID", "error.message"),
        ("message with NUL", fail(message="a\0"), "FIELD_INVALID", "error.message"),
    ],
    "ReleaseTask": of_lease(tasks_pb.ReleaseTaskRequest),
    "ListAuditEvents": [
        *pages(audit_pb.ListAuditEventsRequest),
        *ids(audit_pb.ListAuditEventsRequest, "resource_id", required=False),
        ("method too long", audit_pb.ListAuditEventsRequest(method="a" * 1025), "FIELD_INVALID", "method"),
        ("subject with NUL", audit_pb.ListAuditEventsRequest(subject="\0"), "FIELD_INVALID", "subject"),
        (
            "start out of range",
            audit_pb.ListAuditEventsRequest(start_time=Timestamp(seconds=2**62)),
            "FIELD_INVALID",
            "start_time",
        ),
    ],
    "GetRecord": of_key(records_pb.GetRecordRequest),
    "ReleaseRecord": of_key(records_pb.ReleaseRecordRequest),
}


def test_every_method_has_cases() -> None:
    """GetStatus alone has nothing that could be wrong."""
    found = {
        method.name
        for module in (sessions_pb, tasks_pb, audit_pb, records_pb)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(CASES) == found


@pytest.mark.parametrize("method", CASES)
async def test_every_field_limit(method: str, tenant: Tenant, tables: Tables) -> None:
    """Asked with every permission, so that nothing but the field can be the fault; under a key, and without."""
    agent = tenant.agent()
    for wrong, request, reason, field in CASES[method]:
        for key in (secrets.token_hex(8), ""):
            if method == "RouteTask" and not key:
                continue
            answer = await agent.ask(request, key=key)
            assert answer.refusal == ("INVALID_ARGUMENT", reason), f"{wrong}: {answer}"
            assert answer.fields == [field], f"{wrong}: {answer}"
    assert tables.content(tenant.name) == tables.content("nobody")
    kept = tables.rows("select code from idempotency_guards where tenant = %s and code = 0", tenant.name)
    assert kept == []


async def test_the_limits_themselves_are_good(agent: Agent) -> None:
    metadata = struct({"a": "x" * 16000})
    session = await agent.create("A" + "a._:-0" * 10 + "abc", metadata=metadata)
    assert session.metadata == metadata
    deepest = await agent.create(metadata=nested(32))
    assert deepest.metadata == nested(32)
    task = await agent.route(
        session.id,
        type="A" + "Z_9" * 20 + "AB",
        target_role="a" * 64,
        description="ä" * 4096,
        data=struct(
            {"n": 2**53, "x": 1e300, "neg": -0.5, "deep": [{"a": [None, True]}], "text": "\u0001\U0001f600\uffff"}
        ),
        priority=-100,
        max_attempts=100,
        retry_backoff=spans(0),
        lease_timeout=spans(3600),
        attempt_timeout=spans(86400),
        schedule_time=ahead(365.9),
    )
    assert (await agent.task(task.id)) == task
    assert task.data["x"] == 1e300 and task.data["text"] == "\u0001\U0001f600\uffff"
    assert (await agent.claim("worker", max_tasks=100)) == []


async def test_a_schedule_time_more_than_a_year_ahead(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    with tables.unchanged(tenant.name):
        answer = await agent.ask(route(session_id=session.id, schedule_time=ahead(366.1)), key="far")
        assert answer.refusal == ("INVALID_ARGUMENT", "FIELD_INVALID")
        assert answer.fields == ["schedule_time"]


async def test_requests_over_the_limit_in_bytes(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    longest = 16000 + 16384 - create(metadata=struct({"a": "x" * 16000})).ByteSize()
    request = create(metadata=struct({"a": "x" * longest}))
    assert request.ByteSize() == 16384
    assert (await agent.ask(request)).ok
    request.metadata["a"] = "x" * (longest + 1)
    with tables.unchanged(tenant.name):
        answer = await agent.ask(request)
        assert answer.refusal == ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
        assert answer.metadata == {"size": "16385", "limit": "16384"}
        request.metadata["a"] = "x" * (20 << 20)
        answer = await agent.ask(request)
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("keys", [("",), ("k" * 256,), ("a b",), (" ",), ("a", "b"), ("same", "same")], ids=repr)
async def test_malformed_idempotency_keys(keys: tuple[str, ...], agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    with tables.unchanged(tenant.name):
        for request in (create(), route(session_id=session.id), claim(), update(session_id=session.id)):
            answer = await agent.ask(request, metadata=[("idempotency-key", key) for key in keys])
            assert answer.refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_INVALID")
            assert answer.fields == ["idempotency-key"]


async def test_a_key_of_255_visible_characters_is_good(agent: Agent) -> None:
    key = "".join(chr(code) for code in range(33, 127)) * 2 + "k" * 67
    first = await agent.ask(create(), key=key)
    again = await agent.ask(create(), key=key)
    assert first.ok and again.said == first.said and again.replayed and not first.replayed


async def test_routing_needs_a_key(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    with tables.unchanged(tenant.name):
        answer = await agent.ask(route(session_id=session.id))
        assert answer.refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REQUIRED")
        assert answer.fields == ["idempotency-key"]


async def test_tampered_page_tokens(agent: Agent) -> None:
    for _ in range(3):
        session = await agent.create()
    for _ in range(2):
        await agent.route(session.id)
    cases: tuple[tuple[type[Any], dict[str, str]], ...] = (
        (sessions_pb.ListSessionsRequest, {"agent_role": PLANNER}),
        (tasks_pb.ListTasksRequest, {"session_id": session.id}),
        (audit_pb.ListAuditEventsRequest, {"subject": "agent-1"}),
    )
    for request_class, other in cases:
        token = (await agent.ask(request_class(page_size=1))).response.next_page_token
        assert (await agent.ask(request_class(page_size=2, page_token=token))).ok
        changed = [
            token[:index] + ("A" if token[index] != "A" else "B") + token[index + 1 :] for index in range(len(token))
        ]
        for bad in [
            *changed[:: max(1, len(token) // 12)],
            changed[-1],
            token + "=",
            token[:-1],
            f" {token}",
            token * 2,
        ]:
            answer = await agent.ask(request_class(page_token=bad))
            assert answer.refusal == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID"), bad
            assert answer.fields == ["page_token"]
        answer = await agent.ask(request_class(page_token=token, **other))
        assert answer.refusal == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID"), "with other filters"
    sessions_token = (await agent.ask(sessions_pb.ListSessionsRequest(page_size=1))).response.next_page_token
    answer = await agent.ask(tasks_pb.ListTasksRequest(page_token=sessions_token))
    assert answer.refusal == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID"), "of another method"


async def test_refusals_that_depend_on_what_is_stored(tenant: Tenant, tables: Tables) -> None:
    """Code, reason and metadata of each, under a key and without; nothing written but the kept answer."""
    agent = tenant.agent()
    session = await agent.create(metadata=struct({"a": "x" * 9000}))
    await agent.change("Activate", session.id)
    paused = await agent.create()
    await agent.change("Activate", paused.id)
    await agent.change("Pause", paused.id)
    done = await agent.route(session.id, target_role="done")
    (claimed,) = await agent.claim("done")
    await agent.complete(claimed)
    await agent.route(session.id)
    (held,) = await agent.claim()
    other = tenant.agent("agent-2", permissions=(AGENT,), roles=("auditor", WORKER))

    unknown = {"session_id": ID}
    no_task = {"task_id": ID}
    big = struct({"b": "y" * 9000})
    mask = FieldMask(paths=["metadata"])
    cases: list[tuple[Agent, Message, tuple[str, str], dict[str, str]]] = [
        (agent, sessions_pb.GetSessionRequest(**unknown), ("NOT_FOUND", "SESSION_NOT_FOUND"), unknown),
        (agent, sessions_pb.CompleteSessionRequest(**unknown), ("NOT_FOUND", "SESSION_NOT_FOUND"), unknown),
        (agent, update(**unknown), ("NOT_FOUND", "SESSION_NOT_FOUND"), unknown),
        (agent, route(**unknown), ("NOT_FOUND", "SESSION_NOT_FOUND"), unknown),
        (agent, create(**no_task), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (
            agent,
            update(session_id=session.id, update_mask=FieldMask(paths=["task_id"]), **no_task),
            ("NOT_FOUND", "TASK_NOT_FOUND"),
            no_task,
        ),
        (agent, tasks_pb.GetTaskRequest(**no_task), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (agent, tasks_pb.CancelTaskRequest(**no_task), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (agent, heartbeat(), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (agent, complete(), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (agent, fail(), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (agent, tasks_pb.ReleaseTaskRequest(lease_id=ID, **no_task), ("NOT_FOUND", "TASK_NOT_FOUND"), no_task),
        (
            agent,
            update(session_id=session.id, metadata=big, update_mask=mask),
            ("FAILED_PRECONDITION", "METADATA_TOO_LARGE"),
            {"session_id": session.id},
        ),
        (agent, update(session_id=session.id, etag="1"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (agent, update(session_id=session.id, etag="nonsense"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (agent, sessions_pb.ActivateSessionRequest(session_id=session.id, etag="1"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (agent, sessions_pb.ResumeSessionRequest(session_id=session.id, etag="99"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (agent, sessions_pb.CompleteSessionRequest(session_id=paused.id, etag="1"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (agent, tasks_pb.CancelTaskRequest(task_id=done.id, etag="1"), ("ABORTED", "ETAG_MISMATCH"), {}),
        (
            agent,
            sessions_pb.CompleteSessionRequest(session_id=paused.id),
            ("FAILED_PRECONDITION", "SESSION_STATE_INVALID"),
            {"session_id": paused.id, "state": "PAUSED", "verb": "Complete"},
        ),
        (
            agent,
            route(session_id=paused.id),
            ("FAILED_PRECONDITION", "SESSION_NOT_OPEN"),
            {"session_id": paused.id, "state": "PAUSED"},
        ),
        (
            agent,
            tasks_pb.CancelTaskRequest(task_id=done.id),
            ("FAILED_PRECONDITION", "TASK_STATE_INVALID"),
            {"task_id": done.id, "state": "SUCCEEDED", "verb": "Cancel"},
        ),
        (
            agent,
            complete(task_id=done.id, lease_id=claimed.lease_id),
            ("FAILED_PRECONDITION", "LEASE_LOST"),
            {"task_id": done.id, "state": "SUCCEEDED"},
        ),
        (
            agent,
            heartbeat(task_id=held.task.id),
            ("FAILED_PRECONDITION", "LEASE_LOST"),
            {"task_id": held.task.id, "state": "RUNNING"},
        ),
        (other, create(), ("PERMISSION_DENIED", "ROLE_NOT_HELD"), {"role": PLANNER}),
        (other, update(session_id=session.id), ("PERMISSION_DENIED", "ROLE_NOT_HELD"), {"role": PLANNER}),
        (
            other,
            sessions_pb.FailSessionRequest(session_id=session.id),
            ("PERMISSION_DENIED", "ROLE_NOT_HELD"),
            {"role": PLANNER},
        ),
        (other, route(session_id=session.id), ("PERMISSION_DENIED", "ROLE_NOT_HELD"), {"role": PLANNER}),
        (
            other,
            tasks_pb.CancelTaskRequest(task_id=held.task.id),
            ("PERMISSION_DENIED", "ROLE_NOT_HELD"),
            {"role": PLANNER},
        ),
        (other, claim(role=PLANNER), ("PERMISSION_DENIED", "ROLE_NOT_HELD"), {"role": PLANNER}),
        *(
            (other, make(task_id=held.task.id, lease_id=held.lease_id), ("PERMISSION_DENIED", "LEASE_NOT_HELD"), {
                "task_id": held.task.id
            })
            for make in (
                heartbeat,
                complete,
                tasks_pb.ReleaseTaskRequest,
                lambda **ids: tasks_pb.FailTaskRequest(error=tasks_pb.TaskError(code="BROKEN"), **ids),
            )
        ),
    ]  # fmt: skip
    with tables.unchanged(tenant.name):
        for caller, request, refusal, metadata in cases:
            for key in (secrets.token_hex(8), ""):
                if isinstance(request, tasks_pb.RouteTaskRequest) and not key:
                    continue
                answer = await caller.ask(request, key=key)
                assert answer.refusal == refusal, f"{request}: {answer}"
                assert answer.metadata == metadata, f"{request}: {answer}"
    codes = tables.rows(
        "select distinct code from idempotency_guards where tenant = %s and code <> 0 order by 1", tenant.name
    )
    assert codes == [(5,), (9,)], "only NOT_FOUND and FAILED_PRECONDITION are kept"


async def test_operators_change_what_they_hold_no_role_of(tenant: Tenant) -> None:
    session = await tenant.agent().create()
    operator = tenant.agent("operator", roles=(), permissions=(AGENT, OPERATE))
    assert (await operator.change("Activate", session.id)).ok
    assert (await operator.create("any-role")).agent_role == "any-role"
    task = await operator.route(session.id, target_role="any-role")
    (claimed,) = await operator.claim("any-role")
    assert claimed.task.id == task.id
