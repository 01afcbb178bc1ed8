"""Between messages and the core: every limit, nothing that the database would refuse, nothing lost on the way."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from controller_svc import convert
from controller_svc.core.audit import RecordedAuditEvent
from controller_svc.core.ids import new_id
from controller_svc.core.mutations import Actor
from controller_svc.core.records import GuardFacts, RecordFacts, RecordState
from controller_svc.core.sessions import MAX_METADATA_BYTES, Session, SessionState, metadata_size
from controller_svc.core.status import Component
from controller_svc.core.tasks import HeartbeatResult, Task, TaskError, TaskState
from controller_svc.idempotency import scope_of
from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import record_service_pb2 as records_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from svckit.auth import Principal
from svckit.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

ACTOR = Actor(issuer="https://issuer", tenant="acme", subject="agent", roles=frozenset({"planner"}), operate=False)
ID = "0190f3b6-7c1e-7abc-8def-0123456789ab"
LEASE = "0190f3b6-7c1e-7abc-8def-0123456789ac"
NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)

# Each request with all its fields set and good, and how it is read.
REQUESTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "CreateSession": (
        lambda: sessions_pb.CreateSessionRequest(agent_role="planner", task_id=ID, metadata=struct({"a": 1})),
        lambda request: convert.create_session(request, ACTOR),
    ),
    "GetSession": (lambda: sessions_pb.GetSessionRequest(session_id=ID), convert.session_id),
    "ListSessions": (
        lambda: sessions_pb.ListSessionsRequest(
            agent_role="planner", state=sessions_pb.Session.STATE_ACTIVE, task_id=ID
        ),
        convert.session_filters,
    ),
    "UpdateSession": (
        lambda: sessions_pb.UpdateSessionRequest(
            session_id=ID, metadata=struct({"a": 1}), task_id=ID, update_mask=FieldMask(paths=["metadata"]), etag="1"
        ),
        lambda request: convert.update_session(request, ACTOR),
    ),
    "PauseSession": (
        lambda: sessions_pb.PauseSessionRequest(session_id=ID, etag="1"),
        lambda request: convert.change_session(request, ACTOR),
    ),
    "RouteTask": (
        lambda: tasks_pb.RouteTaskRequest(
            session_id=ID,
            type="ROUTING",
            target_role="coder",
            description="do it",
            data=struct({"a": 1}),
            context=struct({"b": 1}),
            priority=1,
            schedule_time=Timestamp(seconds=1),
            max_attempts=2,
            retry_backoff=Duration(seconds=2),
            lease_timeout=Duration(seconds=3),
            attempt_timeout=Duration(seconds=4),
        ),
        lambda request: convert.route_task(request, ACTOR, "ab" * 16),
    ),
    "GetTask": (lambda: tasks_pb.GetTaskRequest(task_id=ID), convert.task_id),
    "ListTasks": (
        lambda: tasks_pb.ListTasksRequest(
            session_id=ID, target_role="coder", state=tasks_pb.Task.STATE_RUNNING, type="ROUTING"
        ),
        convert.task_filters,
    ),
    "CancelTask": (
        lambda: tasks_pb.CancelTaskRequest(task_id=ID, reason="enough", etag="1"),
        lambda request: convert.cancel_task(request, ACTOR),
    ),
    "ClaimTasks": (
        lambda: tasks_pb.ClaimTasksRequest(role="coder", max_tasks=5, wait=Duration(seconds=3)),
        lambda request: convert.claim_tasks(request, ACTOR),
    ),
    "HeartbeatTask": (
        lambda: tasks_pb.HeartbeatTaskRequest(task_id=ID, lease_id=LEASE, progress=struct({"done": 1})),
        lambda request: (convert.task_id(request), convert.lease_id(request), convert.progress(request)),
    ),
    "CompleteTask": (
        lambda: tasks_pb.CompleteTaskRequest(task_id=ID, lease_id=LEASE, result=struct({"ok": True})),
        lambda request: convert.complete_task(request, ACTOR),
    ),
    "FailTask": (
        lambda: tasks_pb.FailTaskRequest(
            task_id=ID, lease_id=LEASE, error=tasks_pb.TaskError(code="BAD", message="it broke", non_retryable=True)
        ),
        lambda request: convert.fail_task(request, ACTOR),
    ),
    "ReleaseTask": (
        lambda: tasks_pb.ReleaseTaskRequest(task_id=ID, lease_id=LEASE),
        lambda request: convert.release_task(request, ACTOR),
    ),
    "ListAuditEvents": (
        lambda: audit_pb.ListAuditEventsRequest(
            resource_id=ID, method="/a/B", subject="s", start_time=Timestamp(seconds=1), end_time=Timestamp(seconds=2)
        ),
        convert.audit_filters,
    ),
}


def struct(values: dict[str, Any]) -> Struct:
    message = Struct()
    convert.fill_struct(message, values)
    return message


def nested(levels: int, *, lists: bool = False) -> Struct:
    """A struct of `levels` structs (or lists below the first) inside each other, the innermost holding a number."""
    value: Any = 1
    for _ in range(levels - 1):
        value = [value] if lists else {"a": value}
    return struct({"a": value})


def broken(rpc: str, change: Callable[[Any], None], field: str, reason: str = "FIELD_INVALID") -> None:
    make, read = REQUESTS[rpc]
    request = make()
    change(request)
    with pytest.raises(InvalidArgument) as refusal:
        read(request)
    assert refusal.value.reason == reason
    ((named, description),) = refusal.value.fields
    assert named == field
    assert description
    assert refusal.value.message


@pytest.mark.parametrize("rpc", REQUESTS)
def test_every_good_request_is_read(rpc: str) -> None:
    make, read = REQUESTS[rpc]
    read(make())


# -- limits --

IDS = [
    *[(rpc, "session_id") for rpc in ("GetSession", "UpdateSession", "PauseSession", "RouteTask")],
    *[
        (rpc, "task_id")
        for rpc in ("GetTask", "CancelTask", "HeartbeatTask", "CompleteTask", "FailTask", "ReleaseTask")
    ],
    *[(rpc, "lease_id") for rpc in ("HeartbeatTask", "CompleteTask", "FailTask", "ReleaseTask")],
]
OPTIONAL_IDS = [
    ("CreateSession", "task_id"),
    ("UpdateSession", "task_id"),
    ("ListSessions", "task_id"),
    ("ListTasks", "session_id"),
    ("ListAuditEvents", "resource_id"),
]
ROLES = [("CreateSession", "agent_role"), ("RouteTask", "target_role"), ("ClaimTasks", "role")]
OPTIONAL_ROLES = [("ListSessions", "agent_role"), ("ListTasks", "target_role")]
STRUCTS = [
    ("CreateSession", "metadata"),
    ("UpdateSession", "metadata"),
    ("RouteTask", "data"),
    ("RouteTask", "context"),
    ("HeartbeatTask", "progress"),
    ("CompleteTask", "result"),
]


@pytest.mark.parametrize(("rpc", "field"), IDS + OPTIONAL_IDS)
@pytest.mark.parametrize("text", ["x", ID[:-1], ID + "0", ID.replace("-", ""), "{" + ID + "}", ID + "\n", "\0"])
def test_a_malformed_id_is_named(rpc: str, field: str, text: str) -> None:
    broken(rpc, lambda request: setattr(request, field, text), field)


@pytest.mark.parametrize(("rpc", "field"), [*IDS, *ROLES, ("RouteTask", "type")])
def test_a_missing_required_field_is_named(rpc: str, field: str) -> None:
    broken(rpc, lambda request: setattr(request, field, ""), field, "FIELD_REQUIRED")


@pytest.mark.parametrize(("rpc", "field"), [*OPTIONAL_IDS, *OPTIONAL_ROLES, ("ListTasks", "type")])
def test_an_optional_field_may_be_missing(rpc: str, field: str) -> None:
    make, read = REQUESTS[rpc]
    request = make()
    request.ClearField(field)
    value = read(request)
    name = "task_type" if field == "type" else field
    assert (value[name] if isinstance(value, dict) else getattr(value, name)) is None


@pytest.mark.parametrize(("rpc", "field"), ROLES + OPTIONAL_ROLES)
def test_the_form_of_a_role(rpc: str, field: str) -> None:
    make, read = REQUESTS[rpc]
    for good in ("a", "0", "Z" * 64, "a.b_c:d-e", "orchestrator.agent"):
        request = make()
        setattr(request, field, good)
        read(request)
    for bad in ("a" * 65, ".a", "-a", ":a", "_a", "a b", "a\n", "a/b", "ä", "a\u0660", "a\0", " a"):
        broken(rpc, lambda request, bad=bad: setattr(request, field, bad), field)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rpc", "path", "reason"),
    [
        ("RouteTask", "type", "FIELD_REQUIRED"),
        ("FailTask", "error.code", "FIELD_REQUIRED"),
        ("ListTasks", "type", ""),
    ],
)
def test_the_form_of_a_name(rpc: str, path: str, reason: str) -> None:
    make, read = REQUESTS[rpc]
    for good in ("A", "A" * 63, "A_0", "ROUTING"):
        request = make()
        assign(request, path, good)
        read(request)
    for bad in ("A" * 64, "_A", "0A", "a", "A-B", "A B", "A\n", "Ä", "A\0"):
        broken(rpc, lambda request, bad=bad: assign(request, path, bad), path)  # type: ignore[misc]
    if reason:
        broken(rpc, lambda request: assign(request, path, ""), path, reason)


@pytest.mark.parametrize(
    ("rpc", "path", "limit"),
    [
        ("RouteTask", "description", 4096),
        ("CancelTask", "reason", 1024),
        ("FailTask", "error.message", 4096),
        ("ListAuditEvents", "method", 1024),
        ("ListAuditEvents", "subject", 1024),
    ],
)
def test_a_text_may_fill_its_limit_and_not_pass_it(rpc: str, path: str, limit: int) -> None:
    make, read = REQUESTS[rpc]
    for good in ("", "x" * limit, "\U0001f600" * limit):
        request = make()
        assign(request, path, good)
        read(request)
    broken(rpc, lambda request: assign(request, path, "x" * (limit + 1)), path)
    broken(rpc, lambda request: assign(request, path, "x\0"), path)


@pytest.mark.parametrize(
    ("rpc", "field", "least", "most"),
    [("RouteTask", "priority", -100, 100), ("RouteTask", "max_attempts", 1, 100), ("ClaimTasks", "max_tasks", 1, 100)],
)
def test_a_number_keeps_its_range(rpc: str, field: str, least: int, most: int) -> None:
    make, read = REQUESTS[rpc]
    for good in (least, most):
        request = make()
        setattr(request, field, good)
        assert getattr(read(request), field) == good
    for bad in (least - 1 or -1, most + 1, 2**31 - 1, -(2**31)):
        broken(rpc, lambda request, bad=bad: setattr(request, field, bad), field)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rpc", "field", "least", "most"),
    [
        ("RouteTask", "retry_backoff", 0, 3600),
        ("RouteTask", "lease_timeout", 1, 3600),
        ("RouteTask", "attempt_timeout", 1, 86400),
        ("ClaimTasks", "wait", 0, 30),
    ],
)
def test_a_span_keeps_its_range(rpc: str, field: str, least: int, most: int) -> None:
    make, read = REQUESTS[rpc]

    def put(request: Any, seconds: int, nanos: int = 0) -> None:
        getattr(request, field).CopyFrom(Duration(seconds=seconds, nanos=nanos))

    for seconds in (least, most):
        request = make()
        put(request, seconds)
        command = read(request)
        assert (timedelta(seconds=command.wait_seconds) if field == "wait" else getattr(command, field)) == timedelta(
            seconds=seconds
        )
    for seconds, nanos in (
        (least - 1, 999_999_999),
        (least, -1000),
        (most, 1000),
        (most + 1, 0),
        (-1, 0),
        (-(2**63), 0),
        (2**63 - 1, 0),
        (315576000001, 0),
        (1, 1_000_000_000),
        (1, 2**31 - 1),
        (1, -1),
        (-1, 1),
    ):
        broken(rpc, lambda request, s=seconds, n=nanos: put(request, s, n), field)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rpc", "field"),
    [("RouteTask", "schedule_time"), ("ListAuditEvents", "start_time"), ("ListAuditEvents", "end_time")],
)
def test_a_time_is_of_the_years_1_to_9999(rpc: str, field: str) -> None:
    make, read = REQUESTS[rpc]

    def put(request: Any, seconds: int, nanos: int) -> None:
        getattr(request, field).CopyFrom(Timestamp(seconds=seconds, nanos=nanos))

    for seconds, nanos, expected in (
        (-62135596800, 0, datetime(1, 1, 1, tzinfo=UTC)),
        (253402300799, 999_999_999, datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        (0, 0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1, 999_999_999, datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        (1, 1999, datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)),
    ):
        request = make()
        put(request, seconds, nanos)
        value = read(request)
        assert (value[field] if isinstance(value, dict) else getattr(value, field)) == expected
    for seconds, nanos in (
        (-62135596801, 0),
        (253402300800, 0),
        (0, -1),
        (0, 1_000_000_000),
        (2**63 - 1, 0),
        (-(2**63), 0),
    ):
        broken(rpc, lambda request, s=seconds, n=nanos: put(request, s, n), field)  # type: ignore[misc]


@pytest.mark.parametrize("rpc", ["ListSessions", "ListTasks"])
@pytest.mark.parametrize("number", [-1, 7, 99, 2**31 - 1])
def test_an_unknown_state_is_refused(rpc: str, number: int) -> None:
    broken(rpc, lambda request: setattr(request, "state", number), "state")


def test_every_state_of_the_api_is_a_state_of_the_core() -> None:
    for number, state in enumerate(SessionState, 1):
        assert sessions_pb.Session.State.Name(number) == f"STATE_{state}"  # type: ignore[arg-type]
        request = sessions_pb.ListSessionsRequest(state=number)  # type: ignore[arg-type]
        assert convert.session_filters(request)["state"] is state
    for number, task_state in enumerate(TaskState, 1):
        assert tasks_pb.Task.State.Name(number) == f"STATE_{task_state}"  # type: ignore[arg-type]
        listing = tasks_pb.ListTasksRequest(state=number)  # type: ignore[arg-type]
        assert convert.task_filters(listing)["state"] is task_state
    assert len(sessions_pb.Session.State.keys()) == len(SessionState) + 1
    assert len(tasks_pb.Task.State.keys()) == len(TaskState) + 1
    assert convert.session_filters(sessions_pb.ListSessionsRequest())["state"] is None
    assert convert.task_filters(tasks_pb.ListTasksRequest())["state"] is None


def test_fail_needs_an_error() -> None:
    broken("FailTask", lambda request: request.ClearField("error"), "error", "FIELD_REQUIRED")


def assign(request: Any, path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        request = getattr(request, name)
    setattr(request, last, value)


def texts(message: Message, prefix: str = "") -> Iterator[str]:
    """The path of every text in a message, structs and masks aside."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield prefix + field.name
        elif field.message_type is not None and field.message_type.full_name.startswith("orchestrator."):
            yield from texts(getattr(message, field.name), f"{prefix}{field.name}.")


@pytest.mark.parametrize(
    ("rpc", "path"),
    [
        (rpc, path)
        for rpc, (make, _) in REQUESTS.items()
        for path in texts(make())
        # Neither is stored nor looked for in the database.
        if path not in ("etag", "page_token")
    ],
)
def test_no_text_holds_a_nul(rpc: str, path: str) -> None:
    for text in ("\0", "a\0", "\0a", "A\0A"):
        broken(rpc, lambda request, text=text: assign(request, path, text), path)  # type: ignore[misc]


def test_no_text_holds_a_lone_surrogate() -> None:
    with pytest.raises(DecodeError):
        sessions_pb.CreateSessionRequest.FromString(b"\x0a\x03\xed\xa0\x80")
    for bad in (b"\x12\x05\x1a\x03\xed\xa0\x80", b"\x0a\x03\xed\xa0\x80"):
        with pytest.raises(DecodeError):
            Struct.FromString(b"\x0a" + bytes([len(bad)]) + bad)


# -- structs --


@pytest.mark.parametrize(("rpc", "field"), STRUCTS)
def test_a_struct_holds_nothing_that_the_database_would_refuse(rpc: str, field: str) -> None:
    bad: list[Any] = [
        {"a": math.nan},
        {"a": math.inf},
        {"a": -math.inf},
        {"a": [1, {"b": math.nan}]},
        {"a": "\0"},
        {"a": ["x", {"b": "y\0"}]},
        {"\0": 1},
        {"a": {"b": [{"c\0": 1}]}},
    ]
    messages = [struct(values) for values in bad]
    messages.append(Struct(fields={"a": Value()}))
    kindless = struct({"a": []})
    kindless.fields["a"].list_value.values.add()
    messages += [kindless, nested(33), nested(33, lists=True), nested(60)]
    for message in messages:
        broken(rpc, lambda request, message=message: getattr(request, field).CopyFrom(message), field)  # type: ignore[misc]


@pytest.mark.parametrize("lists", [False, True])
def test_values_nest_32_deep(lists: bool) -> None:
    message = nested(32, lists=lists)
    assert convert.struct_to_dict(message, "data") == json.loads(
        '{"a":' + ("[" * 31 + "1" + "]" * 31 if lists else '{"a":' * 31 + "1" + "}" * 31) + "}"
    )


def test_what_nests_32_deep_can_be_sent_and_read_back_in_every_message() -> None:
    deep = nested(32)
    sent = tasks_pb.RouteTaskRequest.FromString(tasks_pb.RouteTaskRequest(data=deep).SerializeToString())
    values = convert.struct_to_dict(sent.data, "data")
    task = replace(A_TASK, data=values, context=values, result=values, progress=values)
    claimed = tasks_pb.ClaimTasksResponse.FromString(convert.claim_answer([(task, new_id())]))
    assert convert.struct_to_dict(claimed.tasks[0].task.progress, "progress") == values


def test_numbers_become_what_they_were_written_as() -> None:
    given = {"whole": 3.0, "half": 1.5, "negative": -7.0, "zero": -0.0, "huge": 1e300, "tiny": 5e-324}
    given |= {"safe": 2.0**53 - 1, "unsafe": 2.0**53, "most": 1.7976931348623157e308}
    values = convert.struct_to_dict(struct(given), "data")
    assert values == given
    assert {name for name, value in values.items() if isinstance(value, int)} == {"whole", "negative", "zero", "safe"}


def a_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randint(0, 7 if depth else 5)
    if kind >= 6:
        size = rng.randint(0, 4)
        if kind == 6:
            return [a_value(rng, depth - 1) for _ in range(size)]
        return {a_text(rng): a_value(rng, depth - 1) for _ in range(size)}
    return [None, True, False, rng.randint(-(2**53), 2**53), rng.uniform(-1e9, 1e9), a_text(rng)][kind]


def a_text(rng: random.Random) -> str:
    alphabet = ["a", "Z", " ", "\x01", "\n", '"', "\\", "\x7f", "ß", "\u2028", "\ufffd", "\U0001f600"]
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 9)))


def test_any_json_comes_back_as_it_was_and_takes_six_bytes_a_byte_at_most() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        values = {a_text(rng): a_value(rng, 5) for _ in range(rng.randint(0, 5))}
        message = struct(values)
        back = convert.struct_to_dict(Struct.FromString(message.SerializeToString()), "data")
        assert json.dumps(back, sort_keys=True) == json.dumps(values, sort_keys=True)
        assert metadata_size(values) <= 6 * message.ByteSize() + 2


def test_no_value_takes_more_json_than_the_shortcut_allows() -> None:
    worst: list[dict[str, Any]] = [
        {"": "\x01" * 5000},
        {"\x01" * 5000: None},
        {str(index): -1.2345678901234567e-300 for index in range(500)},
        {"": [None] * 5000},
        {"": [False] * 5000},
        {"": [[]] * 5000},
        {"": [-1.2345678901234567e-300] * 5000},
    ]
    for values in worst:
        assert metadata_size(values) <= 6 * struct(values).ByteSize()


@pytest.mark.parametrize("rpc", ["CreateSession", "UpdateSession"])
@pytest.mark.parametrize("unit", ["x", "ß", "\x01", "\U0001f600"])
def test_metadata_may_fill_its_limit_and_not_pass_it(rpc: str, unit: str) -> None:
    make, read = REQUESTS[rpc]
    cost = metadata_size({"a": unit}) - metadata_size({"a": ""})
    count = (MAX_METADATA_BYTES - metadata_size({"a": "", "b": ""})) // cost
    rest = MAX_METADATA_BYTES - metadata_size({"a": unit * count, "b": ""})
    full = {"a": unit * count, "b": "y" * rest}
    assert len(json.dumps(full, ensure_ascii=False, separators=(",", ":")).encode()) == MAX_METADATA_BYTES
    request = make()
    request.metadata.CopyFrom(struct(full))
    assert read(request).metadata == full
    over = struct({**full, "b": "y" * (rest + 1)})
    broken(rpc, lambda request: request.metadata.CopyFrom(over), "metadata", "METADATA_TOO_LARGE")


# -- the update mask --


def paths(*given: str) -> tuple[str, ...]:
    request = REQUESTS["UpdateSession"][0]()
    request.update_mask.paths[:] = given
    return convert.update_session(request, ACTOR).paths


def test_what_a_mask_may_name() -> None:
    assert paths("metadata") == ("metadata",)
    assert paths("task_id", "metadata") == ("task_id", "metadata")
    assert paths("metadata.a", "metadata.b.c", "metadata..", "metadata. ", "metadata.metadata") == (
        "metadata.a",
        "metadata.b.c",
        "metadata..",
        "metadata. ",
        "metadata.metadata",
    )
    assert paths("metadata", "metadata.a") == ("metadata", "metadata.a")


@pytest.mark.parametrize(
    "given",
    [
        [""],
        ["*"],
        ["metadata."],
        ["metadata_"],
        ["metadatax"],
        ["Metadata"],
        ["metadata", "state"],
        ["agent_role"],
        ["etag"],
        ["id"],
        ["task_id.x"],
        ["taskId"],
        ["session.metadata"],
        [" metadata"],
        ["metadata.a\0"],
        ["metadata", "metadata"],
        ["metadata.a", "task_id", "metadata.a"],
    ],
)
def test_any_other_path_is_refused(given: list[str]) -> None:
    broken("UpdateSession", lambda request: request.update_mask.paths.__setitem__(slice(None), given), "update_mask")


def test_a_mask_is_required() -> None:
    broken("UpdateSession", lambda request: request.ClearField("update_mask"), "update_mask", "FIELD_REQUIRED")
    broken("UpdateSession", lambda request: request.update_mask.ClearField("paths"), "update_mask", "FIELD_REQUIRED")


# -- commands --


def test_what_a_request_says_reaches_its_command() -> None:
    created = REQUESTS["CreateSession"][1](REQUESTS["CreateSession"][0]())
    assert (created.actor, created.agent_role, str(created.task_id), created.metadata) == (
        ACTOR,
        "planner",
        ID,
        {"a": 1},
    )
    updated = REQUESTS["UpdateSession"][1](REQUESTS["UpdateSession"][0]())
    assert (str(updated.id), updated.etag, updated.paths, str(updated.task_id)) == (ID, "1", ("metadata",), ID)
    paused = REQUESTS["PauseSession"][1](REQUESTS["PauseSession"][0]())
    assert (str(paused.id), paused.etag, paused.actor) == (ID, "1", ACTOR)
    routed = REQUESTS["RouteTask"][1](REQUESTS["RouteTask"][0]())
    assert (str(routed.session_id), routed.type, routed.target_role, routed.description) == (
        ID,
        "ROUTING",
        "coder",
        "do it",
    )
    assert (routed.data, routed.context, routed.trace_id, routed.priority) == ({"a": 1}, {"b": 1}, "ab" * 16, 1)
    assert (routed.schedule_time, routed.max_attempts) == (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), 2)
    assert [span.total_seconds() for span in (routed.retry_backoff, routed.lease_timeout, routed.attempt_timeout)] == [
        2,
        3,
        4,
    ]
    cancelled = REQUESTS["CancelTask"][1](REQUESTS["CancelTask"][0]())
    assert (str(cancelled.id), cancelled.reason, cancelled.etag) == (ID, "enough", "1")
    claim = REQUESTS["ClaimTasks"][1](REQUESTS["ClaimTasks"][0]())
    assert (claim.role, claim.max_tasks, claim.wait_seconds) == ("coder", 5, 3.0)
    beat = REQUESTS["HeartbeatTask"][1](REQUESTS["HeartbeatTask"][0]())
    assert (str(beat[0]), str(beat[1]), beat[2]) == (ID, LEASE, {"done": 1})
    completed = REQUESTS["CompleteTask"][1](REQUESTS["CompleteTask"][0]())
    assert (str(completed.id), str(completed.lease_id), completed.result) == (ID, LEASE, {"ok": True})
    failed = REQUESTS["FailTask"][1](REQUESTS["FailTask"][0]())
    assert (str(failed.id), str(failed.lease_id)) == (ID, LEASE)
    assert failed.error == TaskError(code="BAD", message="it broke", non_retryable=True)
    released = REQUESTS["ReleaseTask"][1](REQUESTS["ReleaseTask"][0]())
    assert (str(released.id), str(released.lease_id)) == (ID, LEASE)
    listed = REQUESTS["ListAuditEvents"][1](REQUESTS["ListAuditEvents"][0]())
    assert (str(listed["resource_id"]), listed["method"], listed["subject"]) == (ID, "/a/B", "s")


def test_the_defaults() -> None:
    created = convert.create_session(sessions_pb.CreateSessionRequest(agent_role="planner"), ACTOR)
    assert (created.task_id, created.metadata) == (None, {})
    minimal = tasks_pb.RouteTaskRequest(session_id=ID, type="T", target_role="coder")
    routed = convert.route_task(minimal, ACTOR, "")
    assert (routed.priority, routed.schedule_time, routed.max_attempts) == (0, None, 3)
    assert (routed.retry_backoff, routed.lease_timeout) == (timedelta(seconds=1), timedelta(seconds=30))
    assert (routed.attempt_timeout, routed.description, routed.data, routed.context) == (None, "", {}, {})
    minimal.retry_backoff.SetInParent()
    assert convert.route_task(minimal, ACTOR, "").retry_backoff == timedelta()
    claim = convert.claim_tasks(tasks_pb.ClaimTasksRequest(role="coder"), ACTOR)
    assert (claim.max_tasks, claim.wait_seconds) == (1, 0.0)
    beat = tasks_pb.HeartbeatTaskRequest(task_id=ID, lease_id=LEASE)
    assert convert.progress(beat) is None
    beat.progress.SetInParent()
    assert convert.progress(beat) == {}
    bare = tasks_pb.CompleteTaskRequest(task_id=ID, lease_id=LEASE)
    assert convert.complete_task(bare, ACTOR).result == {}
    assert set(convert.audit_filters(audit_pb.ListAuditEventsRequest()).values()) == {None}


def test_each_command_mints_its_own_id() -> None:
    make, read = REQUESTS["CreateSession"]
    request = make()
    assert len({read(request).id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("permissions", "operate"),
    [({"orchestrator.agent"}, False), ({"orchestrator.agent", "orchestrator.operate"}, True)],
)
def test_the_caller_becomes_the_actor(permissions: set[str], operate: bool) -> None:
    roles = frozenset({"planner", "coder"})
    principal = Principal("https://issuer", "acme", "agent", roles, frozenset(permissions), on_behalf_of="person")
    assert convert.actor_of(principal) == Actor(
        issuer="https://issuer",
        tenant="acme",
        subject="agent",
        roles=roles,
        operate=operate,
        on_behalf_of="person",
    )


# -- answers --

A_SESSION = Session(
    tenant="acme",
    id=new_id(),
    version=7,
    agent_role="planner",
    state=SessionState.COMPLETED,
    task_id=new_id(),
    metadata={"a": [1, None, {"b": "c"}]},
    create_time=NOW,
    update_time=NOW + timedelta(seconds=1),
    expire_time=NOW + timedelta(days=7),
    start_time=NOW + timedelta(seconds=2),
    pause_time=NOW + timedelta(seconds=3),
    end_time=NOW + timedelta(seconds=4),
)
A_TASK = Task(
    tenant="acme",
    id=new_id(),
    version=8,
    beat=3,
    session_id=new_id(),
    type="ROUTING",
    from_role="planner",
    target_role="coder",
    description="do it",
    data={"a": 1},
    context={"b": 2},
    trace_id="ab" * 16,
    priority=-5,
    schedule_time=NOW,
    attempt=2,
    max_attempts=3,
    retry_backoff=timedelta(microseconds=1500001),
    lease_timeout=timedelta(seconds=30),
    attempt_timeout=timedelta(hours=24),
    state=TaskState.RUNNING,
    result={"c": 3},
    error=TaskError(code="BAD", message="it broke", non_retryable=True),
    progress={"d": 4},
    lease_id=new_id(),
    lease_holder="worker",
    lease_expire_time=NOW + timedelta(seconds=5),
    create_time=NOW + timedelta(seconds=6),
    update_time=NOW + timedelta(seconds=7),
    start_time=NOW + timedelta(seconds=8),
    end_time=NOW + timedelta(seconds=9),
)
AN_EVENT = RecordedAuditEvent(
    tenant="acme",
    id=2**62,
    create_time=NOW,
    method="/a.B/C",
    resource_type="task",
    resource_id=new_id(),
    version_before=2**40,
    version_after=2**40 + 1,
    state_before="PENDING",
    state_after="RUNNING",
    subject="agent",
    role="coder",
    on_behalf_of="person",
    trace_id="ab" * 16,
    key_hash=b"\x00\xff" * 16,
    command_id=new_id(),
)


def exact(time: Timestamp) -> tuple[int, int]:
    return time.seconds, time.nanos


def test_a_whole_session_becomes_a_whole_message() -> None:
    answer = convert.session_answer(sessions_pb.CreateSessionResponse)(A_SESSION)
    message = sessions_pb.CreateSessionResponse.FromString(answer).session
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    assert (message.id, message.task_id, message.agent_role) == (str(A_SESSION.id), str(A_SESSION.task_id), "planner")
    assert (message.state, message.etag) == (sessions_pb.Session.STATE_COMPLETED, "7")
    assert convert.struct_to_dict(message.metadata, "metadata") == A_SESSION.metadata
    for name in ("create_time", "update_time", "expire_time", "start_time", "pause_time", "end_time"):
        assert convert.time_of(getattr(message, name), name) == getattr(A_SESSION, name)


@pytest.mark.parametrize("metadata", [{}, A_SESSION.metadata])
def test_metadata_copied_from_the_request_makes_the_same_answer(metadata: dict[str, Any]) -> None:
    session, given = replace(A_SESSION, metadata=metadata), Struct()
    given.update(metadata)
    given.MergeFromString(b"\xaa\x06\x01x")  # a field that nobody knows
    filled = convert.session_answer(sessions_pb.CreateSessionResponse)(session)
    copied = convert.session_answer(sessions_pb.CreateSessionResponse, given)(session)
    answers = [sessions_pb.CreateSessionResponse.FromString(answer) for answer in (filled, copied)]
    assert answers[0] == answers[1]


def test_what_a_session_does_not_have_is_unset() -> None:
    bare = replace(A_SESSION, task_id=None, metadata={}, start_time=None, pause_time=None, end_time=None)
    message = sessions_pb.Session()
    convert.fill_session(message, bare)
    assert {field.name for field, _ in message.ListFields()} == {
        "id",
        "agent_role",
        "state",
        "create_time",
        "update_time",
        "expire_time",
        "etag",
    }


def test_a_whole_task_becomes_a_whole_message() -> None:
    message = tasks_pb.RouteTaskResponse.FromString(convert.task_answer(tasks_pb.RouteTaskResponse)(A_TASK)).task
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    assert (message.id, message.session_id, message.etag) == (str(A_TASK.id), str(A_TASK.session_id), "8")
    for name in ("type", "from_role", "target_role", "description", "trace_id", "priority", "attempt", "max_attempts"):
        assert getattr(message, name) == getattr(A_TASK, name)
    for name in ("data", "context", "result", "progress"):
        assert convert.struct_to_dict(getattr(message, name), name) == getattr(A_TASK, name)
    for name in ("schedule_time", "lease_expire_time", "create_time", "update_time", "start_time", "end_time"):
        assert convert.time_of(getattr(message, name), name) == getattr(A_TASK, name)
    assert (message.retry_backoff.seconds, message.retry_backoff.nanos) == (1, 500_001_000)
    assert (message.lease_timeout.seconds, message.attempt_timeout.seconds) == (30, 86400)
    assert (message.state, message.lease_holder) == (tasks_pb.Task.STATE_RUNNING, "worker")
    assert (message.error.code, message.error.message, message.error.non_retryable) == ("BAD", "it broke", True)


def test_what_a_new_task_does_not_have_is_unset_and_what_is_zero_is_not() -> None:
    new = replace(
        A_TASK,
        data={},
        context={},
        attempt=0,
        retry_backoff=timedelta(),
        attempt_timeout=None,
        state=TaskState.PENDING,
        result=None,
        error=None,
        progress=None,
        lease_id=None,
        lease_holder="",
        lease_expire_time=None,
        start_time=None,
        end_time=None,
    )
    message = tasks_pb.Task()
    convert.fill_task(message, new)
    unset = {"data", "context", "attempt_timeout", "result", "error", "progress", "lease_expire_time", "start_time"}
    assert not any(message.HasField(name) for name in unset | {"end_time"})  # type: ignore[arg-type]
    assert message.HasField("retry_backoff")
    convert.fill_task(message, replace(new, result={}, progress={}))
    assert message.HasField("result")
    assert message.HasField("progress")


@pytest.mark.parametrize(
    "time", [NOW, datetime(1969, 12, 31, 23, 59, 59, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
)
def test_times_keep_their_microseconds_whatever_their_zone(time: datetime) -> None:
    zone = timezone(timedelta(hours=-5, minutes=-30))
    message, same = Timestamp(), Timestamp()
    convert.fill_time(message, time)
    convert.fill_time(same, time.astimezone(zone))
    assert exact(message) == exact(same)
    assert 0 <= message.nanos <= 999_999_999
    assert convert.time_of(message, "t") == time


def test_a_claim_answers_each_task_with_its_lease_in_order() -> None:
    claimed = [(replace(A_TASK, id=new_id()), new_id()) for _ in range(3)]
    message = tasks_pb.ClaimTasksResponse.FromString(convert.claim_answer(claimed))
    assert [(item.task.id, item.lease_id) for item in message.tasks] == [(str(task.id), str(x)) for task, x in claimed]
    assert convert.claim_answer([]) == b""


def test_a_heartbeat_answers_until_when_or_that_it_is_over() -> None:
    kept = tasks_pb.HeartbeatTaskResponse.FromString(
        convert.heartbeat_answer(HeartbeatResult(lease_expire_time=NOW, cancelled=False))
    )
    assert (convert.time_of(kept.lease_expire_time, "t"), kept.cancelled) == (NOW, False)
    over = tasks_pb.HeartbeatTaskResponse.FromString(
        convert.heartbeat_answer(HeartbeatResult(lease_expire_time=None, cancelled=True))
    )
    assert (over.HasField("lease_expire_time"), over.cancelled) == (False, True)


def test_a_whole_event_becomes_a_whole_message() -> None:
    message = audit_pb.AuditEvent()
    convert.fill_audit_event(message, AN_EVENT)
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    assert (message.id, message.idempotency_key_hash) == (str(2**62), "00ff" * 16)
    assert (message.resource_id, message.command_id) == (str(AN_EVENT.resource_id), str(AN_EVENT.command_id))
    for name in ("method", "resource_type", "version_before", "version_after", "state_before", "state_after"):
        assert getattr(message, name) == getattr(AN_EVENT, name)
    for name in ("subject", "role", "on_behalf_of", "trace_id"):
        assert getattr(message, name) == getattr(AN_EVENT, name)
    keyless = audit_pb.AuditEvent()
    convert.fill_audit_event(keyless, replace(AN_EVENT, key_hash=None))
    assert keyless.idempotency_key_hash == ""


@pytest.mark.parametrize(("up", "name"), [(True, "STATE_UP"), (False, "STATE_DOWN"), (None, "STATE_DISABLED")])
def test_the_state_of_a_component(up: bool | None, name: str) -> None:
    message = status_pb.Component()
    convert.fill_component(message, Component(up, "why", NOW))
    assert (status_pb.Component.State.Name(message.state), message.detail) == (name, "why")
    assert convert.time_of(message.since_time, "t") == NOW


def test_a_whole_guard_becomes_a_whole_message() -> None:
    guard = GuardFacts(
        command_id=new_id(),
        code=9,
        fingerprints=b"\2" + b"a" * 32 + b"\3" + b"b" * 32,
        answer_bytes=77,
        create_time=NOW,
        expire_time=NOW + timedelta(hours=1),
    )
    message = records_pb.Guard()
    convert.fill_guard(message, guard)
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    assert (message.command_id, message.code, message.answer_bytes) == (str(guard.command_id), 9, 77)
    assert list(message.fingerprint_kinds) == [2, 3]
    assert convert.time_of(message.create_time, "t") == NOW
    assert convert.time_of(message.expire_time, "t") == NOW + timedelta(hours=1)
    earlier = records_pb.Guard()
    convert.fill_guard(earlier, replace(guard, fingerprints=b"a" * 32))
    assert list(earlier.fingerprint_kinds) == [1]


def test_a_whole_record_becomes_a_whole_message() -> None:
    record = RecordFacts(
        state=RecordState.IN_PROGRESS,
        ttl_left=timedelta(hours=24),
        age=timedelta(seconds=3),
        lease_left=timedelta(milliseconds=1500),
        epoch=3,
        code=5,
        durable=True,
        timeline=7,
        fingerprint_kinds=(2, 3),
        answer_bytes=12,
    )
    message = records_pb.Record()
    convert.fill_record(message, record)
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    assert (message.ttl_left.seconds, message.lease_left.seconds, message.lease_left.nanos) == (86400, 1, 500_000_000)
    assert message.age.seconds == 3
    assert (message.epoch, message.code, message.durable, message.timeline) == (3, 5, True, 7)
    assert (list(message.fingerprint_kinds), message.answer_bytes) == ([2, 3], 12)
    for state in RecordState:
        other = records_pb.Record()
        convert.fill_record(other, replace(record, state=state, lease_left=None))
        assert records_pb.Record.State.Name(other.state) == f"STATE_{state}"
        assert not other.HasField("lease_left")
    over = records_pb.Record()
    convert.fill_record(over, replace(record, lease_left=timedelta()))
    assert over.HasField("lease_left")


def test_the_scope_of_a_key_is_that_of_the_call_that_sent_it() -> None:
    method = "/orchestrator.controller.v1.SessionService/CreateSession"
    operator = Principal("https://issuer", "acme", "operator", frozenset(), frozenset())
    request = records_pb.GetRecordRequest(method=method, subject="agent", idempotency_key="a-key")
    assert convert.key_scope(request, operator) == scope_of("https://issuer", "acme", "agent", method, "a-key")
    request.issuer = "https://another"
    assert convert.key_scope(request, operator) == scope_of("https://another", "acme", "agent", method, "a-key")
