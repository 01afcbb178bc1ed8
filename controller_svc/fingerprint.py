"""Fingerprints: what tells whether two calls with one idempotency key are the same request.

A fingerprint is a kind and a SHA-256; they travel packed, one behind the other, as the records of idempotency_svc hold
them. Two requests are the same when any kind is equal on both sides. From the first release on a kind is never changed,
only followed by another.

- Kind 1: the deterministic re-serialisation. A field that only one side knows moves its bytes, so a deployment that
  adds one makes it differ. No longer sent; guards that hold nothing else are still compared.
- Kind 2: the bytes as received. What a client sends again unchanged is the same under every version of the protos.
- Kind 3: the content, whatever its encoding: maps in any order, a field left at its default or not known at all.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from struct import Struct, pack, unpack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from orchestrator.options.v1 import options_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    Encode = Callable[[Any], bytes]

NO_STRUCTS: Mapping[str, dict[str, Any]] = MappingProxyType({})
"""Of a request whose Structs, if it has any, were not converted yet: they are walked here."""

PACKED = 33
"""Bytes of one packed fingerprint: the kind in one, the digest in 32."""


def fingerprints_of(raw: bytes, request: Message, structs: Mapping[str, dict[str, Any]] = NO_STRUCTS) -> bytes:
    """The packed fingerprints of a request: `raw` as received, `request` as parsed of it.

    Kind 3 leaves out the fields that the proto marks `fingerprint_exclude`: a retry may change them. `structs`: all
    that fields of type Struct hold, by name, where convert.struct_to_dict was asked before; it spares another walk.
    """
    content = _CONTENT.message(request, structs)
    return b"\2" + hashlib.sha256(raw).digest() + b"\3" + hashlib.sha256(content).digest()


def same_request(stored: bytes, mine: bytes) -> bool:
    """Whether any kind is equal in both packed fingerprints; without a common kind nothing says that they are."""
    return stored == mine or not _split(stored).isdisjoint(_split(mine))


def earlier_fingerprint_of(request: Message) -> bytes:
    """The bare digest of kind 1, as a guard of an earlier version holds it, without a kind before it."""
    excluded = _excluded(request.DESCRIPTOR)
    if excluded:
        whole, request = request, type(request)()
        request.CopyFrom(whole)
        for name in excluded:
            request.ClearField(name)
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def kinds_of(stored: bytes) -> list[int]:
    """Which kinds a guard holds: packed ones, or the bare digest of an earlier version."""
    return [1] if len(stored) == PACKED - 1 else list(stored[::PACKED])


def _split(packed: bytes) -> set[bytes]:
    return {packed[at : at + PACKED] for at in range(0, len(packed), PACKED)}


@cache
def _excluded(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(field.name for field in descriptor.fields if _is_excluded(field))


def _is_excluded(field: FieldDescriptor) -> bool:
    return field.GetOptions().Extensions[options_pb2.fingerprint_exclude]


# -- the content, kind 3 --
#
# A message is its records in the order of their field numbers: tag 4 (number and wire type, as on the wire) · value 8,
# or tag 4 · length 4 · bytes. A field of a scalar type or a string is encoded alike whether its number is known or not.

_VARINT, _FIXED64, _BYTES, _GROUP, _FIXED32 = 0, 1, 2, 3, 5
_scalar = Struct(">IQ").pack
_head = Struct(">II").pack
_ALL_BITS = (1 << 64) - 1
_BILLION = 1_000_000_000

_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
    FieldDescriptor.TYPE_GROUP: _GROUP,
}
"""All others are varints."""


class _Content(dict[FieldDescriptor, "Encode"]):
    """Encodes messages by their descriptors. How to encode a field is worked out when it is first met, and kept."""

    def __init__(self, of_any: _Content | None) -> None:
        """`of_any` encodes what an Any packs; None takes it as plain bytes."""
        self._of_any = of_any

    def message(self, message: Message, structs: Mapping[str, dict[str, Any]] = NO_STRUCTS) -> bytes:
        """All its set fields. Those without presence count as set when they are not at their default."""
        fields = message.ListFields()
        records = [self[field](structs.get(field.name, value)) for field, value in fields]
        unknown = UnknownFieldSet(message)
        if not unknown:
            return b"".join(records)
        numbers = [field.number for field, _ in fields]
        return _in_order([*zip(numbers, records, strict=True), *_unknown(unknown)])

    def __missing__(self, field: FieldDescriptor) -> Encode:
        encode = self[field] = self._field(field)
        return encode

    def _field(self, field: FieldDescriptor) -> Encode:
        if _is_excluded(field):
            return lambda value: b""
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            return self._map(field)
        one = self._one(field)
        if field.is_repeated:
            return lambda values: b"".join(map(one, values))
        if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT) and not field.has_presence:
            return lambda value: one(value) if value else b""  # -0.0 is no default on the wire
        return one

    def _one(self, field: FieldDescriptor) -> Encode:
        """Encodes one value of the field: its only one, an element, a map's key or value."""
        wire_type = _WIRE_TYPES.get(field.type, _VARINT)
        tag = field.number << 3 | wire_type
        if field.message_type is not None:
            name = field.message_type.full_name
            body = self._any if name == "google.protobuf.Any" else _BY_MEANING.get(name, self.message)
            return lambda value: _with_head(tag, body(value))
        if wire_type == _BYTES:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return lambda value: _head(tag, len(value)) + value
            return lambda value: _with_head(tag, value.encode())
        if field.type == FieldDescriptor.TYPE_DOUBLE:
            return lambda value: _scalar(tag, unpack(">Q", pack(">d", _plain(value)))[0])
        if field.type == FieldDescriptor.TYPE_FLOAT:
            return lambda value: _scalar(tag, unpack(">I", pack(">f", _plain(value)))[0])
        if field.type in (FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SINT64):
            return lambda value: _scalar(tag, value << 1 if value >= 0 else ~(value << 1))
        bits = (1 << 32) - 1 if wire_type == _FIXED32 else _ALL_BITS
        return lambda value: _scalar(tag, value & bits)

    def _map(self, field: FieldDescriptor) -> Encode:
        tag = field.number << 3 | _BYTES
        assert field.message_type is not None
        of_key, of_value = (self._one(part) for part in field.message_type.fields)

        def encode(entries: Any) -> bytes:
            pairs = [of_key(key) + of_value(entries[key]) for key in entries]
            return b"".join([_with_head(tag, pair) for pair in sorted(pairs)])

        return encode

    def _any(self, message: Any) -> bytes:
        """An Any: its type and the content of what it packs, or the bytes where the type is unknown.

        An Any within is not opened, so that nesting costs nothing.
        """
        body: bytes = message.value
        if self._of_any is not None:
            try:
                kind = message.DESCRIPTOR.file.pool.FindMessageTypeByName(message.type_url.rpartition("/")[2])
                body = self._of_any.message(GetMessageClass(kind).FromString(body))
            except (KeyError, DecodeError):
                pass
        return _with_head(1, message.type_url.encode()) + _with_head(2, body)


_CONTENT = _Content(_Content(None))


# Types that never change are encoded by what they mean. A field in them that is not theirs means nothing.


def _json(message: Any) -> bytes:
    """A Struct, Value or ListValue, or what a Struct holds: its JSON text with sorted keys.

    Not its serialisation: in which order that sorts keys differs between implementations of the library.
    """
    values = message if isinstance(message, dict) else _JSON_OF[message.DESCRIPTOR.name](message)
    return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)


def json_number(number: float) -> int | float:
    """A finite number of a Value as JSON has it: a whole one below 2^53 is an int. One zero only."""
    return int(number) if number.is_integer() and -_SAFE_INTEGER < number < _SAFE_INTEGER else number


_SAFE_INTEGER = float(2**53)

# What JSON cannot hold is an int that no number of a Value becomes.
_NO_KIND = 2**60
_NOT_FINITE = {"nan": 2**60 + 1, "inf": 2**60 + 2, "-inf": 2**60 + 3}


def _json_of_struct(struct: Any) -> dict[str, Any]:
    fields = struct.fields
    return {key: _json_of_value(fields[key]) for key in fields}


def _json_of_list(values: Any) -> list[Any]:
    return [_json_of_value(value) for value in values.values]


def _json_of_value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return value.string_value
    if kind == "number_value":
        number = value.number_value
        return json_number(number) if math.isfinite(number) else _NOT_FINITE[str(number)]
    if kind == "struct_value":
        return _json_of_struct(value.struct_value)
    if kind == "list_value":
        return _json_of_list(value.list_value)
    if kind == "bool_value":
        return value.bool_value
    return None if kind == "null_value" else _NO_KIND


_JSON_OF: dict[str, Callable[[Any], Any]] = {
    "Struct": _json_of_struct,
    "Value": _json_of_value,
    "ListValue": _json_of_list,
}


def _time(message: Any) -> bytes:
    """A Timestamp or Duration: its nanoseconds."""
    return int(message.seconds * _BILLION + message.nanos).to_bytes(12, "big", signed=True)


def _mask(message: Any) -> bytes:
    """A FieldMask: its paths as a set. A path beside its parent stays, since both together may mean something."""
    return b"".join([_with_head(1, path.encode()) for path in sorted(set(message.paths))])


_BY_MEANING: dict[str, Encode] = {
    "google.protobuf.Struct": _json,
    "google.protobuf.Value": _json,
    "google.protobuf.ListValue": _json,
    "google.protobuf.Timestamp": _time,
    "google.protobuf.Duration": _time,
    "google.protobuf.FieldMask": _mask,
}


def _plain(number: float) -> float:
    """The number with one zero and one NaN."""
    return math.nan if number != number else number + 0.0  # noqa: PLR0124 - only NaN differs from itself


def _unknown(fields: Any) -> Iterable[tuple[int, bytes]]:
    for field in fields:
        tag = field.field_number << 3 | field.wire_type
        if field.wire_type == _BYTES:
            yield field.field_number, _with_head(tag, field.data)
        elif field.wire_type == _GROUP:
            yield field.field_number, _with_head(tag, _in_order(_unknown(field.data)))
        else:
            yield field.field_number, _scalar(tag, field.data)


def _in_order(records: Iterable[tuple[int, bytes]]) -> bytes:
    """By number; records of one number stay in their order."""
    return b"".join([record for _, record in sorted(records, key=lambda record: record[0])])


def _with_head(tag: int, body: bytes) -> bytes:
    return _head(tag, len(body)) + body
