"""The end of what is kept: a record's, a guard's, the time for retries; and guards that are purged under retries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import pytest_asyncio
import redis

from controller_svc.store.guards import PURGE
from deploy.local.issuer import Issuer
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from tests.client import PLANNER, Agent, Answer, Tenant, struct
from tests.oracle import eventually
from tests.system.conftest import NEAR_OFF, World, repeated, show

TTL = 120
"""Seconds: the shortest that the configuration takes."""

Two = tuple[Agent, Agent]


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """Two controllers that replay answers for two minutes."""
    env = {**NEAR_OFF, "IDEMPOTENCY_TTL_SECONDS": str(TTL), "IDEMPOTENCY_ERROR_TTL_SECONDS": str(TTL)}
    return start_world(controllers=2, controller_env=env)


@pytest_asyncio.fixture
async def agents(world: World, tenant: Tenant) -> AsyncIterator[Two]:
    """One subject at each of the two controllers."""
    _, second = world.pair.controller_targets
    yield tenant.agent(connections=2), tenant.agent(target=second, connections=2)


def create(name: str) -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name}))


def first_sent(seconds_ago: float) -> tuple[str, str]:
    return "idempotency-first-sent", (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()


def age(world: World, *tenants: str) -> None:
    """As if the time of what is kept for these tenants were over: in Redis, where it ends first, and in Postgres.

    Rows are locked in the order in which groups of writes lock them: there is no deadlock of the test's own making.
    """
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.flushall()
    world.tables.rows(
        "with old as materialized (select tenant, scope from idempotency_guards"
        " where tenant = any(%s) and expire_time > now() order by tenant, scope for update)"
        " update idempotency_guards g set create_time = create_time - interval '7 days',"
        " expire_time = now() - interval '1 second' from old where g.tenant = old.tenant and g.scope = old.scope",
        list(tenants),
    )


def answered(connection: redis.Redis, told: Mapping[str, Answer]) -> dict[str, bytes]:
    """The record of each key that has this answer, once each has one."""
    found = {
        key: record
        for record in connection.scan_iter("idem:{*")
        for key, answer in told.items()
        if answer.body in (connection.get(record) or b"")
    }
    return found if len(found) == len(told) else {}


@pytest.mark.parametrize(
    "waits", [pytest.param(False, id="short"), pytest.param(True, id="soak", marks=[pytest.mark.soak])]
)
async def test_the_end_of_the_time_for_retries(waits: bool, world: World, agents: Two, tenant: Tenant) -> None:
    """Asked without pause while the record ends: always a replay. Without a guard: told, and nothing is run again.

    In a short run the record's end is brought forward; else it is waited for.
    """
    asked, left = ["asked-1", "asked-2"], ["left-1", "left-2"]
    # Nobody asks for the second ones before their records are gone: a replay from a guard makes a new record.
    keys = asked + left
    sent = first_sent(0)
    told: dict[str, Answer] = {}
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.flushall()
        for key in keys:
            told[key] = await agents[0].ask(create(key), key=key, metadata=[sent])
        records = await eventually(lambda: answered(connection, told))
        seconds = max(float(connection.pttl(record)) / 1000 for record in records.values())
        assert 0 < seconds <= TTL
        if not waits:
            for record in records.values():
                connection.pexpire(record, 500)
            seconds, sent = 0.5, first_sent(TTL - 0.5)
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds + 1
        while loop.time() < until or any(connection.exists(records[key]) for key in left):
            for key in asked:
                for agent in agents:
                    again = await agent.ask(create(key), key=key, metadata=[sent])
                    assert again.body == told[key].body and again.replayed
            assert loop.time() < until + 60, "the records do not end"
    for key in keys:
        again = await agents[1].ask(create(key), key=key, metadata=[sent])
        assert again.body == told[key].body and again.replayed, "the guard outlives the record"
    for number, agent in enumerate(agents):
        # Each controller stores its answers in order: once this one is there, no other comes after `age`.
        key = f"last-{number}"
        keys.append(key)
        told[key] = await agent.ask(create(key), key=key)
    with redis.Redis.from_url(world.valkey.url) as connection:
        await eventually(lambda: answered(connection, told))
    age(world, tenant.name)
    with world.tables.unchanged(tenant.name):
        for key in keys:
            for agent in agents:
                late = await agent.ask(create(key), key=key, metadata=[first_sent(TTL + 1)])
                assert late.refusal == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_EXPIRED")
    early = await agents[0].ask(create("early"), key="early", metadata=[first_sent(TTL - 10)])
    assert early.ok and not early.replayed
    # What the contract says of who does not tell when it first tried.
    again = await agents[0].ask(create(keys[0]), key=keys[0])
    assert again.ok and not again.replayed and again.body != told[keys[0]].body
    assert world.tables.sessions(tenant.name) == world.tables.audits(tenant.name) == len(keys) + 2


@repeated(short=10, soak=300)
async def test_guards_are_purged_under_retries(
    rounds: int, world: World, agents: Two, tenant: Tenant, issuer: Issuer
) -> None:
    """What is expired is purged without pause while its keys are retried: once each time; what lives is not touched."""
    living = Tenant(issuer, world.pair.controller_target)
    others = [living.agent(target=target) for target in world.pair.controller_targets]
    kept = {f"k{n}": await others[n % 2].ask(create("kept"), key=f"k{n}") for n in range(20)}
    stop = asyncio.Event()
    purged = 0

    async def purge() -> None:
        nonlocal purged
        async with await psycopg.AsyncConnection.connect(world.tables.url, autocommit=True) as connection:
            while not stop.is_set():
                purged += (await connection.execute(PURGE, (5,))).rowcount
                await asyncio.sleep(0.002)

    purging = asyncio.create_task(purge())
    answers: dict[str, set[bytes]] = {f"k{n}": set() for n in range(20)}

    async def retry(key: str, agent: Agent, other: Agent) -> None:
        doomed, safe = await asyncio.gather(agent.ask(create("doomed"), key=key), other.ask(create("kept"), key=key))
        assert doomed.ok, str(doomed)
        answers[key].add(doomed.body)
        assert safe.body == kept[key].body and safe.replayed

    for number in range(rounds):
        calls = asyncio.gather(*(retry(key, *two) for key in answers for two in zip(agents, others, strict=True)))
        await asyncio.to_thread(age, world, tenant.name)
        await calls
        assert not purging.done()
        show("purges", number + 1, rounds)
    stop.set()
    await purging
    assert purged > rounds, "too little was purged for the run to count"
    assert world.tables.sessions(living.name) == len(kept)
    # Each answer is an effect and each effect an answer: none was doubled, and none was lost.
    assert world.tables.sessions(tenant.name) == world.tables.audits(tenant.name)
    assert world.tables.sessions(tenant.name) == sum(map(len, answers.values()))
    assert world.tables.one("select deadlocks from pg_stat_database where datname = current_database()") == 0
    await living.close()
