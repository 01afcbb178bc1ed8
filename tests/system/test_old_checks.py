"""One key, one effect, one answer: with everything running, with idempotency_svc stopped, and with Redis stopped."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator

import pytest
import redis
from google.protobuf.field_mask_pb2 import FieldMask

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import AGENT, PLANNER, WORKER, Tenant, struct
from tests.oracle import eventually
from tests.system.conftest import NEAR_OFF, World

UNKNOWN = "01900000-0000-7000-8000-000000000000"
MODES = ("everything runs", "without idempotency_svc", "without Redis")


@pytest.fixture(scope="module")
def whole(start_world: Callable[..., World]) -> World:
    """The pair with all its parts."""
    return start_world(controller_env=NEAR_OFF)


@pytest.fixture(scope="module", params=MODES)
def world(request: pytest.FixtureRequest, whole: World) -> Iterator[World]:
    """The pair in each of the modes."""
    if request.param == "without idempotency_svc":
        whole.pair.kill("idempotency")
    elif request.param == "without Redis":
        whole.valkey.stop()
    yield whole
    whole.tables.check()
    if request.param == "without idempotency_svc":
        whole.pair.start("idempotency")
    elif request.param == "without Redis":
        whole.valkey.start()


def create(name: str = "n") -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name}))


async def test_same_key_two_keys_no_key(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    first = await agent.ask(create(), key="a")
    again = await agent.ask(create(), key="a")
    assert first.ok and again.body == first.body
    assert (first.replayed, again.replayed) == (False, True)
    assert world.tables.sessions(tenant.name) == 1
    second = await agent.ask(create(), key="b")
    assert second.response.session.id != first.response.session.id
    keyless = [(await agent.ask(create())).response.session.id for _ in range(2)]
    assert len({first.response.session.id, second.response.session.id, *keyless}) == 4
    assert world.tables.sessions(tenant.name) == 4
    assert world.tables.audits(tenant.name) == 4


async def test_200_calls_at_once_with_one_key(world: World, tenant: Tenant) -> None:
    """For creates, changes and claims alike: one row, 200 equal answers."""
    agent = tenant.agent(connections=4)
    session = await agent.create()
    await agent.change("Activate", session.id)
    for _ in range(4):
        await agent.route(session.id)
    requests = (
        create(),
        sessions_pb.UpdateSessionRequest(
            session_id=session.id, metadata=struct({"n": 1}), update_mask=FieldMask(paths=["metadata"])
        ),
        tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role="others"),
        tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2),
    )
    events = world.tables.audits(tenant.name)
    for request, effects in zip(requests, (1, 1, 1, 2), strict=True):
        answers = await asyncio.gather(*(agent.ask(request, key="one") for _ in range(200)))
        assert {answer.code.name for answer in answers} == {"OK"}
        assert len({answer.body for answer in answers}) == 1
        assert sum(not answer.replayed for answer in answers) == 1
        events += effects
        assert world.tables.audits(tenant.name) == events
    assert world.tables.sessions(tenant.name) == 2


async def test_a_key_belongs_to_its_request(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    first = await agent.ask(create("one"), key="k")
    with world.tables.unchanged(tenant.name):
        for _ in range(2):
            other = await agent.ask(create("another"), key="k")
            assert other.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
    assert (await agent.ask(create("one"), key="k")).body == first.body
    racing = await asyncio.gather(*(agent.ask(create(str(n % 2)), key="raced") for n in range(40)))
    assert len({answer.body for answer in racing if answer.ok}) == 1
    refused = [answer.refusal for answer in racing if not answer.ok]
    assert len(refused) == 20 and set(refused) == {("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")}
    assert world.tables.sessions(tenant.name) == 2


async def test_a_key_belongs_to_its_caller_and_method(world: World, tenant: Tenant) -> None:
    agent, other = tenant.agent("agent-1"), tenant.agent("agent-2")
    mine = await agent.ask(create(), key="k")
    theirs = await other.ask(create(), key="k")
    assert mine.ok and theirs.ok and not theirs.replayed
    assert mine.response.session.id != theirs.response.session.id
    session_id = mine.response.session.id
    for verb in ("Activate", "Pause", "Resume", "Complete"):
        answer = await agent.change(verb, session_id, key="k")
        assert answer.ok and not answer.replayed
    assert (await agent.session(session_id)).etag == "5"
    assert (await agent.ask(create(), key="k")).body == mine.body, "the session as it was created, not as it is now"
    assert (await agent.change("Pause", session_id, key="k")).replayed


async def test_a_kept_refusal_is_replayed_until_its_time_is_over(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    session = await agent.create()
    refused = await agent.change("Pause", session.id, key="early")
    assert refused.refusal == ("FAILED_PRECONDITION", "SESSION_STATE_INVALID")
    assert (await agent.change("Activate", session.id)).ok
    if complete(world):
        await seconds_in_redis(world, tenant, 9)
    again = await agent.change("Pause", session.id, key="early")
    assert again.said == refused.said and again.replayed
    if complete(world):
        # Answers come to Redis off the caller's path, in order: once this one is there, none comes after the flush.
        await agent.change("Pause", UNKNOWN, key="last")
        await seconds_in_redis(world, tenant, 5)
    ((seconds,),) = world.tables.rows(
        "select extract(epoch from expire_time - create_time) from idempotency_guards where tenant = %s and code = 9",
        tenant.name,
    )
    assert round(seconds) == 600
    # As if that time were over, for Redis too.
    world.tables.rows(
        "update idempotency_guards set create_time = create_time - interval '1 h', expire_time = now() - interval '1 s'"
        " where tenant = %s and code = 9",
        tenant.name,
    )
    if complete(world):
        with redis.Redis.from_url(world.valkey.url) as connection:
            connection.flushdb()
    anew = await agent.change("Pause", session.id, key="early")
    assert anew.ok and not anew.replayed
    assert (await agent.change("Resume", session.id)).ok
    committed = await agent.change("Pause", session.id, key="early")
    assert committed.body == anew.body and committed.replayed, "no error comes in the place of a committed OK"


async def test_a_refused_key_is_free_for_the_same_request_where_nothing_is_kept(world: World, tenant: Tenant) -> None:
    """A stale etag or a role not held says something about the moment: the same call is decided anew."""
    agent = tenant.agent("ada", permissions=(AGENT,))
    without = tenant.agent("ada", roles=(WORKER,), permissions=(AGENT,))
    assert (await without.ask(create(), key="k")).refusal == ("PERMISSION_DENIED", "ROLE_NOT_HELD")
    made = await agent.ask(create(), key="k")
    assert made.ok and not made.replayed
    assert (await without.ask(create(), key="k")).refusal == ("PERMISSION_DENIED", "ROLE_NOT_HELD")
    session_id = made.response.session.id
    stale = await agent.change("Activate", session_id, key="etag", etag="2")
    assert stale.refusal == ("ABORTED", "ETAG_MISMATCH")
    await agent.ask(
        sessions_pb.UpdateSessionRequest(
            session_id=session_id, metadata=struct({"n": 2}), update_mask=FieldMask(paths=["metadata"])
        )
    )
    good = await agent.change("Activate", session_id, key="etag", etag="2")
    assert good.response.session.etag == "3"


@pytest.mark.parametrize("world", MODES[:1], indirect=True)
async def test_the_record_in_redis_lives_a_day(world: World, tenant: Tenant) -> None:
    """And an error's at most ten minutes. The guards in Postgres outlive both."""
    agent = tenant.agent()
    session = await agent.create(key="k")
    assert (await agent.change("Pause", session.id, key="refused")).refusal[0] == "FAILED_PRECONDITION"
    for code, least, most, guard in ((0, 86_000, 86_400, 48 * 3600), (9, 0, 600, 600)):
        assert least < await seconds_in_redis(world, tenant, code) <= most
        life = world.tables.one(
            "select extract(epoch from expire_time - create_time) from idempotency_guards"
            " where tenant = %s and code = %s",
            tenant.name,
            code,
        )
        assert round(life) == guard


def complete(world: World) -> bool:
    """Whether no part of the world is stopped."""
    return world.valkey.child.running and world.pair.services["idempotency"].running


async def seconds_in_redis(world: World, tenant: Tenant, code: int) -> float:
    """How long the tenant's only answer with this code is kept in Redis, once it is there."""
    scope = world.tables.one("select scope from idempotency_guards where tenant = %s and code = %s", tenant.name, code)
    # A claim's record is there before its answer, without its bytes.
    answer = world.tables.one(
        "select answer from idempotency_guards where tenant = %s and code = %s", tenant.name, code
    )
    with redis.Redis.from_url(world.valkey.url) as connection:
        key = f"idem:{{{base64.b64encode(scope[:16]).decode().rstrip('=')}}}"
        await eventually(lambda: answer in (connection.get(key) or b""))
        return float(connection.pttl(key)) / 1000
