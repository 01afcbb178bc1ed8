"""SessionService on the running pair: what is kept, the whole state table, lists, updates, and races for the end."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from datetime import timedelta
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import AGENT, PLANNER, WORKER, Agent, Answer, Tenant, struct
from tests.oracle import Tables, eventually

STATES = ("PENDING", "ACTIVE", "PAUSED", "COMPLETED", "FAILED", "EXPIRED")
TABLE = {
    "Activate": "ACTIVE = × × × ×",
    "Pause": "× PAUSED = × × ×",
    "Resume": "× = ACTIVE × × ×",
    "Complete": "× COMPLETED × = × ×",
    "Fail": "× FAILED × × = ×",
}
SWEEPER = "EXPIRED EXPIRED EXPIRED – – –"
WAY = {
    "PENDING": (),
    "ACTIVE": ("Activate",),
    "PAUSED": ("Activate", "Pause"),
    "COMPLETED": ("Activate", "Complete"),
    "FAILED": ("Activate", "Fail"),
}
UNKNOWN = "01900000-0000-7000-8000-000000000000"


def state(session: sessions_pb.Session) -> str:
    return sessions_pb.Session.State.Name(session.state).removeprefix("STATE_")


async def in_state(agent: Agent, wanted: str) -> sessions_pb.Session:
    session = await agent.create()
    for verb in WAY[wanted]:
        session = (await agent.change(verb, session.id)).response.session
    assert state(session) == wanted
    return session


async def expire(tables: Tables, agent: Agent, *ids: str) -> None:
    """Moves the time of these sessions to the past, and returns when the sweeper has ended all of them."""
    tables.rows("update sessions set expire_time = create_time where id = any(%s::uuid[])", list(ids))

    async def all_expired() -> bool:
        return all([state(await agent.session(id_)) == "EXPIRED" for id_ in ids])

    await eventually(all_expired)


async def test_a_session_is_kept_as_it_was_created(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    metadata = struct({
        "text": "Grüße, \U0001f600 \u2028", "whole": 7, "part": 0.1, "large": 1e300, "none": None, "yes": True,
        "list": [1, [2, {"x": []}]], "": {}, "a.b": "dot",
    })  # fmt: skip
    before = tables.one("select now()")
    task = await agent.route((await agent.create()).id)
    session = await agent.create(task_id=task.id, metadata=metadata)
    assert session.metadata == metadata
    assert session.task_id == task.id
    assert session.agent_role == PLANNER
    assert state(session) == "PENDING"
    assert session.id[14] == "7" and session.id == session.id.lower()
    assert session.create_time == session.update_time
    assert abs((session.create_time.ToDatetime(tzinfo=before.tzinfo) - before).total_seconds()) < 60
    assert session.expire_time.ToDatetime() - session.update_time.ToDatetime() == timedelta(days=7)
    for unset in ("start_time", "pause_time", "end_time"):
        assert not session.HasField(unset)
    assert await agent.session(session.id) == session
    (event,) = await agent.events(session.id)
    assert (event.version_before, event.version_after, event.state_before, event.state_after) == (0, 1, "", "PENDING")
    assert (event.method, event.resource_type) == (
        "/orchestrator.controller.v1.SessionService/CreateSession",
        "session",
    )
    assert (event.subject, event.role, event.idempotency_key_hash) == ("agent-1", PLANNER, "")


async def test_the_callers_trace_is_in_the_audit_trail(agent: Agent) -> None:
    trace_id = secrets.token_hex(16)
    request = sessions_pb.CreateSessionRequest(agent_role=PLANNER)
    answer = await agent.ask(
        request, key="a-key", metadata=[("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01")]
    )
    (event,) = await agent.events(answer.response.session.id)
    assert event.trace_id == trace_id
    assert len(event.idempotency_key_hash) == 64 and "a-key" not in event.idempotency_key_hash


async def test_every_cell_of_the_state_table(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    """A move is one version and one audit event; what changes nothing answers OK; the rest names state and verb."""
    sessions: dict[tuple[str, str], sessions_pb.Session] = {}
    for actor in (*TABLE, "sweeper"):
        for before in STATES[:-1]:
            sessions[actor, before] = await in_state(agent, before)
        sessions[actor, "EXPIRED"] = await agent.create()
    busy = await agent.create()
    task = await agent.route(busy.id)
    ended = [sessions["sweeper", before].id for before in ("COMPLETED", "FAILED")]
    tables.rows("update sessions set expire_time = create_time where id = any(%s::uuid[])", [*ended, busy.id])
    by_sweeper = [sessions["sweeper", before].id for before in ("PENDING", "ACTIVE", "PAUSED")]
    await expire(tables, agent, *(sessions[actor, "EXPIRED"].id for actor in (*TABLE, "sweeper")), *by_sweeper)
    for actor in (*TABLE, "sweeper"):
        sessions[actor, "EXPIRED"] = await agent.session(sessions[actor, "EXPIRED"].id)

    for verb, row in TABLE.items():
        for before, cell in zip(STATES, row.split(), strict=True):
            await _check_verb(agent, tables, verb, before, cell, sessions[verb, before])

    assert state(await agent.session(busy.id)) == "PENDING", "unfinished tasks keep a session alive"
    await agent.cancel(task.id)
    await expire(tables, agent, busy.id)  # so the sweeper has been round once more
    for before, cell in zip(STATES, SWEEPER.split(), strict=True):
        was = sessions["sweeper", before]
        session = await agent.session(was.id)
        trail = await agent.events(was.id)
        if cell == "–":
            assert (state(session), session.etag, len(trail)) == (before, was.etag, int(was.etag))
        else:
            assert (state(session), len(trail)) == (cell, int(was.etag) + 1)
            assert session.HasField("end_time")
            assert trail[-1].method == "/orchestrator.controller.v1.Sweeper/ExpireSession"
            assert (trail[-1].subject, trail[-1].role) == ("system", "")


async def _check_verb(
    agent: Agent, tables: Tables, verb: str, before: str, cell: str, session: sessions_pb.Session
) -> None:
    answer = await agent.change(verb, session.id, etag=session.etag)
    if cell == "×":
        assert answer.refusal == ("FAILED_PRECONDITION", "SESSION_STATE_INVALID"), (verb, before)
        assert answer.metadata == {"session_id": session.id, "state": before, "verb": verb}
    elif cell == "=":
        assert answer.response.session == session, (verb, before)
    else:
        moved = answer.response.session
        assert (state(moved), moved.etag) == (cell, str(int(session.etag) + 1)), (verb, before)
        assert moved.HasField("end_time") == (cell in ("COMPLETED", "FAILED"))
        assert moved.HasField("start_time")
        assert moved.HasField("pause_time") == (cell == "PAUSED" or session.HasField("pause_time"))
        session = moved
    assert await agent.session(session.id) == session, (verb, before)
    assert len(await agent.events(session.id)) == int(session.etag), (verb, before)


async def test_25_complete_and_25_fail_at_once(tenant: Tenant, tables: Tables) -> None:
    """One verb wins: it answers OK to all its callers, with one version; the other is refused to all of its."""
    agent = tenant.agent(connections=2)
    winners: Counter[str] = Counter()
    for attempt in range(6):
        session = await in_state(agent, "ACTIVE")
        verbs = ["Complete", "Fail"] * 25
        if attempt % 2:
            verbs.reverse()
        keyed = attempt % 3 != 0
        answers = await asyncio.gather(
            *(agent.change(verb, session.id, key=secrets.token_hex(8) if keyed else "") for verb in verbs)
        )
        by_verb: dict[str, list[Answer]] = {"Complete": [], "Fail": []}
        for verb, answer in zip(verbs, answers, strict=True):
            by_verb[verb].append(answer)
        won, lost = ("Complete", "Fail") if by_verb["Complete"][0].ok else ("Fail", "Complete")
        winners[won] += 1
        assert {answer.response.session.etag for answer in by_verb[won]} == {"3"}
        assert {answer.refusal for answer in by_verb[lost]} == {("FAILED_PRECONDITION", "SESSION_STATE_INVALID")}
        assert len({answer.response.session.SerializeToString() for answer in by_verb[won]}) == 1
        assert tables.audits(tenant.name, session.id) == 3
        assert tables.one("select version from sessions where id = %s", session.id) == 3


async def test_updates_merge(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create(metadata=struct({"a": 1, "b": {"x": 1}, "c": "stays"}))

    async def update(paths: list[str], metadata: dict[str, Any], **fields: Any) -> Answer:
        request = sessions_pb.UpdateSessionRequest(
            session_id=session.id, metadata=struct(metadata), update_mask=FieldMask(paths=paths), **fields
        )
        return await agent.ask(request)

    merged = (await update(["metadata"], {"a": None, "b": {"y": 2}, "d": [1]})).response.session
    assert merged.metadata == struct({"b": {"y": 2}, "c": "stays", "d": [1]})
    assert merged.etag == "2"
    set_one = (await update(["metadata.d", "metadata.gone"], {"d": 5, "c": "ignored"})).response.session
    assert set_one.metadata == struct({"b": {"y": 2}, "c": "stays", "d": 5})
    removed = (await update(["metadata.d"], {})).response.session
    assert removed.metadata == struct({"b": {"y": 2}, "c": "stays"})
    task = await agent.route(session.id)
    tasked = (await update(["task_id"], {"c": "ignored"}, task_id=task.id, etag=removed.etag)).response.session
    assert (tasked.task_id, tasked.metadata) == (task.id, removed.metadata)
    with tables.unchanged(tenant.name):
        for same in (
            await update(["task_id"], {}, task_id=task.id),
            await update(["metadata"], {"c": "stays", "no": None}),
        ):
            assert same.response.session == tasked
        assert (await update(["metadata"], {"z": 1}, etag=removed.etag)).refusal == ("ABORTED", "ETAG_MISMATCH")
    untasked = (await update(["task_id"], {})).response.session
    assert untasked.task_id == ""
    assert untasked.expire_time.ToDatetime() - untasked.update_time.ToDatetime() == timedelta(days=7)
    assert [event.version_after for event in await agent.events(session.id)] == [1, 2, 3, 4, 5, 6]


async def test_concurrent_updates_with_one_etag_change_it_once(agent: Agent, tenant: Tenant, tables: Tables) -> None:
    session = await agent.create()
    requests = [
        sessions_pb.UpdateSessionRequest(
            session_id=session.id, metadata=struct({"n": n}), update_mask=FieldMask(paths=["metadata"]), etag="1"
        )
        for n in range(30)
    ]
    answers = await asyncio.gather(*(agent.ask(request, key=secrets.token_hex(8)) for request in requests))
    assert sum(answer.ok for answer in answers) == 1
    assert {answer.refusal for answer in answers if not answer.ok} == {("ABORTED", "ETAG_MISMATCH")}
    without = await asyncio.gather(
        *(agent.ask(type(request)(session_id=session.id, metadata=request.metadata, update_mask=request.update_mask))
          for request in requests)
    )  # fmt: skip
    changed = {answer.response.session.etag for answer in without}
    assert tables.audits(tenant.name, session.id) == 2 + len(changed - {"2"})
    assert (await agent.session(session.id)).etag == max(changed, key=int)


async def test_lists_are_complete_and_newest_first(tenant: Tenant) -> None:
    agent = tenant.agent()
    created = [await agent.create() for _ in range(7)]
    created += [await agent.create(WORKER) for _ in range(18)]
    for session in created[:5]:
        await agent.change("Activate", session.id)
    task = await agent.route(created[0].id)
    for session in created[3:9]:
        request = sessions_pb.UpdateSessionRequest(
            session_id=session.id, task_id=task.id, update_mask=FieldMask(paths=["task_id"])
        )
        assert (await agent.ask(request)).ok
    ids = [session.id for session in created]

    async def listed(page_size: int, **filters: Any) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = sessions_pb.ListSessionsRequest(
                page_size=page_size, page_token=token, include_total_size=True, **filters
            )
            page = (await agent.ask(request)).response
            found += [session.id for session in page.sessions]
            token = page.next_page_token
            if not token:
                assert page.total_size == len(found)
                return found
            assert len(page.sessions) == (page_size or 20)
            await agent.create("newer")  # appears on no later page

    agent = tenant.agent(roles=(PLANNER, WORKER, "newer"))
    assert await listed(7, agent_role=PLANNER) == ids[6::-1]
    assert await listed(1, state=sessions_pb.Session.STATE_ACTIVE) == ids[4::-1]
    assert await listed(2, agent_role=WORKER, task_id=task.id) == ids[8:6:-1]
    assert await listed(100, task_id=task.id, state=sessions_pb.Session.STATE_PENDING) == ids[8:4:-1]
    assert await listed(5, agent_role="nobody") == []
    page = (await agent.ask(sessions_pb.ListSessionsRequest(agent_role=WORKER))).response
    assert page.total_size == 0, "counted only when asked for"
    first = (await agent.ask(sessions_pb.ListSessionsRequest())).response
    assert len(first.sessions) == 20 and first.next_page_token
    many = (await agent.ask(sessions_pb.ListSessionsRequest(page_size=2**31 - 1))).response
    assert ids == [session.id for session in reversed(many.sessions) if session.agent_role != "newer"]


async def test_audit_events_are_listed_by_every_filter(tenant: Tenant) -> None:
    agent, other = tenant.agent(), tenant.agent("agent-2")
    session = await agent.create()
    await other.change("Activate", session.id)
    await agent.change("Pause", session.id, key="pause")
    await agent.change("Pause", session.id, key="pause")
    await agent.change("Complete", session.id)
    trail = await agent.events(session.id)
    assert [(e.subject, e.state_before, e.state_after) for e in trail] == [
        ("agent-1", "", "PENDING"),
        ("agent-2", "PENDING", "ACTIVE"),
        ("agent-1", "ACTIVE", "PAUSED"),
    ], "replays and refusals leave no event"
    assert len({event.command_id for event in trail}) == 3

    async def found(**filters: Any) -> list[str]:
        response = (await agent.ask(audit_pb.ListAuditEventsRequest(include_total_size=True, **filters))).response
        assert response.total_size == len(response.audit_events)
        return [event.id for event in response.audit_events]

    created, activated, paused = (event.id for event in trail)
    assert await found() == [paused, activated, created]
    assert await found(subject="agent-2") == [activated]
    assert await found(method="/orchestrator.controller.v1.SessionService/PauseSession") == [paused]
    assert await found(start_time=trail[1].create_time) == [paused, activated]
    assert await found(end_time=trail[1].create_time) == [created]
    assert await found(resource_id=UNKNOWN) == []
    pages: list[str] = []
    token = ""
    while not pages or token:
        response = (await agent.ask(audit_pb.ListAuditEventsRequest(page_size=1, page_token=token))).response
        pages += [event.id for event in response.audit_events]
        token = response.next_page_token
    assert pages == [paused, activated, created]
    plain = tenant.agent("agent-3", permissions=(AGENT,))
    refused = await plain.ask(audit_pb.ListAuditEventsRequest())
    assert refused.refusal == ("PERMISSION_DENIED", "PERMISSION_MISSING")
