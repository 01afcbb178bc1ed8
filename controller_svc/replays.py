"""The near-cache: answers that this process may give again without asking anybody."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from controller_svc.fingerprint import same_request

OVERHEAD = 400
"""About the bytes of an entry beside its answer: scope, fingerprints, and what Python needs for them."""


class Replays:
    """OK answers that are committed with their guards, the least recently used forgotten first.

    Only those never change: an error answer gives way to a committed OK, and a key in progress to its answer. They are
    answers of one timeline of Postgres; a failover may have lost some of them, so a new timeline forgets all.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds what is kept, with its overhead; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._timeline = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.bytes = 0
        """What is kept, with its overhead."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, scope: bytes, fingerprints: bytes, now: float) -> bytes | None:
        """The answer to this very request. `now` is in the event loop's time.

        None says nothing: another request with the key, too, has to ask those who decide.
        """
        entry = self._entries.get(scope)
        if entry is None:
            return None
        if entry.expires <= now:
            self._drop(scope)
            return None
        if not same_request(entry.fingerprints, fingerprints):
            return None
        self._entries.move_to_end(scope)
        return entry.answer

    def put(self, scope: bytes, fingerprints: bytes, answer: bytes, *, expires: float, timeline: int) -> None:
        """Keeps an OK answer until `expires`, in the event loop's time, which must not be after its record in Redis.

        `timeline` is that of the connection that wrote or read its guard. An answer of another one than the present is
        not kept, nor is one that is larger than all may be.
        """
        size = len(answer) + OVERHEAD
        if timeline != self._timeline or size > self._max_bytes:
            return
        if scope in self._entries:
            self._drop(scope)
        self._entries[scope] = _Entry(fingerprints, answer, expires)
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def turn_to(self, timeline: int) -> None:
        """Takes note of the timeline of a new connection; another than before forgets all answers."""
        if timeline != self._timeline:
            self._timeline = timeline
            self._entries.clear()
            self.bytes = 0

    def _drop(self, scope: bytes) -> None:
        self.bytes -= len(self._entries.pop(scope).answer) + OVERHEAD


class _Entry(NamedTuple):
    fingerprints: bytes
    answer: bytes
    expires: float
