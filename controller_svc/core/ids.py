"""Ids: of resources UUIDv7, whose order is the order of creation; of commands UUIDv4."""

from __future__ import annotations

import os
import re
import time
from io import BytesIO
from uuid import UUID

from svckit.errors import invalid_field

_CANONICAL = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}").fullmatch


_reserve = BytesIO()


def _random(size: int) -> bytes:
    """Bytes of the system's generator, which is asked for many at once: each time costs a system call.

    For one thread. A process that is copied whole while it runs (a snapshot of its machine) would make them twice.
    """
    global _reserve  # noqa: PLW0603
    taken = _reserve.read(size)
    if len(taken) < size:
        _reserve = BytesIO(os.urandom(4096))
        taken = _reserve.read(size)
    return taken


def _forget() -> None:
    global _reserve  # noqa: PLW0603
    _reserve = BytesIO()


os.register_at_fork(after_in_child=_forget)


def new_command_id() -> UUID:
    """A new random UUID, which nobody can guess."""
    return UUID(bytes=_random(16), version=4)


def new_id(now: float | None = None) -> UUID:
    """A new UUIDv7 for `now` (seconds since the epoch; the wall clock if not given).

    The 12 bits after the milliseconds hold a fraction of the millisecond (RFC 9562, 6.2, method 3),
    so ids made in one process at least 0.25 µs apart sort as they were made.
    """
    nanos = time.time_ns() if now is None else round(now * 1_000_000) * 1000
    millis, rest = divmod(nanos, 1_000_000)
    random = int.from_bytes(_random(8), "big") >> 2
    return UUID(int=(millis << 80) | (0x7 << 76) | ((rest * 4096 // 1_000_000) << 64) | (0b10 << 62) | random)


def parse_id(text: str, field: str) -> UUID:
    """The UUID of its canonical text in either case; raises InvalidArgument naming `field` for any other text."""
    if _CANONICAL(text) is None:
        if not text:
            raise invalid_field(field, "Required.", "FIELD_REQUIRED")
        raise invalid_field(field, "Must be a UUID in its canonical form.")
    return UUID(text)
