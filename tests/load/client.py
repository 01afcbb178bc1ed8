"""The aio client as its own process: it is told what to call through its stdin, and reports on its stdout.

One JSON line each way. First the target, the echo's target and the token; then `["prepare"]`, `["fill", tasks]` and
`["measure", call, in_flight, seconds]`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration

from orchestrator.controller.v1 import session_service_pb2, task_service_pb2
from tests.load.calls import CONNECTIONS, REPLAYS, TIMEOUT_SECONDS, path, request

Metadata = tuple[tuple[str, str], ...]
Stub = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

_TASKS = "/orchestrator.controller.v1.TaskService"


class Replay(NamedTuple):
    """A call that was made before: its metadata with the key, and what was answered."""

    metadata: Metadata
    answer: bytes


class Tally:
    """What became of the calls of one run: end and latency of each OK one in µs, and the others by code."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.ends: list[int] = []
        self.latencies: list[int] = []
        self.errors: Counter[str] = Counter()


class Connection:
    """One HTTP/2 connection to the controller, and one to the echo; requests and answers are bytes."""

    def __init__(self, target: str, echo_target: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # else all channels of a process share one connection
        channel = grpc.aio.insecure_channel(target, options)
        self.stubs: dict[str, Stub] = {
            name: channel.unary_unary(path(name)) for name in ("create", "get", "list", "route", "claim")
        }
        self.stubs["heartbeat"] = channel.unary_unary(f"{_TASKS}/HeartbeatTask")
        self.stubs["complete"] = channel.unary_unary(f"{_TASKS}/CompleteTask")
        self.stubs["echo"] = grpc.aio.insecure_channel(echo_target, options).unary_unary(path("echo"))


class Caller:
    """Makes one call after another on one connection, and notes each in `tally`."""

    def __init__(self, connection: Connection, tally: Tally) -> None:
        self._stubs = connection.stubs
        self._tally = tally

    async def call(self, name: str, message: bytes, metadata: Metadata | None = None) -> bytes | None:
        """The answer, or None when it was an error."""
        start = time.perf_counter()
        try:
            answer = await self._stubs[name](message, metadata=metadata, timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            self.failed(f"{error.code().name}: {error.details()}")
            return None
        end = time.perf_counter()
        self._tally.ends.append(round((end - self._tally.start) * 1e6))
        self._tally.latencies.append(round((end - start) * 1e6))
        return answer

    def failed(self, what: str) -> None:
        """Note an error."""
        self._tally.errors[what] += 1


class Client:
    """An agent with many calls in flight."""

    def __init__(self, target: str, echo_target: str, token: str) -> None:
        self._bearer: Metadata = (("authorization", f"Bearer {token}"),)
        self._connections = [Connection(target, echo_target) for _ in range(CONNECTIONS)]
        self._run = uuid.uuid4().hex[:24]
        self._count = itertools.count()
        self._create_request = request("create")
        self._list_request = request("list")
        self._route_request = request("route")
        self._sessions: list[str] = []
        self._next_session: Iterator[str] = iter(())
        self._gets: Iterator[bytes] = iter(())
        self._replays: Iterator[Replay] = iter(())
        self._steps: dict[str, Callable[[Caller], Awaitable[object]]] = {
            "echo": lambda caller: caller.call("echo", self._create_request),
            "echo-keyed": lambda caller: caller.call("echo", self._create_request, self._with_key()),
            "create": lambda caller: caller.call("create", self._create_request, self._with_key()),
            "get": lambda caller: caller.call("get", next(self._gets), self._bearer),
            "list": lambda caller: caller.call("list", self._list_request, self._bearer),
            "replay": self._replay,
            "loop": self._loop,
            "mix": self._mix,
        }

    async def prepare(self) -> dict[str, Any]:
        """Create the sessions that are read, replayed and routed to; answer their ids."""
        replays: list[Replay] = []

        async def create(caller: Caller, number: int) -> None:
            metadata = (*self._bearer, ("idempotency-key", f"replay-{number}"))
            answer = await caller.call("create", self._create_request, metadata)
            if answer is not None:
                replays.append(Replay(metadata, answer))

        tally = await self._each(REPLAYS, create)
        self._sessions = [_session_id(replay.answer) for replay in replays]
        self._next_session = itertools.cycle(self._sessions)
        self._gets = itertools.cycle([request("get", SESSION_ID=session) for session in self._sessions])
        self._replays = itertools.cycle(replays)
        return {"sessions": self._sessions, "errors": tally.errors}

    async def fill(self, tasks: int) -> dict[str, Any]:
        """Route this many tasks to the role `queue`."""
        tally = await self._each(tasks, lambda caller, number: self._route(caller, next(self._next_session), "queue"))
        return {"errors": tally.errors}

    async def measure(self, call: str, in_flight: int, seconds: float) -> dict[str, Any]:
        """Keep this many calls in flight for this long, and then until the last step is over."""
        step = self._steps[call]
        tally = Tally()
        stop = tally.start + seconds

        async def keep_calling(connection: Connection) -> None:
            caller = Caller(connection, tally)
            while time.perf_counter() < stop:
                await step(caller)

        async with asyncio.TaskGroup() as group:
            for number in range(in_flight):
                group.create_task(keep_calling(self._connections[number % CONNECTIONS]))
        return {"ends": tally.ends, "latencies": tally.latencies, "errors": tally.errors}

    async def _each(self, count: int, step: Callable[[Caller, int], Awaitable[object]]) -> Tally:
        """Do `step` for each number below `count`, 64 at a time."""
        tally = Tally()
        numbers = iter(range(count))

        async def work(connection: Connection) -> None:
            caller = Caller(connection, tally)
            for number in numbers:
                await step(caller, number)

        async with asyncio.TaskGroup() as group:
            for number in range(64):
                group.create_task(work(self._connections[number % CONNECTIONS]))
        return tally

    def _with_key(self) -> Metadata:
        """The token and a key as long as a UUID, never used before."""
        return (*self._bearer, ("idempotency-key", f"{self._run}{next(self._count):012d}"))

    async def _replay(self, caller: Caller) -> None:
        replay = next(self._replays)
        answer = await caller.call("create", self._create_request, replay.metadata)
        if answer is not None and answer != replay.answer:
            caller.failed("another answer than the first")

    async def _loop(self, caller: Caller) -> None:
        if await self._route(caller, next(self._next_session), "loop") is not None:
            await self._work(caller, "loop", heartbeat=False)

    async def _mix(self, caller: Caller) -> None:
        answer = await caller.call("create", self._create_request, self._with_key())
        if answer is not None and await self._route(caller, _session_id(answer), "mix") is not None:
            await self._work(caller, "mix", heartbeat=True)

    async def _route(self, caller: Caller, session: str, role: str) -> bytes | None:
        message = task_service_pb2.RouteTaskRequest.FromString(self._route_request)
        message.session_id, message.target_role = session, role
        return await caller.call("route", message.SerializeToString(), self._with_key())

    async def _work(self, caller: Caller, role: str, *, heartbeat: bool) -> None:
        """Claim a task of this role and complete it. As many were routed as are claimed, so one is always there."""
        claim = task_service_pb2.ClaimTasksRequest(role=role, max_tasks=1, wait=Duration(seconds=10))
        answer = await caller.call("claim", claim.SerializeToString(), self._with_key())
        if answer is None:
            return
        tasks = task_service_pb2.ClaimTasksResponse.FromString(answer).tasks
        if not tasks:
            caller.failed("nothing to claim")
            return
        task_id, lease_id = tasks[0].task.id, tasks[0].lease_id
        if heartbeat:
            beat = task_service_pb2.HeartbeatTaskRequest(task_id=task_id, lease_id=lease_id)
            beat.progress["done"] = 0.5
            await caller.call("heartbeat", beat.SerializeToString(), self._bearer)
        complete = task_service_pb2.CompleteTaskRequest(task_id=task_id, lease_id=lease_id)
        complete.result["summary"] = "Nothing new."
        await caller.call("complete", complete.SerializeToString(), self._with_key())


def _session_id(answer: bytes) -> str:
    return session_service_pb2.CreateSessionResponse.FromString(answer).session.id


def main() -> None:
    """Do what stdin says until it ends."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def connect() -> Client:
            return Client(*json.loads(sys.stdin.readline()))

        client = runner.run(connect())
        commands: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
            "prepare": client.prepare,
            "fill": client.fill,
            "measure": client.measure,
        }
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(runner.run(commands[name](*arguments))), flush=True)


if __name__ == "__main__":
    main()
