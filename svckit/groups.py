"""Work in groups: concurrent calls share each step, so that a step's cost is paid once a group, not once a call."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog
from prometheus_client import Histogram

from svckit.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Hashable

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

EARLY_GROUPS = 10
"""How many groups may start early between two that wait in full."""
GATHER = 0.004
LONGEST_GATHER = 0.02
"""Seconds. A group's work may take a while for other reasons than its size."""

GROUP_SIZE = Histogram(
    "orchestrator_group_size",
    "Items per group, by queue.",
    ["queue"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)


@dataclass(slots=True, eq=False)
class Asked(Generic[R]):
    """An item whose caller waits for its answer. Who has left, or was answered, is answered no more."""

    answer: asyncio.Future[R] = field(init=False, default_factory=lambda: asyncio.get_running_loop().create_future())

    def give(self, answer: R) -> None:
        """Answers the caller."""
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        """Raises the error at the caller's."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Groups(Generic[T]):
    """Runs what is waiting in groups, at most `lanes` at a time; while they are on their way the next group forms.

    `work(group)` settles each item by itself, in the context (so, the trace) of the group's first item. What it raises
    is handed to `failed(item, error)` for every item: none can stop the queue. Nothing cancels a running group.

    A lone item goes at once. When the last group had company, the next one waits for more: callers answered together
    come back together. It waits `gather` seconds, or twice as long as the last group's work took (up to
    `longest_gather`): the dearer a group, the better it is filled. Once hardly more come than before, the EARLY_GROUPS
    after it start as soon as that many wait. With `eager` false all groups wait in full: nobody is kept by it.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[T]], Awaitable[None]],
        failed: Callable[[T, Exception], None],
        *,
        max_size: int = 64,
        lanes: int = 1,
        gather: float = GATHER,
        longest_gather: float = LONGEST_GATHER,
        eager: bool = True,
    ) -> None:
        self._work = work
        self._failed = failed
        self._max_size = max_size
        self._lanes = lanes
        self._gather = gather
        self._longest_gather = longest_gather
        self._eager = eager
        self._loop = asyncio.get_running_loop()  # asked for once: each time costs a system call (Python 3.11)
        self._waiting: dict[T, Context] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._took = 0.0
        self._last_size = 1
        self._expected = 1
        self._early = EARLY_GROUPS
        self._launching = False
        self._formed = False
        self._launched: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sizes = GROUP_SIZE.labels(name)

    def __len__(self) -> int:
        """The items that wait for a group."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._running)

    def put(self, item: T) -> None:
        """Adds an item; it starts with the next group that has room, in order of arrival."""
        self._waiting[item] = copy_context()
        if not self._launching and len(self._running) < self._lanes:
            self._schedule()

    def start(self) -> None:
        """Has what waits start without gathering, as soon as a lane is free: it was a group before it came here."""
        self._formed = bool(self._waiting)
        if self._formed and len(self._running) < self._lanes:
            self._launch()

    async def started(self, seconds: float) -> None:
        """Returns when nothing waits for a lane any more, at the latest after `seconds`. For one caller at a time."""
        if self._waiting:
            self._launched = self._loop.create_future()
            timer = self._loop.call_later(seconds, _resolve, self._launched)
            await self._launched
            timer.cancel()

    def take_out(self, item: T) -> bool:
        """Takes an item out before its start. False when it has started already, or never came."""
        return self._waiting.pop(item, None) is not None

    async def drained(self) -> None:
        """Returns when nothing waits and nothing runs."""
        while self.busy:  # noqa: ASYNC110 - once, at the end; an event would cost at every group
            await asyncio.sleep(0.01)

    def _schedule(self) -> None:
        """Sees to it that a group starts: in the loop's next turn (what comes in this one joins), or after a wait."""
        if self._formed or (self._eager and self._last_size == 1):
            enough = 1
        elif self._eager and self._expected > 1 and self._early < EARLY_GROUPS:
            enough = self._expected
        else:
            enough = self._max_size
        if len(self._waiting) >= enough:
            if not self._launching:
                self._launching = True
                self._loop.call_soon(self._launch)
        elif self._timer is None:
            wait = max(self._gather, min(2 * self._took, self._longest_gather))
            self._timer = self._loop.call_later(wait, self._waited)

    def _waited(self) -> None:
        if not self._waiting:  # all were taken out: nothing was seen
            self._timer = None
            return
        came = min(len(self._waiting), self._max_size)
        grown = came > self._expected * 5 // 4
        # One wait may meet a moment in which few come; only if few come again, fewer are expected.
        self._expected = max(came, self._expected * 3 // 4)
        self._launch()
        self._early = EARLY_GROUPS if grown else 0  # more may come still: then the next one waits in full too

    def _launch(self) -> None:
        self._launching = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self._lanes:
            group = list(islice(self._waiting, self._max_size))
            contexts = [self._waiting.pop(item) for item in group]
            self._last_size = len(group)
            self._early += 1
            self._sizes.observe(len(group))
            task = self._loop.create_task(self._run(group), context=contexts[0])
            self._running.add(task)  # the loop holds tasks weakly
            task.add_done_callback(self._ended)
        if not self._waiting:
            self._formed = False
            if self._launched is not None:
                _resolve(self._launched)

    async def _run(self, group: list[T]) -> None:
        started = self._loop.time()
        try:
            await self._work(group)
            self._took = self._loop.time() - started
        except BaseException as error:
            if not isinstance(error, ServiceError):
                log.exception("group failed", size=len(group))
            for item in group:
                self._failed(item, error if isinstance(error, Exception) else RuntimeError("the group was cancelled"))
            if not isinstance(error, Exception):
                raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._waiting:
            self._schedule()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Slots(Generic[T]):
    """One item at a time per key.

    An item takes the slots of all its keys together, or waits for them in order of arrival.
    """

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[T]] = {}
        self._held: dict[T, tuple[tuple[Hashable, ...], Callable[[T], None]]] = {}
        self._missing: dict[T, int] = {}

    def take(self, item: T, keys: Collection[Hashable], ready: Callable[[T], None]) -> bool:
        """Queues the item at all its keys; `ready(item)` is called once it is first at each of them.

        True if that was at once.
        """
        if not keys:
            ready(item)
            return True
        distinct = tuple(dict.fromkeys(keys))
        missing = 0
        for key in distinct:
            queue = self._queues.get(key)
            if queue is None:
                self._queues[key] = deque((item,))
            else:
                queue.append(item)
                missing += 1
        self._held[item] = (distinct, ready)
        if missing:
            self._missing[item] = missing
            return False
        ready(item)
        return True

    def give_back(self, item: T) -> None:
        """Gives the item's slots, or its places in the queues, to the next ones. An unknown item is no fault."""
        held = self._held.pop(item, None)
        if held is None:
            return
        self._missing.pop(item, None)
        for key in held[0]:
            queue = self._queues[key]
            was_first = queue[0] is item
            queue.remove(item)
            if not queue:
                del self._queues[key]
            elif was_first:
                self._advance(queue[0])

    def _advance(self, item: T) -> None:
        self._missing[item] -= 1
        if self._missing[item] == 0:
            del self._missing[item]
            self._held[item][1](item)
