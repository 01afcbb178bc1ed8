"""Starts a service as usual, but it can be made to fail at named places: the product knows nothing of them.

    python -m tests.system.failpoints controller_svc

Wraps the functions below before the service is imported. A passage of a failpoint looks at the file FAILPOINT_FILE: a
line `name action nth seconds` there arms one failpoint, `Failpoints` writes it. The nth passage after that disarms it,
notes the hit in FAILPOINT_FILE.hits, waits `seconds`, and acts. CLOCK_OFFSET (seconds) moves the process' wall clock.
Claims have a second: tests wait for who has met one, which after 50 ms of standing still nobody would.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio
import psycopg

from svckit.errors import Unavailable

FILE = "FAILPOINT_FILE"
OFFSET = "CLOCK_OFFSET"

Action = Literal["kill", "exit", "stop", "delay", "raise"]
"""SIGKILL, exit code 1, SIGSTOP (until somebody sends SIGCONT), only the wait, an error of the place's own kind."""


@dataclass(frozen=True, slots=True)
class Place:
    """An async function of the product, and what the failpoints before it and after its return are named.

    `owner` is a module, or `module:Class`. A generated stub has its methods only once it is made: `attribute` is then
    looked for in what `__init__` has set.
    """

    owner: str
    attribute: str
    before: str
    after: str
    error: Callable[[], Exception]


def _lost_connection() -> Exception:
    return psycopg.OperationalError("failpoint: the connection is lost")


def _unreachable() -> Exception:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "failpoint: unreachable")


def _refused() -> Exception:
    return Unavailable("REDIS_UNAVAILABLE", "failpoint: refused")


_STUB = "orchestrator.idempotency.v1.idempotency_service_pb2_grpc:IdempotencyServiceStub"
_SERVICER = "idempotency_svc.servicer:IdempotencyServicer"

PLACES: Mapping[str, tuple[Place, ...]] = {
    "controller_svc": (
        Place("controller_svc.store.write", "write", "before-write", "after-write", _lost_connection),
        Place("controller_svc.store.claims", "claim_tasks", "before-take", "after-take", _lost_connection),
        Place("controller_svc.mutation:Door", "write", "before-door", "before-answer", _refused),
        Place(_STUB, "Claim", "before-claim", "after-claim", _unreachable),
        Place(_STUB, "Await", "before-await", "after-await", _unreachable),
        Place(_STUB, "Complete", "before-complete", "after-complete", _unreachable),
        Place(_STUB, "Release", "before-release", "after-release", _unreachable),
    ),
    "idempotency_svc": (
        Place(_SERVICER, "Claim", "before-claim-script", "after-claim-script", _refused),
        Place(_SERVICER, "Await", "before-wait", "after-wait", _refused),
        Place(_SERVICER, "Complete", "before-complete-script", "after-complete-script", _refused),
        Place(_SERVICER, "Release", "before-release-script", "after-release-script", _refused),
    ),
}
"""What can fail, by service. after-write is after COMMIT: the statement is its own transaction."""

NAMES = {
    service: frozenset(name for place in places for name in (place.before, place.after))
    for service, places in PLACES.items()
}


class Failpoints:
    """The test's side: arms one failpoint at a time of one service, and sees what was hit."""

    def __init__(self, service: str, file: Path) -> None:
        self._names = NAMES[service]
        self._file = file
        self._hits = file.with_suffix(".hits")

    @property
    def env(self) -> dict[str, str]:
        """What the service has to be started with."""
        return {FILE: str(self._file)}

    def arm(self, name: str, action: Action, *, nth: int = 1, seconds: float = 0) -> None:
        """The nth passage from now on acts, after `seconds`; one armed before is forgotten. KeyError: no such name."""
        if name not in self._names:
            raise KeyError(name)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{name} {action} {nth} {seconds}")
        fresh.replace(self._file)

    def disarm(self) -> None:
        """Nothing fails any more."""
        self._file.unlink(missing_ok=True)

    @property
    def hits(self) -> list[str]:
        """The names of the failpoints that acted, in order."""
        return self._hits.read_text().split() if self._hits.exists() else []


class _Armed:
    """The service's side."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: tuple[int, int] | None = None
        self._passages = 0

    async def passage(self, name: str, error: Callable[[], Exception]) -> None:
        try:
            line = self._file.read_text()
            stat = self._file.stat()
        except FileNotFoundError:
            return
        if (stat.st_ino, stat.st_mtime_ns) != self._seen:
            self._seen = (stat.st_ino, stat.st_mtime_ns)
            self._passages = 0
        armed, action, nth, seconds = line.split()
        if armed != name:
            return
        self._passages += 1
        if self._passages != int(nth):
            return
        # First disarmed: who is started again must not fall at the same place.
        self._file.unlink(missing_ok=True)
        with self._file.with_suffix(".hits").open("a") as hits:
            hits.write(f"{name}\n")
        await asyncio.sleep(float(seconds))
        match action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(1)
            case "raise":
                raise error()


def _wrapped(function: Callable[..., Awaitable[Any]], place: Place, armed: _Armed) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(function, updated=())
    async def wrapper(*arguments: Any, **named: Any) -> Any:
        await armed.passage(place.before, place.error)
        answer = await function(*arguments, **named)
        await armed.passage(place.after, place.error)
        return answer

    return wrapper


def install(service: str, armed: _Armed) -> None:
    """Wraps all places of a service. Raises AttributeError for one that is not there any more."""
    for place in PLACES[service]:
        module, _, name = place.owner.partition(":")
        owner: Any = importlib.import_module(module)
        if not name:
            setattr(owner, place.attribute, _wrapped(getattr(owner, place.attribute), place, armed))
            continue
        owner = getattr(owner, name)
        if hasattr(owner, place.attribute):
            setattr(owner, place.attribute, _wrapped(getattr(owner, place.attribute), place, armed))
        else:
            owner.__init__ = _wrapping_init(owner.__init__, place, armed)


def _wrapping_init(init: Callable[..., None], place: Place, armed: _Armed) -> Callable[..., None]:
    def wrapper(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        setattr(self, place.attribute, _wrapped(getattr(self, place.attribute), place, armed))

    return wrapper


def missing() -> list[str]:
    """The places that the product does not have, so that a renamed function is noticed."""
    found = []
    for place in (place for places in PLACES.values() for place in places):
        module, _, name = place.owner.partition(":")
        owner: Any = importlib.import_module(module)
        if name:
            owner = getattr(owner, name, None)
        if place.owner == _STUB and owner is not None:
            owner = owner(grpc.insecure_channel("127.0.0.1:1"))
        if not hasattr(owner, place.attribute):
            found.append(f"{place.owner}.{place.attribute}")
    return found


def main(service: str) -> None:
    """Runs the service's own `__main__`."""
    offset = float(os.environ.get(OFFSET, "0"))
    if offset:
        real = time.time
        time.time = lambda: real() + offset
    # In the order of the table: a function that others import by name is wrapped before they do.
    install(service, _Armed(Path(os.environ[FILE])))
    if service == "controller_svc":
        from controller_svc import idempotency

        idempotency.CLAIM_SECONDS = 1.0
    sys.argv = [service]
    runpy.run_module(service, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
