"""Writes in groups under hostile neighbours: each takes effect once, and nobody pays for another's bad luck."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import PLANNER, WORKER, Agent, Answer, Tenant, struct
from tests.system.conftest import World, metric, repeated, show

UNKNOWN = "01900000-0000-7000-8000-000000000000"


def create(name: str, **metadata: str) -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name, **metadata}))


def update(session_id: str, name: str, **metadata: str) -> sessions_pb.UpdateSessionRequest:
    return sessions_pb.UpdateSessionRequest(
        session_id=session_id, metadata=struct({name: 1, **metadata}), update_mask=FieldMask(paths=["metadata"])
    )


def route(session_id: str) -> tasks_pb.RouteTaskRequest:
    return tasks_pb.RouteTaskRequest(session_id=session_id, type="ROUTING", target_role="others")


def named(world: World, tenant: Tenant) -> Counter[str]:
    """How many sessions there are of each name."""
    rows = world.tables.rows(
        "select metadata->>'name', count(*) from sessions where tenant = %s group by 1", tenant.name
    )
    return Counter(dict(rows))


def groups_above(world: World, size: int) -> float:
    """How many groups of writes with more commands than this the controller has sent."""
    all_, small = (
        metric(world, "controller", "orchestrator_group_size_bucket", queue="write", le=bound)
        for bound in ("+Inf", f"{size:.1f}")
    )
    return all_ - small


@contextmanager
def slow_commits(world: World) -> Iterator[None]:
    """While inside, a commit takes 2 ms per new session: backends that are ended then are most often in a COMMIT."""
    world.tables.rows(
        "create function slow_commit() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(0.002); return null; end $$"
    )
    world.tables.rows(
        "create constraint trigger slow_commit after insert on sessions deferrable initially deferred"
        " for each row execute function slow_commit()"
    )
    try:
        yield
    finally:
        world.tables.rows("drop function slow_commit cascade")


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World]) -> World:
    """The module's pair, with a proxy before Postgres."""
    return start_world(proxied={"postgres"})


@repeated(short=12, soak=100)
async def test_backends_ended_at_any_moment(rounds: int, world: World, tenant: Tenant) -> None:
    await _check_lost_connections(rounds, world, tenant, world.tables.end_backends)


@repeated(short=12, soak=100)
async def test_backends_ended_in_commits(rounds: int, world: World, tenant: Tenant) -> None:
    with slow_commits(world):
        await _check_lost_connections(rounds, world, tenant, world.tables.end_backends, longest_pause=0.5)


@repeated(short=12, soak=100)
async def test_answers_lost_after_commits(rounds: int, world: World, tenant: Tenant) -> None:
    """Postgres has written; what it said got lost on its way to the controller."""
    await _check_lost_connections(rounds, world, tenant, world.proxies["postgres"].lose_answers)


async def _check_lost_connections(
    rounds: int, world: World, tenant: Tenant, lose: Callable[[], int], *, longest_pause: float = 0.08
) -> None:
    """Keyed and keyless calls together: OK or UNAVAILABLE; what is said to be unwritten is; retries converge."""
    agent = tenant.agent(connections=2)
    sessions = [await agent.create() for _ in range(4)]
    keyed: dict[str, list[Answer]] = {}
    keyless: dict[str, Answer] = {}
    updates: dict[tuple[str, str], Answer] = {}
    stop = asyncio.Event()

    async def caller(number: int) -> None:
        rng = random.Random(number)
        for n in itertools.count():
            if stop.is_set():
                return
            name = f"{number}-{n}"
            match rng.randrange(4):
                case 0 | 1:
                    keyed[name] = [await agent.ask(create(name), key=name)]
                case 2:
                    keyless[name] = await agent.ask(create(name))
                case _:
                    session_id = rng.choice(sessions).id
                    updates[session_id, name] = await agent.ask(update(session_id, name))

    rng = random.Random(7)
    ended = 0
    callers = [asyncio.create_task(caller(number)) for number in range(40)]
    async with asyncio.timeout(200 + 10 * rounds):
        while ended < rounds or len(keyed) + len(keyless) + len(updates) < 200:
            await asyncio.sleep(rng.uniform(0.002, longest_pause))
            ended += lose()
            show("connections", min(ended, rounds), rounds)
    stop.set()
    await asyncio.gather(*callers)
    first = [answers[0] for answers in keyed.values()]
    everything = [*first, *keyless.values(), *updates.values()]
    assert {answer.code.name for answer in everything} <= {"OK", "UNAVAILABLE"}, Counter(map(str, everything))
    for name, answers in keyed.items():
        answers.append(await agent.ask(create(name), key=name))
        assert answers[1].ok
        if answers[0].ok:
            assert answers[1].body == answers[0].body and answers[1].replayed
    rows = named(world, tenant)
    assert {name: rows[name] for name in keyed} == dict.fromkeys(keyed, 1)
    merged = {session.id: (await agent.session(session.id)).metadata for session in sessions}
    for count, answer in [
        *((rows[name], answer) for name, answer in keyless.items()),
        *((int(name in merged[session_id]), answer) for (session_id, name), answer in updates.items()),
    ]:
        if answer.ok:
            assert count == 1
        elif answer.reason == "OUTCOME_UNKNOWN":
            assert count in (0, 1)
        else:
            assert count == 0, f"{answer}"
    world.tables.check()


async def test_claims_whose_answers_are_lost(world: World, tenant: Tenant) -> None:
    """A claim asked again with its key gets the same tasks: each is claimed once, and no lease is waited for."""
    agent = tenant.agent(connections=2)
    session = await agent.create()
    routing = tasks_pb.RouteTaskRequest(session_id=session.id, type="ROUTING", target_role=WORKER)
    tasks: list[str] = []
    done: list[str] = []
    keys = map(str, itertools.count())

    async def worker() -> None:
        while len(done) < len(tasks):
            claim = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=2)
            answer = await agent.insist(claim, key=next(keys))
            for claimed in answer.response.tasks:
                request = tasks_pb.CompleteTaskRequest(task_id=claimed.task.id, lease_id=claimed.lease_id)
                assert (await agent.insist(request, key=claimed.lease_id)).ok
                done.append(claimed.task.id)

    rng = random.Random(2)
    lost = 0
    while lost < 6:
        routed = await asyncio.gather(*(agent.insist(routing, key=secrets.token_hex(8)) for _ in range(400)))
        tasks += [answer.response.task.id for answer in routed]
        workers = asyncio.gather(*(worker() for _ in range(6)))
        while not workers.done():
            await asyncio.sleep(rng.uniform(0.02, 0.1))
            lost += world.proxies["postgres"].lose_answers() if rng.random() < 0.7 else world.tables.end_backends()
        await workers
    assert sorted(done) == sorted(tasks)
    attempts = world.tables.rows("select attempt, count(*) from tasks where tenant = %s group by 1", tenant.name)
    assert attempts == [(1, len(tasks))]
    world.tables.check()


async def test_a_locked_row_delays_only_its_own_callers(world: World, tenant: Tenant) -> None:
    """A stranger holds one row for 5 s; meanwhile hundreds of others' calls are answered, and none of that row's."""
    agent = tenant.agent(connections=2)
    held, *others = [await agent.create() for _ in range(9)]
    loop = asyncio.get_running_loop()
    with world.tables.locked(held.id):
        until = loop.time() + 5
        mine = [
            asyncio.create_task(agent.ask(update(held.id, f"n{n}"), key=f"held-{n}" if n % 2 else ""))
            for n in range(10)
        ]
        mine += [
            asyncio.create_task(agent.change("Activate", held.id)),
            asyncio.create_task(agent.ask(route(held.id), key="route")),
        ]
        brief = asyncio.create_task(agent.ask(update(held.id, "brief"), key="brief", timeout=1.5))
        answered = 0
        while loop.time() < until or answered < 300:
            assert loop.time() < until + 120, f"only {answered} others were answered"
            names = [secrets.token_hex(4) for _ in others]
            answers = await asyncio.gather(
                *(agent.ask(update(session.id, name)) for session, name in zip(others, names, strict=True)),
                *(agent.ask(create(name), key=name) for name in names),
                *(agent.ask(route(session.id), key=session.id + names[0]) for session in others[:2]),
            )
            assert all(answer.ok for answer in answers)
            answered += len(answers)
            assert not any(task.done() for task in mine)
        too_brief = await brief
        assert too_brief.refusal == ("ABORTED", "RESOURCE_BUSY") or too_brief.code.name == "DEADLINE_EXCEEDED"
    answers = await asyncio.gather(*mine)
    assert all(answer.ok for answer in answers)
    session = await agent.session(held.id)
    assert session.etag == "12" and len(await agent.events(held.id)) == 12
    assert "brief" not in session.metadata
    assert (await agent.ask(update(held.id, "brief"), key="brief")).ok, "its key is free"
    world.tables.check()


@pytest.mark.soak
async def test_a_call_without_a_deadline_gets_thirty_seconds(world: World, tenant: Tenant) -> None:
    agent = tenant.agent()
    held = await agent.create()
    with world.tables.locked(held.id):
        answer = await asyncio.wait_for(agent.ask(update(held.id, "n"), key="k", timeout=None), 60)
    assert answer.refusal in {("ABORTED", "RESOURCE_BUSY"), ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")}
    assert (await agent.ask(update(held.id, "n"), key="k")).ok


@contextmanager
def poisonous(world: World, key: str) -> Iterator[None]:
    """While inside, Postgres refuses sessions whose metadata has this key, which no check of ours foresees."""
    world.tables.rows(f"alter table sessions add constraint poison_check check (not metadata ? '{key}') not valid")
    try:
        yield
    finally:
        world.tables.rows("alter table sessions drop constraint poison_check")


@pytest.mark.parametrize("poisons", [1, 3])
async def test_a_poisonous_command_fails_alone(poisons: int, world: World, tenant: Tenant) -> None:
    agent = tenant.agent(connections=2)
    large = groups_above(world, 16)
    sessions = await asyncio.gather(*(agent.create() for _ in range(100)))
    for attempt in range(6):
        bad = set(random.Random(attempt).sample(range(100), poisons))
        poison = f"poison-{poisons}-{attempt}"
        requests = [
            update(session.id, f"n{attempt}", **({poison: "yes"} if n in bad else {}))
            if attempt % 2
            else create(f"{attempt}-{n}", **({poison: "yes"} if n in bad else {}))
            for n, session in enumerate(sessions)
        ]
        with poisonous(world, poison):
            answers = await asyncio.gather(
                *(agent.ask(request, key=f"{attempt}-{n}" if n % 3 else "") for n, request in enumerate(requests))
            )
            for n, answer in enumerate(answers):
                if n in bad:
                    assert answer.refusal == ("INVALID_ARGUMENT", "VALUE_REFUSED")
                else:
                    assert answer.ok, str(answer)
        for n in bad:
            if n % 3:
                assert (await agent.ask(requests[n], key=f"{attempt}-{n}")).ok, "nothing was kept for its key"
        if not attempt % 2:
            rows = named(world, tenant)
            assert [rows[f"{attempt}-{n}"] for n in range(100)] == [
                0 if n in bad and not n % 3 else 1 for n in range(100)
            ]
    assert groups_above(world, 16) > large, "the commands shared no group"
    world.tables.check()


async def test_with_a_tenth_refused_nothing_is_run_twice(world: World, tenant: Tenant) -> None:
    """Unknown sessions and illegal moves in every group: those are refused, all others have one effect each."""
    agent = tenant.agent(connections=2)
    rng = random.Random(3)
    sessions = [await agent.create() for _ in range(30)]

    async def one(n: int) -> tuple[str, Answer]:
        key = f"k{n}" if rng.random() < 0.7 else ""
        match n % 10:
            case 0:
                verb, session_id = rng.choice((("Pause", UNKNOWN), ("Complete", rng.choice(sessions).id)))
                return "refused", await agent.change(verb, session_id, key=key)
            case 1 | 2 | 3:
                return "task", await agent.ask(route(rng.choice(sessions).id), key=f"k{n}")
            case 4 | 5 | 6:
                return "change", await agent.ask(update(rng.choice(sessions).id, f"n{n}"), key=key)
            case _:
                return "session", await agent.ask(create(f"n{n}"), key=key)

    results: list[tuple[str, Answer]] = []
    for start in range(0, 2000, 200):
        results += await asyncio.gather(*(one(n) for n in range(start, start + 200)))
    counts = Counter(kind for kind, _ in results)
    for kind, answer in results:
        assert answer.ok == (kind != "refused"), f"{kind}: {answer}"
        if kind == "refused":
            assert answer.refusal in {
                ("NOT_FOUND", "SESSION_NOT_FOUND"),
                ("FAILED_PRECONDITION", "SESSION_STATE_INVALID"),
            }
    tasks = world.tables.one("select count(*) from tasks where tenant = %s", tenant.name)
    changes = world.tables.one(
        "select sum(version - 1) from sessions where tenant = %s and id = any(%s::uuid[])",
        tenant.name,
        [session.id for session in sessions],
    )
    assert (tasks, changes) == (counts["task"], counts["change"])
    assert world.tables.sessions(tenant.name) == 30 + counts["session"]
    assert world.tables.audits(tenant.name) == 30 + counts["session"] + counts["task"] + counts["change"]
    world.tables.check()


async def test_one_key_for_many_requests_and_many_keys_for_one_row(world: World, tenant: Tenant) -> None:
    """The hottest mix: 12 keys and 3 rows among 600 calls; per key one answer, per row no lost update."""
    agent = tenant.agent(connections=2)
    sessions = [await agent.create() for _ in range(3)]
    said: dict[str, set[tuple[int, bytes]]] = {}

    async def one(agent: Agent, n: int) -> None:
        key = f"k{n % 12}"
        answer = await agent.ask(update(sessions[n % 3].id, f"n{n % 4}-{n % 12}"), key=key)
        assert answer.ok, str(answer)
        said.setdefault(key, set()).add(answer.said)

    await asyncio.gather(*(one(agent, n) for n in range(600)))
    assert [len(answers) for answers in said.values()] == [1] * 12
    for n, session in enumerate(sessions):
        seen = await agent.session(session.id)
        assert seen.etag == "5"
        assert sorted(seen.metadata) == sorted(f"n{k % 4}-{k}" for k in range(12) if k % 3 == n)
    world.tables.check()
