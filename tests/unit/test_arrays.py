"""Columns as Postgres arrays: what each type can hold, and what it refuses for its own command alone."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from controller_svc.store.arrays import Array, Blobs, Ints, Jsons, Longs, Spans, Texts, Times, Uuids

GOOD: list[tuple[type[Array], Any, bytes]] = [
    (Texts, "é", b"\xc3\xa9"),
    (Uuids, UUID(int=1), b"\0" * 15 + b"\1"),
    (Times, datetime(2000, 1, 1, 0, 0, 1, tzinfo=UTC), struct.pack(">q", 1_000_000)),
    (Jsons, {"a": [1, None]}, b'\x01{"a":[1,null]}'),
    (Longs, -(2**63), b"\x80" + b"\0" * 7),
    (Spans, timedelta(microseconds=3), struct.pack(">q", 3)),
    (Ints, 2**31 - 1, b"\x7f\xff\xff\xff"),
    (Blobs, b"\0\xff", b"\0\xff"),
]
BAD: list[tuple[type[Array], Any]] = [
    (Texts, "\ud800"),
    (Jsons, {"a": "\ud800"}),
    (Jsons, 2**64),
    (Longs, 2**63),
    (Ints, 2**31),
    (Ints, "1"),
]


def elements(array: Array) -> list[bytes | None]:
    """The values as the server reads them."""
    dimensions, flags, oid, count, first = struct.unpack(">iiIii", array[:20])
    assert (dimensions, flags, oid, first) == (1, 1, array.element_oid, 1)
    at, found = 20, []
    for _ in range(count):
        (length,) = struct.unpack(">i", array[at : at + 4])
        found.append(None if length < 0 else bytes(array[at + 4 : at + 4 + length]))
        at += 4 + max(length, 0)
    assert at == len(array)
    return found


@pytest.mark.parametrize(("kind", "value", "encoded"), GOOD)
def test_values_and_nulls_in_every_place(kind: type[Array], value: Any, encoded: bytes) -> None:
    for values in ([value], [None], [value] * 3, [None] * 3, [value, None], [None, value], [None, value, None]):
        expected = [None if one is None else encoded for one in values]
        assert elements(kind.of(values)) == expected


@pytest.mark.parametrize(("kind", "value"), BAD)
def test_what_a_type_cannot_hold_is_a_value_error(kind: type[Array], value: Any) -> None:
    """Which fails the one command that has it (store/database.py, is_bad_data)."""
    good = next(one for of, one, _ in GOOD if of is kind)
    for values in ([value], [good, value], [value, value]):
        with pytest.raises(ValueError):  # a UnicodeError is one too
            kind.of(values)


def test_true_is_not_one() -> None:
    assert elements(Jsons.of([1, True, 1])) == [b"\x011", b"\x01true", b"\x011"]
