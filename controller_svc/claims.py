"""ClaimTasks: tried at once, then at every sign of new tasks until the wait is over, with nothing held meanwhile.

Calls that claim at the same time share a transaction for each role.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from psycopg_pool import PoolTimeout

from controller_svc.core.tasks import ReleaseTask, TaskState
from controller_svc.idempotency import in_progress
from controller_svc.mutation import (
    MARGIN,
    RESEND_PAUSE,
    RESEND_SECONDS,
    Answer,
    Attempt,
)
from controller_svc.store.claims import NotNow, TaskClaim, claim_tasks, claimable, recorded
from controller_svc.store.database import (
    FAILURES,
    confirmed,
    is_collision,
    is_lock_timeout,
    is_unknown,
    resource_busy,
    unavailable,
)
from controller_svc.store.read import Guard
from svckit.errors import Aborted, ServiceError
from svckit.groups import Asked, Groups
from svckit.telemetry import current_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from uuid import UUID

    from controller_svc.core.mutations import Row
    from controller_svc.core.tasks import ClaimTasks, Task, TaskMutations
    from controller_svc.mutation import Door
    from controller_svc.store.claims import Claimed
    from controller_svc.store.database import Connection, Database
    from svckit.interceptors import Call

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""How often waiting roles are looked at whatever wake-ups say: others route tasks too, and schedules come due."""
MOST_LINES = 1000
"""Above so many roles, those whose claims are all done are forgotten to have had company."""
ALONE = 2
"""Claims on their way that wait for a lock; the pool has connections for others besides."""
MOST_TASKS = 256
"""What the claims of one transaction may ask for together, unless one of them asks for more."""
CONNECTION_SECONDS = 1.0
"""For which a transaction waits for a connection, before each of its claims looks whether it can wait on."""


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
        self._doubts: Groups[_Doubt] = Groups("settle", self._settle, _Doubt.fail)
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
            known = self._door.known(call)  # a retry may have been given tasks meanwhile
            if known is not None:
                return await known

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
            max_tasks=command.max_tasks,
            subject=actor.subject,
            acting_role=actor.acting_role(command.role),
            on_behalf_of=actor.on_behalf_of,
            trace_id=attempt.trace_id,
            scope=attempt.scope,
            fingerprints=attempt.fingerprints,
            key_hash=attempt.key_hash,
            command_id=attempt.command_id,
            lifetime=self._door.lifetimes.of_guard(attempt, 0),
            respond=respond,
        )
        single, waits = False, attempt.alone
        too_late: ServiceError | None = None
        while True:
            if not self._database.ready:
                raise unavailable()
            if attempt.remaining < MARGIN:
                raise in_progress() if attempt.key_busy else too_late or resource_busy()
            ask = _Ask(attempt, claim, single)
            try:
                outcome = await (self._wait_for_scope(ask, command.role) if waits else self._line_up(ask, command.role))
            except NothingToClaimError:
                raise
            except Exception as error:
                if is_lock_timeout(error) or is_collision(error):
                    # Tasks that are locked are skipped: who waits, waits for its key's own lock.
                    attempt.key_busy = attempt.key_busy or (waits and attempt.key_hash is not None)
                elif isinstance(error, PoolTimeout):
                    too_late = self._database.refusal(error)
                    continue
                elif ask.sent and is_unknown(error):
                    guard = await self._settled(attempt)
                    if guard is not None:
                        return self._door.replay(attempt, guard)
                    await asyncio.sleep(RESEND_PAUSE)
                elif single or waits or not ask.sent:
                    if isinstance(error, FAILURES):
                        raise self._database.refusal(error) from error
                    raise
                single = True  # it may have been another's fault
                continue
            if outcome is NotNow.HELD:
                waits = True
                attempt.key_busy = attempt.key_hash is not None
            elif isinstance(outcome, Guard):
                return self._door.replay(attempt, outcome)
            elif isinstance(outcome, tuple):
                tasks, body = outcome
                if not tasks:
                    raise NothingToClaimError
                taken.extend(tasks)
                return self._door.finish(attempt, 0, body)

    async def _line_up(self, ask: _Ask, role: str) -> Guard | Claimed | NotNow | None:
        """The claim's outcome in the next transaction of its role."""
        self._line(ask.attempt.tenant, role).put(ask)
        return await ask.answer

    async def _wait_for_scope(self, ask: _Ask, role: str) -> Guard | Claimed | NotNow | None:
        """The claim's outcome in a transaction of its own, which waits for who holds the scope."""
        try:
            async with asyncio.timeout(ask.attempt.remaining - MARGIN):
                await self._alone.acquire()
        except TimeoutError:
            return None
        try:
            await self._take(ask.attempt.tenant, role, [ask], wait=True)
        finally:
            self._alone.release()
        return await ask.answer

    def _line(self, tenant: str, role: str) -> Groups[_Ask]:
        """Where the role's claims form groups: one on its way at a time."""
        line = self._lines.get((tenant, role))
        if line is None:
            if len(self._lines) >= MOST_LINES:
                self._lines = {who: line for who, line in self._lines.items() if line.busy}
            line = self._lines[tenant, role] = Groups("take", partial(self._in_group, tenant, role), _Ask.fail)
        return line

    async def _in_group(self, tenant: str, role: str, group: list[_Ask]) -> None:
        """Makes a group's claims, in some transactions: who found no room in one is first in the next."""
        while group:
            count = _together(group)
            try:
                await self._take(tenant, role, group[:count], wait=False)
            except PoolTimeout as error:
                for ask in group:
                    ask.fail(error)
            group = [ask for ask in group if not ask.answer.done()]

    async def _take(self, tenant: str, role: str, asks: list[_Ask], *, wait: bool) -> None:
        """Makes the claims of one transaction; answers each but those that found no room. Raises PoolTimeout."""
        try:
            if asks := _wanted(asks):
                longest = max(ask.attempt.remaining for ask in asks)
                async with self._database.claims.connection(min(longest - MARGIN, CONNECTION_SECONDS)) as connection:
                    if asks := _wanted(asks):
                        await self._send(connection, tenant, role, asks, wait)
        except PoolTimeout:
            raise
        except Exception as error:
            if len(asks) > 1:
                log.warning("claims failed together", size=len(asks), error=repr(error))
            for ask in asks:
                ask.fail(error)

    async def _send(self, connection: Connection, tenant: str, role: str, asks: list[_Ask], wait: bool) -> None:
        for ask in asks:
            ask.sent = True
            ask.attempt.timeline = connection.timeline
        with confirmed(connection):
            claims = [ask.claim for ask in asks]
            outcomes = await claim_tasks(connection, tenant, role, asks[0].attempt.method, claims, wait=wait)
        for ask, outcome in zip(asks, outcomes, strict=True):
            if outcome is NotNow.NO_ROOM:
                ask.sent = False
            else:
                ask.give(outcome)

    async def _settled(self, attempt: Attempt) -> Guard | None:
        """After a lost connection: the guard if the claim was committed, None if it was not.

        Raises Unavailable OUTCOME_UNKNOWN.
        """
        self._door.keep_claim(attempt)
        loop = asyncio.get_running_loop()
        until = loop.time() + RESEND_SECONDS
        while True:
            doubt = _Doubt(attempt)
            self._doubts.put(doubt)
            found = await doubt.answer
            if not isinstance(found, NotNow):
                return found
            if loop.time() > until:
                raise self._door.leave_open(attempt)
            await asyncio.sleep(RESEND_PAUSE)

    async def _settle(self, doubts: list[_Doubt]) -> None:
        """Looks together at what became of claims."""
        scopes = [(doubt.attempt.tenant, doubt.attempt.scope) for doubt in doubts]
        try:
            async with self._database.claims.connection() as connection:
                with confirmed(connection):
                    found = await recorded(connection, scopes)
                for doubt, guard in zip(doubts, found, strict=True):
                    doubt.attempt.timeline = connection.timeline
                    doubt.give(guard)
        except FAILURES as error:
            for doubt in doubts:
                doubt.fail(error)

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
class _Ask(Asked["Guard | Claimed | NotNow | None"]):
    """A claim on its way to Postgres. None: its time was over before it was sent."""

    attempt: Attempt
    claim: TaskClaim
    single: bool
    """It shares its transaction with none."""
    sent: bool = False
    """Postgres may have seen it."""


@dataclass(slots=True, eq=False)
class _Doubt(Asked["Guard | NotNow | None"]):
    """A claim of which nobody knows yet whether it was made."""

    attempt: Attempt

    def fail(self, error: Exception) -> None:
        """Whatever the look failed with, it has found nothing out: the claim must not count as unmade."""
        self.give(NotNow.HELD)


def _wanted(asks: list[_Ask]) -> list[_Ask]:
    """Those that are to be sent: not of callers without a key that have left, nor of those that are late."""
    for ask in asks:
        if ask.attempt.result.cancelled() and ask.attempt.key_hash is None:
            ask.fail(NothingToClaimError())
        elif ask.attempt.remaining < MARGIN:
            ask.give(None)
    return [ask for ask in asks if not ask.answer.done()]


def _together(group: list[_Ask]) -> int:
    """How many of the group, from the first one, may share a transaction: at least one, and no more than MOST_TASKS."""
    wanted = 0
    for count, ask in enumerate(group):
        wanted += ask.claim.max_tasks
        if count and (ask.single or group[0].single or wanted > MOST_TASKS):
            return count
    return len(group)
