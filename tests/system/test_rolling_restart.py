"""Every process is stopped and started again, one after another, under calls of a client of both controllers."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PLANNER, Tenant, struct
from tests.system.conftest import World

CREATE = "/orchestrator.controller.v1.SessionService/CreateSession"


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    return start_world(controllers=2, env={"DRAIN_SECONDS": "1"})


def open_channel(targets: list[str], *, by_health: bool) -> grpc.aio.Channel:
    """A channel that goes round the targets; `by_health` it leaves one that says it is not ready."""
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if by_health:
        config["healthCheckConfig"] = {"serviceName": ""}
    options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    return grpc.aio.insecure_channel(f"ipv4:{','.join(targets)}", options)


async def test_restarts_under_calls(world: World, tenant: Tenant) -> None:
    """Who looks at the health loses no call. Who does not may, and has its answer when it asks again."""
    authorization = ("authorization", f"Bearer {tenant.agent().token}")
    stop = asyncio.Event()
    told: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    created: dict[str, str] = {}

    async def create(call: Any, key: str, by_health: bool) -> None:
        body = sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"key": key})).SerializeToString()
        while key not in created:
            try:
                response = await call(body, timeout=10, metadata=(authorization, ("idempotency-key", key)))
            except grpc.aio.AioRpcError as error:
                assert "database" not in str(error.details()), "it was called before it had looked for its database"
                told[by_health][error.code().name] += 1
            else:
                created[key] = response.session.id
                told[by_health]["OK"] += 1

    async def caller(by_health: bool) -> None:
        async with open_channel(world.pair.controller_targets, by_health=by_health) as channel:
            call: Any = channel.unary_unary(CREATE, response_deserializer=sessions_pb.CreateSessionResponse.FromString)
            while not stop.is_set():
                await create(call, secrets.token_hex(8), by_health)
                await asyncio.sleep(0.02)

    callers = [asyncio.create_task(caller(number % 2 == 0)) for number in range(6)]
    for name in ("controller", "idempotency", "controller-2"):
        before = told[True]["OK"]
        await asyncio.to_thread(world.pair.restart, name)
        assert told[True]["OK"] > before
    stop.set()
    await asyncio.gather(*callers)
    print({by_health: dict(answers) for by_health, answers in told.items()})
    assert set(told[True]) == {"OK"}
    assert set(told[False]) <= {"OK", "UNAVAILABLE", "CANCELLED"}
    assert len(set(created.values())) == len(created) == world.tables.sessions(tenant.name)
    world.tables.check()
