"""ClaimTasks: tried at once, then at every sign of new tasks until the wait is over, with nothing held meanwhile.

Calls that claim at the same time share a transaction for each role.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from controller_svc.core.tasks import ReleaseTask, TaskState
from controller_svc.idempotency import in_progress
from controller_svc.mutation import (
    MARGIN,
    RESEND_PAUSE,
    RESEND_SECONDS,
    WATCHDOG_SECONDS,
    Answer,
    Attempt,
)
from controller_svc.store.claims import TaskClaim, claim_tasks, claimable, recorded
from controller_svc.store.database import (
    OutcomeUnknownError,
    confirmed,
    is_collision,
    is_lock_timeout,
    refusal,
    resource_busy,
    unavailable,
)
from controller_svc.store.read import Guard
from svckit.errors import Aborted, ServiceError
from svckit.groups import Groups
from svckit.telemetry import current_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from uuid import UUID

    from controller_svc.core.mutations import Row
    from controller_svc.core.tasks import ClaimTasks, Task, TaskMutations
    from controller_svc.mutation import Door
    from controller_svc.store.claims import Claimed
    from controller_svc.store.database import Database
    from svckit.interceptors import Call

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""How often waiting roles are looked at whatever wake-ups say: others route tasks too, and schedules come due."""
MOST_LINES = 1000
"""Roles whose claims are remembered to have had company."""
ALONE = 2
"""Claims on their way that wait for a lock; the pool has connections for the groups besides."""
MOST_TASKS = 256
"""What the claims of one transaction may ask for together, unless one of them asks for more."""


_OF_POSTGRES = (psycopg.Error, PoolTimeout, OutcomeUnknownError, ValueError, OverflowError)


class NothingToClaimError(Exception):
    """Nothing to claim now."""


class Claims:
    """Hands out tasks. Waiting calls sleep per (tenant, role); one query a second asks for all of them together."""

    def __init__(self, database: Database, door: Door, mutations: TaskMutations) -> None:
        self._database = database
        self._door = door
        self._mutations = mutations
        self._sleepers: dict[tuple[str, str], deque[asyncio.Future[bool]]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._lines: dict[tuple[str, str], Groups[_Ask]] = {}
        self._alone = asyncio.Semaphore(ALONE)
        self._stopped = False

    def start(self) -> None:
        """Starts to look for claimable tasks."""
        self._poller = asyncio.create_task(self._poll())

    def stop(self) -> None:
        """Answers every waiting call, empty."""
        self._stopped = True
        if self._poller is not None:
            self._poller.cancel()
        for sleepers in self._sleepers.values():
            for sleeper in sleepers:
                if not sleeper.done():
                    sleeper.set_result(False)

    async def close(self) -> None:
        """Returns when no claim is on its way any more."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)

    def written(self, row: Row) -> None:
        """Takes note of a committed row: a pending task wakes one call that waits for its role."""
        if row.table == "tasks" and row.state == TaskState.PENDING:
            self._wake((row.tenant, row.target_role))  # type: ignore[attr-defined]

    async def claim(
        self, command: ClaimTasks, call: Call, respond: Callable[[list[tuple[Task, UUID]]], bytes]
    ) -> bytes:
        """The response's bytes, empty when the wait is over without a task. Raises ServiceError as Door.write does."""
        loop = asyncio.get_running_loop()
        until = loop.time() + min(command.wait_seconds, max(call.remaining() - MARGIN, 0.0))
        who = (command.actor.tenant, command.role)

        def answer(tasks: list[Task]) -> bytes:
            return respond([(task, task.lease_id) for task in tasks if task.lease_id is not None])

        while True:
            attempt = self._door.attempt(call)
            taken: list[Task] = []
            work = partial(self._start, command=command, call=call, respond=answer, taken=taken)
            try:
                given = await self._door.once(attempt, call, work)
            except NothingToClaimError:
                pass
            except Aborted:
                # Without a key there are none in time. With one its owner, at work elsewhere, may have some by now.
                if loop.time() < until or attempt.key_hash is not None:
                    raise
            except asyncio.CancelledError:
                self._give_back(attempt, command, taken)
                raise
            else:
                self._wake(who)  # there may be more than this call took
                return self._door.tell(given, call)
            if self._stopped or not await self._sleep(who, until - loop.time(), call):
                return answer([])

    async def _sleep(self, who: tuple[str, str], seconds: float, call: Call) -> bool:
        """True when there may be a task; False when the time is over."""
        if seconds <= 0:
            return False
        sleeper: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        sleepers = self._sleepers.setdefault(who, deque())
        sleepers.append(sleeper)
        try:
            with call.waiting():
                async with asyncio.timeout(seconds):
                    return await sleeper
        except TimeoutError:
            return False
        finally:
            if sleeper in sleepers:
                sleepers.remove(sleeper)
            if not sleepers and self._sleepers.get(who) is sleepers:
                del self._sleepers[who]

    def _wake(self, who: tuple[str, str]) -> None:
        sleepers = self._sleepers.get(who)
        while sleepers:
            sleeper = sleepers.popleft()
            if not sleeper.done():
                sleeper.set_result(True)
                return

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if not self._sleepers or not self._database.ready:
                continue
            try:
                async with self._database.reading() as connection:
                    for who in await claimable(connection, self._sleepers):
                        self._wake(who)
            except Exception:
                log.exception("looking for claimable tasks failed")

    # -- the transaction --

    def _start(
        self,
        attempt: Attempt,
        *,
        command: ClaimTasks,
        call: Call,
        respond: Callable[[list[Task]], bytes],
        taken: list[Task],
    ) -> None:
        """Claims in a task of its own, which goes on to its end whatever becomes of the caller."""
        attempt.started = True
        self._keep(self._transact(attempt, command, call, respond, taken))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _transact(
        self,
        attempt: Attempt,
        command: ClaimTasks,
        call: Call,
        respond: Callable[[list[Task]], bytes],
        taken: list[Task],
    ) -> None:
        """Settles the attempt, and notes in `taken` what it took."""
        current_trace.set(call.trace)
        try:
            answer = await self._claim(attempt, command, respond, taken)
        except Exception as error:
            self._door.give_up(attempt, error)
            return
        self._door.settle(attempt, answer)
        if attempt.result.cancelled():
            self._give_back(attempt, command, taken)

    async def _claim(
        self, attempt: Attempt, command: ClaimTasks, respond: Callable[[list[Task]], bytes], taken: list[Task]
    ) -> Answer:
        actor = command.actor
        claim = TaskClaim(
            tenant=actor.tenant,
            role=command.role,
            max_tasks=command.max_tasks,
            subject=actor.subject,
            acting_role=actor.acting_role(command.role),
            on_behalf_of=actor.on_behalf_of,
            trace_id=attempt.trace_id,
            method=attempt.method,
            scope=attempt.scope,
            fingerprints=attempt.fingerprints,
            key_hash=attempt.key_hash,
            command_id=attempt.command_id,
            lifetime=self._door.lifetimes.of_guard(attempt, 0),
            respond=respond,
        )
        alone = attempt.alone
        while True:
            if not self._database.ready:
                raise unavailable()
            if attempt.remaining < MARGIN:
                raise in_progress() if attempt.key_busy else resource_busy()
            ask = _Ask(attempt, claim)
            try:
                outcome = await self._asked(ask, alone)
            except NothingToClaimError:
                raise
            except Exception as error:
                if is_lock_timeout(error) or is_collision(error):
                    # Tasks that are locked are skipped: what is waited for is the key's own lock.
                    attempt.key_busy = attempt.key_hash is not None
                elif ask.sent and isinstance(error, (psycopg.OperationalError, OutcomeUnknownError)):
                    guard = await self._settled(attempt)
                    if guard is not None:
                        return self._door.replay(attempt, guard)
                    continue
                elif not ask.sent and attempt.key_busy:
                    raise in_progress() from None
                elif alone or not ask.sent:
                    raise (refusal(error) if isinstance(error, _OF_POSTGRES) else error) from error
                alone = True  # it may have been another's fault
                continue
            if outcome is None:
                attempt.key_busy = attempt.key_hash is not None
                alone = True
                continue
            if isinstance(outcome, Guard):
                return self._door.replay(attempt, outcome)
            tasks, body = outcome
            if not tasks:
                raise NothingToClaimError
            taken.extend(tasks)
            return self._door.finish(attempt, 0, body)

    async def _asked(self, ask: _Ask, alone: bool) -> Guard | Claimed | None:
        """As claim_tasks, for one claim: with company, or `alone`. Raises what that raises, and NothingToClaimError."""
        if alone:
            async with self._alone:
                await self._take([ask], wait=True)
        else:
            self._line(ask.claim.tenant, ask.claim.role).put(ask)
        return await ask.outcome

    def _line(self, tenant: str, role: str) -> Groups[_Ask]:
        """Where the role's claims form groups: one on its way at a time, so no role can keep others waiting."""
        line = self._lines.get((tenant, role))
        if line is None:
            if len(self._lines) >= MOST_LINES:
                self._lines = {who: line for who, line in self._lines.items() if line.busy}
            line = self._lines[tenant, role] = Groups("take", self._in_group, _Ask.fail)
        return line

    async def _in_group(self, group: list[_Ask]) -> None:
        for asks in _transactions(group):
            await self._take(asks, wait=False)

    async def _take(self, asks: list[_Ask], *, wait: bool) -> None:
        """Makes the claims of one transaction, and leaves each its outcome or the error."""
        for ask in asks:
            if ask.attempt.result.cancelled() and ask.attempt.key_hash is None:
                ask.fail(NothingToClaimError())  # the caller left while this one stood in line
        asks = [ask for ask in asks if not ask.outcome.done()]
        if not asks:
            return
        try:
            async with self._database.claims.connection(max(ask.attempt.remaining for ask in asks)) as connection:
                for ask in asks:
                    ask.sent = True
                    ask.attempt.timeline = connection.timeline
                with confirmed(connection, WATCHDOG_SECONDS):
                    outcomes = await claim_tasks(connection, [ask.claim for ask in asks], wait=wait)
        except Exception as error:
            for ask in asks:
                ask.fail(error)
        else:
            for ask, outcome in zip(asks, outcomes, strict=True):
                ask.outcome.set_result(outcome)

    async def _settled(self, attempt: Attempt) -> Guard | None:
        """After a lost connection: the guard if the claim was committed, None if it was not.

        Raises Unavailable OUTCOME_UNKNOWN.
        """
        self._door.keep_claim(attempt)
        loop = asyncio.get_running_loop()
        until = loop.time() + RESEND_SECONDS
        while True:
            try:
                async with self._database.claims.connection() as connection:
                    attempt.timeline = connection.timeline
                    with confirmed(connection, WATCHDOG_SECONDS):
                        return await recorded(connection, attempt.tenant, attempt.scope)
            except (psycopg.Error, PoolTimeout, OutcomeUnknownError):
                if loop.time() > until:
                    raise self._door.leave_open(attempt) from None
                await asyncio.sleep(RESEND_PAUSE)

    def _give_back(self, attempt: Attempt, command: ClaimTasks, taken: list[Task]) -> None:
        """A caller that has left never sees its lease ids: without a key nobody ever will."""
        if attempt.key_hash is None and taken:
            self._keep(self._release(command, taken.copy()))
            taken.clear()

    async def _release(self, command: ClaimTasks, taken: list[Task]) -> None:
        for task in taken:
            assert task.lease_id is not None
            release = ReleaseTask(actor=command.actor, id=task.id, lease_id=task.lease_id)
            try:
                await self._door.apply(self._mutations.release, release, command.actor)
            except ServiceError as error:
                log.warning("task not given back; its lease ends it", task_id=str(task.id), reason=error.reason)


@dataclass(slots=True, eq=False)
class _Ask:
    """A claim on its way to Postgres."""

    attempt: Attempt
    claim: TaskClaim
    outcome: asyncio.Future[Guard | Claimed | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    sent: bool = False
    """Postgres may have seen it."""

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


def _transactions(group: list[_Ask]) -> Iterator[list[_Ask]]:
    """The asks in order, as long as they want no more than MOST_TASKS together."""
    asks: list[_Ask] = []
    wanted = 0
    for ask in group:
        wanted += ask.claim.max_tasks
        if asks and wanted > MOST_TASKS:
            yield asks
            asks, wanted = [], ask.claim.max_tasks
        asks.append(ask)
    yield asks
