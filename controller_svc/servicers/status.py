"""StatusService: how this process and what it depends on are doing."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from controller_svc import convert
from orchestrator.controller.v1 import status_service_pb2 as pb

if TYPE_CHECKING:
    from controller_svc.core.status import Component
    from svckit.interceptors import Call


class Dependency(Protocol):
    """Something this process needs and watches."""

    def component(self) -> Component:
        """Its present state."""
        ...


class StatusServicer:
    """Implements orchestrator.controller.v1.StatusService. The process counts as started when this is made."""

    def __init__(self, database: Dependency, idempotency: Dependency, version: str) -> None:
        self._database = database
        self._idempotency = idempotency
        self._version = version
        self._started = time.monotonic()

    async def GetStatus(self, request: pb.GetStatusRequest, call: Call) -> bytes:
        """Without Postgres the service is unavailable, without room in it or the fast path degraded.

        A component that is switched off is no fault.
        """
        database, idempotency = self._database.component(), self._idempotency.component()
        response = pb.GetStatusResponse(version=self._version, health=pb.HEALTH_HEALTHY)
        if not database.up:
            response.health = pb.HEALTH_UNAVAILABLE
        elif database.detail or idempotency.up is False:
            response.health = pb.HEALTH_DEGRADED
        convert.fill_span(response.uptime, timedelta(seconds=time.monotonic() - self._started))
        convert.fill_component(response.postgres, database)
        convert.fill_component(response.idempotency, idempotency)
        return response.SerializeToString()
