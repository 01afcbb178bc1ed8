"""Columns of a group as Postgres arrays in binary form, packed in one step where psycopg adapts value by value."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from struct import Struct
from struct import error as struct_error
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types.json import set_json_dumps, set_json_loads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from psycopg.abc import AdaptContext

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NULL = b"\xff\xff\xff\xff"
_head = Struct(">iiIii").pack
_length = Struct(">i").pack


class Array(bytes):
    """A one-dimensional array in Postgres' binary form. Each subclass is one array type; `type` is its name in SQL."""

    __slots__ = ()
    type: ClassVar[str]
    oid: ClassVar[int]
    element_oid: ClassVar[int]
    equal_is_same: ClassVar[bool] = True
    """Whether values that are equal in Python are encoded the same."""

    @staticmethod
    def element(value: Any) -> bytes:
        """One value's binary form, behind its length in four bytes."""
        raise NotImplementedError

    @classmethod
    def of(cls, values: Sequence[Any]) -> Array:
        """The values, None for NULL, as an array. Raises ValueError or UnicodeError for what the type cannot hold."""
        element, count, first = cls.element, len(values), values[0]
        try:
            # Most columns of a group have one value throughout: tenant, method, state, no end time.
            if (first is None or cls.equal_is_same) and first == values[-1] and values.count(first) == count:
                elements = (_NULL if first is None else element(first)) * count
            else:
                elements = b"".join([_NULL if value is None else element(value) for value in values])
        except struct_error as error:
            raise ValueError(f"{cls.type}: {error}") from error
        # One dimension; NULLs may be among them, which the server sees by itself; the type; how many; from index 1.
        return cls(_head(1, 1, cls.element_oid, count, 1) + elements)


class Texts(Array):
    """Text."""

    type, oid, element_oid = "text[]", 1009, 25

    @staticmethod
    def element(value: str) -> bytes:  # noqa: D102
        data = value.encode()
        return _length(len(data)) + data


class Uuids(Array):
    """UUIDs."""

    type, oid, element_oid = "uuid[]", 2951, 2950

    @staticmethod
    def element(value: UUID) -> bytes:  # noqa: D102
        return b"\0\0\0\x10" + value.bytes


class Longs(Array):
    """64-bit integers."""

    type, oid, element_oid = "bigint[]", 1016, 20
    element = staticmethod(partial(Struct(">iq").pack, 8))


class Times(Array):
    """Aware datetimes."""

    type, oid, element_oid = "timestamptz[]", 1185, 1184

    @staticmethod
    def element(value: datetime) -> bytes:  # noqa: D102
        return Longs.element((value - EPOCH) // _MICROSECOND)


class Jsons(Array):
    """What JSON can hold, with integers of 64 bits. NaN and infinity would become null: they end before, in convert."""

    type, oid, element_oid = "jsonb[]", 3807, 3802
    equal_is_same = False  # True == 1

    @staticmethod
    def element(value: Any) -> bytes:  # noqa: D102
        try:
            data = orjson.dumps(value)
        except orjson.JSONEncodeError as error:  # a TypeError, which nobody takes for a refused value
            raise ValueError(f"jsonb: {error}") from error
        return _length(len(data) + 1) + b"\x01" + data


class Spans(Longs):
    """Timedeltas, as their microseconds."""

    @staticmethod
    def element(value: timedelta) -> bytes:  # noqa: D102
        return Longs.element(value // _MICROSECOND)


class Ints(Array):
    """32-bit integers."""

    type, oid, element_oid = "int[]", 1007, 23
    element = staticmethod(partial(Struct(">ii").pack, 4))


class Blobs(Array):
    """Bytes."""

    type, oid, element_oid = "bytea[]", 1001, 17

    @staticmethod
    def element(value: bytes) -> bytes:  # noqa: D102
        return _length(len(value)) + value


TYPES: tuple[type[Array], ...] = (Texts, Uuids, Times, Jsons, Longs, Spans, Ints, Blobs)


def register(context: AdaptContext) -> None:
    """Teaches a connection to send the arrays of this module as they are, and to read JSON as it is written here."""
    set_json_dumps(orjson.dumps, context)
    set_json_loads(orjson.loads, context)
    for array in TYPES:
        dumper = type(f"{array.__name__}Dumper", (_ArrayDumper,), {"oid": array.oid})
        context.adapters.register_dumper(array, dumper)


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: bytes) -> bytes:
        return obj
