"""Columns of a group as Postgres arrays in binary form: packed here in one step each, where psycopg adapts value by value."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from struct import pack
from typing import TYPE_CHECKING, Any, ClassVar

from psycopg.adapt import Dumper
from psycopg.pq import Format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg.abc import AdaptContext

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NULL = b"\xff\xff\xff\xff"


class Array(bytes):
    """A one-dimensional array in Postgres' binary form. Each subclass is one array type; `type` is its name in SQL."""

    __slots__ = ()
    type: ClassVar[str]
    oid: ClassVar[int]
    element_oid: ClassVar[int]
    encode: ClassVar[Callable[[Any], bytes]]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Array:
        """The values, None for NULL, as an array. Raises ValueError or UnicodeError for what the type cannot hold."""
        encode = cls.encode
        parts = []
        nulls = 0
        for value in values:
            if value is None:
                nulls = 1
                parts.append(_NULL)
            else:
                data = encode(value)
                parts.append(pack(">i", len(data)))
                parts.append(data)
        return cls(pack(">iiIii", 1, nulls, cls.element_oid, len(values), 1) + b"".join(parts))


def _text(value: str) -> bytes:
    return value.encode()


def _time(value: datetime) -> bytes:
    return pack(">q", (value - EPOCH) // _MICROSECOND)


def _json(value: Any) -> bytes:
    return b"\x01" + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Texts(Array):
    type, oid, element_oid, encode = "text[]", 1009, 25, staticmethod(_text)


class Uuids(Array):
    type, oid, element_oid, encode = "uuid[]", 2951, 2950, staticmethod(lambda value: value.bytes)


class Times(Array):
    type, oid, element_oid, encode = "timestamptz[]", 1185, 1184, staticmethod(_time)


class Jsons(Array):
    type, oid, element_oid, encode = "jsonb[]", 3807, 3802, staticmethod(_json)


class Longs(Array):
    type, oid, element_oid, encode = "bigint[]", 1016, 20, staticmethod(lambda value: pack(">q", value))


class Ints(Array):
    type, oid, element_oid, encode = "int[]", 1007, 23, staticmethod(lambda value: pack(">i", value))


class Blobs(Array):
    type, oid, element_oid, encode = "bytea[]", 1001, 17, staticmethod(lambda value: value)


TYPES: tuple[type[Array], ...] = (Texts, Uuids, Times, Jsons, Longs, Ints, Blobs)


def register(context: AdaptContext) -> None:
    """Teaches a connection to send the arrays of this module as they are."""
    for array in TYPES:
        dumper = type(f"{array.__name__}Dumper", (_ArrayDumper,), {"oid": array.oid})
        context.adapters.register_dumper(array, dumper)


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: bytes) -> bytes:
        return obj
