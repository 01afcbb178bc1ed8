"""Every RPC of both services, found by their descriptors: what strangers, foreigners and broken clients are told."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from deploy.local.issuer import Issuer
from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from orchestrator.options.v1 import options_pb2
from svckit.auth import TokenSigner
from tests.client import PLANNER, WORKER, Agent, Answer, Tenant, full_method, services, struct
from tests.conftest import ServiceKeys
from tests.oracle import Tables
from tests.system.pair import Pair

METHODS = {full_method(method): method for service in services() for method in service.methods}
CONTROLLER = [name for name in METHODS if name.startswith("/orchestrator.controller.")]
ALL_PERMISSIONS = ("orchestrator.agent", "orchestrator.approve", "orchestrator.audit", "orchestrator.operate")
MALFORMED = b"\x0a\xff\xff\xff\xff\x0f"
"""A field of 4 GiB that is not there."""

every_rpc = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_controller_rpc = pytest.mark.parametrize("method", [METHODS[name] for name in CONTROLLER], ids=CONTROLLER)


def test_both_services_are_found() -> None:
    assert {method.containing_service.name for method in METHODS.values()} >= {
        "SessionService", "TaskService", "AuditService", "RecordService", "StatusService", "IdempotencyService",
    }  # fmt: skip
    assert len(METHODS) >= 25


class Callers:
    """Tokens of all kinds, and agents that present them."""

    def __init__(self, pair: Pair, issuer: Issuer, service_keys: ServiceKeys, tenant: str) -> None:
        self._targets = {"controller": pair.controller_target, "idempotency": pair.idempotency_target}
        self._issuer = issuer
        self._service_keys = service_keys
        self._tenant = tenant
        self._agents: list[Agent] = []

    async def ask(
        self, method: MethodDescriptor, token: str | None, raw: bytes = b"", *, timeout: float | None = 30
    ) -> Answer:
        """The answer to these bytes, of the service that has the method."""
        agent = Agent(self._targets[method.containing_service.full_name.split(".")[1]], token)
        self._agents.append(agent)
        return await agent.send(method, raw, timeout=timeout, metadata=[("idempotency-key", secrets.token_hex(8))])

    def permission(self, method: MethodDescriptor) -> str:
        return method.GetOptions().Extensions[options_pb2.policy].permission

    def user(self, *permissions: str, **claims: Any) -> str:
        """A user's token."""
        return self._issuer.token(**{"tenant": self._tenant, "roles": (PLANNER, WORKER, *permissions), **claims})

    def service(self, **claims: Any) -> str:
        """A token signed with the controller's service key."""
        signer = TokenSigner(
            self._service_keys.private,
            issuer="controller_svc",
            subject=claims.pop("sub", "controller_svc"),
            audience=claims.pop("aud", "idempotency_svc"),
            clock=lambda: time.time() + claims.get("later", 0),
        )
        return signer.token()

    def good(self, method: MethodDescriptor) -> str:
        """A token that may call the method, and nothing else."""
        permission = self.permission(method)
        return self.service() if permission == "orchestrator.service" else self.user(permission)

    def expired(self, method: MethodDescriptor) -> str:
        if self.permission(method) == "orchestrator.service":
            return self.service(later=-3600)
        return self.user(self.permission(method), iat=int(time.time()) - 7200, exp=int(time.time()) - 3600)

    def of_other_audience(self, method: MethodDescriptor) -> str:
        if self.permission(method) == "orchestrator.service":
            return self.service(aud="controller_svc")
        return self.user(self.permission(method), aud="somebody-else")

    def without_permission(self, method: MethodDescriptor) -> str:
        """All permissions but those that would do; where only services have one, all that users can have."""
        enough = {self.permission(method), "orchestrator.operate"}
        return self.user(*(name for name in ALL_PERMISSIONS if name not in enough))

    async def close(self) -> None:
        for agent in self._agents:
            await agent.close()


@pytest_asyncio.fixture
async def callers(
    shared_pair: Pair, issuer: Issuer, service_keys: ServiceKeys, tenant: Tenant
) -> AsyncIterator[Callers]:
    made = Callers(shared_pair, issuer, service_keys, tenant.name)
    yield made
    await made.close()


@every_rpc
async def test_strangers_are_refused_before_anything_is_parsed(
    method: MethodDescriptor, callers: Callers, issuer: Issuer, service_keys: ServiceKeys
) -> None:
    """Whatever the bytes are, without a token that may call nothing is said about them."""
    needed = callers.permission(method)
    for_services = needed == "orchestrator.service"
    stranger = ec.generate_private_key(ec.SECP256R1())
    claims = issuer.claims(roles=ALL_PERMISSIONS)
    header, payload, signature = callers.good(method).split(".")
    refused = {
        "none": (None, "TOKEN_MISSING"),
        "empty": ("", "TOKEN_MISSING"),
        "garbage": ("garbage", "TOKEN_INVALID"),
        "expired": (callers.expired(method), "TOKEN_EXPIRED"),
        "audience": (callers.of_other_audience(method), "TOKEN_INVALID"),
        "foreign key": (issuer.sign(claims, key=stranger), "TOKEN_INVALID"),
        "unsigned": (jwt.encode(claims, "", algorithm="none", headers={"typ": "at+jwt"}), "TOKEN_INVALID"),
        "cut": (f"{header}.{payload}.{signature[:-8]}", "TOKEN_INVALID"),
        "ID token": (issuer.sign(claims, headers={"typ": "JWT"}), "TOKEN_INVALID"),
    }
    if for_services:
        refused["a user's"] = (callers.without_permission(method), "TOKEN_INVALID")
        refused["another service's"] = (callers.service(sub="another_svc"), "TOKEN_INVALID")
    else:
        refused["the service's own"] = (callers.service(), "TOKEN_INVALID")
    for name, (token, reason) in refused.items():
        for raw in (b"", MALFORMED):
            answer = await callers.ask(method, token, raw)
            assert answer.refusal == ("UNAUTHENTICATED", reason), name
    if not for_services:
        for raw in (b"", MALFORMED):
            answer = await callers.ask(method, callers.without_permission(method), raw)
            assert answer.refusal == ("PERMISSION_DENIED", "PERMISSION_MISSING")
            assert answer.metadata == {"permission": needed}


@every_rpc
async def test_malformed_and_oversized_requests_are_refused(
    method: MethodDescriptor, callers: Callers, tables: Tables, tenant: Tenant
) -> None:
    token = callers.good(method)
    limit = method.GetOptions().Extensions[options_pb2.policy].max_request_bytes or 16384
    with tables.unchanged(tenant.name):
        answer = await callers.ask(method, token, MALFORMED)
        assert answer.refusal == ("INVALID_ARGUMENT", "REQUEST_MALFORMED")
        # An unknown field, well-formed, so that only the size can be wrong.
        length = limit + 1 - 6
        raw = b"\xfa\x7f" + bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21])
        answer = await callers.ask(method, token, raw + b"x" * length)
        assert answer.refusal == ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
        assert answer.metadata == {"size": str(limit + 1), "limit": str(limit)}


@every_rpc
async def test_an_empty_request_without_a_deadline_gets_a_definite_answer(
    method: MethodDescriptor, callers: Callers
) -> None:
    answer = await callers.ask(method, callers.good(method), timeout=None)
    if not answer.ok:
        code, reason = answer.refusal
        assert (code, reason) in {("INVALID_ARGUMENT", "FIELD_REQUIRED"), ("INVALID_ARGUMENT", "FIELD_INVALID")}
        assert answer.fields


@every_controller_rpc
async def test_another_tenant_sees_and_changes_nothing(
    method: MethodDescriptor, tenant: Tenant, shared_pair: Pair, issuer: Issuer, tables: Tables
) -> None:
    """Its callers hold the same roles and every permission, have the same subject, and know all ids."""
    owner = tenant.agent()
    session = await owner.create(key="a-key", metadata=struct({"secret": "s3cret"}))
    await owner.route(session.id, description="s3cret", target_role=WORKER)
    (claimed,) = await owner.claim()
    await owner.route(session.id, description="s3cret", target_role=WORKER)
    names: dict[str, Any] = {
        "session_id": session.id,
        "task_id": claimed.task.id,
        "lease_id": claimed.lease_id,
        "resource_id": session.id,
        "agent_role": PLANNER,
        "role": WORKER,
        "target_role": WORKER,
        "type": "ROUTING",
        "update_mask": {"paths": ["metadata"]},
        "error": {"code": "BROKEN"},
        "include_total_size": True,
        "method": "/orchestrator.controller.v1.SessionService/CreateSession",
        "subject": "agent-1",
        "idempotency_key": "a-key",
    }
    is_list = method.name.startswith("List")
    request_class = GetMessageClass(method.input_type)
    fields = [field.name for field in method.input_type.fields if field.name in names]
    requests: list[Message] = [request_class(**{name: names[name] for name in fields})]
    if is_list:
        requests.append(request_class(include_total_size=True))

    foreign = Tenant(issuer, shared_pair.controller_target)
    intruder = foreign.agent()
    try:
        with tables.unchanged(tenant.name):
            for request in requests:
                answer = await intruder.ask(request, key=secrets.token_hex(8))
                if not is_list and {"session_id", "task_id"} & set(fields):
                    code, reason = answer.refusal
                    assert (code, reason[-10:]) == ("NOT_FOUND", "_NOT_FOUND")
                    missing = type(request)()
                    missing.CopyFrom(request)
                    for name in {"session_id", "task_id"} & set(fields):
                        setattr(missing, name, "01900000-0000-7000-8000-000000000000")
                    unknown = await intruder.ask(missing, key=secrets.token_hex(8))
                    assert unknown.refusal == answer.refusal, "a foreign resource differs from a missing one"
                    continue
                if answer.refusal == ("UNAVAILABLE", "IDEMPOTENCY_UNAVAILABLE"):
                    continue
                assert answer.ok, str(answer)
                for secret in (session.id, claimed.task.id, claimed.lease_id, tenant.name, "s3cret"):
                    assert secret.encode() not in answer.body
                if is_list:
                    assert answer.response.total_size == 0
    finally:
        await foreign.close()


async def test_another_tenants_page_token_is_refused(tenant: Tenant, shared_pair: Pair, issuer: Issuer) -> None:
    owner = tenant.agent()
    session = await owner.create()
    await owner.create()
    for _ in range(2):
        await owner.route(session.id)
    foreign = Tenant(issuer, shared_pair.controller_target)
    for request_class in (
        sessions_pb.ListSessionsRequest, tasks_pb.ListTasksRequest, audit_pb.ListAuditEventsRequest,
    ):  # fmt: skip
        token = (await owner.ask(request_class(page_size=1))).response.next_page_token
        assert token
        answer = await foreign.agent().ask(request_class(page_size=1, page_token=token))
        assert answer.refusal == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")
        assert answer.fields == ["page_token"]
    await foreign.close()


async def test_methods_that_do_not_exist_are_unimplemented(shared_pair: Pair, agent: Agent) -> None:
    for target, token in ((shared_pair.controller_target, agent.token), (shared_pair.idempotency_target, None)):
        caller = Agent(target, token)
        for name in ("/orchestrator.controller.v1.SessionService/DropSession", "/nobody.v1.NoService/Nothing"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await caller.call(name, b"", timeout=30)
            answer = Answer(error.value.code(), trailers=dict(error.value.trailing_metadata() or ()))
            assert answer.refusal == ("UNIMPLEMENTED", "METHOD_UNKNOWN")
        await caller.close()


async def test_a_tenant_must_be_named(callers: Callers) -> None:
    for name in CONTROLLER:
        answer = await callers.ask(METHODS[name], callers.user(*ALL_PERMISSIONS, tenant=None))
        assert answer.refusal == ("PERMISSION_DENIED", "TENANT_MISSING")


async def test_every_guarded_rpc_leaves_a_guard_and_is_replayed(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """Each with a key of its own: the second time the same bytes, and nothing more is written."""
    guarded = {
        name
        for name, method in METHODS.items()
        if method.GetOptions().Extensions[options_pb2.policy].write == options_pb2.WRITE_MODE_GUARDED
    }
    done = set()

    async def twice(request: Message) -> Any:
        method = next(name for name in guarded if METHODS[name].input_type is request.DESCRIPTOR)
        guards, key = tables.guards(tenant.name), secrets.token_hex(8)
        first = await agent.ask(request, key=key)
        assert first.ok, f"{first}"
        assert not first.replayed
        assert tables.guards(tenant.name) == guards + 1, method
        with tables.unchanged(tenant.name):
            again = await agent.ask(request, key=key)
        assert again.replayed, method
        assert again.body == first.body
        done.add(method)
        return first.response

    async def a_task() -> str:
        route = tasks_pb.RouteTaskRequest(session_id=session, type="ROUTING", target_role=WORKER)
        return str((await twice(route)).task.id)

    async def a_claim() -> dict[str, Any]:
        await a_task()
        [claimed] = (await twice(tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=1))).tasks
        return {"task_id": claimed.task.id, "lease_id": claimed.lease_id}

    session = (await twice(sessions_pb.CreateSessionRequest(agent_role=PLANNER))).session.id
    await twice(
        sessions_pb.UpdateSessionRequest(
            session_id=session, metadata=struct({"a": 1}), update_mask=FieldMask(paths=["metadata"])
        )
    )
    await twice(tasks_pb.CompleteTaskRequest(**await a_claim()))
    await twice(tasks_pb.FailTaskRequest(**await a_claim(), error=tasks_pb.TaskError(code="X", non_retryable=True)))
    released = await a_claim()
    await twice(tasks_pb.ReleaseTaskRequest(**released))
    await twice(tasks_pb.CancelTaskRequest(task_id=released["task_id"]))  # or a sweep does, when the session has ended
    await twice(sessions_pb.ActivateSessionRequest(session_id=session))
    await twice(sessions_pb.PauseSessionRequest(session_id=session))
    await twice(sessions_pb.ResumeSessionRequest(session_id=session))
    await twice(sessions_pb.CompleteSessionRequest(session_id=session))
    session = (await twice(sessions_pb.CreateSessionRequest(agent_role=PLANNER))).session.id
    await twice(sessions_pb.ActivateSessionRequest(session_id=session))
    await twice(sessions_pb.FailSessionRequest(session_id=session))
    assert done == guarded, "a new method belongs here"
