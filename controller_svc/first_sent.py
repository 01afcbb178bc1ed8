"""When the first attempt of a call was sent: what keeps a retry that comes too late from taking effect again."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from svckit.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_SENT_HEADER = "idempotency-first-sent"
MOST_AHEAD = timedelta(minutes=5)
"""How far a caller's clock may be ahead of ours."""

_HOUR = r"(?:[01]\d|2[0-3])"  # fromisoformat knows 24:00 from Python 3.14 on; RFC 3339 does not
_RFC_3339 = re.compile(
    rf"\d{{4}}-\d\d-\d\d[Tt]{_HOUR}:\d\d:\d\d(?:\.\d{{1,9}})?(?:[Zz]|[+-]{_HOUR}:[0-5]\d)", re.ASCII
).fullmatch


def first_sent(values: Sequence[str], now: datetime) -> datetime | None:
    """The time in UTC that the caller names, cut to microseconds; None if it names none. `now` is aware.

    Raises InvalidArgument IDEMPOTENCY_FIRST_SENT_INVALID unless it is one time of RFC 3339, at most five minutes ahead.
    """
    if not values:
        return None
    if len(values) > 1 or not _RFC_3339(values[0]):
        raise _invalid()
    try:
        sent = datetime.fromisoformat(values[0].upper()).astimezone(UTC)
    except (ValueError, OverflowError):  # as 30 February, a leap second, or the year 0
        raise _invalid() from None
    if sent - now > MOST_AHEAD:
        raise _invalid()
    return sent


def key_expired(sent: datetime, window: timedelta) -> FailedPrecondition:
    """The refusal of a call first sent longer ago than `window`, whose key nobody knows: it may have taken effect."""
    return FailedPrecondition(
        "IDEMPOTENCY_KEY_EXPIRED",
        "The first attempt was sent longer ago than answers are kept, and may have taken effect. Read the resource.",
        metadata={"first_sent": sent.isoformat(), "window_seconds": str(int(window.total_seconds()))},
    )


def _invalid() -> InvalidArgument:
    return InvalidArgument(
        "IDEMPOTENCY_FIRST_SENT_INVALID",
        f"Metadata {FIRST_SENT_HEADER} must be given once, as a time of RFC 3339, not more than 5 minutes ahead.",
        fields=((FIRST_SENT_HEADER, "one time of RFC 3339, at most 5 minutes in the future"),),
    )
