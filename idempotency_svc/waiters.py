"""Waiting for keys that others own."""

from __future__ import annotations

import asyncio
import math
from random import uniform
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter, Gauge

from idempotency_svc.cache import Acquired, Busy, ReleaseItem, Takeover
from svckit.errors import Aborted, ServiceError

if TYPE_CHECKING:
    from idempotency_svc.cache import Cache, ClaimItem, ClaimOutcome

    _Line = dict[asyncio.Future[ClaimOutcome], ClaimItem]
    """Who waits for one key, in order of arrival."""

log = structlog.get_logger(__name__)

MAX_WAITERS = 1000
"""Who may wait for one key."""
FIRST_LOOK = 0.25
LAST_LOOK = 1.0
"""Seconds between two looks at a key of which there is no sign."""

_WAITERS = Gauge("orchestrator_idempotency_waiters", "Calls that wait for a key that another owns.")
_REFUSED = Counter("orchestrator_idempotency_waiters_refused", "Calls that were not let wait: too many for their key.")


class Waiters:
    """All who wait in this process. Those for one key stand in a line, which looks at the key for all of them.

    A look is a claim for the first in line: so one of them becomes the owner, and the others go on waiting.
    """

    def __init__(self, records: Cache) -> None:
        self._records = records
        self._lines: dict[bytes, _Line] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def wait(self, item: ClaimItem, seconds: float) -> ClaimOutcome:
        """As Cache.claim, for a key that was busy: Busy only when `seconds` are over.

        Raises Aborted IDEMPOTENCY_IN_PROGRESS when MAX_WAITERS wait for the key, and what a look raises.
        """
        line = self._lines.get(item.scope)
        if line is None:
            line = self._lines[item.scope] = {}
            task = asyncio.create_task(self._serve(item.scope, line), name="idempotency waiters")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        elif len(line) >= MAX_WAITERS:
            _REFUSED.inc()
            raise Aborted(
                "IDEMPOTENCY_IN_PROGRESS",
                f"A call with this idempotency key is still under way, and {MAX_WAITERS} wait for its answer.",
                retry_after=uniform(0.5, 1.5),  # noqa: S311 - lest they come back together
            )
        outcome: asyncio.Future[ClaimOutcome] = asyncio.get_running_loop().create_future()
        line[outcome] = item
        _WAITERS.inc()
        try:
            async with asyncio.timeout(seconds):
                return await outcome
        except TimeoutError:
            return Busy(1)
        finally:
            _WAITERS.dec()
            line.pop(outcome, None)

    async def _serve(self, scope: bytes, line: _Line) -> None:
        """Until nobody is left in line. It ends with that look: who comes later makes a new line."""
        try:
            async with self._records.signs(scope) as sign:
                longest = pause = FIRST_LOOK
                while line:
                    try:
                        async with asyncio.timeout(pause):
                            await sign.wait()
                    except TimeoutError:
                        longest = min(2 * longest, LAST_LOOK)
                    sign.clear()
                    pause = min(await self._look(scope, line), longest * uniform(0.75, 1))  # noqa: S311
                del self._lines[scope]
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.exception("waiting for a key failed")
            if self._lines.get(scope) is line:
                del self._lines[scope]
            for outcome in line:
                if not outcome.done():
                    outcome.set_exception(error)

    async def _look(self, scope: bytes, line: _Line) -> float:
        """Claims for the first in line and tells all whom it concerns. Answers after how many seconds to look again."""
        first = next((outcome for outcome in line if not outcome.done()), None)
        if first is None:
            return math.inf
        asked = line[first]
        [found] = await self._records.claim([asked])
        if isinstance(found, Busy):
            return found.lease_left_millis / 1000
        if isinstance(found, Acquired | Takeover):
            if first.done():  # its caller has left meanwhile
                await self._records.release([ReleaseItem(scope, asked.nonce)])
                return 0.0
            del line[first]
            first.set_result(found)
            return math.inf
        for outcome in [outcome for outcome, item in line.items() if item.fingerprints == asked.fingerprints]:
            del line[outcome]
            if not outcome.done():
                outcome.set_result(found)
        return 0.0
