"""Ids: UUIDv7 that sort as they were made, and the one spelling that is read."""

from __future__ import annotations

import os
import time
from uuid import RFC_4122, UUID

import pytest

from controller_svc.core.ids import new_command_id, new_id, parse_id
from svckit.errors import InvalidArgument


def test_an_id_is_a_uuid_of_version_7_that_begins_with_the_time() -> None:
    made = new_id(1_700_000_000.125)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == 1_700_000_000_125
    before = time.time_ns() // 1_000_000
    now = new_id().int >> 80
    assert before <= now <= time.time_ns() // 1_000_000


def test_ids_sort_in_the_order_of_creation_even_within_a_millisecond() -> None:
    moments = [1_700_000_000 + step / 2_000_000 for step in range(0, 4000, 3)]
    made = [new_id(moment) for moment in moments]
    assert made == sorted(made)
    assert [str(one) for one in made] == sorted(str(one) for one in made)


def test_ids_of_one_moment_differ() -> None:
    assert len({new_id(1_700_000_000.0) for _ in range(20_000)}) == 20_000


def test_ids_of_commands_are_random_and_none_comes_twice() -> None:
    made = [new_command_id() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert {(one.version, one.variant) for one in made} == {(4, RFC_4122)}
    bits = [sum(one.int >> bit & 1 for one in made) for bit in range(128)]
    assert sum(1 for ones in bits if 9_000 < ones < 11_000) == 122  # all but version and variant


def test_a_forked_process_makes_other_ids() -> None:
    new_command_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, new_command_id().bytes)
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    made = os.read(reader, 16)
    os.close(reader)
    assert len(made) == 16
    assert made != new_command_id().bytes


def test_an_id_is_read_in_either_case() -> None:
    made = new_id()
    assert parse_id(str(made), "session_id") == parse_id(str(made).upper(), "session_id") == made


GOOD = "0190f3b6-7c1e-7abc-8def-0123456789ab"


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("-", ""),
        "{" + GOOD + "}",
        "urn:uuid:" + GOOD,
        GOOD + " ",
        " " + GOOD,
        GOOD + "\n",
        GOOD[:-1],
        GOOD + "0",
        GOOD.replace("a", "g"),
        GOOD.replace("0", "\u0660"),
        GOOD.replace("0", "_"),
        GOOD[:-1] + "\0",
        "0190f3b67-c1e-7abc-8def-0123456789ab",
        "x",
        "\0",
        "\ud800",
    ],
)
def test_no_other_text_is_an_id(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_id(text, "session_id")
    assert refusal.value.reason == "FIELD_INVALID"
    assert [field for field, _ in refusal.value.fields] == ["session_id"]


def test_no_id_is_a_missing_field() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_id("", "lease_id")
    assert refusal.value.reason == "FIELD_REQUIRED"
    assert [field for field, _ in refusal.value.fields] == ["lease_id"]


def test_any_uuid_can_be_asked_for() -> None:
    for text in ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"):
        assert parse_id(text, "task_id") == UUID(text)
