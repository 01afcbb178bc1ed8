"""The near-cache: answers that this process may give again without asking anybody."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from google.protobuf.message import Message

OVERHEAD = 450
"""About what Python needs for an entry beside the bytes of its key, request and answer."""


class NearKey(NamedTuple):
    """What an answer is found by. It is told to nobody but the very caller, with the very rights, who got it before.

    So what a servicer asks of caller and request before it begins need not be asked again.
    """

    principal: bytes
    """Principal.digest."""
    method: str
    idempotency_key: str


class Replays:
    """OK answers that are committed with their guards, the least recently used forgotten first.

    Only those never change: an error answer gives way to a committed OK, and a key in progress to its answer. They are
    answers of one timeline of Postgres; a failover may have lost some of them, so a new timeline forgets all.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds what is kept, with its overhead; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._timeline = 0
        self._entries: OrderedDict[NearKey, _Entry] = OrderedDict()
        self.bytes = 0
        """What is kept, with its overhead."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: NearKey, raw: bytes, request: Message, now: float) -> bytes | None:
        """The answer to this very request: `raw` as received, `request` as parsed. `now` is in the event loop's time.

        None says nothing: another request with the key, too, has to ask those who decide.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self._drop(key)
            return None
        if entry.raw != raw and _in_order(request.FromString(entry.raw)) != _in_order(request):
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def put(self, key: NearKey, raw: bytes, answer: bytes, *, expires: float, timeline: int) -> None:
        """Keeps an OK answer, and the request as it was received, until `expires`, in the event loop's time.

        That must not be after its record in Redis. `timeline` is that of the connection that wrote or read its guard.
        An answer of another one than the present is not kept, nor is one that is larger than all may be.
        """
        size = _size(key, raw, answer)
        if timeline != self._timeline or size > self._max_bytes:
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = _Entry(raw, answer, expires)
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def turn_to(self, timeline: int) -> None:
        """Takes note of the timeline of a new connection; another than before forgets all answers."""
        if timeline != self._timeline:
            self._timeline = timeline
            self._entries.clear()
            self.bytes = 0

    def _drop(self, key: NearKey) -> None:
        entry = self._entries.pop(key)
        self.bytes -= _size(key, entry.raw, entry.answer)


def _in_order(request: Message) -> bytes:
    """Equal for equal requests, of one version of the protos, whatever order their maps came in."""
    return request.SerializeToString(deterministic=True)


def _size(key: NearKey, raw: bytes, answer: bytes) -> int:
    return len(key.idempotency_key) + len(raw) + len(answer) + OVERHEAD


class _Entry(NamedTuple):
    raw: bytes
    answer: bytes
    expires: float
