"""What the server does by itself: sessions and leases expire, ended sessions' tasks end, guards are purged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import Counter

from controller_svc.core.mutations import system_actor
from controller_svc.core.sessions import ChangeSession
from controller_svc.core.tasks import CancelOrphan, LoseLease
from controller_svc.store.guards import purge
from svckit.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from controller_svc.core.mutations import Actor, Key, Mutation
    from controller_svc.core.sessions import SessionMutations, SessionStore
    from controller_svc.core.tasks import TaskMutations, TaskStore
    from controller_svc.mutation import Door
    from controller_svc.store.database import Database

log = structlog.get_logger(__name__)

BATCH = 100
MAX_UNDER_WAY = 1000
LEASE_SECONDS = 0.25
ORPHAN_SECONDS = 0.5
EXPIRY_SECONDS = 5.0
PURGE_SECONDS = 10.0
"""Pauses between two sweeps that found nothing more."""

SWEPT = Counter("orchestrator_swept_total", "Rows the server saw to by itself, by sweep.", ["sweep"])


class Sweepers:
    """Safe beside other replicas: each command is decided on the row as it is then, so what one swept no other does."""

    def __init__(
        self,
        database: Database,
        door: Door,
        *,
        sessions: SessionStore,
        session_mutations: SessionMutations,
        tasks: TaskStore,
        task_mutations: TaskMutations,
    ) -> None:
        self._database = database
        self._door = door
        self._sweeps: list[tuple[str, float, Callable[[], Awaitable[int]]]] = [
            (
                "lost leases",
                LEASE_SECONDS,
                self._through_the_door("lost leases", tasks.lost_leases, task_mutations.lose_lease, LoseLease),
            ),
            (
                "orphans",
                ORPHAN_SECONDS,
                self._through_the_door("orphans", tasks.orphans, task_mutations.cancel_orphan, CancelOrphan),
            ),
            (
                "expiry",
                EXPIRY_SECONDS,
                self._through_the_door("expiry", sessions.expirable, session_mutations.expire, ChangeSession),
            ),
            ("guards", PURGE_SECONDS, self._purge),
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._applying: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Starts every sweep."""
        self._tasks = [asyncio.create_task(self._repeat(*sweep)) for sweep in self._sweeps]

    async def stop(self) -> None:
        """Stops sweeping. Commands under way go on in the door."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, name: str, pause: float, sweep: Callable[[], Awaitable[int]]) -> None:
        while True:
            found = 0
            if self._database.ready:
                try:
                    found = await sweep()
                except ServiceError as error:
                    log.warning("sweep failed", sweep=name, reason=error.reason)
                except Exception:
                    log.exception("sweep failed", sweep=name)
            await asyncio.sleep(pause if found < BATCH else 0.01)

    def _through_the_door(
        self,
        name: str,
        find: Callable[[int], Awaitable[Sequence[Key]]],
        mutation: Mutation[Any],
        command: Callable[..., Any],
    ) -> Callable[[], Awaitable[int]]:
        under_way: set[Key] = set()

        async def one(key: Key) -> None:
            try:
                await self._apply(name, mutation, command, key)
            finally:
                under_way.discard(key)

        async def sweep() -> int:
            """Starts what is found and waits for nothing: a row that somebody holds keeps no other from being swept."""
            if len(under_way) >= MAX_UNDER_WAY:
                return 0
            keys = [key for key in await find(BATCH + len(under_way)) if key not in under_way]
            for key in keys:
                under_way.add(key)
                task = asyncio.create_task(one(key))
                self._applying.add(task)
                task.add_done_callback(self._applying.discard)
            return len(keys)

        return sweep

    async def _apply(self, name: str, mutation: Mutation[Any], command: Callable[..., Any], key: Key) -> None:
        """One row; one that fails is left for the next sweep and hinders no other."""
        actor: Actor = system_actor(key.tenant)
        try:
            await self._door.apply(mutation, command(actor=actor, id=key.id), actor)
        except ServiceError as error:
            log.warning("not swept", sweep=name, id=str(key.id), reason=error.reason)
        except Exception:
            log.exception("not swept", sweep=name, id=str(key.id))
        else:
            SWEPT.labels(name).inc()

    async def _purge(self) -> int:
        async with self._database.reading() as connection:
            purged = await purge(connection, BATCH * 5)
        SWEPT.labels("guards").inc(purged)
        return purged
