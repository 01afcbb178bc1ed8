"""What callers were told, call by call, and whether the tables agree: the proof that every write takes effect once."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from svckit.statuses import STORED_CODES
from tests.client import PLANNER, WORKER, Agent, Answer, spans, struct
from tests.oracle import Tables

FORBIDDEN = frozenset({"UNKNOWN", "INTERNAL", "DATA_LOSS", "UNIMPLEMENTED", "UNAUTHENTICATED"})
"""What no caller with a good token may ever be told."""

ALWAYS_CHANGES = (
    sessions_pb.CreateSessionRequest,
    sessions_pb.UpdateSessionRequest,
    tasks_pb.RouteTaskRequest,
    tasks_pb.ClaimTasksRequest,
)
"""Requests whose OK answers always stand for an effect; a verb may find that it has nothing to change."""


REPEATED = 0.35
"""The share of answers that traffic asks for again."""


class ViolationError(AssertionError):
    """The history shows a write that took effect otherwise than its callers were told."""


class VoidError(AssertionError):
    """The run proves nothing: too little traffic, or a fault that was not seen to take effect."""


class Intent(NamedTuple):
    """Whatever is to take effect once: a key of one caller and method, or a single call without a key."""

    tenant: str
    subject: str
    method: str
    key: str


class Effect(NamedTuple):
    """An audit event, and with it a change."""

    trace: str
    command: str
    resource: str
    version: int


@dataclass(slots=True, eq=False)
class Told:
    """One call: who asked for what, when and where, and the answer; None while it is under way."""

    intent: Intent
    request: Message
    trace: str
    target: str
    started: float
    ended: float = math.inf
    answer: Answer | None = None

    @property
    def verdict(self) -> str:
        """`ok`; `fail`: it wrote nothing; `unknown`: it may have written."""
        answer = self.answer
        if answer is None or answer.code.name in ("DEADLINE_EXCEEDED", "CANCELLED"):
            return "unknown"
        if answer.ok:
            return "ok"
        unsure = answer.code.name == "UNAVAILABLE" and answer.reason in ("", "OUTCOME_UNKNOWN", "CALL_ABANDONED")
        return "unknown" if unsure else "fail"

    @property
    def refused_key(self) -> bool:
        """Whether the key was said to belong to another request."""
        return self.answer is not None and self.answer.reason == "IDEMPOTENCY_KEY_REUSED"

    @property
    def empty(self) -> bool:
        """Whether it claimed nothing, which is not kept."""
        return self.verdict == "ok" and isinstance(self.request, tasks_pb.ClaimTasksRequest) and not self.resources

    @property
    def lasting(self) -> bool:
        """Whether all callers of its key must be told the same."""
        if self.answer is None or self.refused_key or self.empty:
            return False
        return self.answer.ok or self.answer.code.value[0] in STORED_CODES

    @property
    def resources(self) -> set[tuple[str, int]]:
        """(id, version) of each resource in an OK answer."""
        assert self.answer is not None
        response = self.answer.response
        if isinstance(response, tasks_pb.ClaimTasksResponse):
            given: Iterable[Any] = (claimed.task for claimed in response.tasks)
        else:
            given = (response.session,) if hasattr(response, "session") else (response.task,)
        return {(one.id, int(one.etag)) for one in given}

    def __str__(self) -> str:
        return f"{self.intent} at {self.target}, {self.started:.3f}–{self.ended:.3f}: {self.answer}"


class History:
    """Records calls and checks them. All writes of its tenants must go through it."""

    def __init__(self) -> None:
        self.calls: list[Told] = []
        self._agents: dict[tuple[str, str], list[Agent]] = defaultdict(list)

    async def ask(self, agent: Agent, request: Message, *, key: str = "", timeout: float = 10) -> Told:
        """One call, recorded whatever becomes of it."""
        if agent not in (known := self._agents[agent.tenant, agent.subject]):
            known.append(agent)
        trace = secrets.token_hex(16)
        loop = asyncio.get_running_loop()
        intent = Intent(agent.tenant, agent.subject, request.DESCRIPTOR.name, key or f"keyless {trace}")
        told = Told(intent, request, trace, agent.target, loop.time())
        self.calls.append(told)
        parent = ("traceparent", f"00-{trace}-{secrets.token_hex(8)}-01")
        told.answer = await agent.ask(request, key=key, timeout=timeout, metadata=(parent,))
        told.ended = loop.time()
        return told

    async def insist(
        self, agents: Sequence[Agent], request: Message, key: str, *, timeout: float = 5, seconds: float = 90
    ) -> Told:
        """Asks again with the same key, at any of the agents, until the answer lasts."""
        until = asyncio.get_running_loop().time() + seconds
        while True:
            told = await self.ask(random.choice(agents), request, key=key, timeout=timeout)
            if told.lasting or told.empty or told.refused_key or _is_for_the_moment(told):
                return told
            if asyncio.get_running_loop().time() > until:
                raise ViolationError(f"no answer that lasts after {seconds} s: {told}")
            await asyncio.sleep(random.uniform(0.01, 0.1))

    async def settle(self) -> None:
        """Asks again for every key that has no lasting answer yet; faults have to be over."""
        waiting = [
            (self._agents[intent.tenant, intent.subject], calls[0])
            for intent, calls in self._by_intent().items()
            if not intent.key.startswith("keyless") and not any(_settled(call) for call in calls)
        ]
        for start in range(0, len(waiting), 64):
            await asyncio.gather(
                *(self.insist(agents, call.request, call.intent.key) for agents, call in waiting[start : start + 64])
            )

    async def again(self, most: int = 300) -> None:
        """Asks once more for keys that have their answer already: it must be told again."""
        done = [calls[0] for calls in self._by_intent().values() if any(call.lasting for call in calls)]
        keyed = [call for call in done if not call.intent.key.startswith("keyless")]
        chosen = random.sample(keyed, min(most, len(keyed)))
        for start in range(0, len(chosen), 64):
            await asyncio.gather(
                *(
                    self.insist(self._agents[call.intent.tenant, call.intent.subject], call.request, call.intent.key)
                    for call in chosen[start : start + 64]
                )
            )

    def verdicts(self) -> Counter[str]:
        """How many calls there are of each verdict."""
        return Counter(call.verdict for call in self.calls)

    def enough(self, least: int, faults: Mapping[str, int]) -> None:
        """Raises VoidError unless at least so many calls were OK and each fault took effect."""
        if self.verdicts()["ok"] < least:
            raise VoidError(f"too little traffic: {dict(self.verdicts())}, {least} OK wanted")
        if unseen := [name for name, count in faults.items() if not count]:
            raise VoidError(f"not seen to take effect: {unseen}")

    def check(self, tables: Tables) -> None:
        """Raises ViolationError for the first thing that is not as it was told."""
        for call in self.calls:
            if call.answer is not None and call.answer.code.name in FORBIDDEN:
                raise ViolationError(f"told {call}")
        try:
            tables.check()
        except AssertionError as error:
            raise ViolationError(str(error)) from error
        effects = self._effects(tables)
        at = {(effect.resource, effect.version) for group in effects.values() for effect in group}
        given: dict[str, Intent] = {}
        for intent, calls in self._by_intent().items():
            self._check_intent(intent, calls, effects, at)
            for call in calls:
                if call.verdict == "ok" and isinstance(call.request, ALWAYS_CHANGES[:1] + ALWAYS_CHANGES[2:3]):
                    for id_, _ in call.resources:
                        if given.setdefault(id_, intent) != intent:
                            raise ViolationError(f"{id_} was given to {intent} and to {given[id_]}")
        known = {call.trace for call in self.calls}
        if strange := [effect for trace, group in effects.items() if trace not in known for effect in group]:
            raise ViolationError(f"effects that nobody asked for: {strange[:3]}")

    def _check_intent(
        self, intent: Intent, calls: list[Told], effects: Mapping[str, list[Effect]], at: set[tuple[str, int]]
    ) -> None:
        if liars := [call for call in calls if call.verdict == "fail" and effects.get(call.trace)]:
            raise ViolationError(f"took effect, and was told that it did not: {liars[0]}")
        mine = [effect for call in calls for effect in effects.get(call.trace, ())]
        if len({effect.command for effect in mine}) > 1:
            raise ViolationError(f"{intent} took effect {len({effect.command for effect in mine})} times: {mine}")
        lasting = [call for call in calls if call.lasting]
        if len({call.answer.said for call in lasting if call.answer is not None}) > 1:
            raise ViolationError(f"{intent} was answered differently: {[str(call) for call in lasting]}")
        requests = {call.request.SerializeToString(deterministic=True) for call in calls}
        if len({call.request.SerializeToString(deterministic=True) for call in lasting}) > 1:
            raise ViolationError(f"{intent} was answered for two requests")
        if any(call.refused_key for call in calls) and len(requests) == 1:
            raise ViolationError(f"{intent}: its key is said to be another's")
        first = min((call.ended for call in lasting), default=math.inf)
        if any(call.empty and call.started > first for call in calls):
            raise ViolationError(f"{intent}: nothing claimed, after tasks were")
        if not lasting:
            if mine and all(call.verdict == "fail" or call.empty for call in calls):
                raise ViolationError(f"{intent} took effect and was refused: {[str(call) for call in calls]}")
            if not intent.key.startswith("keyless") and not any(map(_settled, calls)):
                raise ViolationError(f"{intent} has no answer that lasts")
            return
        answer = lasting[0].answer
        assert answer is not None
        told = lasting[0].resources if answer.ok else set()
        done = {(effect.resource, effect.version) for effect in mine}
        if not done <= told:
            raise ViolationError(f"{intent} did {done - told}, and was told {lasting[0]}")
        if done != told and (isinstance(lasting[0].request, ALWAYS_CHANGES) or not told <= at):
            raise ViolationError(f"{intent} was told {told - done}, which did not happen: {lasting[0]}")

    def _by_intent(self) -> dict[Intent, list[Told]]:
        intents: dict[Intent, list[Told]] = defaultdict(list)
        for call in self.calls:
            intents[call.intent].append(call)
        return intents

    def _effects(self, tables: Tables) -> dict[str, list[Effect]]:
        """What callers did, by the trace of their call; what the server did by itself is left out."""
        tenants = sorted({tenant for tenant, _ in self._agents})
        effects: dict[str, list[Effect]] = defaultdict(list)
        for row in tables.rows(
            "select trace_id, command_id::text, resource_id::text, version_after from audit_events"
            " where tenant = any(%s) and subject <> 'system'",
            tenants,
        ):
            effect = Effect(*row)
            effects[effect.trace].append(effect)
        return effects


def _is_for_the_moment(told: Told) -> bool:
    """A refusal that is not kept and that asking again does not change."""
    assert told.answer is not None
    return told.answer.reason in ("ETAG_MISMATCH", "ROLE_NOT_HELD")


def _settled(call: Told) -> bool:
    return call.lasting or call.empty or call.refused_key or (call.answer is not None and _is_for_the_moment(call))


class Traffic:
    """Mixed calls on few rows: creates with and without keys, updates, verbs, routes, claims and completions."""

    def __init__(self, history: History, agents: Sequence[Agent], *, seed: int = 0) -> None:
        """The agents are one subject at one or more controllers."""
        self.history = history
        self.agents = agents
        self.sessions: list[str] = []
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._run = secrets.token_hex(4)

    async def prepare(self, sessions: int = 4) -> None:
        """Makes the sessions that are then changed by all."""
        for number in range(sessions):
            request = sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"number": number}))
            told = await self.history.insist(self.agents, request, f"{self._run}-session-{number}")
            assert told.answer is not None
            self.sessions.append(told.answer.response.session.id)

    def requests(self) -> Iterator[tuple[Message, str]]:
        """Requests with their keys ("" without), for ever."""
        while True:
            number = next(self._numbers)
            key = f"{self._run}-{number}"
            session_id = self._rng.choice(self.sessions)
            metadata = struct({f"n{number % 50}": key})
            match self._rng.randrange(10):
                case 0 | 1:
                    yield sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=metadata), key
                case 2:
                    yield sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=metadata), ""
                case 3 | 4:
                    mask = FieldMask(paths=["metadata"])
                    update = sessions_pb.UpdateSessionRequest(
                        session_id=session_id, metadata=metadata, update_mask=mask
                    )
                    yield update, key if number % 3 else ""
                case 5 | 6:
                    verb = self._rng.choice(("Activate", "Pause", "Resume"))
                    yield getattr(sessions_pb, f"{verb}SessionRequest")(session_id=session_id), key
                case 7:
                    route = tasks_pb.RouteTaskRequest(
                        session_id=session_id, type="ROUTING", target_role=WORKER, lease_timeout=spans(300)
                    )
                    yield route, key
                case _:
                    yield tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2), key

    async def one(self, request: Message, key: str, *, agent: Agent | None = None, timeout: float = 10) -> Told:
        """One call; claimed tasks are completed, each by a key of its own.

        A third of the answers is asked for again: replays are so frequent then that claims go first.
        """
        told = await self.history.ask(agent or self._rng.choice(self.agents), request, key=key, timeout=timeout)
        if told.lasting and told.answer is not None and isinstance(request, tasks_pb.ClaimTasksRequest):
            for claimed in told.answer.response.tasks:
                complete = tasks_pb.CompleteTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id)
                await self.history.ask(
                    agent or self._rng.choice(self.agents),
                    complete,
                    key=f"complete-{claimed.lease_id}",
                    timeout=timeout,
                )
        if told.lasting and key and self._rng.random() < REPEATED:
            await self.history.ask(agent or self._rng.choice(self.agents), request, key=key, timeout=timeout)
        return told

    async def burst(self, calls: int, *, agent: Agent | None = None, timeout: float = 10) -> None:
        """So many calls at once."""
        requests = itertools.islice(self.requests(), calls)
        await asyncio.gather(*(self.one(request, key, agent=agent, timeout=timeout) for request, key in requests))

    async def until(self, stop: asyncio.Event, *, callers: int = 8, timeout: float = 5) -> None:
        """Calls by so many callers, one after the other each, until told to stop."""
        requests = self.requests()

        async def caller() -> None:
            while not stop.is_set():
                request, key = next(requests)
                told = await self.one(request, key, timeout=timeout)
                if told.verdict != "ok":
                    await asyncio.sleep(self._rng.uniform(0.01, 0.1))  # as a client that backs off

        await asyncio.gather(*(caller() for _ in range(callers)))
