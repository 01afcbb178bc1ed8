"""The near-cache: it answers the same request only, in time, of this timeline, and never grows past its bytes."""

from __future__ import annotations

import random
import sys
from typing import NamedTuple

import pytest
from google.protobuf.struct_pb2 import Struct

from controller_svc.replays import OVERHEAD, NearKey, Replays
from tests.client import struct

MINE = struct({"a": 1}).SerializeToString() + struct({"b": "x"}).SerializeToString()
ENCODED_ANEW = struct({"b": "x"}).SerializeToString() + struct({"a": 1}).SerializeToString()
OTHER = struct({"a": 1, "b": "y"}).SerializeToString()


def key(number: int, principal: bytes = b"p" * 32, method: str = "/a.Service/Method") -> NearKey:
    return NearKey(principal, method, f"{number:030}")


ENTRY = OVERHEAD + len(key(0).idempotency_key) + len(MINE)
"""What an entry without an answer counts."""


def put(replays: Replays, number: int, answer: bytes = b"", *, expires: float = 100, timeline: int = 0) -> None:
    replays.put(key(number), MINE, answer, expires=expires, timeline=timeline)


def get(replays: Replays, what: NearKey, raw: bytes, now: float = 0) -> bytes | None:
    return replays.get(what, raw, Struct.FromString(raw), now)


def kept(replays: Replays, number: int, now: float = 0) -> bytes | None:
    return get(replays, key(number), MINE, now)


def test_the_same_request_is_answered_and_another_is_not() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"one")
    put(replays, 2, b"two")
    assert get(replays, key(1), MINE) == get(replays, key(1), ENCODED_ANEW) == b"one"
    assert get(replays, key(1), OTHER) is None
    assert get(replays, key(3), MINE) is None
    assert kept(replays, 1) == b"one"
    assert kept(replays, 2) == b"two"


def test_another_caller_or_method_is_not_answered() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"one")
    assert get(replays, key(1, principal=b"q" * 32), MINE) is None
    assert get(replays, key(1, method="/a.Service/Other"), MINE) is None


def test_an_empty_answer_is_an_answer() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"")
    assert kept(replays, 1) == b""


def test_an_answer_ends_at_its_time_and_frees_its_bytes() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"one", expires=50)
    assert kept(replays, 1, now=49.999) == b"one"
    assert get(replays, key(1), OTHER, 50) is None
    assert (replays.bytes, len(replays)) == (0, 0)
    assert kept(replays, 1, now=49) is None


def test_the_newest_put_counts() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"a longer one", expires=50)
    put(replays, 1, b"one", expires=60)
    assert kept(replays, 1, now=55) == b"one"
    assert (replays.bytes, len(replays)) == (3 + ENTRY, 1)


def test_what_was_not_used_for_longest_goes_first() -> None:
    replays = Replays(3 * (10 + ENTRY))
    for number in (1, 2, 3):
        put(replays, number, b"0123456789")
    assert kept(replays, 1) is not None
    assert get(replays, key(2), OTHER) is None  # asking for something else is no use of it
    put(replays, 4, b"0123456789")
    assert [kept(replays, number) is not None for number in (1, 2, 3, 4)] == [True, False, True, True]
    put(replays, 1, b"0123456789")
    put(replays, 5, b"0123456789" * 2)
    assert [kept(replays, number) is not None for number in (1, 3, 4, 5)] == [True, False, False, True]


def test_an_answer_that_does_not_fit_pushes_nothing_out() -> None:
    replays = Replays(2 * ENTRY)
    put(replays, 1, b"one")
    put(replays, 2, b"x" * (ENTRY + 1))
    assert (kept(replays, 1), kept(replays, 2)) == (b"one", None)
    put(replays, 2, b"x" * ENTRY)
    assert (kept(replays, 1), kept(replays, 2)) == (None, b"x" * ENTRY)
    nothing = Replays(0)
    put(nothing, 1)
    assert len(nothing) == 0


def test_a_new_timeline_forgets_all_and_takes_no_answers_of_the_old_one() -> None:
    replays = Replays(10_000)
    put(replays, 1, b"before any was known")
    replays.turn_to(7)
    assert (kept(replays, 1), replays.bytes) == (None, 0)
    put(replays, 1, b"seven", timeline=7)
    replays.turn_to(7)
    assert kept(replays, 1) == b"seven"
    put(replays, 2, timeline=8)
    assert kept(replays, 2) is None
    replays.turn_to(8)
    put(replays, 1, b"lost in the failover", timeline=7)
    assert kept(replays, 1) is None
    replays.turn_to(3)
    put(replays, 1, b"another server", timeline=3)
    assert kept(replays, 1) == b"another server"


class Kept(NamedTuple):
    answer: bytes
    expires: float


@pytest.mark.parametrize("seed", range(20))
def test_it_never_answers_what_was_not_put_nor_holds_more_than_it_may(seed: int) -> None:
    chance = random.Random(seed)
    replays = Replays(20 * ENTRY)
    put_last: dict[int, Kept] = {}
    hits = 0
    for now in range(3000):
        number = chance.randrange(40)
        if chance.random() < 0.4:
            answer = chance.randbytes(chance.randrange(2 * ENTRY))
            put_last[number] = Kept(answer, now + chance.randrange(1, 200))
            put(replays, number, answer, expires=put_last[number].expires)
        else:
            answer_now = kept(replays, number, now)
            if answer_now is not None:
                assert answer_now == put_last[number].answer and now < put_last[number].expires
                hits += 1
        assert 0 <= replays.bytes <= 20 * ENTRY
    assert hits > 100
    for number in range(40):
        kept(replays, number, now=10_000)
    assert (replays.bytes, len(replays)) == (0, 0)


def test_the_overhead_covers_what_python_needs() -> None:
    """Else the bound would be one on paper only."""
    replays = Replays(1 << 30)
    put(replays, 1, b"")
    entry = replays._entries[key(1)]
    parts = (key(1), key(1).principal, entry.expires, entry)
    headers = 2 * sys.getsizeof(b"") + sys.getsizeof("")  # of request and answer, and of the key
    of_table = (sys.getsizeof(filled(10_000)._entries) - sys.getsizeof(filled(0)._entries)) / 10_000
    assert headers + sum(map(sys.getsizeof, parts)) + of_table <= OVERHEAD


def filled(count: int) -> Replays:
    replays = Replays(1 << 30)
    for number in range(count):
        put(replays, number)
    return replays
