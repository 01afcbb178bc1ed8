"""The records of idempotency_svc, one at a time, as operators ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from svckit.errors import Unavailable

if TYPE_CHECKING:
    from controller_svc.core.records import RecordFacts


class Records:
    """The contract core.records.RecordCache. idempotency_svc does not offer its records yet, so none is reached."""

    async def facts(self, scope: bytes) -> RecordFacts | None:
        """The record of a scope."""
        _unavailable()

    async def release_whoever(self, scope: bytes) -> bool:
        """Ends the ownership of a record in progress."""
        _unavailable()


def _unavailable() -> NoReturn:
    raise Unavailable(
        "IDEMPOTENCY_UNAVAILABLE", "The idempotency service cannot be reached; its record may exist.", retry_after=1.0
    )
