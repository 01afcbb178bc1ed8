"""The time a caller says its first attempt was sent: every spelling of RFC 3339, and nothing else."""

from __future__ import annotations

import random
import string
from datetime import UTC, datetime, timedelta

import pytest

from controller_svc.first_sent import first_sent, key_expired
from svckit.errors import InvalidArgument

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-03-01T11:59:59Z", NOW - timedelta(seconds=1)),
        ("2026-03-01t11:59:59z", NOW - timedelta(seconds=1)),
        ("2026-03-01T14:00:00+02:00", NOW),
        ("2026-03-01T00:30:00-11:30", NOW),
        ("2026-03-01T12:00:00-00:00", NOW),
        ("2026-02-28T11:59:59.5Z", NOW - timedelta(days=1, seconds=0.5)),
        ("2026-03-01T11:59:59.123456789Z", NOW - timedelta(seconds=1) + timedelta(microseconds=123456)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("2026-03-01T12:05:00Z", NOW + timedelta(minutes=5)),
    ],
)
def test_a_time_is_read_in_every_spelling(text: str, time: datetime) -> None:
    read = first_sent([text], NOW)
    assert read == time
    assert read is not None and read.utcoffset() == timedelta()


def test_none_is_none() -> None:
    assert first_sent([], NOW) is None


BAD = [
    "", " ", "now", "1772366400", "2026-03-01", "2026-03-01T11:59:59", "2026-03-01 11:59:59Z", "2026-03-01T11:59Z",
    "2026-03-01T11:59:59Z ", " 2026-03-01T11:59:59Z", "2026-03-01T11:59:59Z\n", "2026-03-01T11:59:59,5Z",
    "2026-03-01T11:59:59.Z", "2026-03-01T11:59:59.1234567890Z", "2026-03-01T11:59:59+0200", "2026-03-01T11:59:59+02",
    "2026-03-01T11:59:59+24:00", "2026-03-01T11:59:59+02:60", "2026-03-01T11:59:60Z", "2026-03-01T24:00:00Z",
    "2026-02-30T11:59:59Z", "2026-00-01T11:59:59Z", "0000-01-01T00:00:00Z", "20260301T115959Z", "2026-W09-7T11:59:59Z",
    "-2026-03-01T11:59:59Z", "٢٠٢٦-03-01T11:59:59Z", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01",
    "2026-03-01T12:05:00.000001Z", "2026-03-01T14:05:01+02:00", "9999-12-31T23:59:59Z",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_by_name(text: str) -> None:
    assert refusal([text]) == ("IDEMPOTENCY_FIRST_SENT_INVALID", ["idempotency-first-sent"])


def test_one_time_is_enough() -> None:
    assert refusal(["2026-03-01T11:59:59Z"] * 2) == ("IDEMPOTENCY_FIRST_SENT_INVALID", ["idempotency-first-sent"])


def refusal(values: list[str]) -> tuple[str, list[str]]:
    with pytest.raises(InvalidArgument) as error:
        first_sent(values, NOW)
    return error.value.reason, [field for field, _ in error.value.fields]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_sent_is_read_or_refused(seed: int) -> None:
    """Good ones with some characters changed: near misses of every rule."""
    chance = random.Random(seed)
    good = [
        "2026-03-01T11:59:59Z",
        "2026-03-01T11:59:59.123+02:00",
        "0001-01-01T00:00:00-23:59",
        "9999-12-31T23:59:59Z",
    ]
    read = 0
    for _ in range(2000):
        text = list(chance.choice(good))
        for _ in range(chance.randrange(3)):
            at = chance.randrange(len(text))
            text[at : at + chance.randrange(3)] = chance.choices(
                string.digits * 5 + string.printable + "é٣", k=chance.randrange(3)
            )
            text = text or ["x"]
        try:
            time = first_sent(["".join(text)], NOW)
        except InvalidArgument as error:
            assert error.reason == "IDEMPOTENCY_FIRST_SENT_INVALID"
        else:
            assert time is not None and time <= NOW + timedelta(minutes=5)
            read += 1
    assert 0 < read < 2000


def test_who_comes_too_late_is_told_what_was_kept_and_when_it_sent() -> None:
    error = key_expired(NOW - timedelta(days=40), timedelta(days=30))
    assert error.reason == "IDEMPOTENCY_KEY_EXPIRED"
    assert error.metadata == {"first_sent": "2026-01-20T12:00:00+00:00", "window_seconds": "2592000"}
    assert error.retry_after is None
