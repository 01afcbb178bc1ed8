"""The records of idempotency_svc, one at a time, as operators ask for them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc

from controller_svc.core.records import RecordFacts, RecordState
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.errors import Unavailable

if TYPE_CHECKING:
    from orchestrator.idempotency.v1.idempotency_service_pb2_grpc import IdempotencyServiceAsyncStub

SECONDS = 1.0
"""How long an operator's question may take."""

_STATES = {
    pb.GetOutcome.Record.STATE_IN_PROGRESS: RecordState.IN_PROGRESS,
    pb.GetOutcome.Record.STATE_RELEASED: RecordState.RELEASED,
    pb.GetOutcome.Record.STATE_COMPLETED: RecordState.COMPLETED,
}


class Records:
    """The contract core.records.RecordCache. It asks whatever the breaker of the fast path says."""

    def __init__(self, stub: IdempotencyServiceAsyncStub | None, *, ttl: float) -> None:
        """`stub` None: idempotency_svc is switched off. `ttl` is the life of a claimed record in seconds."""
        self._stub = stub
        self._ttl = timedelta(seconds=ttl)

    async def facts(self, scope: bytes) -> RecordFacts | None:
        """The record of a scope."""
        response = await self._ask("Get", pb.GetRequest(items=[pb.GetItem(scope=scope)]))
        outcome = response.outcomes[0]
        if not outcome.HasField("record"):
            return None
        record = outcome.record
        in_progress = record.state == pb.GetOutcome.Record.STATE_IN_PROGRESS
        completed = record.state == pb.GetOutcome.Record.STATE_COMPLETED
        ttl_left = timedelta(milliseconds=record.ttl_left_millis)
        return RecordFacts(
            state=_STATES.get(record.state, RecordState.UNSPECIFIED),
            ttl_left=ttl_left,
            age=None if completed else max(self._ttl - ttl_left, timedelta()),
            lease_left=timedelta(milliseconds=record.lease_left_millis) if in_progress else None,
            epoch=record.epoch,
            code=record.code,
            durable=record.durable,
            timeline=record.timeline,
            fingerprint_kinds=tuple(record.fingerprint_kinds),
            answer_bytes=record.answer_bytes,
        )

    async def release_whoever(self, scope: bytes) -> bool:
        """Ends the ownership of a record in progress."""
        response = await self._ask("Release", pb.ReleaseRequest(items=[pb.ReleaseItem(scope=scope, forced=True)]))
        result = response.outcomes[0].result
        if result == pb.ReleaseOutcome.RESULT_AWAY:
            raise _unavailable()
        return bool(result == pb.ReleaseOutcome.RESULT_RELEASED)

    async def _ask(self, method: str, request: pb.GetRequest | pb.ReleaseRequest) -> Any:
        error = None
        if self._stub is not None:
            try:
                return await getattr(self._stub, method)(request, timeout=SECONDS)
            except grpc.aio.AioRpcError as failure:
                error = failure
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable(
        "IDEMPOTENCY_UNAVAILABLE",
        "The idempotency service cannot be reached, or is switched off; its record may exist.",
        retry_after=1.0,
    )
