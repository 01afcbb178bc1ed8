"""Fingerprints: the same request however it is encoded and whichever version reads it, and no other one."""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc_tools  # type: ignore[import-untyped]
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

from controller_svc.convert import struct_to_dict
from controller_svc.fingerprint import earlier_fingerprint_of, fingerprints_of, same_request
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

ROOT = Path(__file__).parents[2]

PROTO = """
syntax = "proto3";
package test;
import "google/protobuf/any.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/field_mask.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/timestamp.proto";
import "orchestrator/options/v1/options.proto";
enum Colour { COLOUR_UNSPECIFIED = 0; COLOUR_RED = 1; COLOUR_BELOW = -3; }
message Whole {
  double a_double = 1; float a_float = 2; int32 an_int32 = 3; int64 an_int64 = 4; uint32 a_uint32 = 5;
  uint64 a_uint64 = 6; sint32 a_sint32 = 7; sint64 a_sint64 = 8; fixed32 a_fixed32 = 9; fixed64 a_fixed64 = 10;
  sfixed32 a_sfixed32 = 11; sfixed64 a_sfixed64 = 12; bool a_bool = 13; string a_string = 14; bytes some_bytes = 15;
  Colour a_colour = 16;
  optional double maybe_double = 17; optional int32 maybe_int = 18; optional string maybe_string = 19;
  repeated double doubles = 20; repeated int64 ints = 21; repeated sint32 sints = 22; repeated bool bools = 23;
  repeated string strings = 24; repeated bytes blobs = 25; repeated Colour colours = 26; repeated fixed32 fixeds = 27;
  map<string, string> texts = 30; map<int32, double> numbers = 31; map<bool, Whole> wholes = 32;
  map<sint64, bytes> by_sint = 33; map<string, google.protobuf.Struct> structs = 34;
  Whole child = 40; repeated Whole children = 41;
  oneof choice { string chosen_string = 42; uint32 chosen_number = 43; Whole chosen_whole = 44;
    double chosen_double = 45; }
  google.protobuf.Struct data = 50; google.protobuf.Value value = 51; google.protobuf.ListValue list = 52;
  google.protobuf.Timestamp time = 53; google.protobuf.Duration span = 54; google.protobuf.FieldMask mask = 55;
  google.protobuf.Any any = 56; repeated google.protobuf.Timestamp times = 57;
  string trace = 60 [(orchestrator.options.v1.fingerprint_exclude) = true];
  repeated Whole hints = 61 [(orchestrator.options.v1.fingerprint_exclude) = true];
  %s
}
"""
ADDED = """
  string new_string = 36; double new_double = 37; sint32 new_sint = 38; bool new_bool = 39;
  repeated string new_strings = 46; fixed32 new_fixed = 47; Colour new_colour = 48; bytes new_bytes = 49;
  float new_float = 58; int32 new_int = 59; optional int32 new_maybe = 62; Whole new_child = 63;
  map<string, string> new_texts = 64;
"""
FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
NOT_NUMBERS = [
    struct.unpack("<d", bits.to_bytes(8, "little"))[0] for bits in (0x7FF8 << 48, 0xFFF8 << 48, 0x7FF8 << 48 | 1)
]


@cache
def compiled(fields: str = "") -> type[Message]:
    """The class of Whole, with these fields besides, in a pool of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "whole.proto").write_text(PROTO % fields)
        includes = (folder, ROOT / "protos", Path(grpc_tools.__file__).parent / "_proto")
        arguments = [f"-I{include}" for include in includes]
        code = protoc.main(["", *arguments, "--include_imports", f"--descriptor_set_out={path / 'set'}", "whole.proto"])
        assert code == 0
        files = FileDescriptorSet.FromString((path / "set").read_bytes())
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("test.Whole"))


def whole(**fields: Any) -> Any:
    return compiled()(**fields)


def digests(message: Message, raw: bytes | None = None) -> tuple[bytes, bytes]:
    """(kind 2, kind 3) of a request."""
    packed = fingerprints_of(message.SerializeToString() if raw is None else raw, message)
    assert (len(packed), packed[0], packed[33]) == (66, 2, 3)
    return packed[1:33], packed[34:]


def content(message: Message) -> bytes:
    return digests(message)[1]


# -- random messages, and other encodings of them --


class Maker:
    """Random messages of any type; without what has several spellings, such as -0.0 and masks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return "".join(self.random.choices('ab\0é😀\x11\x7f,"', k=self.random.randrange(4)))

    def message(self, kind: type[Message], depth: int = 3) -> Any:
        made: Any = kind()
        for field in made.DESCRIPTOR.fields:
            if self.random.random() < 0.3 and (depth or field.message_type is None):
                self.fill(made, field, depth)
        return made

    def fill(self, made: Any, field: FieldDescriptor, depth: int = 3) -> None:
        kind = field.message_type
        times = self.random.randrange(1, 4)
        if kind is not None and kind.GetOptions().map_entry:
            of_key, of_value = kind.fields
            for _ in range(times):
                if of_value.message_type is not None:
                    getattr(made, field.name)[self.scalar(of_key)].CopyFrom(self.value(of_value, depth))
                else:
                    getattr(made, field.name)[self.scalar(of_key)] = self.scalar(of_value)
        elif field.is_repeated:
            getattr(made, field.name).extend([self.value(field, depth) for _ in range(times)])
        elif kind is not None:
            getattr(made, field.name).CopyFrom(self.value(field, depth))
        else:
            setattr(made, field.name, self.scalar(field))

    def value(self, field: FieldDescriptor, depth: int) -> Any:
        if field.message_type is None:
            return self.scalar(field)
        made: Any = GetMessageClass(field.message_type)()
        name = field.message_type.full_name
        if name == "google.protobuf.Struct":
            made.update({self.text(): self.json(2) for _ in range(self.random.randrange(5))})
        elif name == "google.protobuf.ListValue":
            made.extend([self.json(2) for _ in range(self.random.randrange(3))])
        elif name == "google.protobuf.Value":
            made.struct_value.update({self.text(): self.json(2)})
        elif name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
            made.seconds, made.nanos = self.random.randrange(10**9), self.random.randrange(10**9)
        elif name == "google.protobuf.FieldMask":
            made.paths.extend(sorted({self.text() for _ in range(self.random.randrange(4))}))
        elif name == "google.protobuf.Any":
            made.Pack(self.message(type(made), 0))
        else:
            made = self.message(type(made), depth - 1)
        return made

    def scalar(self, field: FieldDescriptor) -> Any:
        kinds = FieldDescriptor
        if field.cpp_type == kinds.CPPTYPE_STRING:
            return self.text().encode() if field.type == kinds.TYPE_BYTES else self.text()
        if field.cpp_type == kinds.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if field.cpp_type in FLOATS:
            return self.random.choice([0.0, 1.5, -2.0, math.inf, 2.0**100])
        if field.cpp_type == kinds.CPPTYPE_ENUM:
            return self.random.choice([0, 1, -3, 77])
        bits = 32 if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_UINT32) else 64
        least = 0 if field.cpp_type in (kinds.CPPTYPE_UINT32, kinds.CPPTYPE_UINT64) else -(2 ** (bits - 1))
        return self.random.choice([0, 1, least, least + 2**bits - 1, self.random.randrange(least, least + 2**bits)])

    def json(self, depth: int) -> Any:
        kinds: list[Any] = [None, True, False, 0.0, 1e300, float(self.random.randrange(99)), self.text()]
        if depth:
            kinds.append({self.text(): self.json(depth - 1) for _ in range(self.random.randrange(4))})
            kinds.append([self.json(depth - 1) for _ in range(self.random.randrange(3))])
        return self.random.choice(kinds)

    def encoded_anew(self, raw: bytes, kind: Descriptor) -> bytes:
        """Bytes that mean the same: fields and map entries in another order, numbers packed and padded otherwise."""
        queues: dict[Any, list[bytes]] = {}
        for index, (number, wire_type, payload) in enumerate(records(raw)):
            field = kind.fields_by_number.get(number)
            part = field.message_type if field is not None else None
            if part is not None:
                again = self.encoded_anew(payload, part)
                lane = (number, index) if part.GetOptions().map_entry else number
                queues.setdefault(lane, []).append(record(number, wire_type, again))
            elif field is not None and field.is_repeated and wire_type == 2 and field.cpp_type != field.CPPTYPE_STRING:
                pieces = list(packed(payload, field))
                while pieces:
                    count = self.random.randrange(1, len(pieces) + 1)
                    taken, pieces = pieces[:count], pieces[count:]
                    if count == 1 and self.random.random() < 0.5:
                        again = record(number, *taken[0])
                    else:
                        again = record(number, 2, b"".join(piece for _, piece in taken))
                    queues.setdefault(number, []).append(again)
            else:
                if field is not None and not field.is_repeated and self.random.random() < 0.3:
                    queues.setdefault(number, []).append(record(number, wire_type, payload))  # the last one wins
                if wire_type == 0 and len(payload) < 10:
                    payload = payload[:-1] + bytes([payload[-1] | 128, 0])
                queues.setdefault(number, []).append(record(number, wire_type, payload))
        out = b""
        while queues:
            lane = self.random.choice(list(queues))
            out += queues[lane].pop(0)
            if not queues[lane]:
                del queues[lane]
        return out


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if raw[at - 1] < 128:
            return value, at


def record(number: int, wire_type: int, payload: bytes) -> bytes:
    head = varint(number << 3 | wire_type)
    if wire_type == 3:
        return head + payload + varint(number << 3 | 4)
    return head + varint(len(payload)) + payload if wire_type == 2 else head + payload


def records(raw: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, wire type, payload) of each field on the wire."""
    at = 0
    while at < len(raw):
        tag, at = read_varint(raw, at)
        start = at
        if tag & 7 == 0:
            _, at = read_varint(raw, at)
        elif tag & 7 == 2:
            length, start = read_varint(raw, at)
            at = start + length
        else:
            at += {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, tag & 7, raw[start:at]


def packed(payload: bytes, field: FieldDescriptor) -> Iterator[tuple[int, bytes]]:
    """(wire type, payload) of each element of a packed field."""
    wire_type = {FieldDescriptor.TYPE_DOUBLE: 1, FieldDescriptor.TYPE_FIXED32: 5}.get(field.type, 0)
    at = 0
    while at < len(payload):
        end = {1: at + 8, 5: at + 4}[wire_type] if wire_type else read_varint(payload, at)[1]
        yield wire_type, payload[at:end]
        at = end


@pytest.mark.parametrize("seed", range(60))
def test_another_runtimes_encoding_is_the_same_content(seed: int) -> None:
    maker = Maker(seed)
    message = maker.message(compiled())
    raw = message.SerializeToString()
    for _ in range(5):
        again = maker.encoded_anew(raw, message.DESCRIPTOR)
        parsed = compiled().FromString(again)
        assert digests(parsed, again)[1] == digests(message, raw)[1]
        assert same_request(fingerprints_of(raw, message), fingerprints_of(again, parsed))


@pytest.mark.parametrize("seed", range(60))
def test_any_change_of_content_is_another_request(seed: int) -> None:
    """One field, somewhere inside, is cleared or gets another value."""
    maker = Maker(seed)
    message = maker.message(compiled())
    form = plain_form(message)
    for _ in range(15):
        changed: Any = compiled()()
        changed.CopyFrom(message)
        inner = changed
        while inner.HasField("child") and maker.random.random() < 0.7:
            inner = inner.child
        field = maker.random.choice(inner.DESCRIPTOR.fields)
        inner.ClearField(field.name)
        if maker.random.random() < 0.6:
            maker.fill(inner, field, depth=1)
        assert (content(changed) == content(message)) == (plain_form(changed) == form), field.name


def plain_form(message: Message) -> bytes:
    """What must be equal exactly when the content is, of a message from Maker."""
    made = type(message)()
    made.CopyFrom(message)
    strip(made)
    return made.SerializeToString(deterministic=True)


def strip(message: Any) -> None:
    """Clears the excluded fields, at any depth."""
    if message.DESCRIPTOR.full_name != "test.Whole":
        return
    message.ClearField("trace")
    message.ClearField("hints")
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for key in value:
                    strip(value[key])
        elif field.is_repeated:
            for item in value:
                strip(item)
        else:
            strip(value)


def test_equal_bytes_are_the_same_request_whatever_is_known_of_them() -> None:
    raw = b"\x0a\x01a" + record(99, 2, b"x") + record(98, 0, b"\1")
    one, other = sessions_pb.GetSessionRequest.FromString(raw), tasks_pb.GetTaskRequest.FromString(raw)
    assert same_request(fingerprints_of(raw, one), fingerprints_of(raw, other))
    assert digests(one, raw)[0] == digests(other, raw)[0] != digests(one, raw + raw)[0]


# -- two versions of a message side by side --


def as_seen_by(fields: str, message: Message) -> Message:
    return compiled(fields).FromString(message.SerializeToString())


@pytest.mark.parametrize("seed", range(30))
def test_an_added_field_left_at_its_default_changes_nothing(seed: int) -> None:
    message = Maker(seed).message(compiled())
    assert content(as_seen_by(ADDED, message)) == content(message)


ADDED_VALUES: dict[str, Any] = {
    "new_string": "text",
    "new_double": 1.5,
    "new_sint": -7,
    "new_bool": True,
    "new_strings": ["b", "", "a"],
    "new_fixed": 2**32 - 1,
    "new_colour": -3,
    "new_bytes": b"\xff",
    "new_float": -0.25,
    "new_int": -1,
    "new_maybe": 0,
}


@pytest.mark.parametrize("name", ADDED_VALUES)
def test_an_added_scalar_that_is_set_is_the_same_to_who_knows_it_and_who_does_not(name: str) -> None:
    new = compiled(ADDED)(
        **{name: ADDED_VALUES[name], "a_string": "x", "texts": {"a": "b"}, "a_double": 1, "mask": {"paths": ["z"]}}
    )
    old = as_seen_by("", new)
    assert (
        content(old)
        == content(new)
        != content(whole(a_string="x", texts={"a": "b"}, a_double=1, mask={"paths": ["z"]}))
    )
    deep = compiled(ADDED)(child={"child": new})
    assert content(as_seen_by("", deep)) == content(deep)


def test_an_added_message_that_is_set_counts_for_who_does_not_know_it() -> None:
    new = compiled(ADDED)(new_child={"a_string": "x"})
    assert content(as_seen_by("", new)) not in (
        content(whole()),
        content(as_seen_by("", compiled(ADDED)(new_child={}))),
    )


def test_unknown_fields_count_in_any_order_of_numbers_but_not_of_values() -> None:
    one, other = record(1, 0, b"\1"), record(2, 2, b"y")
    records_of = {
        "text": record(900, 2, b"x"),
        "number": record(901, 0, b"\5"),
        "fixed": record(902, 1, b"12345678"),
        "short": record(903, 5, b"1234"),
        "group": record(904, 3, one + other),
    }
    forwards = compiled().FromString(b"".join(records_of.values()))
    backwards = compiled().FromString(b"".join(reversed(records_of.values())))
    assert content(forwards) == content(backwards)
    seen = {content(forwards)}
    for left_out in records_of:
        some = compiled().FromString(b"".join(value for name, value in records_of.items() if name != left_out))
        seen.add(content(some))
    assert len(seen) == 1 + len(records_of)
    groups = [record(904, 3, one + other), record(904, 3, other + one), record(904, 3, one), record(904, 3, b"")]
    contents = [content(compiled().FromString(group)) for group in groups]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    twice = [record(900, 2, b"x") + record(900, 2, b"y"), record(900, 2, b"y") + record(900, 2, b"x")]
    assert len({content(compiled().FromString(part)) for part in twice}) == 2
    nested = [
        compiled().FromString(record(40, 2, part)) for part in (record(900, 0, b"\1"), record(901, 0, b"\1"), b"")
    ]
    assert len({content(message) for message in nested}) == 3


def test_a_field_that_is_excluded_counts_neither_at_the_top_nor_inside() -> None:
    plain = whole(a_string="x", child={"a_string": "y"}, wholes={True: {}})
    traced = whole(
        a_string="x",
        trace="t",
        hints=[{"a_string": "h"}],
        child={"a_string": "y", "trace": "u"},
        wholes={True: {"trace": "v"}},
    )
    assert content(traced) == content(plain)
    assert digests(traced)[0] != digests(plain)[0]
    assert same_request(fingerprints_of(b"1", traced), fingerprints_of(b"2", plain))
    poll = [tasks_pb.ClaimTasksRequest(role="r", wait=spans(seconds)) for seconds in (1, 2)]
    assert content(poll[0]) == content(poll[1]) != content(tasks_pb.ClaimTasksRequest(role="s", wait=spans(1)))


# -- rule by rule --


def test_a_zero_has_one_form_and_so_has_what_is_no_number() -> None:
    makers: list[Callable[[float], Message]] = [
        lambda number: whole(doubles=[number]),
        lambda number: whole(maybe_double=number),
        lambda number: whole(numbers={1: number}),
        lambda number: whole(chosen_double=number),
        lambda number: whole(data=as_struct({"a": [{"b": number}], "c": number})),
        lambda number: whole(value={"number_value": number}),
        lambda number: whole(list={"values": [{"list_value": {"values": [{"number_value": number}]}}]}),
        lambda number: whole(child={"a_string": "x", "a_double": number}),
    ]
    for make in makers:
        assert content(make(-0.0)) == content(make(0.0))
        assert len({content(make(number)) for number in NOT_NUMBERS}) == 1
        different = [0.0, NOT_NUMBERS[0], math.inf, -math.inf, 5e-324, -5e-324, 1.0, -1.0]
        assert len({content(make(number)) for number in different}) == len(different)
    assert (
        content(whole(a_double=-0.0))
        == content(whole(a_float=-0.0))
        == content(whole(a_double=0.0))
        == content(whole())
    )
    assert len({content(whole(a_float=number)) for number in NOT_NUMBERS}) == 1


def as_struct(values: dict[str, Any]) -> Any:
    made = whole(data={}).data
    made.update(values)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_a_struct_is_its_json_value(seed: int) -> None:
    """Whatever the keys, in whichever order they come; also where one begins with another."""
    maker = Maker(seed)
    values = {key: maker.json(4) for key in ("", "a", "ab", "abc", "b", "\0", "é", "😀", maker.text())}
    made = {
        content(whole(data=as_struct(dict(maker.random.sample(list(values.items()), len(values)))))) for _ in range(5)
    }
    assert len(made) == 1
    values["ab"] = [values["ab"]]
    assert content(whole(data=as_struct(values))) not in made


@pytest.mark.parametrize("seed", range(20))
def test_what_a_struct_holds_spares_walking_it(seed: int) -> None:
    maker = Maker(seed)
    given = {maker.text().replace("\0", ""): maker.json(4) for _ in range(8)} | {
        "a": [0.0, -0.0, 1e300, 2.0**53, -3.0, 0.1]
    }
    message = whole(a_string="x", data=as_struct(json.loads(json.dumps(given).replace("\\u0000", ""))))
    for raw in (b"", record(900, 0, b"\1")):
        message.MergeFromString(raw)
        structs = {"data": struct_to_dict(message.data, "data")}
        assert fingerprints_of(b"raw", message, structs) == fingerprints_of(b"raw", message)
        assert fingerprints_of(b"raw", message, {"data": {"a": 1}}) != fingerprints_of(b"raw", message)


def test_presence_counts_where_there_is_presence() -> None:
    absent = whole()
    for present in (
        whole(maybe_int=0), whole(maybe_double=0), whole(maybe_string=""), whole(chosen_string=""),
        whole(chosen_number=0), whole(child={}), whole(data={}), whole(value={}), whole(value={"null_value": 0}),
        whole(time={}), whole(span={}), whole(mask={}), whole(list={}), whole(children=[{}]), whole(strings=[""]),
        whole(texts={"": ""}), whole(data=as_struct({"a": None})), whole(any={}),
    ):  # fmt: skip
        assert content(present) != content(absent)
    for unset in (
        whole(an_int32=0),
        whole(a_string=""),
        whole(a_bool=False),
        whole(a_colour=0),
        whole(strings=[], texts={}),
    ):
        assert content(unset) == content(absent)


def test_near_misses_are_other_requests() -> None:
    pairs = [
        (whole(strings=["ab", "c"]), whole(strings=["a", "bc"])),
        (whole(strings=["ab"]), whole(strings=["a", "b"])),
        (whole(strings=["a", "b"]), whole(strings=["b", "a"])),
        (whole(texts={"a": "b"}), whole(texts={"b": "a"})),
        (whole(texts={"a": "bc"}), whole(texts={"ab": "c"})),
        (whole(texts={"a": "b", "c": "d"}), whole(texts={"a": "d", "c": "b"})),
        (whole(numbers={1: 2}), whole(numbers={2: 1})),
        (whole(a_sint32=-1), whole(a_sint32=1)),
        (whole(a_sint64=-(2**63)), whole(a_sint64=2**63 - 1)),
        (whole(an_int64=2**53), whole(an_int64=2**53 + 1)),
        (whole(an_int32=1), whole(a_uint32=1)),
        (whole(an_int32=-1), whole(an_int32=2**31 - 1)),
        (whole(a_sfixed32=-1), whole(a_sfixed32=1)),
        (whole(a_string="e\u0301"), whole(a_string="é")),
        (whole(a_string="a"), whole(a_string="a\0")),
        (whole(child={"a_string": "x"}), whole(a_string="x")),
        (whole(child={"child": {}}), whole(child={}, children=[{}])),
        (whole(children=[{}, {"a_bool": True}]), whole(children=[{"a_bool": True}, {}])),
        (whole(chosen_number=1), whole(chosen_string="1")),
        (whole(a_colour=77), whole(a_colour=78)),
        (whole(data=as_struct({"a": 1})), whole(data=as_struct({"a": "1"}))),
        (whole(data=as_struct({"a": True})), whole(data=as_struct({"a": 1}))),
        (whole(data=as_struct({"a": None})), whole(data=as_struct({}))),
        (whole(data=as_struct({"a": {}})), whole(data=as_struct({"a": []}))),
        (whole(data=as_struct({"a": [1, [2]]})), whole(data=as_struct({"a": [[1], 2]}))),
        (whole(value={}), whole(value={"null_value": 0})),
        (whole(time={"seconds": 1}), whole(span={"seconds": 1})),
        (whole(time={"seconds": 1}), whole(time={"nanos": 1})),
        (whole(times=[{"seconds": 1}, {}]), whole(times=[{}, {"seconds": 1}])),
        (whole(mask={"paths": ["a.b"]}), whole(mask={"paths": ["a", "b"]})),
        (whole(mask={"paths": ["a"]}), whole(mask={"paths": ["a", "a.b"]})),
    ]
    for one, other in pairs:
        assert content(one) != content(other), (one, other)
        assert not same_request(fingerprints_of(b"1", one), fingerprints_of(b"2", other))


def test_the_order_of_a_mask_is_no_matter_nor_is_a_path_named_twice() -> None:
    paths = [f"metadata.{number}" for number in range(200)]
    shuffled = [random.Random(seed).sample(paths, 200) for seed in range(20)]
    assert len({content(whole(mask={"paths": again})) for again in (paths, paths + paths[:1], *shuffled)}) == 1


def test_a_time_is_what_it_adds_up_to() -> None:
    for name in ("time", "span"):
        forms = [(1, 5 * 10**8), (0, 15 * 10**8), (2, -5 * 10**8)]
        assert len({content(whole(**{name: {"seconds": s, "nanos": n}})) for s, n in forms}) == 1
        ends = [(2**63 - 1, 2**31 - 1), (-(2**63), -(2**31)), (2**63 - 1, 0), (0, 0)]
        assert len({content(whole(**{name: {"seconds": s, "nanos": n}})) for s, n in ends}) == 4


def test_an_any_is_its_type_and_the_content_of_what_it_packs() -> None:
    def packs(raw: bytes, name: str = "test.Whole") -> Any:
        return whole(any={"type_url": f"type.googleapis.com/{name}", "value": raw})

    raw = whole(texts={"a": "b", "c": "d"}, an_int32=1).SerializeToString(deterministic=True)
    again = (
        whole(an_int32=1).SerializeToString()
        + whole(texts={"c": "d"}).SerializeToString()
        + whole(texts={"a": "b"}).SerializeToString()
    )
    assert content(packs(raw)) == content(packs(again)) != content(packs(raw + record(14, 2, b"x")))
    assert content(packs(raw, "test.Nobody")) != content(packs(again, "test.Nobody"))
    assert content(packs(raw, "test.Nobody")) != content(packs(raw))
    assert content(packs(b"\xff")) != content(packs(b"\xfe"))
    inner = [record(56, 2, packs(value).any.SerializeToString()) for value in (raw, again)]
    assert content(packs(inner[0])) != content(packs(inner[1]))


def test_the_deepest_message_is_walked() -> None:
    def nested(text: str, levels: int) -> Any:
        made = whole(a_string=text)
        for _ in range(levels):
            made = whole(child=made)
        return made

    def packed_in(text: str) -> Any:
        inner, outer = nested(text, 95), whole()
        outer.any.Pack(inner)
        for _ in range(95):
            outer = whole(child=outer)
        return compiled().FromString(outer.SerializeToString())

    assert content(packed_in("a")) == content(packed_in("a")) != content(packed_in("b"))


def test_an_any_in_an_any_costs_no_depth() -> None:
    def nested(text: str) -> Any:
        made = whole(a_string=text)
        for _ in range(2000):
            inner, made = made, whole()
            made.any.Pack(inner)
        return made

    assert content(nested("a")) == content(nested("a")) != content(nested("b"))


# -- the packed form --


def test_requests_are_the_same_when_any_kind_is() -> None:
    two, three, other = b"\2" + b"a" * 32, b"\3" + b"b" * 32, b"\3" + b"c" * 32
    assert same_request(two + three, two + three)
    assert same_request(two + three, two + other)
    assert same_request(three + two, two + other)
    assert same_request(two, two + three)
    assert not same_request(two + three, b"\2" + b"b" * 32 + other)
    assert not same_request(two, three)
    assert not same_request(b"\2" + b"a" * 32, b"\3" + b"a" * 32)
    assert not same_request(b"\1" + b"a" * 32, two + three)
    assert not same_request(b"a" * 32, two + three)


def test_a_digest_of_an_earlier_version_is_that_of_the_deterministic_serialisation() -> None:
    poll = [tasks_pb.ClaimTasksRequest(role="r", wait=spans(seconds)) for seconds in (1, 2)]
    assert earlier_fingerprint_of(poll[0]) == earlier_fingerprint_of(poll[1])
    assert earlier_fingerprint_of(poll[0]) != earlier_fingerprint_of(tasks_pb.ClaimTasksRequest(role="s"))
    assert poll[0].wait.seconds == 1
    one = example()
    assert earlier_fingerprint_of(one) != earlier_fingerprint_of(sessions_pb.CreateSessionRequest())
    assert earlier_fingerprint_of(one).hex() == "fd53483307f815a500a2c83548be743ad36aba79bb201151e217f9e561597d70"


def example() -> sessions_pb.CreateSessionRequest:
    call = json.loads((ROOT / "tests/load/ghz/create.json").read_text())
    return ParseDict(call["data"], sessions_pb.CreateSessionRequest())


def test_no_kind_ever_changes() -> None:
    """Stored digests outlive a deployment. From the first release on, who must change this needs a new kind instead."""
    two, three = digests(example(), b"these very bytes")
    assert two.hex() == "7e900799b42a3bf1fc9705d1134ca1595fa436e96bd58a512d127114129f7c1b"
    assert three.hex() == "05afd8c42f41150706523cd0b3210db1e089978161829bb927a835f1763b3d82"
    full = whole(
        a_double=1.5, a_float=-2.5, an_int32=-1, an_int64=-2, a_uint32=3, a_uint64=2**64 - 1, a_sint32=-4, a_sint64=5,
        a_fixed32=6, a_fixed64=7, a_sfixed32=-8, a_sfixed64=-9, a_bool=True, a_string="é", some_bytes=b"\xff",
        a_colour=-3, maybe_double=math.nan, maybe_int=0, strings=["b", "a"], ints=[2, 1], texts={"b": "1", "a": "2"},
        numbers={2: 0.5, -1: 1}, wholes={True: {"a_bool": True}, False: {}}, by_sint={-1: b"x"},
        structs={"s": as_struct({"b": [1, None], "a": -0.0})}, child={"a_string": "x"}, children=[{}, {"an_int32": 1}],
        chosen_number=0, data=as_struct({"k": {"b": True, "a": "é😀\n"}, "é": [1e300, 0.1, 2**53]}),
        value={"null_value": 0}, list={"values": [{}]},
        time={"seconds": -1, "nanos": 5}, span={"seconds": 3}, mask={"paths": ["b", "a"]},
        any={"type_url": "x/test.Whole", "value": b"\x18\x01"}, trace="t",
    )  # fmt: skip
    full.MergeFromString(record(900, 0, b"\1") + record(901, 2, b"u"))
    assert content(full).hex() == "80a79f89347d698a7b67714db95c5d34aa1b36b0ed9b304d41bc70f1f9b87fb7"
