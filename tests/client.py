"""A caller of the pair: any request, by its message, and the answer with its bytes, trailers and error details."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import pkgutil
import random
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

import orchestrator
from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import error_reason_pb2
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb

if TYPE_CHECKING:
    from deploy.local.issuer import Issuer

AGENT = "orchestrator.agent"
AUDIT = "orchestrator.audit"
OPERATE = "orchestrator.operate"
PLANNER = "planner"
WORKER = "worker"

REASONS = frozenset(
    name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
)
"""Every reason that the contract knows."""

PASSING = frozenset({"UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"})
"""Codes after which an agent asks again with the same key."""


def services() -> Iterator[ServiceDescriptor]:
    """Every service that has a module in gen/, so that none can be forgotten."""
    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
        if module.name.endswith("_pb2"):
            yield from importlib.import_module(module.name).DESCRIPTOR.services_by_name.values()


def full_method(method: MethodDescriptor) -> str:
    """The name of a method as it goes over the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


METHODS = {method.input_type.full_name: method for service in services() for method in service.methods}
"""Every method, by the full name of its request."""


def spans(seconds: float) -> Duration:
    """A Duration."""
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def struct(values: Mapping[str, Any]) -> Struct:
    """A Struct."""
    made = Struct()
    made.update(dict(values))
    return made


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one call; `body` is the response as it was sent, empty for an error."""

    code: grpc.StatusCode
    body: bytes = b""
    message: str = ""
    trailers: Mapping[str, str | bytes] = field(default_factory=dict)
    response_class: type[Message] | None = None

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def response(self) -> Any:
        """The response; fails the test for an error."""
        assert self.ok and self.response_class is not None, f"{self}"
        return self.response_class.FromString(self.body)

    @property
    def status(self) -> Any:
        """The google.rpc.Status of an error; None where the server gave none, as when it was not reached."""
        details = self.trailers.get("grpc-status-details-bin")
        return None if details is None else Status.FromString(details)

    def detail(self, kind: type[Any]) -> Any:
        """The error's detail of this type, empty if it has none."""
        found = kind()
        for packed in self.status.details if self.status is not None else ():
            if packed.Unpack(found):
                break
        return found

    @property
    def reason(self) -> str:
        return str(self.detail(error_details_pb2.ErrorInfo).reason)

    @property
    def retry_after(self) -> float:
        """Seconds that its RetryInfo asks for; 0 without one."""
        delay = self.detail(error_details_pb2.RetryInfo).retry_delay
        return float(delay.seconds + delay.nanos / 1e9)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of its ErrorInfo."""
        return dict(self.detail(error_details_pb2.ErrorInfo).metadata)

    @property
    def fields(self) -> list[str]:
        """The fields that its BadRequest names."""
        return [violation.field for violation in self.detail(error_details_pb2.BadRequest).field_violations]

    @property
    def replayed(self) -> bool:
        return self.trailers.get("idempotency-replayed") == "true"

    @property
    def refusal(self) -> tuple[str, str]:
        """(code, reason) of an error that the server gave, with all that errors must have; ("OK", "") without one."""
        if self.ok:
            return "OK", ""
        assert self.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), f"{self}"
        info = self.detail(error_details_pb2.ErrorInfo)
        assert info.domain == "orchestrator" and info.reason in REASONS, f"{self}"
        assert self.status.code == self.code.value[0]
        return self.code.name, str(info.reason)

    @property
    def said(self) -> tuple[int, bytes]:
        """What all callers of a key must be told alike: code, and the response's or the error's bytes."""
        return self.code.value[0], self.body if self.ok else self.status.SerializeToString(deterministic=True)

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message} {self.metadata} {self.fields}"


class Agent:
    """One subject with its token, on as many connections as it is given (a server takes 100 calls at once on each)."""

    def __init__(
        self, target: str, token: str | None, *, connections: int = 1, tenant: str = "", subject: str = ""
    ) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 2000),  # how long an attempt to connect may take
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        self.target = target
        self.token = token
        self.tenant = tenant
        self.subject = subject
        self.channels = [grpc.aio.insecure_channel(target, options) for _ in range(connections)]
        self._next = itertools.cycle(self.channels)
        self._calls: dict[tuple[grpc.aio.Channel, str], Any] = {}

    def call(
        self,
        method: str,
        raw: bytes,
        *,
        timeout: float | None = 30,
        metadata: Iterable[tuple[str, str]] = (),
        channel: grpc.aio.Channel | None = None,
    ) -> Any:
        """A call under way, to be awaited or cancelled."""
        channel = channel or next(self._next)
        callable_ = self._calls.get((channel, method))
        if callable_ is None:
            callable_ = self._calls[channel, method] = channel.unary_unary(method)
        if self.token is not None:
            metadata = (*metadata, ("authorization", f"Bearer {self.token}"))
        return callable_(raw, timeout=timeout, metadata=tuple(metadata))

    async def send(
        self,
        method: MethodDescriptor,
        raw: bytes,
        *,
        timeout: float | None = 30,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> Answer:
        """The answer to these bytes."""
        call = self.call(full_method(method), raw, timeout=timeout, metadata=metadata)
        try:
            body = await call
        except grpc.aio.AioRpcError as error:
            return Answer(error.code(), b"", error.details() or "", dict(error.trailing_metadata() or ()))
        trailers = dict(await call.trailing_metadata() or ())
        return Answer(grpc.StatusCode.OK, body, "", trailers, GetMessageClass(method.output_type))

    async def ask(
        self,
        request: Message,
        *,
        key: str = "",
        timeout: float | None = 30,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """The answer to a request; its message says which method it is for."""
        if key:
            metadata = (*metadata, ("idempotency-key", key))
        method = METHODS[request.DESCRIPTOR.full_name]
        return await self.send(method, request.SerializeToString(), timeout=timeout, metadata=metadata)

    async def insist(self, request: Message, *, key: str, seconds: float = 60, timeout: float = 5) -> Answer:
        """Asks again with the same key, as an agent does, until there is an answer that lasts."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            answer = await self.ask(request, key=key, timeout=timeout)
            if answer.code.name not in PASSING or answer.reason == "ETAG_MISMATCH":
                return answer
            assert loop.time() < until, f"after {seconds} s still {answer}"
            await asyncio.sleep(random.uniform(0.02, 0.2))

    async def create(self, role: str = PLANNER, *, key: str = "", **fields: Any) -> sessions_pb.Session:
        """A new session."""
        answer = await self.ask(sessions_pb.CreateSessionRequest(agent_role=role, **fields), key=key)
        session: sessions_pb.Session = answer.response.session
        return session

    async def session(self, session_id: str) -> sessions_pb.Session:
        """A session as it is now."""
        answer = await self.ask(sessions_pb.GetSessionRequest(session_id=session_id))
        session: sessions_pb.Session = answer.response.session
        return session

    async def change(self, verb: str, session_id: str, *, key: str = "", etag: str = "") -> Answer:
        """The answer to ActivateSession, PauseSession, ResumeSession, CompleteSession or FailSession."""
        request = getattr(sessions_pb, f"{verb}SessionRequest")(session_id=session_id, etag=etag)
        return await self.ask(request, key=key)

    async def route(self, session_id: str, *, key: str = "", **fields: Any) -> tasks_pb.Task:
        """A new task, for the role `worker` and of type ROUTING unless said otherwise."""
        fields = {"target_role": WORKER, "type": "ROUTING", **fields}
        request = tasks_pb.RouteTaskRequest(session_id=session_id, **fields)
        answer = await self.ask(request, key=key or secrets.token_hex(8))
        task: tasks_pb.Task = answer.response.task
        return task

    async def task(self, task_id: str) -> tasks_pb.Task:
        """A task as it is now."""
        answer = await self.ask(tasks_pb.GetTaskRequest(task_id=task_id))
        task: tasks_pb.Task = answer.response.task
        return task

    async def claim(
        self, role: str = WORKER, *, max_tasks: int = 1, wait: float = 0, key: str = ""
    ) -> list[tasks_pb.ClaimedTask]:
        """Tasks claimed, within `wait` seconds."""
        request = tasks_pb.ClaimTasksRequest(role=role, max_tasks=max_tasks, wait=spans(wait))
        answer = await self.ask(request, key=key, timeout=wait + 30)
        return list(answer.response.tasks)

    async def heartbeat(self, claimed: tasks_pb.ClaimedTask, **fields: Any) -> Answer:
        """The answer to a heartbeat under this lease."""
        request = tasks_pb.HeartbeatTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id, **fields)
        return await self.ask(request)

    async def complete(self, claimed: tasks_pb.ClaimedTask, *, key: str = "", **result: Any) -> Answer:
        """The answer to completing the task under this lease."""
        request = tasks_pb.CompleteTaskRequest(
            task_id=claimed.task.id, lease_id=claimed.lease_id, result=struct(result)
        )
        return await self.ask(request, key=key)

    async def fail(
        self, claimed: tasks_pb.ClaimedTask, code: str = "BROKEN", *, key: str = "", non_retryable: bool = False
    ) -> Answer:
        """The answer to failing the attempt under this lease."""
        error = tasks_pb.TaskError(code=code, message="it broke", non_retryable=non_retryable)
        request = tasks_pb.FailTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id, error=error)
        return await self.ask(request, key=key)

    async def release(self, claimed: tasks_pb.ClaimedTask, *, key: str = "") -> Answer:
        """The answer to giving the task back."""
        request = tasks_pb.ReleaseTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id)
        return await self.ask(request, key=key)

    async def cancel(self, task_id: str, *, reason: str = "", key: str = "", etag: str = "") -> Answer:
        """The answer to cancelling a task."""
        return await self.ask(tasks_pb.CancelTaskRequest(task_id=task_id, reason=reason, etag=etag), key=key)

    async def events(self, resource_id: str) -> list[audit_pb.AuditEvent]:
        """The audit events of a resource, the oldest first."""
        answer = await self.ask(audit_pb.ListAuditEventsRequest(resource_id=resource_id, page_size=100))
        return sorted(answer.response.audit_events, key=lambda event: event.version_after)

    async def status(self) -> status_pb.GetStatusResponse:
        """How the server says it is."""
        answer = await self.ask(status_pb.GetStatusRequest())
        response: status_pb.GetStatusResponse = answer.response
        return response

    async def health(self) -> str:
        """The name of the health that its status says."""
        return status_pb.Health.Name((await self.status()).health)

    async def close(self) -> None:
        """Closes its connections."""
        for channel in self.channels:
            await channel.close(None)


class Tenant:
    """A tenant and its agents. They have all permissions and the roles `planner` and `worker` unless said otherwise."""

    def __init__(self, issuer: Issuer, target: str, name: str = "") -> None:
        self.name = name or f"tenant-{secrets.token_hex(4)}"
        self._issuer = issuer
        self._target = target
        self._agents: list[Agent] = []

    def agent(
        self,
        subject: str = "agent-1",
        *,
        roles: Sequence[str] = (PLANNER, WORKER),
        permissions: Sequence[str] = (AGENT, AUDIT, OPERATE),
        target: str = "",
        connections: int = 1,
    ) -> Agent:
        """An agent of this tenant, closed with it."""
        token = self._issuer.token(subject=subject, tenant=self.name, roles=(*roles, *permissions), seconds=3600)
        agent = Agent(target or self._target, token, connections=connections, tenant=self.name, subject=subject)
        self._agents.append(agent)
        return agent

    async def close(self) -> None:
        """Closes its agents."""
        for agent in self._agents:
            await agent.close()
