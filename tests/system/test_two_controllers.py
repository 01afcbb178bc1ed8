"""Two controllers on one database and one idempotency_svc: they share keys, rows, page tokens and sweeps."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from deploy.local.issuer import Issuer
from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, Agent, Answer, Tenant, spans, struct
from tests.oracle import eventually
from tests.system.conftest import World

RETENTION = 8.0
"""Seconds after which an idle session expires here."""


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """Two controllers with a short retention."""
    return start_world(controllers=2, controller_env={"SESSION_RETENTION_DAYS": str(RETENTION / 86400)})


Two = tuple[Agent, Agent]


@pytest_asyncio.fixture
async def agents(world: World, issuer: Issuer) -> AsyncIterator[Two]:
    """The same subject at each of the controllers."""
    first, second = world.pair.controller_targets
    tenant = Tenant(issuer, first)
    yield tenant.agent(connections=2), tenant.agent(target=second, connections=2)
    await tenant.close()


async def told(agent: Agent, request: Message, key: str) -> Answer:
    """The answer, asked for again if a process stood still for a second, and found no connection for the call."""
    answer = await agent.ask(request, key=key)
    return await agent.insist(request, key=key) if answer.reason == "DATABASE_BUSY" else answer


def tenant_of(world: World, session: sessions_pb.Session) -> str:
    return str(world.tables.one("select tenant from sessions where id = %s", session.id))


async def test_page_tokens_are_good_on_both_and_after_a_restart(world: World, agents: Two) -> None:
    sessions = [await agents[0].create() for _ in range(9)]
    tasks = [await agents[1].route(sessions[0].id, target_role="others") for _ in range(9)]
    found: dict[str, list[str]] = {"sessions": [], "tasks": [], "audit_events": []}
    tokens = dict.fromkeys(found, "")
    requests: dict[str, Any] = {
        "sessions": sessions_pb.ListSessionsRequest(page_size=2, agent_role=PLANNER),
        "tasks": tasks_pb.ListTasksRequest(page_size=2, session_id=sessions[0].id),
        "audit_events": audit_pb.ListAuditEventsRequest(page_size=4, subject="agent-1"),
    }
    for page in range(5):
        for name, request in requests.items():
            request.page_token = tokens[name]
            response = (await agents[page % 2].ask(request)).response
            found[name] += [resource.id for resource in getattr(response, name)]
            tokens[name] = response.next_page_token
        if page == 1:
            await asyncio.to_thread(world.pair.restart, "controller")
            await agents[0].channels[0].channel_ready()
    assert set(tokens.values()) == {""}
    assert found["sessions"] == [session.id for session in reversed(sessions)]
    assert found["tasks"] == [task.id for task in reversed(tasks)]
    assert len(found["audit_events"]) == len(set(found["audit_events"])) == 18


@pytest.mark.parametrize("fast_path", [True, False], ids=["with idempotency_svc", "without idempotency_svc"])
async def test_one_key_at_both_at_once(fast_path: bool, world: World, agents: Two) -> None:
    if not fast_path:
        world.pair.kill("idempotency")
    session = await agents[0].create()
    tenant = tenant_of(world, session)
    for n in range(5):
        requests = (
            sessions_pb.CreateSessionRequest(agent_role=PLANNER),
            tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role="others"),
            sessions_pb.UpdateSessionRequest(
                session_id=session.id, metadata=struct({f"n{n}": n}), update_mask=FieldMask(paths=["metadata"])
            ),
        )
        before = world.tables.audits(tenant)
        answers = await asyncio.gather(
            *(told(agent, request, f"k{n}") for _ in range(20) for agent in agents for request in requests)
        )
        for kind in range(3):
            assert len({answer.said for answer in answers[kind::3]}) == 1
            assert answers[kind].ok
        assert world.tables.audits(tenant) == before + 3
    if not fast_path:
        await asyncio.to_thread(world.pair.start, "idempotency")
    world.tables.check()


async def test_verbs_race_across_both(world: World, agents: Two) -> None:
    """As on one controller: one verb answers OK to all with one version, the other is refused to all."""
    for _ in range(5):
        session = await agents[0].create()
        await agents[1].change("Activate", session.id)
        answers = await asyncio.gather(
            *(
                agents[n // 2 % 2].change(
                    ("Complete", "Fail")[n % 2], session.id, key=secrets.token_hex(8) if n % 3 else ""
                )
                for n in range(50)
            )
        )
        won, lost = (answers[::2], answers[1::2]) if answers[0].ok else (answers[1::2], answers[::2])
        assert {answer.response.session.SerializeToString() for answer in won} == {
            won[0].response.session.SerializeToString()
        }
        assert {answer.refusal for answer in lost} == {("FAILED_PRECONDITION", "SESSION_STATE_INVALID")}
        assert world.tables.one("select count(*) from audit_events where resource_id = %s", session.id) == 3
    world.tables.check()


async def test_a_poll_at_one_gets_what_is_routed_at_the_other(agents: Two) -> None:
    session = await agents[0].create()
    polls = [asyncio.create_task(agents[1].claim(wait=20)) for _ in range(3)]
    await asyncio.sleep(0.3)
    tasks = [await agents[0].route(session.id, lease_timeout=spans(60)) for _ in range(3)]
    given = [claimed.task.id for answer in await asyncio.gather(*polls) for claimed in answer]
    assert sorted(given) == sorted(task.id for task in tasks)


async def test_sweepers_beside_each_other_do_everything_once(world: World, agents: Two) -> None:
    """Idle sessions expire, lost leases end and orphans are cancelled: each by one audit event, whoever came first."""
    idle = [session for _ in range(75) for session in await asyncio.gather(*(agent.create() for agent in agents))]
    tenant = tenant_of(world, idle[0])
    used = await agents[0].create()
    pending = await agents[1].route(used.id, target_role="nobody")
    busy, ended = await agents[0].create(), await agents[0].create()
    leased = await asyncio.gather(
        *(agents[n % 2].route(busy.id, lease_timeout=spans(1), max_attempts=1) for n in range(100))
    )
    assert len(await agents[1].claim(max_tasks=100)) == 100
    orphans = await asyncio.gather(*(agents[n % 2].route(ended.id, target_role="others") for n in range(100)))
    await agents[0].change("Activate", ended.id)
    await agents[1].change("Complete", ended.id)

    def all_swept() -> bool:
        states = dict(
            world.tables.rows(
                "select state, count(*) from (select state from sessions where tenant = %s union all"
                " select state from tasks where tenant = %s) r group by 1",
                tenant,
                tenant,
            )
        )
        # Busy too: its tasks are dead by then. The two that are left are the session in use and its task.
        return states == {"EXPIRED": 151, "COMPLETED": 1, "DEAD": 100, "CANCELLED": 100, "PENDING": 2}

    await eventually(all_swept, seconds=60)
    trail = world.tables.rows(
        "select resource_id::text, count(*), count(*) filter (where subject = 'system') from audit_events"
        " where tenant = %s group by 1",
        tenant,
    )
    expected = {
        **{session.id: (2, 1) for session in idle},
        **{task.id: (3, 1) for task in leased},
        **{task.id: (2, 1) for task in orphans},
        busy.id: (2, 1),
        used.id: (1, 0),
        pending.id: (1, 0),
        ended.id: (3, 0),
    }
    assert {id_: (events, by_system) for id_, events, by_system in trail} == expected
    early = "select count(*) from sessions where tenant = %s and state = 'EXPIRED' and end_time < expire_time"
    assert world.tables.one(early, tenant) == 0
    for agent in agents:
        assert (await agent.claim(max_tasks=100)) == []
    world.tables.check()
