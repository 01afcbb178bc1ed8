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


@pytest.mark.parametrize("by_health", [True, False], ids=["by health", "blind"])
async def test_restarts_under_calls(by_health: bool, world: World, tenant: Tenant) -> None:
    """Who looks at the health loses no call. Who does not may, and has its answer when it asks again."""
    channel = open_channel(world.pair.controller_targets, by_health=by_health)
    call: Any = channel.unary_unary(CREATE, response_deserializer=sessions_pb.CreateSessionResponse.FromString)
    authorization = ("authorization", f"Bearer {tenant.agent().token}")
    stop = asyncio.Event()
    told: Counter[str] = Counter()
    created: dict[str, str] = {}

    async def create(key: str) -> None:
        body = sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"key": key})).SerializeToString()
        while key not in created:
            try:
                response = await call(body, timeout=10, metadata=(authorization, ("idempotency-key", key)))
            except grpc.aio.AioRpcError as error:
                assert "database" not in str(error.details()), "it was called before it had looked for its database"
                told[error.code().name] += 1
            else:
                created[key] = response.session.id
                told["OK"] += 1

    async def caller() -> None:
        while not stop.is_set():
            await create(secrets.token_hex(8))
            await asyncio.sleep(0.02)

    callers = [asyncio.create_task(caller()) for _ in range(6)]
    for name in ("controller", "idempotency", "controller-2") if by_health else ("controller",):
        before = told["OK"]
        await asyncio.to_thread(world.pair.restart, name)
        assert told["OK"] > before
    stop.set()
    await asyncio.gather(*callers)
    await channel.close()
    print(dict(told))
    assert set(told) <= ({"OK"} if by_health else {"OK", "UNAVAILABLE", "CANCELLED"})
    assert len(set(created.values())) == len(created) == world.tables.sessions(tenant.name)
    world.tables.check()
