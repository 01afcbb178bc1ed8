"""What every Cache must do, and what the one on Redis does when Redis does not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import struct
import tracemalloc
import zlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest
import redis.asyncio
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from deploy.local.servers import Valkey
from idempotency_svc.cache import (
    LARGEST_ANSWER,
    Acquired,
    Away,
    Busy,
    Completed,
    CompleteItem,
    Extended,
    ExtendItem,
    GetItem,
    Mismatch,
    RedisCache,
    Released,
    ReleaseItem,
    Replay,
    State,
    Takeover,
)
from svckit.errors import Unavailable
from tests.contract.caches import (
    FOREIGN,
    LEASE,
    OTHER,
    OWNER,
    SAME,
    THIRD,
    TTL,
    cache_on,
    claim,
    claim_item,
    complete,
    extend,
    key_of,
    metric,
    new_scope,
    noting,
    refused,
    release,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from idempotency_svc.cache import Cache, Fingerprints


@pytest.fixture
async def cache(redis_url: str) -> AsyncIterator[RedisCache]:
    async with cache_on(redis_url, timeout=5) as cache:  # what is tested here is not how it hurries
        assert cache.ready
        yield cache


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """Redis as it is, to look behind the cache."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


# --- the contract ----------------------------------------------------------------------------------------------------


async def absent(cache: Cache, scope: bytes) -> None:
    pass


async def in_progress(cache: Cache, scope: bytes) -> None:
    assert await claim(cache, scope) == Acquired(1)


async def lease_over(cache: Cache, scope: bytes) -> None:
    assert await claim(cache, scope, lease=1) == Acquired(1)
    await asyncio.sleep(0.005)


async def released(cache: Cache, scope: bytes) -> None:
    await in_progress(cache, scope)
    assert await release(cache, scope) is Released.RELEASED


def completed(code: int, *, durable: bool) -> Callable[[Cache, bytes], Awaitable[None]]:
    async def reach(cache: Cache, scope: bytes) -> None:
        await in_progress(cache, scope)
        assert await complete(cache, scope, code=code, answer=b"first", durable=durable) is Completed.COMPLETED

    return reach


STATES: dict[str, Callable[[Cache, bytes], Awaitable[None]]] = {
    "absent": absent,
    "in progress": in_progress,
    "lease over": lease_over,
    "released": released,
    "error": completed(5, durable=False),
    "OK": completed(0, durable=False),
    "durable error": completed(5, durable=True),
    "durable OK": completed(0, durable=True),
}

Outcome = Acquired | Takeover | Replay | Busy | Mismatch | Away | Completed | Released | Extended


class Step(NamedTuple):
    verb: str
    nonce: bytes
    fingerprints: Fingerprints = SAME
    code: int = 0
    durable: bool = False

    async def run(self, cache: Cache, scope: bytes) -> Outcome:
        match self.verb:
            case "claim":
                return await claim(cache, scope, self.nonce, self.fingerprints)
            case "complete":
                return await complete(cache, scope, self.nonce, self.fingerprints, code=self.code, durable=self.durable)
            case "extend":
                return await extend(cache, scope, self.nonce)
            case "force":
                [released] = await cache.release([ReleaseItem(scope, self.nonce, True)])
                return released
            case _:
                return await release(cache, scope, self.nonce)


STEPS = {
    "claim by owner": Step("claim", OWNER),
    "claim by other": Step("claim", OTHER),
    "claim by owner, other request": Step("claim", OWNER, FOREIGN),
    "claim by other, other request": Step("claim", OTHER, FOREIGN),
    "complete by owner": Step("complete", OWNER),
    "complete by other": Step("complete", OTHER),
    "complete by owner, other request": Step("complete", OWNER, FOREIGN),
    "durable OK by owner": Step("complete", OWNER, durable=True),
    "durable OK by other": Step("complete", OTHER, durable=True),
    "durable OK, other request": Step("complete", OTHER, FOREIGN, durable=True),
    "durable error by owner": Step("complete", OWNER, code=9, durable=True),
    "durable error, other request": Step("complete", OTHER, FOREIGN, code=9, durable=True),
    "release by owner": Step("release", OWNER),
    "release by other": Step("release", OTHER),
    "release by force": Step("force", OTHER),
    "extend by owner": Step("extend", OWNER),
    "extend by other": Step("extend", OTHER),
}

FIRST, SECOND, OVER, BUSY = Acquired(1), Acquired(2), Takeover(2), Busy(LEASE)
ERR, OK, ERR_D, OK_D = (Replay(code, b"first", durable) for durable in (False, True) for code in (5, 0))
OTHER_, OTHER_D = Mismatch(False), Mismatch(True)
DONE, RESTORED, ALREADY = Completed.COMPLETED, Completed.RESTORED, Completed.ALREADY
FENCED, DIFFERS = Completed.FENCED, Completed.MISMATCH
GIVEN, NONE, KEPT, SETTLED = Released.RELEASED, Released.ABSENT, Released.FENCED, Released.ALREADY
LONGER, GONE, LOST, ENDED = Extended.EXTENDED, Extended.ABSENT, Extended.FENCED, Extended.ALREADY

# One row for each step, one column for each state, in the order of STATES.
TABLE: dict[str, list[Outcome]] = {
    "claim by owner": [FIRST, FIRST, FIRST, SECOND, ERR, OK, ERR_D, OK_D],
    "claim by other": [FIRST, BUSY, OVER, SECOND, ERR, OK, ERR_D, OK_D],
    "claim by owner, other request": [FIRST, OTHER_, OTHER_, OTHER_, OTHER_, OTHER_, OTHER_D, OTHER_D],
    "claim by other, other request": [FIRST, OTHER_, OTHER_, OTHER_, OTHER_, OTHER_, OTHER_D, OTHER_D],
    "complete by owner": [FENCED, DONE, DONE, FENCED, ALREADY, ALREADY, ALREADY, ALREADY],
    "complete by other": [FENCED, FENCED, FENCED, FENCED, ALREADY, ALREADY, ALREADY, ALREADY],
    "complete by owner, other request": [FENCED, DIFFERS, DIFFERS, DIFFERS, DIFFERS, DIFFERS, DIFFERS, DIFFERS],
    "durable OK by owner": [RESTORED, DONE, DONE, RESTORED, RESTORED, RESTORED, RESTORED, ALREADY],
    "durable OK by other": [RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, ALREADY],
    "durable OK, other request": [RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, DIFFERS],
    "durable error by owner": [RESTORED, DONE, DONE, RESTORED, RESTORED, RESTORED, ALREADY, ALREADY],
    "durable error, other request": [RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, RESTORED, DIFFERS, DIFFERS],
    "release by owner": [NONE, GIVEN, GIVEN, SETTLED, SETTLED, SETTLED, SETTLED, SETTLED],
    "release by other": [NONE, KEPT, KEPT, KEPT, SETTLED, SETTLED, SETTLED, SETTLED],
    "release by force": [NONE, GIVEN, GIVEN, SETTLED, SETTLED, SETTLED, SETTLED, SETTLED],
    "extend by owner": [GONE, LONGER, LONGER, LOST, ENDED, ENDED, ENDED, ENDED],
    "extend by other": [GONE, LOST, LOST, LOST, ENDED, ENDED, ENDED, ENDED],
}


def test_the_table_is_whole() -> None:
    assert TABLE.keys() == STEPS.keys()
    assert all(len(row) == len(STATES) for row in TABLE.values())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", STEPS)
async def test_each_step_from_each_state(cache: RedisCache, raw: redis.asyncio.Redis, name: str, state: str) -> None:
    scope, step = new_scope(), STEPS[name]
    await STATES[state](cache, scope)
    before, left = await raw.get(key_of(scope)), await raw.pttl(key_of(scope))
    expected = TABLE[name][list(STATES).index(state)]
    outcome = await step.run(cache, scope)
    if isinstance(expected, Busy):
        assert isinstance(outcome, Busy)
        assert LEASE - 5_000 < outcome.lease_left_millis <= LEASE
    else:
        assert outcome == expected

    after, left_after = await raw.get(key_of(scope)), await raw.pttl(key_of(scope))
    if outcome in {DONE, RESTORED}:
        assert await claim(cache, scope, THIRD, step.fingerprints) == Replay(step.code, b"answer", step.durable)
        assert TTL - 5_000 < left_after <= TTL
    elif isinstance(outcome, Acquired | Takeover):
        assert isinstance(await claim(cache, scope, THIRD, step.fingerprints), Busy)
        assert await complete(cache, scope, step.nonce, step.fingerprints) is DONE
        assert TTL - 5_000 < left_after <= TTL
    elif outcome is GIVEN:
        assert await claim(cache, scope, THIRD, FOREIGN) == OTHER_, "the fingerprints outlive the release"
        assert 0 < left_after <= left, "and so does the time to live"
        assert await claim(cache, scope, THIRD) == Acquired(2)
    elif outcome is LONGER:
        busy = await claim(cache, scope, THIRD)
        assert isinstance(busy, Busy) and LEASE - 5_000 < busy.lease_left_millis <= LEASE
        assert 0 < left_after <= left, "a record that outlives the lease keeps its time"
        assert await complete(cache, scope) is DONE
    else:
        assert after == before, "a refusal changes nothing"
        assert left_after <= left


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", STEPS)
async def test_each_step_can_be_repeated(cache: Cache, name: str, state: str) -> None:
    """After a lost answer: the second one says the same, or that it was so already."""
    scope, step = new_scope(), STEPS[name]
    await STATES[state](cache, scope)
    first, second = await step.run(cache, scope), await step.run(cache, scope)
    match first:
        case Acquired(epoch) | Takeover(epoch):
            assert second == Acquired(epoch)
        case Completed.COMPLETED | Completed.RESTORED:
            assert second is ALREADY
        case Released.RELEASED:
            assert second is SETTLED
        case Extended.EXTENDED:
            assert second is LONGER
        case Busy():
            assert isinstance(second, Busy)
        case _:
            assert second == first


async def test_a_nonce_of_its_own_renews_the_lease(cache: Cache) -> None:
    scope = new_scope()
    assert await claim(cache, scope, lease=40) == Acquired(1)
    assert await claim(cache, scope, lease=LEASE) == Acquired(1)
    await asyncio.sleep(0.06)
    assert isinstance(await claim(cache, scope, OTHER), Busy)


async def test_an_extended_lease_ends_later_and_its_record_not_before_it(
    cache: Cache, raw: redis.asyncio.Redis
) -> None:
    scope = new_scope()
    assert await claim(cache, scope, lease=40, ttl=300) == Acquired(1)
    assert await extend(cache, scope, lease=3_600_000) is LONGER
    assert 3_595_000 < await raw.pttl(key_of(scope)) <= 3_600_000
    await asyncio.sleep(0.06)
    assert isinstance(await claim(cache, scope, OTHER), Busy)
    assert await extend(cache, scope, lease=1) is LONGER
    await asyncio.sleep(0.005)
    assert isinstance(await claim(cache, scope, OTHER), Busy), "it is never cut short"


async def test_a_lease_that_was_taken_over_is_not_extended(cache: Cache) -> None:
    scope = new_scope()
    await claim(cache, scope, lease=1)
    await asyncio.sleep(0.005)
    assert await claim(cache, scope, OTHER) == Takeover(2)
    assert await extend(cache, scope) is LOST


@pytest.mark.parametrize("state", STATES)
async def test_what_is_kept_is_told_and_not_changed(cache: RedisCache, raw: redis.asyncio.Redis, state: str) -> None:
    scope = new_scope()
    await STATES[state](cache, scope)
    before = await raw.get(key_of(scope))
    [none, record] = await cache.get([GetItem(new_scope()), GetItem(scope)])
    assert none is None
    assert await raw.get(key_of(scope)) == before
    if state == "absent":
        assert record is None
        return
    assert record is not None
    assert (record.epoch, record.kinds) == (1, tuple(kind for kind, _ in SAME))
    assert TTL - 5_000 < record.ttl_left_millis <= TTL
    if state == "in progress":
        assert record.state is State.IN_PROGRESS
        assert LEASE - 5_000 < record.lease_left_millis <= LEASE
    else:
        assert record.lease_left_millis == 0
        answer = (record.state, record.code, record.durable, record.answer_bytes)
        assert (
            answer
            == {
                "lease over": (State.IN_PROGRESS, 0, False, 0),
                "released": (State.RELEASED, 0, False, 0),
                "error": (State.COMPLETED, 5, False, 5),
                "OK": (State.COMPLETED, 0, False, 5),
                "durable error": (State.COMPLETED, 5, True, 5),
                "durable OK": (State.COMPLETED, 0, True, 5),
            }[state]
        )


async def test_what_is_told_of_an_answer(cache: Cache) -> None:
    long, omitted = new_scope(), new_scope()
    item = CompleteItem(long, (*SAME, (3, b"d" * 32)), OWNER, 0, b"a" * 5000, TTL, True, 7)
    await cache.complete([item, item._replace(scope=omitted, answer=b"", answer_omitted=True)])
    [one, two] = await cache.get([GetItem(long), GetItem(omitted)])
    assert one is not None and two is not None
    assert (one.answer_bytes, one.timeline, one.answer_omitted, one.kinds[-1]) == (5000, 7, False, 3)
    assert (two.answer_bytes, two.timeline, two.answer_omitted) == (0, 7, True)


async def test_epochs_count_the_owners(cache: Cache) -> None:
    scope = new_scope()
    assert await claim(cache, scope, OWNER, lease=1) == Acquired(1)
    await asyncio.sleep(0.005)
    assert await claim(cache, scope, OTHER, lease=1) == Takeover(2)
    await asyncio.sleep(0.005)
    assert await claim(cache, scope, THIRD) == Takeover(3)
    assert await release(cache, scope, THIRD) is Released.RELEASED
    assert await claim(cache, scope, OWNER) == Acquired(4)


async def test_a_zombie_changes_nothing_of_its_successor(cache: Cache) -> None:
    scope = new_scope()
    assert await claim(cache, scope, OWNER, lease=1) == Acquired(1)
    await asyncio.sleep(0.005)
    assert await claim(cache, scope, OTHER) == Takeover(2)
    assert await release(cache, scope, OWNER) is Released.FENCED
    assert await complete(cache, scope, OWNER, answer=b"zombie") is Completed.FENCED
    assert isinstance(await claim(cache, scope, OWNER), Busy), "it lost its place"
    assert await complete(cache, scope, OTHER, answer=b"successor") is Completed.COMPLETED
    assert await complete(cache, scope, OWNER, answer=b"zombie") is Completed.ALREADY
    assert await claim(cache, scope, THIRD) == Replay(0, b"successor", False)


async def test_a_zombie_whose_commit_won_is_believed(cache: Cache) -> None:
    """The successor answered with an error; then the first owner's transaction turned out to be the one that counts."""
    scope = new_scope()
    assert await claim(cache, scope, OWNER, lease=1) == Acquired(1)
    await asyncio.sleep(0.005)
    assert await claim(cache, scope, OTHER) == Takeover(2)
    assert await complete(cache, scope, OTHER, code=9, answer=b"refused") is Completed.COMPLETED
    assert await complete(cache, scope, OWNER, answer=b"committed", durable=True) is Completed.RESTORED
    assert await claim(cache, scope, THIRD) == Replay(0, b"committed", True)


async def test_a_durable_error_never_replaces_a_durable_ok(cache: Cache) -> None:
    scope = new_scope()
    assert await complete(cache, scope, code=0, answer=b"committed", durable=True) is Completed.RESTORED
    assert await complete(cache, scope, OTHER, code=9, answer=b"refused", durable=True) is Completed.ALREADY
    assert await complete(cache, scope, OTHER, FOREIGN, code=9, durable=True) is Completed.MISMATCH
    assert await complete(cache, scope, OTHER, code=0, answer=b"another", durable=True) is Completed.ALREADY
    assert await claim(cache, scope, THIRD) == Replay(0, b"committed", True)


@pytest.mark.parametrize("there,comes,result", [
    # (timeline, code) of the durable record, and of a durable completion of the same request
    ((1, 0), (2, 0), RESTORED),
    ((1, 0), (2, 9), RESTORED),
    ((0, 0), (1, 9), RESTORED),
    ((1, 9), (2, 9), RESTORED),
    ((2**32 - 2, 0), (2**32 - 1, 9), RESTORED),
    ((2, 0), (2, 0), ALREADY),
    ((2, 0), (2, 9), ALREADY),
    ((2, 0), (1, 0), ALREADY),
    ((2, 0), (0, 0), ALREADY),
    ((2, 9), (1, 9), ALREADY),
    ((2, 9), (2, 0), RESTORED),
    ((2, 9), (1, 0), RESTORED),
])  # fmt: skip
async def test_a_higher_timeline_overwrites_any_durable_record(
    cache: Cache, there: tuple[int, int], comes: tuple[int, int], result: Completed
) -> None:
    async def put(scope: bytes, fingerprints: Fingerprints, of: tuple[int, int], answer: bytes) -> Completed:
        timeline, code = of
        return await complete(
            cache, scope, OTHER, fingerprints, code=code, answer=answer, durable=True, timeline=timeline
        )

    def replay(of: tuple[int, int], answer: bytes) -> Replay:
        return Replay(of[1], answer, True, of[0])

    scope = new_scope()
    assert await put(scope, SAME, there, b"there") is RESTORED
    assert await put(scope, SAME, comes, b"comes") is result
    assert await claim(cache, scope) == (replay(comes, b"comes") if result is RESTORED else replay(there, b"there"))
    assert await put(scope, SAME, comes, b"comes") is ALREADY, "a repetition changes nothing"

    foreign = new_scope()
    assert await put(foreign, FOREIGN, there, b"there") is RESTORED
    assert await put(foreign, SAME, comes, b"comes") is (DIFFERS if result is ALREADY else result)


async def test_an_answer_kept_elsewhere_says_so(cache: Cache) -> None:
    scope = new_scope()
    item = CompleteItem(scope, SAME, OWNER, 0, b"", TTL, True, 7, answer_omitted=True)
    assert await cache.complete([item, item]) == [RESTORED, ALREADY]
    assert await claim(cache, scope, OTHER) == Replay(0, b"", True, 7, answer_omitted=True)
    assert await claim(cache, scope, OTHER, FOREIGN) == Mismatch(True)


async def test_a_lost_record_is_restored_only_by_the_database(cache: Cache) -> None:
    scope = new_scope()
    assert await complete(cache, scope) is Completed.FENCED
    assert await claim(cache, scope) == Acquired(1)
    scope = new_scope()
    assert await complete(cache, scope, THIRD, durable=True) is Completed.RESTORED
    assert await claim(cache, scope) == Replay(0, b"answer", True)


@pytest.mark.parametrize("mine,theirs,same", [
    ([(1, "a")], [(1, "a")], True),
    ([(1, "a")], [(1, "b")], False),
    ([(1, "a"), (2, "b"), (3, "c")], [(1, "a")], True),
    ([(1, "a")], [(1, "a"), (2, "b"), (3, "c")], True),
    ([(2, "b"), (3, "c")], [(3, "c"), (2, "x")], True),
    ([(2, "b"), (3, "c")], [(2, "x"), (3, "y")], False),
    ([(1, "a")], [(2, "a")], False),
    ([(2, "b")], [(1, "b"), (3, "b")], False),
])  # fmt: skip
async def test_any_kind_in_common_decides(
    cache: Cache, mine: list[tuple[int, str]], theirs: list[tuple[int, str]], same: bool
) -> None:
    first, second = (tuple((kind, text.encode() * 32) for kind, text in side) for side in (mine, theirs))
    scope = new_scope()
    assert await claim(cache, scope, OWNER, first) == Acquired(1)
    outcome = await claim(cache, scope, OTHER, second)
    assert isinstance(outcome, Busy) if same else outcome == Mismatch(False)


async def test_a_batch_is_answered_item_by_item(cache: Cache) -> None:
    fresh, busy, done, foreign, over, given = (new_scope() for _ in range(6))
    await in_progress(cache, busy)
    await complete(cache, done, code=3, answer=b"refused", durable=True)
    await complete(cache, foreign, OWNER, FOREIGN, durable=True)
    await lease_over(cache, over)
    await released(cache, given)
    outcomes = await cache.claim([claim_item(scope, OTHER) for scope in (fresh, busy, done, foreign, over, given)])
    assert isinstance(outcomes[1], Busy)
    assert outcomes[:1] + outcomes[2:] == [
        Acquired(1), Replay(3, b"refused", True), Mismatch(True), Takeover(2), Acquired(2),
    ]  # fmt: skip
    assert await cache.release([ReleaseItem(scope, OTHER) for scope in (fresh, busy, done, new_scope())]) == [
        Released.RELEASED, Released.FENCED, Released.ALREADY, Released.ABSENT,
    ]  # fmt: skip


async def test_the_same_scope_twice_in_a_batch_is_treated_in_order(cache: Cache) -> None:
    scope = new_scope()
    first, second, third = await cache.claim([
        claim_item(scope, OWNER), claim_item(scope, OTHER), claim_item(scope, OTHER, FOREIGN),
    ])  # fmt: skip
    assert first == Acquired(1)
    assert isinstance(second, Busy)
    assert third == Mismatch(False)
    assert await cache.extend([ExtendItem(one, OWNER, LEASE) for one in (scope, new_scope())]) == [LONGER, GONE]
    item = CompleteItem(scope, SAME, OWNER, 0, b"one", TTL, False)
    assert await cache.complete([item, item._replace(answer=b"two")]) == [Completed.COMPLETED, Completed.ALREADY]


async def test_the_largest_batch(cache: Cache) -> None:
    scopes = [new_scope() for _ in range(256)]
    eight = tuple((kind, os.urandom(32)) for kind in range(1, 9))
    assert set(await cache.claim([claim_item(scope, OWNER, eight) for scope in scopes])) == {Acquired(1)}
    items = [CompleteItem(scope, eight, OWNER, 0, scope * 8, TTL, True) for scope in scopes]
    assert set(await cache.complete(items)) == {Completed.COMPLETED}
    outcomes = await cache.claim([claim_item(scope, OTHER, eight) for scope in scopes])
    assert outcomes == [Replay(0, scope * 8, True) for scope in scopes]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_536, LARGEST_ANSWER])
async def test_answers_come_back_byte_for_byte(cache: Cache, size: int) -> None:
    scope, answer = new_scope(), os.urandom(size)
    await claim(cache, scope)
    assert await complete(cache, scope, answer=answer, code=0) is Completed.COMPLETED
    assert await claim(cache, scope, OTHER) == Replay(0, answer, False)


async def test_a_reply_has_a_limit_and_one_answer_always_fits(cache: Cache) -> None:
    scopes = [new_scope() for _ in range(3)]
    large, small = os.urandom(LARGEST_ANSWER), b"s" * 100
    for scope, answer in zip(scopes, (large, large, small), strict=True):
        assert await complete(cache, scope, answer=answer, durable=True) is Completed.RESTORED
    outcomes = await cache.claim([claim_item(scope, OTHER) for scope in scopes])
    assert outcomes == [Replay(0, large, True), Busy(1), Replay(0, small, True)]
    assert await claim(cache, scopes[1], OTHER) == Replay(0, large, True)


async def test_records_end_with_their_time_to_live(cache: Cache, raw: redis.asyncio.Redis) -> None:
    scope = new_scope()
    await claim(cache, scope, lease=1, ttl=300)
    assert await complete(cache, scope, ttl=60) is Completed.COMPLETED
    assert 0 < await raw.pttl(key_of(scope)) <= 60
    await asyncio.sleep(0.08)
    assert await claim(cache, scope, OTHER, FOREIGN, ttl=2_592_000_000) == Acquired(1)
    assert 2_591_990_000 < await raw.pttl(key_of(scope)) <= 2_592_000_000


async def test_exactly_one_of_ten_thousand_concurrent_claims_acquires(redis_url: str) -> None:
    async with cache_on(redis_url, timeout=60) as one, cache_on(redis_url, timeout=60) as two:  # 32 connections each
        scope = new_scope()
        claims = [claim((one, two)[number % 2], scope, os.urandom(16)) for number in range(10_000)]
        outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*claims))
    assert outcomes == {Acquired: 1, Busy: 9_999}


async def test_exactly_one_of_many_takes_over(cache: Cache) -> None:
    scope = new_scope()
    await lease_over(cache, scope)
    outcomes = await asyncio.gather(*(claim(cache, scope, os.urandom(16)) for _ in range(500)))
    assert Counter(map(type, outcomes)) == {Takeover: 1, Busy: 499}


async def test_a_cancelled_call_does_not_mix_up_others(cache: Cache) -> None:
    """Whoever gets the connection next must not read the answer of the cancelled call."""
    scopes = {new_scope(): os.urandom(100) for _ in range(50)}
    await cache.complete([CompleteItem(scope, SAME, OWNER, 0, answer, TTL, True) for scope, answer in scopes.items()])
    chance = random.Random(1)

    async def ask(scope: bytes, answer: bytes, patience: float) -> bool:
        try:
            async with asyncio.timeout(patience):
                assert await claim(cache, scope, OTHER) == Replay(0, answer, True)
        except TimeoutError:
            return False
        return True

    answered, longest = 0, 0.02
    for _ in range(20):
        calls = [ask(scope, answer, chance.uniform(0, longest)) for scope, answer in scopes.items()]
        in_time = sum(await asyncio.gather(*calls))
        longest *= 1 if in_time else 2  # as patient as a busy machine needs
        answered += in_time
    assert 0 < answered < 1000
    assert await asyncio.gather(*(ask(scope, answer, 5) for scope, answer in scopes.items())) == [True] * 50


# --- the records in Redis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds,most", [(1, 400), (3, 464)])
async def test_a_record_is_one_small_string(cache: RedisCache, raw: redis.asyncio.Redis, kinds: int, most: int) -> None:
    """With an answer of 256 bytes, all of it: key, expiry, the table's share."""

    def item() -> CompleteItem:
        fingerprints = tuple((kind, os.urandom(32)) for kind in range(1, kinds + 1))
        return CompleteItem(new_scope(), fingerprints, OWNER, 0, os.urandom(256), TTL, True, timeline=1)

    first = item()
    await cache.complete([first])
    key = key_of(first.scope)
    assert await raw.type(key) == b"string"
    assert await raw.strlen(key) == 9 + 33 * kinds + 4 + 256
    assert (await raw.memory_usage(key, samples=0) or 0) <= most

    before, count = (await raw.info("memory"))["used_memory"], 10_000
    for _ in range(count // 250):
        await cache.complete([item() for _ in range(250)])
    assert ((await raw.info("memory"))["used_memory"] - before) / count <= 545


@pytest.mark.parametrize("size,kept", [(512, 512), (513, 64), (100_000, 1000)])
async def test_larger_answers_are_compressed(cache: RedisCache, raw: redis.asyncio.Redis, size: int, kept: int) -> None:
    scope, answer = new_scope(), (b"one like the other, " * 5000)[:size]
    assert await complete(cache, scope, answer=answer, durable=True, timeline=9) is RESTORED
    assert await raw.strlen(key_of(scope)) <= 9 + 33 + 8 + kept
    assert await claim(cache, scope) == Replay(0, answer, True, 9)


async def test_what_compression_makes_no_smaller_stays_as_it_is(cache: RedisCache, raw: redis.asyncio.Redis) -> None:
    scope, answer = new_scope(), os.urandom(600)
    await complete(cache, scope, answer=answer, durable=True)
    assert answer in (await raw.get(key_of(scope)) or b"")
    assert await claim(cache, scope) == Replay(0, answer, True)


DAMAGED = {
    "no stream": struct.pack(">I", 600) + b"garbage",
    "cut": struct.pack(">I", 600) + zlib.compress(b"a" * 600)[:-1],
    "shorter than said": struct.pack(">I", 600) + zlib.compress(b"a" * 599),
    "longer than said": struct.pack(">I", 600) + zlib.compress(b"a" * 601),
    "a bomb": struct.pack(">I", 600) + zlib.compress(b"a" * 20_000_000),
    "a bomb that says so": struct.pack(">I", 20_000_000) + zlib.compress(b"a" * 20_000_000),
}


@pytest.mark.parametrize("damage", DAMAGED)
async def test_a_damaged_answer_counts_as_omitted(cache: RedisCache, raw: redis.asyncio.Redis, damage: str) -> None:
    """The caller's own truth has it; finding out costs no more memory than the answer would."""
    counted = metric("orchestrator_idempotency_unreadable_records_total")
    scope, whole = new_scope(), new_scope()
    await raw.set(key_of(scope), b"\x01C\x09\x00\x00\x00\x00\x01\x01\x01" + b"\x01" * 32 + DAMAGED[damage])
    await complete(cache, whole, durable=True)
    tracemalloc.start()
    outcomes = await cache.claim([claim_item(scope), claim_item(whole)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcomes[0] == Replay(0, b"", True, answer_omitted=True)
    assert outcomes[1] in (Replay(0, b"answer", True), Busy(1)), "Busy: the answer before claimed all the room"
    assert metric("orchestrator_idempotency_unreadable_records_total") == counted + 1
    assert peak < 2 << 20


async def test_the_limit_of_a_reply_counts_what_compressed_answers_become(cache: Cache) -> None:
    scopes = [new_scope() for _ in range(3)]
    answer = b"a" * (LARGEST_ANSWER - 1)
    for scope in scopes:
        assert await complete(cache, scope, answer=answer, durable=True) is RESTORED
    assert await cache.claim([claim_item(scope) for scope in scopes]) == [Replay(0, answer, True), Busy(1), Busy(1)]


async def test_records_from_before_the_flags_are_read(cache: RedisCache, raw: redis.asyncio.Redis) -> None:
    for flags, durable in ((b"\x00", False), (b"\x01", True)):
        scope = new_scope()
        await raw.set(key_of(scope), b"\x01C" + flags + b"\x05\x00\x00\x00\x01\x01\x01" + b"\x01" * 32 + b"as it was")
        assert await claim(cache, scope) == Replay(5, b"as it was", durable)
        assert await complete(cache, scope, answer=b"new", durable=True, timeline=1) is RESTORED
        assert await claim(cache, scope) == Replay(0, b"new", True, 1)


GARBAGE = {
    "empty": b"",
    "text": b"garbage",
    "another format": b"\x02" + b"C\x01\x00\x00\x00\x00\x01\x01" + b"\x01" * 33,
    "unknown state": b"\x01" + b"X\x00\x00\x00\x00\x00\x01\x01" + b"\x01" * 33,
    "cut in the timeline": b"\x01" + b"C\x05\x00\x00\x00\x00\x01\x01" + b"\x01" * 33 + b"\x00" * 3,
    "cut in the size": b"\x01" + b"C\x0d\x00\x00\x00\x00\x01\x01" + b"\x01" * 33 + b"\x00" * 7,
    "unknown flag": b"\x01" + b"C\x80\x00\x00\x00\x00\x01\x01" + b"\x01" * 33,
    "no fingerprint": b"\x01" + b"C\x00\x00\x00\x00\x00\x01\x00" + b"answer",
    "cut in the fingerprints": b"\x01" + b"C\x00\x00\x00\x00\x00\x01\x02" + b"\x01" * 65,
    "cut in the tail": b"\x01" + b"I\x00\x00\x00\x00\x00\x01\x01" + b"\x01" * 33 + b"\x00" * 21,
    "too long": b"\x01" + b"R\x00\x00\x00\x00\x00\x01\x01" + b"\x01" * 33 + b"\x00" * 23,
}


@pytest.mark.parametrize("garbage", [*GARBAGE, "a list"])
async def test_what_is_no_record_counts_as_absent(cache: RedisCache, raw: redis.asyncio.Redis, garbage: str) -> None:
    async def put() -> bytes:
        scope = new_scope()
        if garbage == "a list":
            await raw.rpush(key_of(scope), "x")
        else:
            await raw.set(key_of(scope), GARBAGE[garbage])
        return scope

    counted = metric("orchestrator_idempotency_unreadable_records_total")
    assert await release(cache, await put()) is Released.ABSENT
    assert await extend(cache, await put()) is Extended.ABSENT
    assert await cache.get([GetItem(await put())]) == [None]
    assert await complete(cache, await put()) is Completed.FENCED
    scope = await put()
    assert await complete(cache, scope, durable=True) is Completed.RESTORED
    assert await claim(cache, scope, OTHER) == Replay(0, b"answer", True)
    scope = await put()
    assert await claim(cache, scope) == Acquired(1)
    assert isinstance(await claim(cache, scope, OTHER), Busy)
    assert TTL - 5_000 < await raw.pttl(key_of(scope)) <= TTL
    assert metric("orchestrator_idempotency_unreadable_records_total") == counted + 6


async def test_bytes_of_any_kind_never_stop_a_step(cache: RedisCache, raw: redis.asyncio.Redis) -> None:
    chance = random.Random(7)
    valid = new_scope()
    await claim(cache, valid)
    record = await raw.get(key_of(valid))
    assert isinstance(record, bytes)
    for _ in range(300):
        scope, bent = new_scope(), bytearray(record)
        for _ in range(chance.randrange(1, 4)):
            bent[chance.randrange(len(bent))] = chance.randrange(256)
        await raw.set(key_of(scope), bytes(bent[: chance.choice([len(bent), chance.randrange(len(bent))])]))
        await claim(cache, scope, OTHER)
        await complete(cache, scope, OTHER)
        await release(cache, scope, OTHER)
        await extend(cache, scope, OTHER)
        await cache.get([GetItem(scope)])
        assert await complete(cache, scope, OTHER, durable=True) in {DONE, RESTORED, ALREADY, DIFFERS}


async def test_outcomes_are_counted(cache: Cache) -> None:
    def count(step: str, outcome: str) -> float:
        return metric("orchestrator_idempotency_outcomes_total", step=step, outcome=outcome)

    names = [
        ("claim", "acquired"),
        ("claim", "busy"),
        ("complete", "completed"),
        ("claim", "replay"),
        ("release", "already"),
    ]
    before = [count(*name) for name in names]
    scope = new_scope()
    await cache.claim([claim_item(scope, OWNER), claim_item(scope, OTHER), claim_item(scope, THIRD)])
    await complete(cache, scope)
    await claim(cache, scope)
    await release(cache, scope)
    assert [count(*name) - start for name, start in zip(names, before, strict=True)] == [1, 2, 1, 1, 1]


# --- when Redis does not ----------------------------------------------------------------------------------------------


async def test_flushed_records_are_absent(own: RedisCache, admin: redis.asyncio.Redis) -> None:
    scope = new_scope()
    assert await claim(own, scope) == Acquired(1)
    await admin.flushall()
    assert await complete(own, scope) is Completed.FENCED
    assert await complete(own, scope, durable=True) is Completed.RESTORED
    assert await claim(own, scope, OTHER) == Replay(0, b"answer", True)


async def test_flushed_scripts_are_loaded_again(own: RedisCache, admin: redis.asyncio.Redis) -> None:
    counted = metric("orchestrator_redis_errors_total", cause="noscript")
    scope = new_scope()
    steps = (claim(own, scope), extend(own, scope), complete(own, scope), release(own, scope))
    for step in steps:
        await admin.script_flush()
        await step
    assert own.ready
    assert metric("orchestrator_redis_errors_total", cause="noscript") == counted + len(steps)


async def test_ended_connections_are_not_noticed_by_callers(own: RedisCache, admin: redis.asyncio.Redis) -> None:
    scopes = [new_scope() for _ in range(20)]
    await asyncio.gather(*(claim(own, scope) for scope in scopes))
    await admin.client_kill_filter(_type="normal", skipme=True)
    assert await asyncio.gather(*(claim(own, scope) for scope in scopes)) == [Acquired(1)] * 20
    assert own.ready


async def command(admin: redis.asyncio.Redis, *words: str) -> None:
    await admin.execute_command(*words)  # type: ignore[no-untyped-call]


async def set_oom(admin: redis.asyncio.Redis) -> None:
    await admin.config_set("maxmemory", 1)


async def set_readonly(admin: redis.asyncio.Redis) -> None:
    await command(admin, "REPLICAOF", "127.0.0.1", "1")


async def set_noreplicas(admin: redis.asyncio.Redis) -> None:
    await admin.config_set("min-replicas-to-write", 1)


async def set_evicting(admin: redis.asyncio.Redis) -> None:
    await admin.config_set("maxmemory-policy", "allkeys-lru")


async def set_well(admin: redis.asyncio.Redis) -> None:
    await admin.config_set("maxmemory", 0)
    await command(admin, "REPLICAOF", "NO", "ONE")
    await admin.config_set("min-replicas-to-write", 0)
    await admin.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize("cause,worsen", [
    ("oom", set_oom), ("readonly", set_readonly), ("noreplicas", set_noreplicas), ("eviction", set_evicting),
])  # fmt: skip
async def test_a_redis_that_must_not_be_used(
    server: Valkey, admin: redis.asyncio.Redis, cause: str, worsen: Callable[[redis.asyncio.Redis], Awaitable[None]]
) -> None:
    changes: list[bool] = []
    async with cache_on(server.url, timeout=1, on_ready=noting(changes)) as cache:
        counted = metric("orchestrator_redis_errors_total", cause=cause)
        with capture_logs() as logs:
            await worsen(admin)
            if cause != "eviction":
                assert await refused(cache) == cause
                assert metric("orchestrator_redis_errors_total", cause=cause) >= counted + 1
            await until(lambda: not cache.ready)
            assert await refused(cache) == cause
            assert metric("orchestrator_redis_up") == 0
            await until(lambda: changes == [True, False])
            await set_well(admin)
            await until(lambda: cache.ready)
        assert await claim(cache, new_scope()) == Acquired(1)
        assert metric("orchestrator_redis_up") == 1
        assert changes == [True, False, True]
        assert [line["event"] for line in logs] == ["redis_away", "redis_ready"]
        assert logs[0]["cause"] == cause
        if cause == "eviction":
            assert logs[0]["detail"] == "maxmemory-policy is allkeys-lru, it must be noeviction"


async def test_an_evicting_redis_is_not_used_from_the_start(server: Valkey, admin: redis.asyncio.Redis) -> None:
    await set_evicting(admin)
    async with cache_on(server.url) as cache:
        assert not cache.ready
        assert await refused(cache) == "eviction"
        await set_well(admin)
        await until(lambda: cache.ready)


async def test_a_hidden_policy_is_trusted_with_a_warning(server: Valkey, admin: redis.asyncio.Redis) -> None:
    await command(admin, "ACL", "SETUSER", "app", "on", ">pw", "~idem:*", "+@all", "-info", "-config")
    with capture_logs() as logs:
        async with cache_on(f"redis://app:pw@{server.url.rpartition('@')[2]}", timeout=5) as cache:
            assert cache.ready
            assert await claim(cache, new_scope()) == Acquired(1)
            await asyncio.sleep(1.2)
            assert cache.ready
    assert [line["event"] for line in logs] == ["redis_policy_hidden", "redis_ready"]


async def test_a_wrong_password_is_a_cause_of_its_own(server: Valkey) -> None:
    async with cache_on(server.url.replace("@", "wrong@"), timeout=5) as cache:
        assert await refused(cache) == "auth"


async def test_a_script_that_blocks_redis(own: RedisCache, admin: redis.asyncio.Redis) -> None:
    await admin.config_set("lua-time-limit", 50)
    blocker = asyncio.create_task(command(admin, "EVAL", "while true do end", "0"))
    with pytest.raises(Unavailable):
        while True:  # until the blocker has arrived
            await claim(own, new_scope())
    assert await refused(own) in {"busy", "timeout"}
    await until(lambda: not own.ready)
    await admin.script_kill()
    with pytest.raises(ResponseError):
        await blocker
    await until(lambda: own.ready)
    assert await claim(own, new_scope()) == Acquired(1)


async def test_a_stopped_redis_costs_one_timeout_and_comes_back(server: Valkey) -> None:
    async with cache_on(server.url, timeout=0.2) as cache:
        await claim(cache, new_scope())
        server.child.send(signal.SIGSTOP)
        assert await claim(cache, new_scope()) == Away()
        assert await claim(cache, new_scope()) == Away()  # in doubt: not asked again until a probe has told
        await until(lambda: not cache.ready)
        async with asyncio.timeout(10):  # nobody waits again: that would take 20 s
            for _ in range(100):
                assert await refused(cache) == "timeout"
        await asyncio.sleep(1.5)
        assert not cache.ready
        server.child.send(signal.SIGCONT)
        await until(lambda: cache.ready)
        assert await claim(cache, new_scope()) == Acquired(1)


async def test_a_killed_redis_keeps_its_records(own: RedisCache, server: Valkey) -> None:
    """kill -9 under calls: each fails within its time or is answered; what was acknowledged is there afterwards."""
    done: list[bytes] = []
    failures: Counter[str] = Counter()
    running = True

    async def work() -> None:
        while running:
            scope = new_scope()
            try:
                await claim(own, scope)
                completed = await complete(own, scope, answer=scope, durable=True)
            except Unavailable as error:
                failures[error.metadata["cause"]] += 1
                await asyncio.sleep(0.01)
            else:
                if completed is not Completed.AWAY:
                    done.append(scope)

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for _ in range(3):
        enough = len(done) + 40
        await until(lambda enough=enough: len(done) > enough)  # type: ignore[misc]
        server.child.kill()
        await until(lambda: not own.ready)
        await asyncio.sleep(0.3)
        server.start()
        await until(lambda: own.ready)
    running = False
    await asyncio.gather(*workers)
    assert failures.keys() <= {"refused", "connection", "loading", "timeout"}
    assert len(done) > 100
    async with cache_on(server.url, timeout=5) as patient:
        for scope in done:
            assert await claim(patient, scope, THIRD) == Replay(0, scope, True)


async def test_one_outage_is_one_warning_whatever_its_cause_becomes(server: Valkey, admin: redis.asyncio.Redis) -> None:
    async with cache_on(server.url, timeout=1) as cache:
        with capture_logs() as logs:
            await admin.config_set("maxmemory", 1)
            await until(lambda: not cache.ready)
            server.child.kill()
            await until(lambda: len(logs) > 1)
        assert [(line["event"], line["log_level"]) for line in logs[:2]] == [
            ("redis_away", "warning"),
            ("redis_away", "info"),
        ]
        assert logs[0]["cause"] == "oom" != logs[1]["cause"]


async def test_redis_away_at_the_start(server: Valkey) -> None:
    server.child.kill()
    changes: list[bool] = []
    async with cache_on(server.url, timeout=1, on_ready=noting(changes)) as cache:
        assert await refused(cache) == "refused"
        await asyncio.sleep(0.3)
        assert changes == []
        server.start()
        await until(lambda: cache.ready)
        assert await claim(cache, new_scope()) == Acquired(1)
    assert changes == [True]


async def test_a_silent_address_costs_no_more_than_the_timeout() -> None:
    """A listener that never accepts, as behind a black hole."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        async with asyncio.timeout(60), cache_on(f"redis://127.0.0.1:{listener.getsockname()[1]}") as cache:
            assert await refused(cache) == "timeout"


async def test_a_defect_fails_its_call_alone(own: RedisCache) -> None:
    """An error that is no state of Redis must not take the service out of use."""
    with capture_logs() as logs, pytest.raises(Unavailable) as caught:
        await claim(own, new_scope(), ttl=0)
    assert caught.value.metadata == {"cause": "defect"}
    assert own.ready
    assert [line["event"] for line in logs] == ["redis_call_failed"]
    assert await claim(own, new_scope()) == Acquired(1)
