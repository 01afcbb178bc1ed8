"""The records of keys: what a store of them must do, and that on Redis, one script call for each batch."""

from __future__ import annotations

import enum
import struct
import zlib
from binascii import b2a_base64
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from prometheus_client import Counter

from idempotency_svc.link import Link
from idempotency_svc.server import Script
from svckit.errors import Unavailable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

SCOPE_BYTES = 32
NONCE_BYTES = 16
DIGEST_BYTES = 32
LARGEST_KIND = 255
MOST_KINDS = 8
LARGEST_ANSWER = 2 << 20
LONGEST_LEASE_MILLIS = 3_600_000
LONGEST_TTL_MILLIS = 30 * 86_400_000
LARGEST_BATCH = 256

Fingerprints = tuple[tuple[int, bytes], ...]
"""(kind, digest) pairs of one request. Two requests are the same when any kind present on both sides has the same
digest; with no kind in common they are different."""


class ClaimItem(NamedTuple):
    """Asks for a key. nonce names the asker: who knows it owns the key."""

    scope: bytes
    fingerprints: Fingerprints
    nonce: bytes
    lease_millis: int
    ttl_millis: int


class CompleteItem(NamedTuple):
    """The answer of a key.

    durable: it is committed in the database, whatever this store believes. Only then: timeline, that of the database
    when it was committed (it grows with each failover; 0: unknown); answer_omitted, it is too large to be kept here,
    and `answer` is empty.
    """

    scope: bytes
    fingerprints: Fingerprints
    nonce: bytes
    code: int
    answer: bytes
    ttl_millis: int
    durable: bool
    timeline: int = 0
    answer_omitted: bool = False


class ReleaseItem(NamedTuple):
    """Gives a key back without an answer. forced: whoever owns it, an operator's decision."""

    scope: bytes
    nonce: bytes
    forced: bool = False


class GetItem(NamedTuple):
    """Asks what is kept of a key."""

    scope: bytes


class State(enum.Enum):
    """Where a record stands."""

    IN_PROGRESS = ord("I")
    RELEASED = ord("R")
    COMPLETED = ord("C")


@dataclass(frozen=True, slots=True)
class Record:
    """A record without its answer and its owner's nonce.

    Times are left in milliseconds, 0 where there is none. What only a completed one has is 0 or False in others.
    """

    state: State
    epoch: int
    lease_left_millis: int
    ttl_left_millis: int
    code: int
    durable: bool
    timeline: int
    answer_omitted: bool
    answer_bytes: int
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Acquired:
    """The key is the asker's until its lease is over. epoch counts the owners of the record, from 1."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Takeover:
    """As Acquired, but from an owner whose lease is over: that one may still be at work."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The key has its answer, as the CompleteItem said.

    If answer_omitted, only the database has its bytes. That is said, too, of bytes that were damaged here.
    """

    code: int
    answer: bytes
    durable: bool
    timeline: int = 0
    answer_omitted: bool = False


@dataclass(frozen=True, slots=True)
class Busy:
    """Another owns the key, for at least one millisecond more."""

    lease_left_millis: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key belongs to another request. durable: to one with a durable answer."""

    durable: bool


@dataclass(frozen=True, slots=True)
class Away:
    """The record cannot be reached, or was not in time; the item may have been treated."""


class ExtendItem(NamedTuple):
    """Asks for more time with a key."""

    scope: bytes
    nonce: bytes
    lease_millis: int


AWAY = Away()
ClaimOutcome = Acquired | Takeover | Replay | Busy | Mismatch | Away


class Completed(enum.Enum):
    """What became of a CompleteItem."""

    COMPLETED = 1
    RESTORED = 2
    ALREADY = 3
    FENCED = 4
    MISMATCH = 5
    AWAY = 6


class Released(enum.Enum):
    """What became of a ReleaseItem."""

    RELEASED = 1
    ABSENT = 2
    FENCED = 3
    ALREADY = 4
    AWAY = 5


class Extended(enum.Enum):
    """What became of an ExtendItem."""

    EXTENDED = 1
    ABSENT = 2
    FENCED = 3
    ALREADY = 4
    AWAY = 5


class Cache(Protocol):
    """Remembers for each scope who works on it, or its answer. It may forget anything at any time: it is no guarantee.

    Each method takes 1 to 256 items of valid sizes, treats them in order, one after another, each atomically, and
    answers item by item. Every step may be repeated with the same items, as after an answer that was lost. Times are
    this store's own. An item whose record is out of reach, or not in time, is answered AWAY; all methods raise
    Unavailable (REDIS_UNAVAILABLE) when no record can be reached or trusted. Either may have been treated.

    A record is absent, in progress (an owner, its lease, a time to live), released, or completed (an answer, durable
    or not). What cannot be read as a record is absent.
    """

    async def claim(self, items: Sequence[ClaimItem]) -> list[ClaimOutcome]:
        """Makes the caller the owner, or says why not.

        Must, in this order: acquire what is absent (epoch 1). Answer Mismatch for a record with other fingerprints,
        whatever its state. Answer Replay for a completed record. Acquire a released one (epoch + 1). Acquire again,
        with the same epoch and a new lease, for the owner's own nonce, even when its lease is over. Answer Busy while
        another's lease lasts. Take over when it is over (epoch + 1). A claim that acquires or takes over must set
        owner, fingerprints, lease and time to live; any other must change nothing. Answers of one reply are at most
        3 MiB in all, except when one alone is larger: a record that finds no room is Busy for 1 ms.
        """
        ...

    def signs(self, scope: bytes) -> AbstractAsyncContextManager[asyncio.Event]:
        """While inside, should set the event when the record may be in progress no longer, and once at the beginning.

        Any sign may be missing, among them those that come after another has begun to wait for signs of the scope.
        """
        ...

    async def complete(self, items: Sequence[CompleteItem]) -> list[Completed]:
        """Puts the answer into the record and sets its time to live.

        Durable, must look at nothing but these: a durable record is not changed, ALREADY for the same request,
        MISMATCH for another, but a durable OK (code 0) overwrites a durable error, and a higher timeline overwrites
        any. All else is overwritten: COMPLETED for the owner's nonce, RESTORED for an absent, released, completed or
        foreign record.

        Not durable, must answer MISMATCH for a record with other fingerprints, ALREADY for a completed one, COMPLETED
        for one in progress with this nonce, its lease over or not, and FENCED for all else, absent ones included.
        """
        ...

    async def release(self, items: Sequence[ReleaseItem]) -> list[Released]:
        """Ends the ownership of a nonce, and keeps fingerprints and time to live.

        Must answer RELEASED for a record in progress with this nonce, FENCED for one with another, ABSENT without a
        record, ALREADY for a completed one or one that this nonce had and released. Forced, any nonce counts as this.
        """
        ...

    async def extend(self, items: Sequence[ExtendItem]) -> list[Extended]:
        """Lets a nonce's lease end `lease_millis` from now at the earliest, and the record not before it.

        Must answer EXTENDED for a record in progress with this nonce, its lease over or not, FENCED for one with
        another or a released one, ABSENT without a record, ALREADY for a completed one.
        """
        ...

    async def get(self, items: Sequence[GetItem]) -> list[Record | None]:
        """Must answer what is kept of each key, None for an absent record, and change nothing.

        Raises Unavailable if even one of the records is out of reach.
        """
        ...


_OUTCOMES = Counter("orchestrator_idempotency_outcomes", "Items by step and outcome.", ["step", "outcome"])
_UNREADABLE = Counter("orchestrator_idempotency_unreadable_records", "Records that were garbage or of another format.")

_LARGEST_REPLY = 3 << 20
_COMPRESSED_FROM = 513

_CLAIM = struct.Struct(">II16sB")
_COMPLETE = struct.Struct(">16sIBBBI")
_EXTEND = struct.Struct(">16sI")
_RELEASE = struct.Struct(">16sB")
_RECORD = struct.Struct(">BBBIIIIIB")
_OUTCOME = struct.Struct(">BI")
_TIMELINE = _SIZE = struct.Struct(">I")
_ACQUIRED, _TAKEOVER, _REPLAY, _BUSY, _MISMATCH = range(1, 6)
_CLAIM_OUTCOMES = ("", "acquired", "takeover", "replay", "busy", "mismatch")
_UNREADABLE_BIT = 0x80
_FLAG_DURABLE, _FLAG_OMITTED, _FLAG_TIMELINE, _FLAG_COMPRESSED = 1, 2, 4, 8
_FIRST = Acquired(1)


class RedisCache:
    """Cache on Redis. `url`, `timeout` and `on_ready` are those of its Link."""

    def __init__(
        self, url: str, *, timeout: float = 0.04, on_ready: Callable[[bool], Awaitable[None]] | None = None
    ) -> None:
        self._claim, self._complete, self._release = Script("claim"), Script("complete"), Script("release")
        self._extend, self._get = Script("extend"), Script("get")
        scripts = (self._claim, self._complete, self._release, self._extend, self._get)
        self._link = Link(url, scripts, timeout=timeout, on_ready=on_ready)

    @property
    def ready(self) -> bool:
        """Whether calls are passed on to Redis."""
        return self._link.ready

    async def start(self) -> None:
        """Looks for Redis once, then goes on looking in the background. Never raises for its state."""
        await self._link.start()

    async def stop(self) -> None:
        """Ends that and closes all connections that no call is using. Calls made later fail."""
        await self._link.stop()

    async def claim(self, items: Sequence[ClaimItem]) -> list[ClaimOutcome]:
        """As Cache.claim."""
        packed = []
        for _, fingerprints, nonce, lease_millis, ttl_millis in items:
            head = _CLAIM.pack(lease_millis, ttl_millis, nonce, len(fingerprints))
            packed.append(b"".join([head, *[b"%c%b" % fingerprint for fingerprint in fingerprints]]))
        places, reply = await self._run(self._claim, items, packed, b"%d" % _LARGEST_REPLY)
        outcomes: list[ClaimOutcome] = []
        counts = [0] * len(_CLAIM_OUTCOMES)
        unreadable = at = 0
        for _ in places:
            kind, number = _OUTCOME.unpack_from(reply, at)
            at += _OUTCOME.size
            if kind & _UNREADABLE_BIT:
                kind -= _UNREADABLE_BIT
                unreadable += 1
            counts[kind] += 1
            outcome: ClaimOutcome
            if kind == _ACQUIRED:
                outcome = _FIRST if number == 1 else Acquired(number)
            elif kind == _REPLAY:
                end = at + 2 + number
                outcome = _replay(reply[at], reply[at + 1], reply[at + 2 : end])
                at = end
            elif kind == _BUSY:
                outcome = Busy(number)
            elif kind == _TAKEOVER:
                outcome = Takeover(number)
            else:
                outcome = Mismatch(number == 1)
            outcomes.append(outcome)
        for kind, count in enumerate(counts):
            if count:
                _OUTCOMES.labels("claim", _CLAIM_OUTCOMES[kind]).inc(count)
        if unreadable:
            _UNREADABLE.inc(unreadable)
        return _within_limit(_in_place("claim", outcomes, places, len(items), AWAY))

    def signs(self, scope: bytes) -> AbstractAsyncContextManager[asyncio.Event]:
        """As Cache.signs."""
        return self._link.signs(_key(scope))

    async def complete(self, items: Sequence[CompleteItem]) -> list[Completed]:
        """As Cache.complete."""
        packed = []
        for item in items:
            flags, tail = _flags_and_tail(item)
            kinds = len(item.fingerprints)
            head = _COMPLETE.pack(item.nonce, item.ttl_millis, flags, item.code, kinds, len(tail))
            packed.append(b"".join([head, *[b"%c%b" % fingerprint for fingerprint in item.fingerprints], tail]))
        places, reply = await self._run(self._complete, items, packed)
        return _in_place("complete", _results("complete", Completed, reply), places, len(items), Completed.AWAY)

    async def release(self, items: Sequence[ReleaseItem]) -> list[Released]:
        """As Cache.release."""
        packed = [_RELEASE.pack(item.nonce, item.forced) for item in items]
        places, reply = await self._run(self._release, items, packed)
        return _in_place("release", _results("release", Released, reply), places, len(items), Released.AWAY)

    async def extend(self, items: Sequence[ExtendItem]) -> list[Extended]:
        """As Cache.extend."""
        packed = [_EXTEND.pack(item.nonce, item.lease_millis) for item in items]
        places, reply = await self._run(self._extend, items, packed)
        return _in_place("extend", _results("extend", Extended, reply), places, len(items), Extended.AWAY)

    async def get(self, items: Sequence[GetItem]) -> list[Record | None]:
        """As Cache.get."""
        places, reply = await self._run(self._get, items, [b""] * len(items))
        if len(places) < len(items):
            raise Unavailable("REDIS_UNAVAILABLE", "Redis is not available: away.", metadata={"cause": "away"})
        records: list[Record | None] = [None] * len(items)
        at = 0
        for place in places:
            if reply[at] in (0, _UNREADABLE_BIT):
                _UNREADABLE.inc(reply[at] // _UNREADABLE_BIT)
                at += 1
                continue
            state, flags, code, epoch, lease, ttl, timeline, size, count = _RECORD.unpack_from(reply, at)
            at += _RECORD.size
            kinds = tuple(reply[at : at + count])
            at += count
            durable, omitted = flags & _FLAG_DURABLE != 0, flags & _FLAG_OMITTED != 0
            records[place] = Record(State(state), epoch, lease, ttl, code, durable, timeline, omitted, size, kinds)
        return records

    async def _run(
        self, script: Script, items: Sequence[_Item], packed: Sequence[bytes], *arguments: bytes
    ) -> tuple[Sequence[int], bytes]:
        """As Link.run, with the items' keys."""
        return await self._link.run(script, [_key(item.scope) for item in items], packed, *arguments)


def _key(scope: bytes) -> bytes:
    """Where the record of a scope is: 128 bits of it as base64, which has no braces and is short: keys cost memory."""
    return b"idem:{%b}" % b2a_base64(scope[:16])[:22]


_Item = ClaimItem | CompleteItem | ReleaseItem | ExtendItem | GetItem
_Result = TypeVar("_Result", Completed, Released, Extended)
_Outcome = TypeVar("_Outcome", ClaimOutcome, Completed, Released, Extended)


def _in_place(step: str, outcomes: list[_Outcome], places: Sequence[int], count: int, away: _Outcome) -> list[_Outcome]:
    """The outcomes, which are in the order of `places`, in that of the `count` items; `away` where there is none."""
    if places == range(count):
        return outcomes
    if missing := count - len(places):
        _OUTCOMES.labels(step, "away").inc(missing)
    placed = [away] * count
    for place, outcome in zip(places, outcomes, strict=True):
        placed[place] = outcome
    return placed


def _within_limit(outcomes: list[ClaimOutcome]) -> list[ClaimOutcome]:
    """As each script call limits its own reply: of a batch, there may have been many."""
    room = _LARGEST_REPLY
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, Replay):
            if len(outcome.answer) > room < _LARGEST_REPLY:
                outcomes[place] = Busy(1)
            else:
                room -= len(outcome.answer)
    return outcomes


def _results(step: str, kind: type[_Result], reply: bytes) -> list[_Result]:
    results = [kind(byte & ~_UNREADABLE_BIT) for byte in reply]
    for result in kind:
        if count := results.count(result):
            _OUTCOMES.labels(step, result.name.lower()).inc(count)
    if unreadable := sum(byte >= _UNREADABLE_BIT for byte in reply):
        _UNREADABLE.inc(unreadable)
    return results


def _flags_and_tail(item: CompleteItem) -> tuple[int, bytes]:
    """A completed record's flags and tail, as record.lua describes them."""
    flags, tail = _FLAG_DURABLE * item.durable | _FLAG_OMITTED * item.answer_omitted, item.answer
    if len(tail) >= _COMPRESSED_FROM:
        compressed = _SIZE.pack(len(tail)) + zlib.compress(tail, 1)
        if len(compressed) < len(tail):
            flags, tail = flags | _FLAG_COMPRESSED, compressed
    if item.timeline:
        flags, tail = flags | _FLAG_TIMELINE, _TIMELINE.pack(item.timeline) + tail
    return flags, tail


def _replay(code: int, flags: int, tail: bytes) -> Replay:
    """What _flags_and_tail made, as an outcome."""
    durable, omitted, timeline = flags & _FLAG_DURABLE != 0, flags & _FLAG_OMITTED != 0, 0
    if flags & _FLAG_TIMELINE:
        [timeline] = _TIMELINE.unpack_from(tail)
        tail = tail[_TIMELINE.size :]
    if flags & _FLAG_COMPRESSED:
        try:
            tail = _decompressed(tail)
        except ValueError:
            _UNREADABLE.inc()
            tail, omitted = b"", True
    return Replay(code, tail, durable, timeline, omitted)


def _decompressed(sized: bytes) -> bytes:
    """The answer in a size and a zlib stream. Raises ValueError if it is not one of that size, and makes no more."""
    [size] = _SIZE.unpack_from(sized)
    stream = zlib.decompressobj()
    if size <= LARGEST_ANSWER:
        with suppress(zlib.error):
            answer = stream.decompress(memoryview(sized)[_SIZE.size :], size + 1)
            if len(answer) == size and stream.eof:
                return answer
    raise ValueError("not an answer of that size")
