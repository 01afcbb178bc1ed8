"""RecordService on the running pair: what operators see of a key, and that only they do."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import pytest

from controller_svc.idempotency import scope_of
from orchestrator.controller.v1 import record_service_pb2 as records_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.idempotency.v1 import idempotency_service_pb2 as idempotency_pb
from svckit.auth import TokenSigner
from tests.client import AGENT, AUDIT, OPERATE, PLANNER, Agent, Tenant

if TYPE_CHECKING:
    from deploy.local.issuer import Issuer
    from tests.conftest import ServiceKeys
    from tests.oracle import Tables
    from tests.system.pair import Pair

CREATE = "/orchestrator.controller.v1.SessionService/CreateSession"


def named(key: str, **changes: Any) -> records_pb.GetRecordRequest:
    fields = {"method": CREATE, "subject": "agent-1", "idempotency_key": key, **changes}
    return records_pb.GetRecordRequest(**fields)


async def guard_of(operator: Agent, key: str, **changes: Any) -> records_pb.Guard | None:
    response: records_pb.GetRecordResponse = (await operator.ask(named(key, **changes))).response
    return response.guard if response.HasField("guard") else None


async def test_the_guard_of_an_answer(tenant: Tenant, tables: Tables) -> None:
    agent, operator = tenant.agent(), tenant.agent("operator", permissions=(OPERATE,))
    key = secrets.token_hex(8)
    assert await guard_of(operator, key) is None
    answer = await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key=key)
    session = answer.response.session
    guard = await guard_of(operator, key)
    assert guard is not None
    (event,) = await agent.events(session.id)
    assert (guard.code, guard.answer_bytes, guard.command_id) == (0, len(answer.body), event.command_id)
    assert guard.create_time.seconds == pytest.approx(session.create_time.seconds, abs=60)
    assert guard.expire_time.seconds - guard.create_time.seconds == pytest.approx(48 * 3600, abs=2)
    (stored,) = tables.rows("select fingerprint from idempotency_guards where tenant = %s", tenant.name)
    assert list(guard.fingerprint_kinds) == ([1] if len(stored[0]) == 32 else [2, 3])


async def test_the_guard_of_a_refusal(agent: Agent) -> None:
    session = await agent.create()
    await agent.change("Activate", session.id)
    await agent.change("Complete", session.id)
    key = secrets.token_hex(8)
    refused = await agent.change("Pause", session.id, key=key)
    guard = await guard_of(agent, key, method="/orchestrator.controller.v1.SessionService/PauseSession")
    assert guard is not None
    assert (guard.code, guard.answer_bytes) == (9, len(refused.status.SerializeToString()))
    assert refused.refusal == ("FAILED_PRECONDITION", "SESSION_STATE_INVALID")


async def test_a_key_is_that_of_its_method_subject_and_issuer(agent: Agent, issuer: Issuer) -> None:
    key = secrets.token_hex(8)
    await agent.create(key=key)
    assert await guard_of(agent, key) is not None
    assert await guard_of(agent, key, issuer=issuer.url) is not None
    for other in (
        {"method": "/orchestrator.controller.v1.SessionService/UpdateSession"},
        {"subject": "agent-2"},
        {"issuer": "https://another"},
        {"idempotency_key": key[:-1]},
    ):
        assert await guard_of(agent, key, **other) is None


async def test_another_tenants_key_is_as_one_that_nobody_used(
    agent: Agent, shared_pair: Pair, issuer: Issuer, tables: Tables, tenant: Tenant
) -> None:
    key = secrets.token_hex(8)
    await agent.create(key=key)
    foreign = Tenant(issuer, shared_pair.controller_target)
    intruder = foreign.agent()
    try:
        with tables.unchanged(tenant.name):
            seen = await intruder.ask(named(key))
            assert seen.body == (await intruder.ask(named("never-used"))).body
            release = records_pb.ReleaseRecordRequest(method=CREATE, subject="agent-1", idempotency_key=key)
            await intruder.ask(release)
        assert await guard_of(agent, key) is not None
    finally:
        await foreign.close()


async def test_only_operators_may(tenant: Tenant) -> None:
    agent = tenant.agent(permissions=(AGENT, AUDIT, "orchestrator.approve"))
    for request in (named("a-key"), records_pb.ReleaseRecordRequest(method=CREATE)):
        answer = await agent.ask(request)
        assert answer.refusal == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert answer.metadata == {"permission": OPERATE}


async def test_the_record_of_an_answer(agent: Agent) -> None:
    key = secrets.token_hex(8)
    assert not (await agent.ask(named(key))).response.HasField("record")
    answer = await agent.ask(sessions_pb.CreateSessionRequest(agent_role=PLANNER), key=key)
    record = await record_of(agent, key)
    assert (record.state, record.code, record.durable) == (records_pb.Record.STATE_COMPLETED, 0, True)
    assert (record.answer_bytes, list(record.fingerprint_kinds)) == (len(answer.body), [2, 3])
    assert 86_000 < record.ttl_left.seconds <= 86_400
    assert not record.HasField("age"), "its guard tells"
    release = records_pb.ReleaseRecordRequest(method=CREATE, subject="agent-1", idempotency_key=key)
    assert not (await agent.ask(release)).response.released, "an answer stays"
    assert (await record_of(agent, key)).state == records_pb.Record.STATE_COMPLETED


async def test_a_record_in_progress_is_released(
    agent: Agent, shared_pair: Pair, issuer: Issuer, tenant: Tenant, service_keys: ServiceKeys
) -> None:
    """Its owner hangs, and its lease is long."""
    key = secrets.token_hex(8)
    scope = scope_of(issuer.url, tenant.name, "agent-1", CREATE, key)
    item = idempotency_pb.ClaimItem(
        scope=scope,
        fingerprints=[idempotency_pb.Fingerprint(kind=2, digest=bytes(32))],
        nonce=bytes(16),
        lease_millis=3_600_000,
        ttl_millis=86_400_000 - 60_000,  # as a minute after its claim
    )
    signer = TokenSigner(
        service_keys.private, issuer="controller_svc", subject="controller_svc", audience="idempotency_svc"
    )
    owner = Agent(shared_pair.idempotency_target, signer.token())
    await owner.ask(idempotency_pb.ClaimRequest(items=[item]))
    await owner.close()
    record = (await agent.ask(named(key))).response.record
    assert record.state == records_pb.Record.STATE_IN_PROGRESS
    assert 3590 < record.lease_left.seconds <= 3600
    assert 60 <= record.age.seconds < 70
    release = records_pb.ReleaseRecordRequest(method=CREATE, subject="agent-1", idempotency_key=key)
    assert (await agent.ask(release)).response.released
    assert not (await agent.ask(release)).response.released
    record = (await agent.ask(named(key))).response.record
    assert record.state == records_pb.Record.STATE_RELEASED


async def test_without_the_idempotency_service_the_guard_is_told_and_nothing_is_released(
    pair: Pair, issuer: Issuer
) -> None:
    alone = Tenant(issuer, pair.controller_target)
    agent = alone.agent()
    try:
        await agent.create(key="k")
        pair.kill("idempotency")
        response: records_pb.GetRecordResponse = (await agent.ask(named("k"))).response
        assert response.HasField("guard") and response.record_unavailable and not response.HasField("record")
        release = records_pb.ReleaseRecordRequest(method=CREATE, subject="agent-1", idempotency_key="k")
        assert (await agent.ask(release)).refusal == ("UNAVAILABLE", "IDEMPOTENCY_UNAVAILABLE")
        assert await guard_of(agent, "k") is not None
    finally:
        await alone.close()


async def record_of(agent: Agent, key: str) -> records_pb.Record:
    """The record once it is there: completions come after the answer."""
    async with asyncio.timeout(10):
        while True:
            response: records_pb.GetRecordResponse = (await agent.ask(named(key))).response
            if response.record.state == records_pb.Record.STATE_COMPLETED:
                return response.record
            await asyncio.sleep(0.02)
