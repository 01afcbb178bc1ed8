"""The first job, end to end: what two agents and a retry see of the pair."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from google.protobuf.json_format import MessageToJson, ParseDict
from google.protobuf.message import Message
from grpc import aio

from deploy.local.issuer import Issuer
from orchestrator.controller.v1 import session_service_pb2 as sessions
from orchestrator.controller.v1 import task_service_pb2 as tasks

M = TypeVar("M", bound=Message)

_SESSIONS = "/orchestrator.controller.v1.SessionService/"
_TASKS = "/orchestrator.controller.v1.TaskService/"


class Answer(NamedTuple):
    """The bytes of an answer, and whether it says that it is a replay."""

    content: bytes
    replayed: bool


class Agent:
    """An agent of one role, calling with a token of its own."""

    def __init__(self, channel: aio.Channel, issuer: Issuer, role: str) -> None:
        self._channel = channel
        self._token = issuer.token(subject=f"{role}-1", roles=["orchestrator.agent", role])

    async def call(self, method: str, request: Message, key: str | None = None) -> Answer:
        """Call a method by its full name, with an idempotency key or without."""
        metadata = [("authorization", f"Bearer {self._token}")]
        if key is not None:
            metadata.append(("idempotency-key", key))
        multi: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        call = multi(request.SerializeToString(), timeout=15, metadata=aio.Metadata(*metadata))
        content = await call
        trailers = dict(await call.trailing_metadata())
        return Answer(content, trailers.get("idempotency-replayed") == "true")


async def first_job(target: str, issuer: Issuer, say: Callable[[str], None]) -> None:
    """Do it, telling each step; raises grpc.RpcError when a call fails, AssertionError when a promise is not kept."""
    async with aio.insecure_channel(target) as channel:
        sender, worker = Agent(channel, issuer, "sample-sender"), Agent(channel, issuer, "sample-worker")
        key = str(uuid.uuid4())

        create = sessions.CreateSessionRequest(agent_role="sample-sender")
        created = await sender.call(f"{_SESSIONS}CreateSession", create, key)
        session = sessions.CreateSessionResponse.FromString(created.content).session
        say(f"sender  CreateSession  session {session.id}")

        route = tasks.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role="sample-worker")
        ParseDict({"invoice": 4711, "amount": "12.50"}, route.data)
        routed = await sender.call(f"{_TASKS}RouteTask", route, key)
        task = tasks.RouteTaskResponse.FromString(routed.content).task
        say(f"sender  RouteTask      task {task.id} to sample-worker, {_json(task.data)}")

        claim = tasks.ClaimTasksRequest(role="sample-worker", max_tasks=10)
        claim.wait.FromSeconds(5)
        done: set[str] = set()
        while task.id not in done:  # an earlier run may have left one of its own behind
            answer = await worker.call(f"{_TASKS}ClaimTasks", claim, str(uuid.uuid4()))
            claimed = tasks.ClaimTasksResponse.FromString(answer.content)
            assert claimed.tasks, "the task was routed but cannot be claimed"
            for item in claimed.tasks:
                say(f"worker  ClaimTasks     task {item.task.id}, attempt {item.task.attempt}")
                complete = tasks.CompleteTaskRequest(task_id=item.task.id, lease_id=item.lease_id)
                ParseDict({"paid": True}, complete.result)
                await worker.call(f"{_TASKS}CompleteTask", complete, str(uuid.uuid4()))
                say(f"worker  CompleteTask   task {item.task.id}")
                done.add(item.task.id)

        read = await sender.call(f"{_TASKS}GetTask", tasks.GetTaskRequest(task_id=task.id))
        result = tasks.GetTaskResponse.FromString(read.content).task
        assert result.state == tasks.Task.STATE_SUCCEEDED, f"the task is {tasks.Task.State.Name(result.state)}"
        say(f"sender  GetTask        SUCCEEDED, {_json(result.result)}")

        for method, request, first in (("CreateSession", create, created), ("RouteTask", route, routed)):
            service = _SESSIONS if method == "CreateSession" else _TASKS
            again = await sender.call(f"{service}{method}", request, key)
            assert again == Answer(first.content, True), f"the retried {method} was not answered as the first time"
            say(f"sender  {method} again, same key: the same {len(again.content)} bytes, idempotency-replayed: true")


def _json(message: Message) -> str:
    return MessageToJson(message, indent=None)
