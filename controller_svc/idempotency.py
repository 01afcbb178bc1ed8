"""The fast path of idempotency: keys and scopes; claims and completions in groups, behind a breaker."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
from collections import Counter as Counted
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from prometheus_client import Counter, Gauge

from controller_svc.core.status import Component
from controller_svc.fingerprint import PACKED
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import Aborted, InvalidArgument
from svckit.groups import Groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.idempotency.v1.idempotency_service_pb2_grpc import IdempotencyServiceAsyncStub

log = structlog.get_logger(__name__)

KEY_HEADER = "idempotency-key"
_KEY = re.compile("[!-~]{1,255}")
CLAIM_SECONDS = 0.05
"""What a claim may cost a call before Postgres decides alone."""
AWAIT_MARGIN = 0.25
"""Seconds beyond its wait after which an Await counts as lost."""
COMPLETE_SECONDS = 2.0
RELEASE_AGAIN_SECONDS = 1.0
"""Between two tellings of a release that was not heard."""
LONGEST_LEASE = 32.0
"""Seconds for which a call claims its key at most, and for which its release is told again."""
COMPLETE_GATHER = 0.02
"""Seconds a completion waits for company. Who asks meanwhile finds the guard."""
PROBE_SECONDS = 0.5
PROBE_TIMEOUT = 0.25
PROBE_SCOPES = 16
"""Each may belong to another primary of a cluster: one that is away shall not pass for all of them."""
MAX_PENDING = 10_000
MAX_PENDING_BYTES = 64 << 20
"""Completions, releases and extensions that may wait. Past it they are dropped: the guard answers instead."""
MAX_UNHEARD = 1000
"""Releases that may wait to be told again."""
MAX_BATCH_BYTES = 256 << 10
"""Of one Complete, unless one answer is larger: idempotency_svc compresses it in 4 ms, while claims wait."""
MAX_ANSWER_BYTES = 64 << 10
"""Of one answer in Redis; a larger one is replayed from its guard."""
_AWAY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""What says that the service cannot be used at all; any other code is about the one batch."""

_CLAIMS = Counter("orchestrator_claims_total", "Claims, by outcome; away: idempotency_svc or Redis is.", ["outcome"])
CLAIMS = {kind: _CLAIMS.labels(kind) for kind in ("acquired", "takeover", "replay", "busy", "mismatch", "away")}
DROPPED = Counter(
    "orchestrator_completions_dropped_total",
    "Completions, releases and extensions given up: the guard, or the end of the lease, makes up for them.",
)
DEGRADED = Gauge(
    "orchestrator_idempotency_degraded", "1 while calls go without claims, because idempotency_svc or Redis is away."
)


def idempotency_key(values: Sequence[str]) -> str | None:
    """The call's key, None if it has none.

    Raises InvalidArgument unless it is one value of 1..255 visible ASCII characters.
    """
    if not values:
        return None
    key = values[0]
    if len(values) > 1 or not _KEY.fullmatch(key):
        raise InvalidArgument(
            "IDEMPOTENCY_KEY_INVALID",
            f"Metadata {KEY_HEADER} must be given once, as 1 to 255 visible ASCII characters.",
            fields=((KEY_HEADER, "one value of 1..255 visible ASCII characters"),),
        )
    return key


def in_progress() -> Aborted:
    """What a caller is told that cannot wait for the owner of its key any longer, which most often is done soon."""
    return Aborted(
        "IDEMPOTENCY_IN_PROGRESS",
        "A call with this idempotency key is still under way. Retry with the same key.",
        retry_after=random.uniform(0.5, 1.5),  # noqa: S311 - lest they come back together
    )


def scope_of(*parts: str) -> bytes:
    """SHA-256 over the parts, each behind its length, so that no two lists of parts share a preimage."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.digest()


class Idempotency:
    """The client of idempotency_svc. Nothing here raises because the service is away: Postgres decides without it."""

    def __init__(self, stub: IdempotencyServiceAsyncStub | None, *, ttl: float) -> None:
        """`stub` None switches the fast path off. `ttl` is the life of a record in seconds."""
        self._stub = stub
        self._ttl_millis = int(ttl * 1000)
        self._component = Component(None if stub is None else True, "", datetime.now(UTC))
        self._pending_bytes = 0
        self._unheard: list[_End] = []
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._probe: asyncio.Task[None] | None = None
        self._ends: Groups[_End] = Groups(
            "complete",
            self._end,
            lambda end, error: self._not_heard([end]),
            max_size=256,
            gather=COMPLETE_GATHER,
            eager=False,
        )

    def component(self) -> Component:
        """For StatusService; `up` is None when switched off."""
        return self._component

    @property
    def up(self) -> bool:
        """Whether it is worth asking: switched on, and neither away nor in doubt."""
        return self._probe is None and bool(self._component.up)

    def claim_item(self, scope: bytes, fingerprints: bytes, nonce: bytes, lease: float) -> pb.ClaimItem:
        """An ask for a scope, to be owned for `lease` seconds; again with the same nonce, it is answered the same.

        `fingerprints` are packed, as controller_svc/fingerprint.py makes them.
        """
        item = pb.ClaimItem(scope=scope, nonce=nonce, lease_millis=int(lease * 1000), ttl_millis=self._ttl_millis)
        _fill_fingerprints(item, fingerprints)
        return item

    async def claim(self, items: Sequence[pb.ClaimItem]) -> Sequence[pb.ClaimOutcome | None]:
        """What idempotency_svc says of each scope; None when it or the record is away: the claim may have arrived."""
        if not self.up:
            return [None] * len(items)
        assert self._stub is not None
        try:
            response = await self._stub.Claim(pb.ClaimRequest(items=items), timeout=CLAIM_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._failed(error)
            CLAIMS["away"].inc(len(items))
            return [None] * len(items)
        kinds = [outcome.WhichOneof("outcome") or "away" for outcome in response.outcomes]
        for kind, count in Counted(kinds).items():
            CLAIMS[kind].inc(count)
        if "away" not in kinds:
            return response.outcomes
        return [None if kind == "away" else outcome for kind, outcome in zip(kinds, response.outcomes, strict=True)]

    async def wait(self, item: pb.ClaimItem, seconds: float) -> pb.ClaimOutcome | None:
        """As `claim` for a scope that another owns, but busy only when `seconds` are over.

        Raises Aborted IDEMPOTENCY_IN_PROGRESS when too many wait for it already.
        """
        if not self.up:
            return None
        assert self._stub is not None
        request = pb.AwaitRequest(item=item, wait_millis=max(1, int(seconds * 1000)))
        try:
            response = await self._stub.Await(request, timeout=seconds + AWAIT_MARGIN)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED):
                raise in_progress() from None
            self._failed(error)
            CLAIMS["away"].inc()
            return None
        kind = response.outcome.WhichOneof("outcome") or "away"
        CLAIMS[kind].inc()
        return None if kind == "away" else response.outcome

    def extend(self, scope: bytes, nonce: bytes, lease: float) -> None:
        """Keeps a scope owned for `lease` seconds from now on."""
        self._later(_End(pb.ExtendItem(scope=scope, nonce=nonce, lease_millis=int(lease * 1000))))

    def complete(
        self, scope: bytes, nonce: bytes, *, fingerprints: bytes, code: int, answer: bytes, ttl: float, timeline: int
    ) -> None:
        """Tells, off the caller's path, the answer that Postgres keeps for the scope (a durable Complete).

        `ttl` in seconds; `timeline` is that of the connection on which the guard was written or read, 0 if unknown. An
        answer over MAX_ANSWER_BYTES stays in its guard: the record says so.
        """
        if ttl < 1:
            return
        omitted = len(answer) > MAX_ANSWER_BYTES
        kept = b"" if omitted else answer
        item = pb.CompleteItem(
            scope=scope,
            nonce=nonce,
            code=code,
            answer=kept,
            ttl_millis=int(ttl * 1000),
            durable=True,
            timeline=timeline,
            answer_omitted=omitted,
        )
        _fill_fingerprints(item, fingerprints)
        self._later(_End(item, size=len(kept) + 160))

    def release(self, scope: bytes, nonce: bytes) -> None:
        """Gives up a claim for which nothing was written and nothing will be.

        Told again until it is heard: no guard tells who waits for the key that nobody works on it.
        """
        until = self._loop.time() + LONGEST_LEASE
        self._later(_End(pb.ReleaseItem(scope=scope, nonce=nonce), again_until=until))

    async def close(self) -> None:
        """Sends what waits, for a moment, and stops."""
        if self._stub is None:
            return
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
            self._again()
        try:
            async with asyncio.timeout(COMPLETE_SECONDS):
                await self._ends.drained()
        except TimeoutError:
            log.warning("completions left unsent", count=len(self._ends))
        if self._probe is not None:
            self._probe.cancel()

    # -- groups --

    def _later(self, end: _End) -> None:
        full = len(self._ends) >= MAX_PENDING or self._pending_bytes + end.size > MAX_PENDING_BYTES
        if not self._component.up or full:
            self._not_heard([end])
            return
        self._pending_bytes += end.size
        self._ends.put(end)

    def _not_heard(self, ends: Sequence[_End]) -> None:
        """Gives them up, but for releases whose claims may last. One of those may even be on its way still."""
        now = self._loop.time()
        for end in ends:
            if end.again_until < now or len(self._unheard) >= MAX_UNHEARD or self._closed:
                DROPPED.inc()
                continue
            self._unheard.append(end)
            if self._retry is None:
                self._retry = self._loop.call_later(RELEASE_AGAIN_SECONDS, self._again)

    def _again(self) -> None:
        self._retry = None
        ends, self._unheard = self._unheard, []
        for end in ends:
            self._later(end)

    async def _end(self, group: list[_End]) -> None:
        assert self._stub is not None
        self._pending_bytes -= sum(end.size for end in group)
        if not self._component.up:  # it went away while they waited: not each group shall find that out
            self._not_heard(group)
            return
        completions, releases, extensions = (
            [end for end in group if isinstance(end.item, kind)]
            for kind in (pb.CompleteItem, pb.ReleaseItem, pb.ExtendItem)
        )
        for batch in _batches(completions):
            await self._tell(self._stub.Complete, pb.CompleteRequest, batch)
        await self._tell(self._stub.Release, pb.ReleaseRequest, releases)
        await self._tell(self._stub.Extend, pb.ExtendRequest, extensions)

    async def _tell(self, rpc: Any, request: Any, ends: Sequence[_End]) -> None:
        if not ends:
            return
        try:
            response = await rpc(request(items=[end.item for end in ends]), timeout=COMPLETE_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._failed(error)
            if error.code() in _AWAY:
                self._not_heard(ends)
            else:
                DROPPED.inc(len(ends))
            return
        pairs = zip(ends, response.outcomes, strict=True)
        self._not_heard([end for end, outcome in pairs if outcome.result == type(outcome).RESULT_AWAY])

    # -- breaker --

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        """Opens the breaker. What was only slow is in doubt first: the probe, sent at once, tells."""
        if error.code() not in _AWAY:
            log.error("idempotency_svc refused a batch", code=error.code().name, detail=error.details())
            return
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._away(_told(error))
        if self._probe is None:
            self._probe = asyncio.create_task(self._recover())

    def _away(self, detail: str) -> None:
        if self._component.up:
            log.warning("idempotency_svc away: going on with Postgres alone", detail=detail)
            self._component = Component(False, detail, datetime.now(UTC))
            DEGRADED.set(1)

    async def _recover(self) -> None:
        """Asks for something harmless that takes the whole way, token and Redis included, until it is answered."""
        assert self._stub is not None
        late = 0
        while True:
            nothing = [pb.ReleaseItem(scope=os.urandom(32), nonce=os.urandom(16)) for _ in range(PROBE_SCOPES)]
            try:
                response = await self._stub.Release(pb.ReleaseRequest(items=nothing), timeout=PROBE_TIMEOUT)
                if any(outcome.result != pb.ReleaseOutcome.RESULT_AWAY for outcome in response.outcomes):
                    break
                late += 1
                if late > 1:  # at the first, idempotency_svc may still be in doubt itself, for a fifth of a second
                    self._away("Redis is away or late")
            except grpc.aio.AioRpcError as error:
                self._away(_told(error))
            except Exception as error:
                log.exception("looking for idempotency_svc failed")
                self._away(repr(error))
            await asyncio.sleep(PROBE_SECONDS)
        self._probe = None
        if not self._component.up:
            self._component = Component(True, "", datetime.now(UTC))
            DEGRADED.set(0)
            log.info("idempotency_svc back")


def _told(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _fill_fingerprints(item: pb.ClaimItem | pb.CompleteItem, packed: bytes) -> None:
    add = item.fingerprints.add  # half the cost of handing messages to the constructor, which copies them
    if len(packed) < PACKED:  # a guard of before
        add(kind=1, digest=packed)
    for at in range(0, len(packed) - PACKED + 1, PACKED):
        add(kind=packed[at], digest=packed[at + 1 : at + PACKED])


def _batches(ends: list[_End]) -> Iterator[list[_End]]:
    """In order, each of at most MAX_BATCH_BYTES or of one."""
    batch: list[_End] = []
    size = 0
    for end in ends:
        if batch and size + end.size > MAX_BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(end)
        size += end.size
    if batch:
        yield batch


@dataclass(slots=True, eq=False)
class _End:
    """A completion, a release or an extension on its way."""

    item: pb.CompleteItem | pb.ReleaseItem | pb.ExtendItem
    size: int = 128
    """About its bytes on the wire."""
    again_until: float = 0.0
    """In the loop's time: until then it is told again when it was not heard."""
