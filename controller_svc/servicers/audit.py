"""AuditService: reads of the audit trail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from controller_svc import convert
from orchestrator.controller.v1 import audit_service_pb2 as pb

if TYPE_CHECKING:
    from controller_svc.core.audit import AuditStore
    from controller_svc.pages import PageTokens
    from svckit.interceptors import Call


class AuditServicer:
    """Implements orchestrator.controller.v1.AuditService."""

    def __init__(self, store: AuditStore, pages: PageTokens) -> None:
        self._store = store
        self._pages = pages

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, call: Call) -> bytes:
        """Read a page of audit events, newest first."""
        tenant, filters = call.principal.tenant, convert.audit_filters(request)
        page = self._pages.page(request, tenant, call.policy.full_method, filters.values())
        before = int(page.after) if page.after else None
        events = await self._store.list(tenant, **filters, before=before, limit=page.size + 1)
        response = pb.ListAuditEventsResponse(next_page_token=page.next_token(events))
        for event in events[: page.size]:
            convert.fill_audit_event(response.audit_events.add(), event)
        if request.include_total_size:
            response.total_size = await self._store.count(tenant, **filters)
        return response.SerializeToString()
