"""What core.audit.AuditStore asks, of the store on Postgres."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest

from controller_svc.core.audit import RecordedAuditEvent
from tests.contract.rows import NOW, TENANT, insert_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from controller_svc.store.audit import Audit

Connection = psycopg.AsyncConnection[Any]
NONE: dict[str, Any] = dict.fromkeys(("resource_id", "method", "subject", "start_time", "end_time"))


def new_event(seconds: float = 0, **changes: Any) -> dict[str, Any]:
    """An event that was recorded so many seconds after NOW."""
    return {
        "tenant": TENANT,
        "create_time": NOW + timedelta(seconds=seconds),
        "method": "/orchestrator.controller.v1.TaskService/CompleteTask",
        "resource_type": "task",
        "resource_id": uuid4(),
        "version_before": 2,
        "version_after": 3,
        "state_before": "RUNNING",
        "state_after": "SUCCEEDED",
        "subject": "worker-1",
        "role": "coder",
        "on_behalf_of": "alice",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "key_hash": b"\x00\xff" * 16,
        "command_id": uuid4(),
    } | changes


async def record(connection: Connection, *events: dict[str, Any]) -> None:
    for event in events:
        await insert_values(connection, "audit_events", event)


def without_id(event: RecordedAuditEvent) -> dict[str, Any]:
    return {name: value for name, value in asdict(event).items() if name != "id"}


async def test_list_gives_back_what_was_stored(connection: Connection, audit: Audit) -> None:
    creation = {"version_before": 0, "version_after": 1, "state_before": "", "key_hash": None, "role": ""}
    events = [new_event(), new_event(1, resource_type="session", **creation)]
    await record(connection, *events)
    found = await audit.list(TENANT, **NONE, before=None, limit=100)
    assert [without_id(event) for event in found] == events[::-1]
    assert found[0].id > found[1].id > 0


async def test_list_pages_newest_first(connection: Connection, audit: Audit) -> None:
    events = [new_event(number) for number in range(7)]
    await record(connection, *events, new_event(tenant="other"))
    assert await pages(audit, limit=3) == events[::-1]
    assert await audit.count(TENANT, **NONE) == 7


async def test_events_of_one_moment_and_out_of_order_are_paged_once_each(connection: Connection, audit: Audit) -> None:
    """Of writers at the same time the one that took its id first may be the later one to read the clock."""
    events = [new_event(seconds) for seconds in (0, 0, 1, 0, 0, 2, 1, 0)]
    await record(connection, *events)
    in_order = [event for _, event in sorted(enumerate(events), key=lambda item: (item[1]["create_time"], item[0]))]
    for limit in (1, 2, 3, 100):
        assert await pages(audit, limit=limit) == in_order[::-1]


async def test_every_filter_and_all_together(connection: Connection, audit: Audit) -> None:
    resources = (uuid4(), uuid4())
    events = [
        new_event(number, resource_id=resource, method=method, subject=subject)
        for number in range(3)
        for resource in resources
        for method in ("/a.B/C", "/a.B/D")
        for subject in ("worker-1", "worker-2")
    ]
    await record(connection, *events, new_event(1, tenant="other", resource_id=resources[0], method="/a.B/C"))
    for resource_id in (None, resources[0], UUID(int=0)):
        for method in (None, "/a.B/D", "/a.b/D"):
            for subject in (None, "worker-2"):
                for start, end in ((None, None), (1, None), (None, 1), (1, 2), (2, 1)):
                    filters: dict[str, Any] = {
                        "resource_id": resource_id,
                        "method": method,
                        "subject": subject,
                        "start_time": None if start is None else NOW + timedelta(seconds=start),
                        "end_time": None if end is None else NOW + timedelta(seconds=end),
                    }
                    expected = [
                        event
                        for event in reversed(events)
                        if resource_id in (None, event["resource_id"])
                        and method in (None, event["method"])
                        and subject in (None, event["subject"])
                        and (start is None or event["create_time"] >= filters["start_time"])
                        and (end is None or event["create_time"] < filters["end_time"])
                    ]
                    assert await pages(audit, limit=5, **filters) == expected
                    assert await audit.count(TENANT, **filters) == len(expected)


@pytest.mark.parametrize("before", [None, 10**12])
async def test_a_tenant_without_events(audit: Audit, before: int | None) -> None:
    assert await audit.list("nobody", **NONE, before=before, limit=100) == []
    assert await audit.count("nobody", **NONE) == 0


async def pages(audit: Audit, limit: int, **filters: Any) -> list[dict[str, Any]]:
    """All pages after each other, without ids."""
    found: list[dict[str, Any]] = []
    before = None
    page: Sequence[RecordedAuditEvent]
    while page := await audit.list(TENANT, **(NONE | filters), before=before, limit=limit):
        found += [without_id(event) for event in page]
        before = page[-1].id
    return found
