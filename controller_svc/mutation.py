"""The door: every guarded write goes through here, and takes effect once.

    key → claim → read → decide → write → answer → complete

Concurrent calls share the steps (svckit.groups). What may go wrong on the way, and what is done about it, stands beside
each step; store/write.py says what the one statement relies on.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import psycopg
import structlog
from prometheus_client import Counter
from psycopg_pool import AsyncConnectionPool

from controller_svc.core.ids import new_command_id
from controller_svc.fingerprint import NO_STRUCTS, PACKED, earlier_fingerprint_of, fingerprints_of, same_request
from controller_svc.first_sent import FIRST_SENT_HEADER, first_sent, key_expired
from controller_svc.idempotency import KEY_HEADER, LONGEST_LEASE, idempotency_key, in_progress, scope_of
from controller_svc.replays import NearKey, Replays
from controller_svc.store.database import (
    FAILURES,
    STALE_SECONDS,
    WATCHDOG_SECONDS,
    OutcomeUnknownError,
    confirmed,
    is_bad_data,
    is_collision,
    is_full,
    is_lock_timeout,
    is_unknown,
    resource_busy,
    unavailable,
    watched,
)
from controller_svc.store.read import Guard, read_guards, read_rows
from controller_svc.store.write import Outcome, Write, write
from svckit.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ServiceError,
    StoredAnswer,
    Unavailable,
)
from svckit.groups import GATHER, Groups, Slots
from svckit.statuses import STORED_CODES, code_of, status_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from controller_svc.core.audit import AuditEvent
    from controller_svc.core.mutations import Actor, Key, Lookup, Mutation, Row
    from controller_svc.idempotency import Idempotency
    from controller_svc.store.database import Connection, Database
    from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
    from svckit.interceptors import Call

log = structlog.get_logger(__name__)

LONGEST_ATTEMPT = 60.0
"""Seconds within which every attempt has ended: a call's 30 s, and what an unknown outcome may take to settle."""
KEYLESS_LIFE = timedelta(seconds=2 * LONGEST_ATTEMPT)
"""The guard of a call without a key serves only to settle an unknown outcome."""
RESEND_SECONDS = 5.0
RESEND_PAUSE = 0.2
SETTLE_SECONDS = RESEND_SECONDS + WATCHDOG_SECONDS
"""Within which what was sent again is settled."""
MARGIN = 0.1
"""Seconds before its deadline at which a caller that waits is told so."""
AWAIT_SECONDS = 1.0
"""Between two looks at the guard of a key that somebody else owns."""
MAX_FOLLOWERS = 1000
"""Callers of one key that wait in this process for the one at work."""
ANNOUNCE_SECONDS = 0.1
"""After which a call under way is announced by its claim, unless it claims first. Most are done by then."""
CLAIM_FIRST = 0.1
"""The share of replays among the answers above which a call waits for its claim before it begins."""
CLAIM_AHEAD = 0.02
"""Seconds at most for which the next group's claim waits until this group's write is under way."""
SWEEP_SECONDS = 10.0

_OUTCOMES = Counter("orchestrator_writes_total", "Commands in a sent statement, by what became of them.", ["outcome"])
OUTCOMES = {outcome: _OUTCOMES.labels(outcome.value) for outcome in Outcome}
UNKNOWN = _OUTCOMES.labels("unknown")
NEAR = Counter("orchestrator_near_replays_total", "Replays answered from this process's own memory.")

_NO_FINGERPRINT = b"\0" * 32
"""Of a call without a key, whose scope no other has."""


class Answer(NamedTuple):
    """What every caller of a key is told."""

    code: int
    """gRPC status code; 0 is OK."""
    body: bytes
    """The response, or the serialised google.rpc.Status."""
    replayed: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """One command on its way through the door."""

    method: str
    tenant: str
    subject: str
    on_behalf_of: str
    trace_id: str
    scope: bytes
    fingerprints: bytes
    raw: bytes
    """The request as received."""
    request: Any
    key_hash: bytes | None
    """None: without a key, so the scope is its own."""
    near_key: NearKey | None
    """What its answer is found by in this process; None: without a key."""
    deadline: float
    """By the event loop's clock."""
    command_id: UUID
    first_sent: datetime | None
    """When the caller says it tried first."""
    result: asyncio.Future[Answer | Exception | pb.ClaimOutcome]
    """Cancelled when the caller has left. An outcome: the key is another's, and the caller has to wait for it."""
    mutation: Mutation[Any] = None  # type: ignore[assignment]  # a claim of tasks has none
    command: Any = None
    respond: Callable[[Any], bytes] = lambda answer: b""
    go: Callable[[Attempt], None] = lambda attempt: None
    """Does the work once the key is ours, or once Postgres is to decide; settles the attempt."""
    not_after: datetime | None = None
    """By Postgres' clock. Set when it is first decided, and kept: nothing sent before may last longer."""
    timeline: int = 0
    """Of the connection on which its guard was last written or read."""
    earlier_fingerprint: bytes = b""
    """Of kind 1, packed: claimed with as well, once a record turned out to have no other kind in common."""
    claimed: bool = False
    """The key may be ours at idempotency_svc."""
    key_busy: bool = False
    """Another call with the key was met in Postgres."""
    given_up: bool = False
    """Nothing was written and nothing will be: a claim that is on its way still is to be released."""
    alone: bool = False
    look_at_guard: bool = False
    started: bool = False
    settled: bool = False
    unsure: bool = False
    """Sent once without an answer, and no guard looked for since."""
    overdue: asyncio.TimerHandle | None = None
    announcement: asyncio.TimerHandle | None = None
    collisions: int = 0
    followers: dict[asyncio.Future[Answer | None], None] = field(default_factory=dict)
    """In order of arrival."""

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - self.result.get_loop().time()


Decided = tuple[Attempt, Write]
_NearAnswer = tuple[asyncio.Future[bytes], bytes]


class Lifetimes:
    """How long answers are kept."""

    def __init__(self, ok: float, error: float) -> None:
        """OK answers are replayed for `ok` seconds, error answers for at most `error` seconds."""
        self.ok = ok
        self.error = error
        self._of_ok = timedelta(seconds=max(48 * 3600.0, ok + 24 * 3600.0))
        self._of_error = timedelta(seconds=error)

    @property
    def window(self) -> timedelta:
        """How long after its first attempt a call may still be retried."""
        return timedelta(seconds=self.ok)

    def of_guard(self, attempt: Attempt, code: int) -> timedelta:
        """By Postgres' clock. An OK answer's guard outlives its record in Redis by a day, whatever clocks say."""
        if attempt.key_hash is None:
            return KEYLESS_LIFE
        return self._of_error if code else self._of_ok

    def of_record(self, code: int, guard_left: timedelta) -> float:
        """Less than the guard's remaining life: Redis never answers what Postgres has forgotten."""
        return min(self.error if code else self.ok, guard_left.total_seconds() - LONGEST_ATTEMPT)


class Door:
    """Takes commands, makes each take effect once, and answers with the bytes that Postgres keeps."""

    def __init__(
        self,
        database: Database,
        idempotency: Idempotency,
        lifetimes: Lifetimes,
        *,
        lanes: int,
        always_require_key: bool = False,
        near_bytes: int = 0,
        on_written: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """`near_bytes` bounds the answers kept in this process; `on_written` is called for each committed row."""
        self._database = database
        self._idempotency = idempotency
        self.lifetimes = lifetimes
        self._always_require_key = always_require_key
        self._on_written = on_written
        self._loop = asyncio.get_running_loop()
        self._near = Replays(near_bytes)
        self._near_answers: Groups[_NearAnswer] = Groups("near", self._tell_near, _not_told)
        self._slots: Slots[Attempt] = Slots()
        self._owners: dict[bytes, Attempt] = {}
        self._claims: Groups[Attempt] = Groups(
            "claim",
            self._claim,
            self._not_claimed,
            max_size=96,
            longest_gather=GATHER,  # its work waits for the group before
        )
        self._announcements: Groups[Attempt] = Groups(
            "announce", self._announce, self._not_announced, max_size=128, gather=0.01, eager=False
        )
        self.replayed = 0.0
        """The share of replays among the last fifty answers or so."""
        self._groups: Groups[Attempt] = Groups("write", self._in_group, self.settle, max_size=96, lanes=lanes)
        self._alone: Groups[Attempt] = Groups("alone", self._in_turn, self.settle, max_size=1, lanes=4)

    async def write(
        self,
        mutation: Mutation[Any],
        command: Any,
        call: Call,
        respond: Callable[[Any], bytes],
        structs: Mapping[str, dict[str, Any]] = NO_STRUCTS,
    ) -> bytes:
        """Runs a command for a caller; returns the response's bytes, a replay marked by trailer `idempotency-replayed`.

        `structs` is as for `fingerprints_of`. Raises ServiceError: the mutation's refusal, one of the key's reasons
        (IDEMPOTENCY_*), RESOURCE_BUSY, OUTCOME_UNKNOWN or DATABASE_UNAVAILABLE.
        """
        attempt = self.attempt(call, structs)
        attempt.mutation, attempt.command, attempt.respond = mutation, command, respond
        return self.tell(await self.once(attempt, call, self._decide_soon), call)

    async def apply(self, mutation: Mutation[Any], command: Any, actor: Actor) -> None:
        """Runs a command of the server's own. Raises ServiceError as `write` does."""
        command_id = new_command_id()
        attempt = Attempt(
            method=mutation.method,
            tenant=actor.tenant,
            subject=actor.subject,
            on_behalf_of="",
            trace_id="",
            scope=scope_of("keyless", command_id.hex),
            fingerprints=_NO_FINGERPRINT,
            raw=b"",
            request=None,
            key_hash=None,
            near_key=None,
            first_sent=None,
            deadline=self._loop.time() + SWEEP_SECONDS,
            command_id=command_id,
            result=self._loop.create_future(),
            mutation=mutation,
            command=command,
        )
        self._decide_soon(attempt)
        await self._settled(attempt)

    async def close(self) -> None:
        """Returns when nothing is on its way any more."""
        lines = (self._near_answers, self._claims, self._announcements, self._groups, self._alone)
        while any(line.busy for line in lines):
            for line in lines:
                await line.drained()

    # -- key --

    def known(self, call: Call) -> Awaitable[bytes] | None:
        """The response's bytes where this process knows the answer to the same request of the same caller, else None.

        What the request says was found good when it was answered. Raises InvalidArgument for a bad time of the first
        attempt.
        """
        keys = call.values(KEY_HEADER)
        if len(keys) != 1:
            return None
        self._near.turn_to(self._database.timeline)
        near_key = NearKey(call.principal.digest, call.policy.full_method, keys[0])
        body = self._near.get(near_key, call.raw, call.request, self._loop.time())
        if body is None:
            return None
        times = call.values(FIRST_SENT_HEADER)
        if times:
            first_sent(times, datetime.now(UTC))
        return self._tell_known(body, call)

    async def _tell_known(self, body: bytes, call: Call) -> bytes:
        """Tells it together with others: sending answers one by one costs more than finding them."""
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._near_answers.put((answer, body))
        return self.tell(Answer(0, await answer, replayed=True), call)

    def attempt(self, call: Call, structs: Mapping[str, dict[str, Any]] = NO_STRUCTS) -> Attempt:
        """A new attempt at a call, with its key's scope and fingerprints.

        Raises InvalidArgument for a bad or missing key, or a bad time of the first attempt.
        """
        principal = call.principal
        method = call.policy.full_method
        key = idempotency_key(call.values(KEY_HEADER))
        if key is None and (call.policy.key_required or self._always_require_key):
            raise InvalidArgument(
                "IDEMPOTENCY_KEY_REQUIRED",
                f"{method} needs metadata {KEY_HEADER}.",
                fields=((KEY_HEADER, "required"),),
            )
        command_id = new_command_id()
        near_key = None
        if key is None:
            scope, fingerprints, key_hash = scope_of("keyless", command_id.hex), _NO_FINGERPRINT, None
            sent = None
        else:
            scope = scope_of(principal.issuer, principal.tenant, principal.subject, method, key)
            fingerprints, key_hash = fingerprints_of(call.raw, call.request, structs), scope_of(key)
            near_key = NearKey(principal.digest, method, key)
            times = call.values(FIRST_SENT_HEADER)
            sent = first_sent(times, datetime.now(UTC)) if times else None
        return Attempt(
            method=method,
            tenant=principal.tenant,
            subject=principal.subject,
            on_behalf_of=principal.on_behalf_of,
            trace_id=call.trace.trace_id,
            scope=scope,
            fingerprints=fingerprints,
            raw=call.raw,
            request=call.request,
            key_hash=key_hash,
            near_key=near_key,
            first_sent=sent,
            deadline=call.deadline,
            command_id=command_id,
            result=self._loop.create_future(),
        )

    def tell(self, answer: Answer, call: Call) -> bytes:
        """The answer as a servicer gives it. Raises StoredAnswer for an error answer."""
        if answer.replayed:
            call.trailer("idempotency-replayed", "true")
        if answer.code:
            raise StoredAnswer(answer.code, answer.body)
        return answer.body

    async def once(self, attempt: Attempt, call: Call, go: Callable[[Attempt], None]) -> Answer:
        """Has the work done by one owner per key, here and elsewhere; the others are given its answer.

        `go` starts the work, which settles the attempt by `finish` or `give_up`, whatever becomes of its caller. In
        this process the others wait for the owner, and one of them takes over if it has no answer. Raises what the
        attempt was given up with.
        """
        attempt.go = go
        if attempt.key_hash is None:
            self._go(attempt)
            return await self._settled(attempt)  # type: ignore[no-any-return]
        if attempt.first_sent is not None and attempt.first_sent < self._database.now() - self.lifetimes.window:
            guard = await self._guard(attempt)
            if guard is None:
                raise key_expired(attempt.first_sent, self.lifetimes.window)
            return self.replay(attempt, guard)
        while (owner := self._owners.get(attempt.scope)) is not None:
            if not same_request(owner.fingerprints, attempt.fingerprints):
                return await self._recorded(attempt)
            answer = await self._follow(owner, attempt, call)
            if answer is not None:
                return answer._replace(replayed=True)
        self._owners[attempt.scope] = attempt
        self._start(attempt)
        while True:
            result = await self._settled(attempt)
            if isinstance(result, Answer):
                return result
            try:
                answer = await self._look(attempt, result)
                if answer is None and result.WhichOneof("outcome") == "busy":
                    outcome = await self._wait(attempt, call)
            except BaseException as error:
                self.give_up(attempt, error if isinstance(error, ServiceError) else _gone())
                raise
            if answer is not None:
                self.settle(attempt, answer)
                return answer
            attempt.result = self._loop.create_future()
            match result.WhichOneof("outcome"):
                case "busy":
                    self._claimed(attempt, outcome)
                case "mismatch":
                    self._claims.put(attempt)
                case _:
                    self._go(attempt)

    async def _tell_near(self, group: list[_NearAnswer]) -> None:
        NEAR.inc(len(group))
        for answer, body in group:
            if not answer.done():
                answer.set_result(body)

    async def _settled(self, attempt: Attempt) -> Any:
        """What became of the attempt. A caller that leaves before the start takes it along. Raises a refusal."""
        try:
            result = await attempt.result
        except asyncio.CancelledError:
            self._leave(attempt, _gone())
            raise
        if isinstance(result, Exception):
            raise result
        return result

    async def _follow(self, owner: Attempt, attempt: Attempt, call: Call) -> Answer | None:
        """The owner's answer; None if it has none to keep. Raises Aborted IDEMPOTENCY_IN_PROGRESS."""
        if len(owner.followers) >= MAX_FOLLOWERS:
            raise in_progress()
        follower: asyncio.Future[Answer | None] = self._loop.create_future()
        with call.waiting():
            owner.followers[follower] = None
            try:
                async with asyncio.timeout(max(attempt.remaining - MARGIN, 0)):
                    return await follower
            except TimeoutError:
                raise in_progress() from None
            finally:
                owner.followers.pop(follower, None)

    # -- claim --

    def _start(self, attempt: Attempt) -> None:
        """Has the work begun, and the key claimed: before the work where replays are frequent, else beside it.

        A claim finds a replay without Postgres, and the wait for it costs a third of a first call. Beside the work it
        only tells others that the key is being worked on; Postgres decides, as when idempotency_svc is away.
        """
        if not self._idempotency.up:
            self._go(attempt)
        elif self.replayed > CLAIM_FIRST or not self._database.ready:
            self._claims.put(attempt)
        else:
            attempt.announcement = self._loop.call_later(ANNOUNCE_SECONDS, self._announcements.put, attempt)
            self._go(attempt)

    def _go(self, attempt: Attempt) -> None:
        try:
            attempt.go(attempt)
        except Exception as error:
            self.give_up(attempt, error)

    async def _claim(self, group: list[Attempt]) -> None:
        """Claims the keys of a group, which then goes on whole: what was one batch here is one in the statement too.

        The lane is kept until that statement is under way. So while one group is written the next one is claimed, and
        each has half of the calls in flight.
        """
        for attempt, outcome in zip(group, await self._ask(group), strict=True):
            self._claimed(attempt, outcome)
        self._groups.start()
        await self._groups.started(CLAIM_AHEAD)

    async def _ask(self, group: Sequence[Attempt]) -> Sequence[pb.ClaimOutcome | None]:
        return await self._idempotency.claim([self._claim_item(attempt) for attempt in group])

    def _claim_item(self, attempt: Attempt) -> pb.ClaimItem:
        lease = min(max(attempt.remaining, 0.0) + 2.0, LONGEST_LEASE)
        fingerprints = attempt.fingerprints + attempt.earlier_fingerprint
        return self._idempotency.claim_item(attempt.scope, fingerprints, attempt.command_id.bytes, lease)

    def _not_claimed(self, attempt: Attempt, error: Exception) -> None:
        self._claimed(attempt, None)

    def _claimed(self, attempt: Attempt, outcome: pb.ClaimOutcome | None) -> None:
        """Goes on with an attempt, or lets its caller know what the key's record says.

        When idempotency_svc is away the claim may have arrived all the same; it is released or completed like any.
        """
        kind = outcome and outcome.WhichOneof("outcome")
        attempt.claimed = kind in ("acquired", "takeover", None)
        if attempt.given_up:
            self._release(attempt)
        elif outcome is None or attempt.claimed:
            attempt.alone = kind == "takeover"  # the owner before may still be at work: wait for its locks
            self._go(attempt)
        elif kind == "replay" and self._holds(outcome.replay):
            self.settle(attempt, Answer(outcome.replay.code, outcome.replay.answer, replayed=True))
        elif not attempt.result.done():
            attempt.result.set_result(outcome)

    async def _announce(self, group: list[Attempt]) -> None:
        """Claims the keys of those in the group that are still under way. Who is in line yet, may learn its answer.

        Who met its key in Postgres meanwhile learns it by a claim of its own.
        """
        under_way = [attempt for attempt in group if not attempt.settled]
        if not under_way:
            return
        for attempt, outcome in zip(under_way, await self._ask(under_way), strict=True):
            kind = outcome and outcome.WhichOneof("outcome")
            attempt.claimed = kind in ("acquired", "takeover", None)
            if attempt.given_up:
                self._release(attempt)
            elif (
                outcome is not None
                and kind == "replay"
                and self._holds(outcome.replay)
                and not (attempt.started or attempt.settled or attempt.key_busy)
            ):
                self._groups.take_out(attempt)
                self._alone.take_out(attempt)
                self.settle(attempt, Answer(outcome.replay.code, outcome.replay.answer, replayed=True))

    def _holds(self, replay: pb.ClaimOutcome.Replay) -> bool:
        """Whether a record's answer may be told: it is there, and no failover since can have lost its guard."""
        return not replay.answer_omitted and replay.timeline == self._database.timeline != 0

    def _not_announced(self, attempt: Attempt, error: Exception) -> None:
        """The work goes on all the same."""

    def _release(self, attempt: Attempt) -> None:
        if attempt.claimed:
            attempt.claimed = False
            self._idempotency.release(attempt.scope, attempt.command_id.bytes)

    async def _look(self, attempt: Attempt, outcome: pb.ClaimOutcome) -> Answer | None:
        """The answer for a key that is another's by its record, if there is one.

        None: its owner is at work still; a failover has lost what the record tells of; or the record is to be claimed
        with kind 1 of the fingerprints too. Raises FailedPrecondition IDEMPOTENCY_KEY_REUSED.
        """
        kind = outcome.WhichOneof("outcome")
        if kind == "mismatch":
            if not outcome.mismatch.durable and not attempt.earlier_fingerprint:
                attempt.earlier_fingerprint = b"\x01" + earlier_fingerprint_of(attempt.request)
                guard = await self._guard(attempt)
                return None if guard is None else self.replay(attempt, guard)
            try:
                return await self._recorded(attempt)
            except Unavailable:
                if outcome.mismatch.durable:
                    raise _key_reused() from None
                raise
        guard = await self._guard(attempt)  # busy: its owner may have died between COMMIT and Complete
        return None if guard is None else self.replay(attempt, guard)

    async def _wait(self, attempt: Attempt, call: Call) -> pb.ClaimOutcome | None:
        """What a claim of the key says once its owner has gone, or after a while.

        None: idempotency_svc is away. Raises Aborted IDEMPOTENCY_IN_PROGRESS.
        """
        seconds = min(attempt.remaining - MARGIN, AWAIT_SECONDS)
        if seconds <= 0:
            raise in_progress()
        attempt.claimed = True  # the claim may succeed after the caller has left
        with call.waiting():
            return await self._idempotency.wait(self._claim_item(attempt), seconds)

    async def _recorded(self, attempt: Attempt) -> Answer:
        """The key has another fingerprint in a place that does not decide: the guard does."""
        guard = await self._guard(attempt)
        if guard is None:
            raise _key_reused()
        return self.replay(attempt, guard)

    async def _guard(self, attempt: Attempt) -> Guard | None:
        async with self._database.looking() as connection:
            attempt.timeline = connection.timeline
            return (await read_guards(connection, [(attempt.tenant, attempt.scope)])).get(attempt.scope)

    def replay(self, attempt: Attempt, guard: Guard) -> Answer:
        """The guard's answer, given to Redis too. Raises FailedPrecondition when it is of another request."""
        mine = guard.command_id == attempt.command_id
        same = mine or _same(guard, attempt)
        if attempt.key_hash is not None:
            left = guard.expire_time - self._database.now()
            self._complete(attempt, guard.fingerprints, guard.code, guard.answer, left, near=same)
        if not same:
            raise _key_reused()
        return Answer(guard.code, guard.answer, replayed=not mine)

    def _complete(
        self, attempt: Attempt, fingerprints: bytes, code: int, answer: bytes, guard_left: timedelta, *, near: bool
    ) -> None:
        """Has the guard's answer kept where it is found faster: at idempotency_svc, and `near`, if it is OK.

        `fingerprints` are the guard's; `near` wants it to be the answer to this attempt's request.
        """
        ttl = self.lifetimes.of_record(code, guard_left)
        timeline = attempt.timeline
        if near and code == 0 and ttl > 0 and attempt.near_key is not None:
            expires = self._loop.time() + ttl
            self._near.put(attempt.near_key, attempt.raw, answer, expires=expires, timeline=timeline)
        self._idempotency.complete(
            attempt.scope,
            attempt.command_id.bytes,
            fingerprints=fingerprints,
            code=code,
            answer=answer,
            ttl=ttl,
            timeline=timeline,
        )

    # -- read, decide, write --

    def _decide_soon(self, attempt: Attempt) -> None:
        """Has the attempt take its slots, and then a place in a group."""
        if not self._database.ready:
            raise unavailable()
        keys = attempt.mutation.reads(attempt.command, {})
        if not self._slots.take(attempt, keys.change, self._line_up):
            attempt.overdue = self._loop.call_at(attempt.deadline - MARGIN, self._leave, attempt, resource_busy())

    def _leave(self, attempt: Attempt, error: ServiceError) -> None:
        """Takes an attempt out of whatever line it stands in. One that has started goes on."""
        if not attempt.started:
            self._claims.take_out(attempt)
            self._announcements.take_out(attempt)
            self._groups.take_out(attempt)
            self._alone.take_out(attempt)
            self.give_up(attempt, error)

    def _line_up(self, attempt: Attempt) -> None:
        (self._alone if attempt.alone else self._groups).put(attempt)

    async def _in_group(self, group: list[Attempt]) -> None:
        await self._carry(group, wait=False)

    async def _in_turn(self, group: list[Attempt]) -> None:
        await self._carry(group, wait=True)

    async def _carry(self, group: list[Attempt], *, wait: bool) -> None:
        """Reads, decides and writes.

        A connection lost before anything was sent is tried once more, and for STALE_SECONDS again and again: after a
        restart of Postgres every connection of the pool is one.
        """
        attempts = []
        for attempt in group:
            if attempt.settled:
                continue  # it was taken out of line in the very turn of the loop in which its group was formed
            if attempt.remaining <= 0:
                self._without_outcome(attempt, _too_late())
            else:
                attempt.started = True
                attempts.append(attempt)
        until, tried = self._loop.time() + STALE_SECONDS, False
        while True:
            decided: list[Decided] | None = None
            try:
                async with self._pool(wait).connection() as connection:
                    with watched(connection):
                        decided = await self._decide(connection, attempts)
                    if not decided:
                        return
                    outcomes = await self._send(connection, decided, wait)
            except FAILURES as error:
                if decided is not None:
                    await self._mend(decided, error, wait, until=self._loop.time() + RESEND_SECONDS)
                    return
                stale = isinstance(error, psycopg.OperationalError) and not is_full(error)
                if not stale or (tried and self._loop.time() > until):
                    for attempt in attempts:
                        self._without_outcome(attempt, self._database.refusal(error))
                    return
            else:
                await self._settle_all(decided, outcomes, wait)
                return
            tried = True
            attempts = [attempt for attempt in attempts if not attempt.settled]

    def _pool(self, wait: bool) -> AsyncConnectionPool[Connection]:
        return self._database.alone if wait else self._database.groups

    async def _decide(self, connection: Connection, attempts: list[Attempt]) -> list[Decided]:
        """What each attempt wants written. Answers at once those that want nothing written."""
        found: dict[Key | Lookup, Any] = {}
        reads_rows: set[Attempt] = set()
        while True:
            missing: set[Key | Lookup] = set()
            for attempt in attempts:
                keys = attempt.mutation.reads(attempt.command, found)
                wanted = [key for key in (*keys.change, *keys.look) if key not in found]
                if wanted:
                    reads_rows.add(attempt)
                    missing.update(wanted)
            if not missing:
                break
            found.update(await read_rows(connection, missing))
        # Guards after rows: whoever changed a row we saw has a guard we see. Creates read nothing, their guard is met
        # in writing.
        looked = [a for a in attempts if a.look_at_guard or (a.key_hash is not None and a in reads_rows)]
        guards = await read_guards(connection, [(a.tenant, a.scope) for a in looked]) if looked else {}

        decided = []
        now = self._database.now()  # after the reads, so never before what they saw
        for attempt in attempts:
            try:
                guard = guards.get(attempt.scope)
                if guard is not None:
                    attempt.timeline = connection.timeline
                    self.settle(attempt, self.replay(attempt, guard))
                    continue
                attempt.unsure = attempt.unsure and attempt not in looked
                write = self._decide_one(attempt, found, now)
            except Exception as error:
                if not isinstance(error, ServiceError):
                    log.exception("mutation failed", method=attempt.method)
                self.give_up(attempt, error)
                continue
            if attempt.key_hash is None and not write.rows and not write.events:
                self.settle(attempt, Answer(write.code, write.answer))
            else:
                decided.append((attempt, write))
        return decided

    def _decide_one(self, attempt: Attempt, found: dict[Key | Lookup, Any], now: datetime) -> Write:
        """The mutation's decision, or its refusal where that is kept as an answer. Raises any other refusal."""
        if attempt.not_after is None:
            attempt.not_after = now + timedelta(seconds=attempt.remaining)
        code = 0
        rows: tuple[Row, ...] = ()
        events: tuple[AuditEvent, ...] = ()
        try:
            decision = attempt.mutation.decide(attempt.command, found, now)
            rows, events = decision.rows, decision.events
            answer = attempt.respond(decision.answer)
        except ServiceError as error:
            code = code_of(error).value[0]
            if attempt.key_hash is None or code not in STORED_CODES:
                raise
            answer = status_of(error).SerializeToString()
        return Write(
            command_id=attempt.command_id,
            tenant=attempt.tenant,
            scope=attempt.scope,
            fingerprints=attempt.fingerprints,
            code=code,
            answer=answer,
            lifetime=self.lifetimes.of_guard(attempt, code),
            not_after=attempt.not_after,
            method=attempt.method,
            subject=attempt.subject,
            on_behalf_of=attempt.on_behalf_of,
            trace_id=attempt.trace_id,
            key_hash=attempt.key_hash,
            rows=rows,
            events=events,
        )

    async def _send(self, connection: Connection, decided: Sequence[Decided], wait: bool) -> list[Outcome]:
        for attempt, _ in decided:
            attempt.timeline = connection.timeline
        with confirmed(connection):
            outcomes, now = await write(connection, [write for _, write in decided], wait=wait)
        self._database.learn(now)
        return outcomes

    async def _settle_all(
        self,
        decided: Sequence[Decided],
        outcomes: Sequence[Outcome],
        wait: bool,
        *,
        unknown_until: float | None = None,
    ) -> None:
        """Settles each command by its outcome.

        `unknown_until`: the statement was sent before, and may be under way still.
        """
        recorded: list[Decided] = []
        under_way: list[Decided] = []
        for outcome, counter in OUTCOMES.items():
            if count := outcomes.count(outcome):
                counter.inc(count)
        for pair, outcome in zip(decided, outcomes, strict=True):
            attempt, write = pair
            if outcome is Outcome.WON:
                self._won(attempt, write)
            elif outcome in (Outcome.LOST, Outcome.EXPIRED):
                recorded.append(pair)
            elif outcome is Outcome.BUSY and unknown_until is not None:
                under_way.append(pair)
            elif outcome is Outcome.BUSY:
                self._key_busy(attempt)
            else:
                self._again(attempt)
        if recorded:
            await self._settle_recorded(recorded, outcomes=dict(zip((a for a, _ in decided), outcomes, strict=True)))
        if under_way:
            assert unknown_until is not None
            await self._mend(under_way, OutcomeUnknownError("under way"), wait, until=unknown_until)

    async def _settle_recorded(self, pairs: Sequence[Decided], outcomes: dict[Attempt, Outcome]) -> None:
        """The guards decide, read by a statement of its own: the one that met them saw an older snapshot."""
        try:
            async with self._database.looking() as connection:
                guards = await read_guards(connection, [(attempt.tenant, attempt.scope) for attempt, _ in pairs])
                timeline = connection.timeline
        except ServiceError:
            for attempt, _ in pairs:
                self._again(attempt)
            return
        for attempt, wanted in pairs:
            attempt.timeline = timeline
            guard = guards.get(attempt.scope)
            if guard is None:
                if outcomes[attempt] is Outcome.EXPIRED:
                    self.give_up(attempt, _too_late())
                else:
                    self._again(attempt)
            elif guard.command_id == attempt.command_id:
                self._won(attempt, wanted)
            else:
                try:
                    self.settle(attempt, self.replay(attempt, guard))
                except ServiceError as error:
                    self.give_up(attempt, error)

    async def _mend(
        self, decided: Sequence[Decided], error: Exception, wait: bool, *, until: float, collided: bool = False
    ) -> None:
        """A statement that was sent has failed: by cause, send it again whole, in halves, or its commands alone."""
        if is_collision(error) or is_lock_timeout(error):
            unsure = [pair for pair in decided if pair[0].unsure]
            if not collided and is_collision(error):
                await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - jitter
                await self._resend(decided, wait, until=until, collided=True, unknown=bool(unsure))
                return
            for attempt, _ in decided:
                if not attempt.unsure:
                    self._again(attempt, alone=True)
            if unsure:  # what holds the locks may be the first sending itself
                await self._mend(unsure, OutcomeUnknownError("under way"), wait, until=until)
        elif not is_unknown(error):
            if len(decided) == 1:
                attempt = decided[0][0]
                if attempt.unsure and not is_bad_data(error):
                    self.leave_open(attempt)
                else:
                    self.give_up(attempt, self._database.refusal(error))
                return
            middle = len(decided) // 2
            for half in (decided[:middle], decided[middle:]):
                await self._resend(half, wait, until=until, collided=collided, unknown=False)
        elif self._loop.time() > until:
            for attempt, _ in decided:
                self.leave_open(attempt)
        else:
            # The identical statement: a guard of our own command id will say that it was us.
            log.warning("outcome unknown, sending again", commands=len(decided), error=str(error).strip())
            for attempt, _ in decided:
                attempt.unsure = True
                self.keep_claim(attempt)
            await asyncio.sleep(RESEND_PAUSE)
            await self._resend(decided, wait, until=until, collided=collided, unknown=True)

    async def _resend(
        self, decided: Sequence[Decided], wait: bool, *, until: float, collided: bool, unknown: bool
    ) -> None:
        try:
            async with self._pool(wait).connection() as connection:
                outcomes = await self._send(connection, decided, wait)
        except FAILURES as error:
            await self._mend(decided, error, wait, until=until, collided=collided)
        else:
            await self._settle_all(decided, outcomes, wait, unknown_until=until if unknown else None)

    # -- ends --

    def _won(self, attempt: Attempt, write: Write) -> None:
        for row in write.rows:
            self._on_written(row)
        self.finish(attempt, write.code, write.answer)

    def finish(self, attempt: Attempt, code: int, body: bytes) -> Answer:
        """Ends an attempt whose answer is committed with its guard."""
        if attempt.key_hash is not None:
            left = self.lifetimes.of_guard(attempt, code)
            self._complete(attempt, attempt.fingerprints, code, body, left, near=True)
        answer = Answer(code, body)
        self.settle(attempt, answer)
        return answer

    def _key_busy(self, attempt: Attempt) -> None:
        """Another call with its key is being written, by another process: its answer is waited for, if it is announced.

        Who has asked once, and found the key free, waits for the other's lock instead.
        """
        first, attempt.key_busy = not attempt.key_busy, attempt.key_hash is not None
        waits = first and attempt.key_busy and not attempt.unsure and not attempt.result.done()
        if not (waits and self._idempotency.up and attempt.remaining > MARGIN):
            self._again(attempt)
            return
        if attempt.announcement is not None:
            attempt.announcement.cancel()
        self._announcements.take_out(attempt)
        attempt.look_at_guard = True
        attempt.started = False
        self._slots.give_back(attempt)  # others may have its rows meanwhile; it lines up for them once more
        self._claims.put(attempt)

    def _again(self, attempt: Attempt, *, alone: bool = False) -> None:
        """Nothing was written because somebody else was at it: read again; the second time alone, last in line."""
        attempt.collisions += 1
        attempt.look_at_guard = True
        attempt.alone = attempt.alone or alone or attempt.collisions > 1
        if attempt.remaining < MARGIN:
            self._without_outcome(attempt, resource_busy())
        else:
            self._line_up(attempt)

    def _without_outcome(self, attempt: Attempt, error: ServiceError) -> None:
        """Ends an attempt that gets no further; it is told `error` unless what it sent may have been written."""
        if attempt.unsure:
            self.leave_open(attempt)
        else:
            self.give_up(attempt, in_progress() if attempt.key_busy else error)

    def keep_claim(self, attempt: Attempt) -> None:
        """Has the key kept for an attempt that is sent again, which may take longer than its caller had."""
        if attempt.claimed:
            self._idempotency.extend(attempt.scope, attempt.command_id.bytes, SETTLE_SECONDS)

    def leave_open(self, attempt: Attempt) -> ServiceError:
        """Ends an attempt of which nobody knows yet whether it was written.

        Its claim is kept: no other may run meanwhile.
        """
        UNKNOWN.inc()
        keyless = attempt.key_hash is None
        error = Unavailable(
            "OUTCOME_UNKNOWN",
            "The database did not confirm the write, which may have happened. "
            + ("Read before sending it again." if keyless else "Retry with the same idempotency key."),
            retry_after=-1.0 if keyless else 1.0,
        )
        self.settle(attempt, error)
        return error

    def give_up(self, attempt: Attempt, error: Exception) -> None:
        """Ends an attempt that wrote nothing and never will: its claim is free again."""
        if attempt.settled:
            return
        attempt.given_up = True
        self._release(attempt)
        self.settle(attempt, error)

    def settle(self, attempt: Attempt, result: Answer | Exception) -> None:
        """Answers the caller and who waits with it; only a kept answer is theirs too."""
        attempt.settled = True
        if attempt.overdue is not None:
            attempt.overdue.cancel()
        if attempt.announcement is not None:
            attempt.announcement.cancel()
        self._slots.give_back(attempt)
        if self._owners.get(attempt.scope) is attempt:
            del self._owners[attempt.scope]
        if not attempt.result.done():
            attempt.result.set_result(result)
        kept = result if isinstance(result, Answer) else None
        if kept is not None:
            self.replayed += (kept.replayed - self.replayed) * 0.02
        for follower in attempt.followers:
            if not follower.done():
                follower.set_result(kept)


def _not_told(item: _NearAnswer, error: Exception) -> None:
    answer, _ = item
    if not answer.done():
        answer.set_exception(error)


def _same(guard: Guard, attempt: Attempt) -> bool:
    """Whether the guard is of this request; one of before has a bare digest of kind 1."""
    if len(guard.fingerprints) < PACKED and attempt.request is not None:
        return guard.fingerprints == earlier_fingerprint_of(attempt.request)
    return same_request(guard.fingerprints, attempt.fingerprints)


def _key_reused() -> FailedPrecondition:
    return FailedPrecondition(
        "IDEMPOTENCY_KEY_REUSED", "This idempotency key was used with another request. Use a new key for a new request."
    )


def _gone() -> Cancelled:
    return Cancelled("CANCELLED", "The caller went away.")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("DEADLINE_EXCEEDED", "The call's time was over before anything was written.")
