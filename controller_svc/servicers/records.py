"""RecordService: what is kept of an idempotency key, and the end of an ownership that hangs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter

from controller_svc import convert
from controller_svc.idempotency import scope_of
from orchestrator.controller.v1 import record_service_pb2 as pb
from svckit.errors import Unavailable

if TYPE_CHECKING:
    from controller_svc.core.records import GuardStore, RecordCache
    from svckit.interceptors import Call

log = structlog.get_logger(__name__)

RELEASED = Counter("orchestrator_records_released_total", "Records in progress that operators released.")


class RecordServicer:
    """Implements orchestrator.controller.v1.RecordService."""

    def __init__(self, guards: GuardStore, records: RecordCache) -> None:
        self._guards = guards
        self._records = records

    async def GetRecord(self, request: pb.GetRecordRequest, call: Call) -> bytes:
        """Read both places; the guard is answered also while idempotency_svc is away."""
        scope = convert.key_scope(request, call.principal)
        response = pb.GetRecordResponse()
        guard = await self._guards.facts(call.principal.tenant, scope)
        if guard is not None:
            convert.fill_guard(response.guard, guard)
        try:
            record = await self._records.facts(scope)
        except Unavailable:
            response.record_unavailable = True
        else:
            if record is not None:
                convert.fill_record(response.record, record)
        return response.SerializeToString()

    async def ReleaseRecord(self, request: pb.ReleaseRecordRequest, call: Call) -> bytes:
        """End the ownership of a record. No resource changes, so the log tells of it and not the audit trail."""
        released = await self._records.release_whoever(convert.key_scope(request, call.principal))
        if released:
            RELEASED.inc()
        log.warning(
            "record released by an operator" if released else "no record to release",
            tenant=call.principal.tenant,
            operator=call.principal.subject,
            method=request.method,
            subject=request.subject,
            key_hash=scope_of(request.idempotency_key).hex(),
        )
        return pb.ReleaseRecordResponse(released=released).SerializeToString()
