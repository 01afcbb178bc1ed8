"""Parts of the system away: what callers are told meanwhile, and that everything recovers by itself."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from deploy.local.issuer import Issuer
from deploy.local.servers import Postgres
from orchestrator.controller.v1 import audit_service_pb2 as audit_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, WORKER, Agent, Tenant, spans, struct
from tests.conftest import ServiceKeys
from tests.oracle import Tables, eventually
from tests.system.conftest import NEAR_OFF, World
from tests.system.pair import Pair

UNKNOWN = "01900000-0000-7000-8000-000000000000"


def create(name: str = "n") -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name}))


def records(connection: redis.Redis) -> list[bytes]:
    """The keys of all records in Redis."""
    return list(connection.scan_iter("idem:{*"))


async def is_serving(agent: Agent, name: str = "") -> bool:
    """Whether the health service says so, which it does without a token."""
    stub = agent.channels[0].unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await stub(health_pb2.HealthCheckRequest(service=name), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def told(log: str, level: str, about: str) -> int:
    """How many lines of this level with this in their text a log has."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return sum(line["level"] == level and about in line["event"] for line in lines)


class TestPostgres:
    """With a Postgres of its own, which is stopped, killed and started."""

    @pytest.fixture
    def pair(
        self, own_postgres: Postgres, redis_url: str, issuer: Issuer, service_keys: ServiceKeys, tmp_path: Path
    ) -> Iterator[Pair]:
        """A pair that has never seen its Postgres, in which there is not even a schema yet."""
        own_postgres.stop()
        services = Pair(
            database_url=own_postgres.url,
            redis_url=redis_url,
            issuer=issuer,
            service_key=service_keys.private,
            directory=tmp_path,
        )
        services.start(health="liveness")
        yield services
        services.stop()

    @pytest_asyncio.fixture
    async def agent(self, pair: Pair, issuer: Issuer) -> AsyncIterator[Agent]:
        tenant = Tenant(issuer, pair.controller_target)
        yield tenant.agent()
        await tenant.close()

    async def test_away_at_start_and_later(self, agent: Agent, pair: Pair, own_postgres: Postgres) -> None:
        await self._check_unavailable(agent)
        await asyncio.to_thread(own_postgres.start)
        kept = await agent.insist(create(), key="first")
        await eventually(lambda: is_serving(agent))
        assert await agent.health() == "HEALTH_HEALTHY"
        tables = Tables(own_postgres.url)

        # Killed under load, with every call asked again by its caller until it lasts.
        names = [f"n{n}" for n in range(300)]
        load = asyncio.gather(*(self._insist(agent, name, n / 60) for n, name in enumerate(names)))
        await asyncio.sleep(1.5)
        await asyncio.to_thread(own_postgres.child.kill)
        await eventually(lambda: self._is_away(agent))
        assert not await is_serving(agent) and await is_serving(agent, "liveness")
        await self._check_unavailable(agent)
        assert not load.done()
        await asyncio.to_thread(own_postgres.start)
        answered = await load
        await eventually(lambda: is_serving(agent))
        tables.close()
        tables = Tables(own_postgres.url)
        rows = dict(tables.rows("select metadata->>'name', array_agg(id::text) from sessions group by 1"))
        assert rows == {**dict(zip(names, answered, strict=True)), "n": [kept.response.session.id]}
        assert (await agent.ask(create(), key="first")).body == kept.body
        tables.check()
        tables.close()
        assert pair.services["controller"].running

    async def _insist(self, agent: Agent, name: str, delay: float) -> list[str]:
        await asyncio.sleep(delay)
        answer = await agent.insist(create(name), key=name)
        return [answer.response.session.id]

    async def _is_away(self, agent: Agent) -> bool:
        return await agent.health() == "HEALTH_UNAVAILABLE"

    async def _check_unavailable(self, agent: Agent) -> None:
        requests: list[Message] = [
            create(),
            sessions_pb.GetSessionRequest(session_id=UNKNOWN),
            sessions_pb.ListSessionsRequest(),
            sessions_pb.ActivateSessionRequest(session_id=UNKNOWN),
            tasks_pb.RouteTaskRequest(session_id=UNKNOWN, type="ROUTING", target_role=WORKER),
            tasks_pb.ClaimTasksRequest(role=WORKER, wait=spans(1)),
            tasks_pb.HeartbeatTaskRequest(task_id=UNKNOWN, lease_id=UNKNOWN),
            tasks_pb.CompleteTaskRequest(task_id=UNKNOWN, lease_id=UNKNOWN),
            audit_pb.ListAuditEventsRequest(),
        ]
        for request in requests:
            for key in ("", secrets.token_hex(8)):
                if key or not isinstance(request, tasks_pb.RouteTaskRequest):
                    answer = await agent.ask(request, key=key)
                    assert answer.refusal == ("UNAVAILABLE", "DATABASE_UNAVAILABLE"), f"{request}: {answer}"
        assert not await is_serving(agent) and await is_serving(agent, "liveness")
        status = await agent.status()
        assert status.health == status_pb.HEALTH_UNAVAILABLE
        assert status.postgres.state == status_pb.Component.STATE_DOWN and status.postgres.detail


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """The module's pair; it has to ask for each replay."""
    return start_world(controller_env=NEAR_OFF)


def configure(world: World, **settings: str) -> None:
    with redis.Redis.from_url(world.valkey.url) as connection:
        for name, value in settings.items():
            connection.config_set(name, value)


def follow(world: World, host: str, port: str) -> None:
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.replicaof(host, port)


FAULTS: dict[str, tuple[Callable[[World], Any], Callable[[World], Any]]] = {
    "Redis stopped": (lambda world: world.valkey.stop(), lambda world: world.valkey.start()),
    "Redis killed": (lambda world: world.valkey.child.kill(), lambda world: world.valkey.start()),
    "Redis hangs": (
        lambda world: world.valkey.child.send(signal.SIGSTOP),
        lambda world: world.valkey.child.send(signal.SIGCONT),
    ),
    "Redis out of memory": (
        lambda world: configure(world, maxmemory="1"),
        lambda world: configure(world, maxmemory="0"),
    ),
    "Redis read-only": (lambda world: follow(world, "127.0.0.1", "1"), lambda world: follow(world, "NO", "ONE")),
    "Redis evicting": (
        lambda world: configure(world, **{"maxmemory-policy": "allkeys-lru"}),
        lambda world: configure(world, **{"maxmemory-policy": "noeviction"}),
    ),
    "idempotency_svc killed": (
        lambda world: world.pair.kill("idempotency"),
        lambda world: world.pair.start("idempotency"),
    ),
    "idempotency_svc hangs": (
        lambda world: world.pair.kill("idempotency", signal.SIGSTOP),
        lambda world: world.pair.kill("idempotency", signal.SIGCONT),
    ),
}
"""What is done to the fast path, and how it is undone."""


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_the_fast_path_calls_succeed_once(fault: str, world: World, tenant: Tenant) -> None:
    """No call fails; one warning for each outage; degraded in GetStatus; no duplicate; healthy again by itself."""
    agent = tenant.agent()

    async def is_(wanted: str) -> bool:
        return await agent.health() == wanted

    await eventually(lambda: is_("HEALTH_HEALTHY"))
    controller_log, idempotency_log = (len(world.pair.log(name)) for name in ("controller", "idempotency"))
    before = [await agent.ask(create(f"before-{n}"), key=f"before-{n}") for n in range(5)]
    stop = asyncio.Event()
    failed: list[str] = []
    names: list[str] = []

    async def caller() -> None:
        while not stop.is_set():
            name = secrets.token_hex(8)
            names.append(name)
            answers = await asyncio.gather(*(agent.ask(create(name), key=name) for _ in range(2)))
            answers.append(await agent.ask(create(name), key=name))
            failed.extend(str(answer) for answer in answers if not answer.ok)
            assert failed or len({answer.body for answer in answers}) == 1

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    end, mend = FAULTS[fault]
    await asyncio.sleep(0.2)
    await asyncio.to_thread(end, world)
    try:
        await eventually(lambda: is_("HEALTH_DEGRADED"))
        status = await agent.status()
        assert status.idempotency.state == status_pb.Component.STATE_DOWN and status.idempotency.detail
        assert status.postgres.state == status_pb.Component.STATE_UP
        assert await is_serving(agent), "degraded is ready"
        for n, answer in enumerate(before):
            assert (await agent.ask(create(f"before-{n}"), key=f"before-{n}")).body == answer.body
        count = len(names)
        await eventually(lambda: len(names) > count + 50)
    finally:
        await asyncio.to_thread(mend, world)
    await eventually(lambda: is_("HEALTH_HEALTHY"))
    count = len(names)
    await eventually(lambda: len(names) > count + 20)
    stop.set()
    await asyncio.gather(*callers)
    assert failed == []
    await eventually(lambda: is_("HEALTH_HEALTHY"))
    # More than one outage if a process stood still for a quarter of a second.
    log = world.pair.log("controller")[controller_log:]
    assert 1 <= told(log, "warning", "idempotency_svc away") == told(log, "info", "idempotency_svc back") <= 3
    if fault.startswith("Redis"):
        log = world.pair.log("idempotency")[idempotency_log:]
        assert 1 <= told(log, "warning", "redis_away") == told(log, "info", "redis_ready") <= 3
    assert world.tables.sessions(tenant.name) == world.tables.audits(tenant.name) == len(names) + 5
    world.tables.check()


async def test_a_redis_that_forgot_is_told_again(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.flushall()
        first = await agent.ask(create(), key="k")
        await eventually(lambda: records(connection))
        connection.flushall()
        again = await agent.ask(create(), key="k")
        assert again.body == first.body and again.replayed
        await eventually(lambda: records(connection))
        other = await agent.ask(create("another"), key="k")
        assert other.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
        connection.flushall()
        other = await agent.ask(create("another"), key="k")
        assert other.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED"), "the guard alone knows"
        assert (await agent.ask(create(), key="k")).body == first.body
    assert world.tables.sessions(tenant.name) == 1


async def test_what_is_half_written_in_redis_does_no_harm(world: World, tenant: Tenant) -> None:
    """Garbage under every key: all is answered by Postgres."""
    agent = tenant.agent()
    answers = [await agent.ask(create(str(n)), key=str(n)) for n in range(10)]
    assert [str(answer) for answer in answers if not answer.ok] == []
    with redis.Redis.from_url(world.valkey.url) as connection:
        await eventually(lambda: len(records(connection)) >= 10)
        for n, key in enumerate(records(connection)):
            connection.set(key, (b"", b"\0", b"\xff" * 200, connection.get(key)[: 10 + n])[n % 4])
    for n, answer in enumerate(answers):
        again = await agent.ask(create(str(n)), key=str(n))
        assert again.body == answer.body and again.replayed
    assert world.tables.sessions(tenant.name) == 10


async def test_switched_off_and_with_keys_for_all(start_world: Callable[..., World], issuer: Issuer) -> None:
    """IDEMPOTENCY_ENABLED=false drops the fast path alone; IDEMPOTENCY_REQUIRE_KEY=all makes keys a must."""
    world = start_world(controller_env={"IDEMPOTENCY_ENABLED": "false", "IDEMPOTENCY_REQUIRE_KEY": "all"})
    tenant = Tenant(issuer, world.pair.controller_target)
    agent = tenant.agent()
    status = await agent.status()
    assert status.health == status_pb.HEALTH_HEALTHY
    assert status.idempotency.state == status_pb.Component.STATE_DISABLED
    assert (await agent.ask(create())).refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REQUIRED")
    claim = tasks_pb.ClaimTasksRequest(role=WORKER)
    assert (await agent.ask(claim)).refusal == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REQUIRED")
    answers = await asyncio.gather(*(agent.ask(create(), key="k") for _ in range(50)))
    assert len({answer.said for answer in answers}) == 1 and answers[0].ok
    assert world.tables.sessions(tenant.name) == 1
    assert (await agent.ask(create("other"), key="k")).refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
    assert (await agent.ask(sessions_pb.ListSessionsRequest())).ok, "reads need none"
    with redis.Redis.from_url(world.valkey.url) as connection:
        assert records(connection) == []
    await tenant.close()
