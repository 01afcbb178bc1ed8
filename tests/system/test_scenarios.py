"""Failure scenarios of docs/IDEMPOTENCY.md that no other test is about: real processes, two controllers, one key."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
import pytest_asyncio
import redis
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from deploy.local.issuer import Issuer
from deploy.local.processes import LOOPBACK, free_port
from deploy.local.servers import Postgres, Valkey, embedded_valkey
from idempotency_svc.cache import Cache, GetItem, Record, State
from orchestrator.controller.v1 import record_service_pb2 as records_pb
from orchestrator.controller.v1 import session_service_pb2 as sessions_pb
from orchestrator.controller.v1 import status_service_pb2 as status_pb
from orchestrator.controller.v1 import task_service_pb2 as tasks_pb
from tests.client import AGENT, AUDIT, PLANNER, WORKER, Agent, Answer, Tenant, spans, struct
from tests.contract.caches import cache_on, key_of
from tests.history import Traffic
from tests.oracle import Tables, eventually
from tests.system.conftest import NEAR_OFF, World, metric, repeated, show
from tests.system.proxy import Proxy

CREATE = "/orchestrator.controller.v1.SessionService/CreateSession"


def create(name: str = "n") -> sessions_pb.CreateSessionRequest:
    return sessions_pb.CreateSessionRequest(agent_role=PLANNER, metadata=struct({"name": name}))


def update(session_id: str, name: str) -> sessions_pb.UpdateSessionRequest:
    return sessions_pb.UpdateSessionRequest(
        session_id=session_id, metadata=struct({name: 1}), update_mask=FieldMask(paths=["metadata"])
    )


def records(connection: redis.Redis) -> list[bytes]:
    """The keys of all records in Redis."""
    return list(connection.scan_iter("idem:{*"))


def unguarded(world: World, connection: redis.Redis) -> set[bytes]:
    """As `records`, of calls without an answer: completions of earlier ones may arrive at any time."""
    found = set(records(connection))
    return found - {key_of(scope).encode() for (scope,) in world.tables.rows("select scope from idempotency_guards")}


def has_record(server: Valkey, answer: Answer) -> bool:
    """Whether a record has this answer, which must not be so large that it is compressed."""
    with redis.Redis.from_url(server.url) as connection:
        return any(answer.body in (connection.get(key) or b"") for key in records(connection))


async def is_recorded(server: Valkey, answer: Answer, agent: Agent, key: str) -> None:
    """Returns when a record has this answer to a create. Completions come after answers; a retry mends one lost."""

    async def has_it() -> bool:
        again = await agent.insist(create(key), key=key)
        assert again.said == answer.said, str(again)
        return has_record(server, answer)

    await eventually(has_it, pause=0.1)


async def is_healthy(*agents: Agent) -> bool:
    """Whether each controller says that nothing is away."""
    return all([(await agent.status()).health == status_pb.HEALTH_HEALTHY for agent in agents])


@pytest.fixture(scope="module")
def world(start_world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two controllers with failpoints, and proxies before Postgres and Redis."""
    program = tmp_path_factory.mktemp("valkey") / "valkey-server"
    program.write_text(f'#!/bin/sh\nexec "{embedded_valkey()}" "$@" --enable-debug-command local\n')
    program.chmod(0o755)
    return start_world(
        controllers=2,
        failpoints=True,
        proxied={"redis", "postgres"},
        controller_env=NEAR_OFF,
        redis_binary=program,
    )


Two = tuple[Agent, Agent]


@pytest_asyncio.fixture
async def agents(world: World, tenant: Tenant) -> AsyncIterator[Two]:
    """One subject at each of the two controllers."""
    _, second = world.pair.controller_targets
    yield tenant.agent(connections=2), tenant.agent(target=second, connections=2)


# -- Redis forgets --


def flush(world: World) -> int:
    """Gives how many records there were."""
    with redis.Redis.from_url(world.valkey.url) as connection:
        count = int(connection.dbsize())
        connection.flushall()
    return count


def flush_scripts(world: World) -> int:
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.script_flush()
    return 1


def reload(world: World) -> int:
    """Redis saves everything, forgets it and reads it again."""
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.execute_command("DEBUG", "RELOAD")
    return 1


def kill(world: World) -> int:
    world.valkey.child.kill()
    world.valkey.start()
    return 1


def kill_without_its_file(world: World) -> int:
    """As a Redis without an append-only file: it comes back empty. Gives how many records there were."""
    with redis.Redis.from_url(world.valkey.url) as connection:
        count = int(connection.dbsize())
        folder = Path(connection.config_get("dir")["dir"]) / connection.config_get("appenddirname")["appenddirname"]
    world.valkey.child.kill()
    shutil.rmtree(folder)
    world.valkey.start()
    return count


FORGETTING: Mapping[str, tuple[Callable[[World], int], int, int]] = {
    "FLUSHALL": (flush, 20, 600),
    "SCRIPT FLUSH": (flush_scripts, 20, 600),
    "DEBUG RELOAD": (reload, 5, 100),
    "kill": (kill, 2, 100),
    "kill without its file": (kill_without_its_file, 2, 100),
}
"""What is done to Redis, and how often: in a short run, in `make soak`."""

CALLERS = 32
FORGETTINGS = [
    pytest.param(
        fault,
        rounds,
        id=f"{fault}-{kind}",
        marks=[pytest.mark.soak, pytest.mark.timeout(1800)] if kind == "soak" else [],
    )
    for fault, (_, short, soak) in FORGETTING.items()
    for kind, rounds in (("short", short), ("soak", soak))
]


@pytest.mark.parametrize("fault,rounds", FORGETTINGS)
async def test_redis_forgets_under_retried_writes(fault: str, rounds: int, world: World, traffic: Traffic) -> None:
    """Every 100 ms, or whenever all is well again after a kill. Each write is sent to both controllers: no error."""
    harm, history = FORGETTING[fault][0], traffic.history
    stop = asyncio.Event()
    requests = traffic.requests()

    async def caller() -> None:
        while not stop.is_set():
            request, key = next(requests)
            twice = traffic.agents if key else traffic.agents[:1]
            await asyncio.gather(*(history.ask(agent, request, key=key) for agent in twice))

    await eventually(lambda: is_healthy(*traffic.agents))
    callers = asyncio.gather(*(caller() for _ in range(CALLERS)))
    loop = asyncio.get_running_loop()
    began, before = loop.time(), len(history.calls)
    harmed = 0
    for number in range(rounds):
        harmed += await asyncio.to_thread(harm, world)
        if "kill" in fault:
            await eventually(lambda: is_healthy(*traffic.agents))
        else:
            await asyncio.sleep(0.1)
        assert not callers.done(), callers.exception()
        show(fault, number + 1, rounds)
    stop.set()
    await callers
    rate = (len(history.calls) - before) / (loop.time() - began)
    await history.settle()
    await history.again()
    of_state = ("OK", "FAILED_PRECONDITION")
    told = [call for call in history.calls if call.answer and call.answer.code.name not in of_state]
    strange = [str(call) for call in told if call.answer and call.answer.reason != "DATABASE_BUSY"]
    print(f"{dict(history.verdicts())}, {rate:.0f} calls/s, {harmed} forgotten")
    assert not strange, "a refusal is one of the session's state; nothing else is told"
    # A process that stands still for a second has no connection for what is in flight; in a long run, more than once.
    assert len(told) <= max(2 * CALLERS, len(history.calls) // 100)
    history.enough(20, {fault: harmed})
    history.check(world.tables)


# -- Redis fails over, and has lost what it acknowledged --


class Replica:
    """A second Valkey that follows the first through a proxy; they change places at each failover."""

    def __init__(self, primary: Valkey, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        password = urlsplit(primary.url).password or ""
        (directory / "password").write_text(password)
        self.first = primary
        self.second = Valkey(directory, port=free_port(), log=directory.with_suffix(".log"), durable=False)
        self._password = password
        self.link = Proxy(LOOPBACK, 0)

    async def follow(self) -> None:
        """Returns when the second has all that the first has."""
        self.link.to = (LOOPBACK, urlsplit(self.first.url).port or 0)
        with redis.Redis.from_url(self.first.url) as first:
            first.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis.from_url(self.second.url) as second:
            second.config_set("masterauth", self._password)
            second.replicaof(LOOPBACK, str(self.link.port))
            await eventually(lambda: second.info("replication").get("master_link_status") == "up")

    def fail_over(self) -> None:
        """Kills the first and has the second take its place."""
        self.first.child.kill()
        with redis.Redis.from_url(self.second.url) as second:
            second.replicaof("NO", "ONE")
        self.first, self.second = self.second, self.first


@repeated(short=2, soak=100)
async def test_a_failover_that_lost_the_record(
    rounds: int, start_world: Callable[..., World], issuer: Issuer, tmp_path: Path
) -> None:
    """The replica is cut off, the primary says that it has the answer and is killed, the replica takes over."""
    world = start_world(controllers=2, proxied={"redis"}, controller_env=NEAR_OFF)
    tenant = Tenant(issuer, world.pair.controller_target)
    agents = [tenant.agent(target=target) for target in world.pair.controller_targets]
    servers = Replica(world.valkey, tmp_path / "replica")
    try:
        for number in range(rounds):
            await asyncio.to_thread(servers.second.start)
            await servers.follow()
            await eventually(lambda: is_healthy(*agents))
            servers.link.black_hole()
            key = f"k{number}"
            told = await agents[number % 2].ask(create(key), key=key)
            assert told.ok, str(told)
            await is_recorded(servers.first, told, agents[number % 2], key)
            await asyncio.to_thread(servers.fail_over)
            # Before the controllers reach it: a completion of theirs that is under way stores the answer again.
            assert not has_record(servers.first, told), "it was to be lost"
            servers.link.heal()
            servers.link.cut()
            world.proxies["redis"].to = (LOOPBACK, urlsplit(servers.first.url).port or 0)
            world.proxies["redis"].cut()
            await eventually(lambda: is_healthy(*agents))
            for agent in agents:
                again = await agent.ask(create(key), key=key)
                assert again.said == told.said and again.replayed
            await is_recorded(servers.first, told, agents[0], key)
            show("failovers", number + 1, rounds)
    finally:
        for server in (servers.first, servers.second):
            await asyncio.to_thread(server.stop)
        servers.link.stop()
        await tenant.close()
    assert world.tables.sessions(tenant.name) == rounds
    world.tables.check()


# -- Redis cannot be reached --


@pytest.mark.parametrize("seconds", [pytest.param(3, id="short"), pytest.param(30, id="soak", marks=pytest.mark.soak)])
async def test_redis_in_a_black_hole(seconds: int, world: World, agents: Two, tenant: Tenant) -> None:
    """No call fails, none asks while the breaker is open, and records are used again without a restart."""
    await eventually(lambda: is_healthy(*agents))
    proxy = world.proxies["redis"]
    told: dict[str, Answer] = {}
    loop = asyncio.get_running_loop()

    async def write_twice(name: str) -> None:
        first, second = [await agent.ask(create(name), key=name) for agent in agents]
        assert first.ok and second.said == first.said, f"{first} {second}"
        told[name] = first

    affected = proxy.affected
    proxy.black_hole()
    try:
        number = 0
        while not all([await is_degraded(agent) for agent in agents]):
            await write_twice(f"dark-{number}")
            number += 1
        asked = away(world)
        until = loop.time() + seconds
        number = 0
        while loop.time() < until or number < 20:
            await write_twice(f"open-{number}")
            number += 1
        assert away(world) == asked, "a call has waited for what is known to be away"
    finally:
        proxy.heal()
    assert proxy.affected > affected
    await eventually(lambda: is_healthy(*agents))
    replays = metric(world, "controller", "orchestrator_claims_total", outcome="replay")
    key = "light"
    await write_twice(key)
    await is_recorded(world.valkey, told[key], agents[0], key)

    async def is_replayed_by_redis() -> bool:
        assert (await agents[0].ask(create(key), key=key)).said == told[key].said
        return metric(world, "controller", "orchestrator_claims_total", outcome="replay") > replays

    await eventually(is_replayed_by_redis)
    assert world.tables.sessions(tenant.name) == len(told)
    world.tables.check()


async def is_degraded(agent: Agent) -> bool:
    return (await agent.status()).health == status_pb.HEALTH_DEGRADED


def away(world: World) -> float:
    """How many claims found nobody."""
    return sum(
        metric(world, name, "orchestrator_claims_total", outcome="away") for name in ("controller", "controller-2")
    )


# -- a controller stands still, and goes on when another has taken over --


@repeated(short=2, soak=100)
@pytest.mark.parametrize("ended_by", ["its time", "an operator"])
async def test_an_owner_that_stands_still(
    ended_by: str, rounds: int, world: World, agents: Two, tenant: Tenant
) -> None:
    """Stopped before its statement is sent; its lease ends; the other commits; it goes on, and says what that said."""
    failpoints, first = world.pair.failpoints["controller"], world.pair.services["controller"]
    takeovers = metric(world, "controller-2", "orchestrator_claims_total", outcome="takeover")
    released = 0
    await eventually(lambda: is_healthy(*agents))
    first_answer = await agents[0].ask(create("first"), key="first")
    await is_recorded(world.valkey, first_answer, agents[0], "first")
    for number in range(rounds):
        key = f"k{number}"
        for _ in range(8):  # where replays are frequent, a call waits for its claim
            assert (await agents[1].ask(create("first"), key="first")).said == first_answer.said
        # Late enough for it to be announced; a lease is two seconds longer than what its caller has left.
        failpoints.arm("before-write", "stop", seconds=0.3)
        timeout = 2 if ended_by == "its time" else 30
        stopped = asyncio.create_task(agents[0].ask(create(key), key=key, timeout=timeout))
        try:
            await eventually(lambda: is_stopped(first.pid))
            if ended_by == "an operator":
                release = records_pb.ReleaseRecordRequest(method=CREATE, subject=agents[0].subject, idempotency_key=key)
                released += (await agents[1].insist(release, key=key)).response.released
            answer = await agents[1].ask(create(key), key=key, timeout=20)
            assert answer.ok and not answer.replayed, str(answer)
        finally:
            first.send(signal.SIGCONT)
        late = await stopped
        if ended_by == "an operator" or late.ok:
            assert late.said == answer.said and late.replayed
        else:
            assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await agents[0].ask(create(key), key=key)).said == answer.said
        show(f"ended by {ended_by}", number + 1, rounds)
    if ended_by == "its time":
        released = int(metric(world, "controller-2", "orchestrator_claims_total", outcome="takeover") - takeovers)
    assert released >= rounds / 2, "too few claims were in time for the run to count"
    assert world.tables.sessions(tenant.name) == world.tables.audits(tenant.name) == rounds + 1
    world.tables.check()


def is_stopped(pid: int) -> bool:
    """Whether a process stands still by SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextmanager
def commits_held(world: World, tenant: Tenant) -> Iterator[Callable[[], None]]:
    """While inside, the tenant's COMMITs of sessions and tasks stand still, until the given function is called."""
    rows = world.tables.rows
    rows("create table gate (closed boolean)")
    rows("insert into gate values (true)")
    rows(
        "create function hold_commit() returns trigger language plpgsql as"
        " $$ begin while exists (select from gate) loop perform pg_sleep(0.01); end loop; return null; end $$"
    )
    for table in ("sessions", "tasks"):
        rows(
            f"create constraint trigger hold_commit after insert or update on {table} deferrable initially deferred"
            f" for each row when (new.tenant = '{tenant.name}') execute function hold_commit()"
        )

    def release() -> None:
        rows("delete from gate")

    try:
        yield release
    finally:
        release()
        for table in ("sessions", "tasks"):  # not both at once: who reads both may have locked one, and want the other
            rows(f"drop trigger hold_commit on {table}")
        rows("drop function hold_commit")
        rows("drop table gate")


HELD = (
    "select pid from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"
    " and application_name like 'controller_svc%%'"
)


@repeated(short=1, soak=50)
@pytest.mark.parametrize("ends", ["commits", "aborts"])
@pytest.mark.parametrize("method", ["CreateSession", "ClaimTasks"])
async def test_an_owner_that_stands_still_in_its_transaction(
    method: str, ends: str, rounds: int, world: World, agents: Two, tenant: Tenant
) -> None:
    """It has written, and not committed: a duplicate waits until it is known what became of that."""
    first = world.pair.services["controller"]
    session = await agents[0].create()
    for number in range(rounds):
        await agents[0].route(session.id, lease_timeout=spans(300))
        key = f"k{number}"
        request: Message = create(key)
        if method == "ClaimTasks":
            request = tasks_pb.ClaimTasksRequest(role=WORKER, wait=spans(5))
        seen, met = world.tables.audits(tenant.name), met_another(world)
        with commits_held(world, tenant) as release:
            # Nobody ends the lease of an owner that is not heard of: a short call has a short one.
            timeout = 30 if ends == "commits" else 2
            stopped = asyncio.create_task(agents[0].ask(request, key=key, timeout=timeout))
            ((pid,),) = await eventually(lambda: world.tables.rows(HELD))
            first.send(signal.SIGSTOP)
            try:
                duplicate = asyncio.create_task(agents[1].ask(request, key=key))
                await eventually(lambda met=met: met_another(world) > met or locks_wanted(world))  # type: ignore[misc]
                assert not duplicate.done()
                assert world.tables.audits(tenant.name) == seen
                if ends == "aborts":
                    world.tables.rows("select pg_terminate_backend(%s)", pid)
                    await eventually(lambda pid=pid: not is_there(world, pid))  # type: ignore[misc]
                release()
                answer = await duplicate
            finally:
                first.send(signal.SIGCONT)
            assert answer.ok and answer.replayed == (ends == "commits"), str(answer)
            late = await stopped
            assert late.said == answer.said if late.ok else late.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert (await agents[0].insist(request, key=key)).said == answer.said
        assert world.tables.audits(tenant.name) == seen + 1
        assert method == "CreateSession" or len(answer.response.tasks) == 1
        show(f"{method} {ends}", number + 1, rounds)
    world.tables.check()


def met_another(world: World) -> float:
    """How often the second controller has met what another holds: a key's record, or its lock."""
    return sum(
        metric(world, "controller-2", f"orchestrator_{name}_total", outcome="busy") for name in ("claims", "writes")
    )


def is_there(world: World, pid: int) -> bool:
    return bool(world.tables.rows("select pid from pg_stat_activity where pid = %s", pid))


# -- what is not kept --


async def test_who_is_refused_at_the_door_leaves_its_key(world: World, agents: Two, tenant: Tenant) -> None:
    """No token, a forged one, one without the permission: nothing is kept, and the good token executes."""
    agent, elsewhere = agents
    strangers = [
        Agent(world.pair.controller_target, None),
        Agent(world.pair.controller_target, (agent.token or "")[:-8] + "AAAAAAAA"),
        tenant.agent(permissions=(AUDIT,)),
    ]
    codes = []
    with redis.Redis.from_url(world.valkey.url) as connection:
        before = unguarded(world, connection)
        for stranger in strangers:
            codes.append((await stranger.ask(create(), key="k")).code.name)
        assert codes == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED"]
        assert world.tables.guards(tenant.name) == 0 and unguarded(world, connection) <= before
    made = await agent.ask(create(), key="k")
    assert made.ok and not made.replayed

    # The answer is there now, and is not for who may not ask any more.
    for stranger, code in zip(strangers, codes, strict=True):
        refused = await stranger.ask(create(), key="k")
        assert refused.code.name == code and not refused.replayed and not refused.body
    assert (await elsewhere.ask(create(), key="k")).body == made.body
    assert world.tables.sessions(tenant.name) == 1
    for stranger in strangers[:2]:
        await stranger.close()


async def test_callers_share_no_key_and_a_new_token_changes_none(world: World, tenant: Tenant, issuer: Issuer) -> None:
    """Another tenant's key, another subject's; and a token that was made anew, with another jti and expiry."""
    other = Tenant(issuer, world.pair.controller_target)
    agents = [tenant.agent("a"), tenant.agent("a:b"), other.agent("a"), tenant.agent("a", permissions=(AGENT,))]
    keys = ["b:k", "k", "b:k", "b:k"]
    answers = [await agent.ask(create(), key=key) for agent, key in zip(agents, keys, strict=True)]
    assert [answer.replayed for answer in answers] == [False, False, False, True]
    assert len({answer.body for answer in answers}) == 3
    assert agents[0].token != agents[3].token
    await other.close()


Unkept = Callable[[World, Agent, str], Awaitable[tuple[Message, Answer]]]


async def _unavailable(world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    proxy = world.proxies["postgres"]
    request = update(session_id, "n")
    proxy.refusing = True
    proxy.cut()
    try:
        return request, await agent.ask(request, key="k")
    finally:
        proxy.heal()


async def _deadline_exceeded(world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    request = update(session_id, "n")
    world.pair.failpoints["controller"].arm("before-write", "delay", seconds=1)
    return request, await agent.ask(request, key="k", timeout=0.5)


async def _cancelled(world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    request = update(session_id, "n")
    with world.tables.locked(session_id):
        call = agent.call(
            "/orchestrator.controller.v1.SessionService/UpdateSession",
            request.SerializeToString(),
            metadata=[("idempotency-key", "k")],
        )
        await eventually(lambda: locks_wanted(world))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    return request, Answer(grpc.StatusCode.CANCELLED)


async def _busy(world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    request = update(session_id, "n")
    with world.tables.locked(session_id):
        before = asyncio.create_task(agent.ask(update(session_id, "before"), key="before"))
        await eventually(lambda: locks_wanted(world))
        for _ in range(5):  # it is told so 0.1 s before its deadline, by which a stall may come first
            answer = await agent.ask(request, key="k", timeout=1)  # it stands behind the other
            if answer.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                break
    assert (await before).ok
    return request, answer


async def _aborted(world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    request = sessions_pb.ActivateSessionRequest(session_id=session_id, etag="2")
    answer = await agent.ask(request, key="k")
    assert (await agent.ask(update(session_id, "other"))).ok  # now it has that etag
    return request, answer


async def _refused(sqlstate: str, world: World, agent: Agent, session_id: str) -> tuple[Message, Answer]:
    """The database refuses for a reason of its own."""
    world.tables.rows(
        "create function defect() returns trigger language plpgsql as"
        f" $$ begin raise exception 'defect' using errcode = '{sqlstate}'; end $$"
    )
    world.tables.rows("create trigger defect before update on sessions for each row execute function defect()")
    request = update(session_id, "n")
    try:
        return request, await agent.ask(request, key="k")
    finally:
        world.tables.rows("drop function defect cascade")


def locks_wanted(world: World) -> bool:
    """Whether a controller waits for a lock."""
    return bool(
        world.tables.rows(
            "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            " and application_name like 'controller_svc%%'"
        )
    )


UNKEPT: Mapping[str, Unkept] = {
    "UNAVAILABLE": _unavailable,
    "DEADLINE_EXCEEDED": _deadline_exceeded,
    "CANCELLED": _cancelled,
    "ABORTED RESOURCE_BUSY": _busy,
    "ABORTED ETAG_MISMATCH": _aborted,
    "UNAVAILABLE DATABASE_UNAVAILABLE": partial(_refused, "XX000"),
    "RESOURCE_EXHAUSTED DATABASE_FULL": partial(_refused, "53100"),
}
"""What brings about each answer that says something of the moment only."""


@pytest.mark.parametrize("name", UNKEPT)
async def test_an_answer_of_the_moment_is_not_kept(name: str, world: World, agents: Two, tenant: Tenant) -> None:
    """Its key is free: the retry executes, at either controller, and another request with the key is refused."""
    # Not at once: the first controller may have to find Postgres again after the case before.
    session = (await agents[0].insist(create("session"), key="session")).response.session
    request, answer = await UNKEPT[name](world, agents[0], session.id)
    assert f"{answer.code.name} {answer.reason}".startswith(name), str(answer)
    made = await agents[1].insist(request, key="k", seconds=28)
    assert made.ok
    assert (await agents[0].insist(request, key="k")).said == made.said
    other = await agents[0].ask(type(request)(session_id=session.id, etag="77"), key="k")
    assert other.refusal[0] in ("FAILED_PRECONDITION", "INVALID_ARGUMENT")
    kept = "select count(*) from idempotency_guards where tenant = %s and code <> 0"
    assert world.tables.one(kept, tenant.name) == 0
    world.tables.check()


# -- large answers --


async def completed(cache: Cache, scope: bytes, agent: Agent, request: Message, key: str) -> Record:
    """The record, once it is completed. Completions come after answers; a retry mends one lost."""

    async def has_it() -> Record | None:
        await agent.insist(request, key=key)
        [record] = await cache.get([GetItem(scope)])
        return record if record and record.state is State.COMPLETED else None

    record: Record = await eventually(has_it, pause=0.1)
    return record


async def test_large_answers(world: World, agents: Two, tenant: Tenant) -> None:
    """64 KiB and more, up to the mebibyte that a claim may have: kept once, replayed byte for byte, never run again."""
    session = await agents[0].create()
    text = "x" * 15_000
    for count in (2, 4, 5, 80):
        await asyncio.gather(
            *(agents[n % 2].route(session.id, data=struct({"n": text}), lease_timeout=spans(300)) for n in range(count))
        )
        request = tasks_pb.ClaimTasksRequest(role=WORKER, max_tasks=count)
        first = await agents[0].ask(request, key=f"k{count}")
        taken = len(first.response.tasks)
        assert len(first.body) > 15_000 * min(count, 60)
        assert (taken == count) == (count < 80), "the largest is cut, and leaves tasks"
        events = world.tables.audits(tenant.name)
        for forget in (False, True):
            if forget:
                await asyncio.to_thread(flush, world)
            for agent in agents:
                again = await agent.insist(request, key=f"k{count}")
                assert again.body == first.body and again.replayed
        assert world.tables.audits(tenant.name) == events
        ((scope,),) = world.tables.rows(
            "select scope from idempotency_guards where tenant = %s and answer = %s", tenant.name, first.body
        )
        async with cache_on(world.valkey.url, timeout=5) as cache:
            record = await completed(cache, scope, agents[0], request, f"k{count}")
        assert record.answer_omitted == (len(first.body) > 65_536)
        assert record.answer_bytes == (0 if record.answer_omitted else len(first.body))
    world.tables.check()


# -- attempts that take long --


async def test_an_attempt_outlives_its_record(world: World, agents: Two) -> None:
    """The record ends while its owner still waits for a row: a duplicate waits too, and its time starts anew."""
    session = await agents[0].create()
    request = update(session.id, "n")
    with redis.Redis.from_url(world.valkey.url) as connection:
        connection.flushall()
        with world.tables.locked(session.id):
            owner = asyncio.create_task(agents[0].ask(request, key="k"))
            (record,) = await eventually(lambda: unguarded(world, connection))
            assert connection.pexpire(record, 1)
            await eventually(lambda: not connection.exists(record))
            duplicate = asyncio.create_task(agents[1].ask(request, key="k"))
            await eventually(lambda: connection.exists(record))
            await eventually(lambda: locks_wanted(world))
            assert not owner.done() and not duplicate.done()
        one, two = await owner, await duplicate
        assert one.ok and one.said == two.said
        assert {one.replayed, two.replayed} == {False, True}
        await eventually(lambda: one.body in (connection.get(record) or b""))
        assert connection.pttl(record) > 86_000_000
    assert (await agents[0].session(session.id)).etag == "2"
    world.tables.check()


# -- a request that ends whoever takes it --


@repeated(short=2, soak=100)
async def test_a_request_that_ends_its_controller(rounds: int, world: World, agents: Two, tenant: Tenant) -> None:
    """Time after time: it has no effect until it gets through, and the other controller's callers notice nothing."""
    failpoints, first = world.pair.failpoints["controller"], world.pair.services["controller"]
    hits = len(failpoints.hits)
    for number in range(rounds):
        failpoints.arm("before-write", "kill")
        answer = await agents[0].ask(create("poison"), key="poison")
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        await eventually(lambda: not first.running)
        assert (await agents[1].ask(create("good"), key=f"good-{number}")).ok
        assert world.tables.sessions(tenant.name) == number + 1
        await asyncio.to_thread(world.pair.start, "controller")
        show("crashes", number + 1, rounds)
    assert len(failpoints.hits) - hits == rounds
    made = await agents[0].insist(create("poison"), key="poison")
    assert made.ok and (await agents[1].ask(create("poison"), key="poison")).said == made.said
    assert world.tables.sessions(tenant.name) == rounds + 1
    world.tables.check()


# -- isolation --


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_whatever_isolation_the_database_has_by_default(
    isolation: str, new_database: Callable[..., str], start_world: Callable[..., World], issuer: Issuer
) -> None:
    """One key at two controllers, for a create, a change and a claim: one effect, equal answers, no error."""
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        name = urlsplit(url).path.removeprefix("/")
        connection.execute(f"alter database {name} set default_transaction_isolation to '{isolation}'")
    world = start_world(controllers=2, controller_env={**NEAR_OFF, "IDEMPOTENCY_ENABLED": "false"}, database_url=url)
    tenant = Tenant(issuer, world.pair.controller_target)
    agents = [tenant.agent(target=target, connections=2) for target in world.pair.controller_targets]
    session = await agents[0].create()
    for number in range(5):
        await agents[0].route(session.id, lease_timeout=spans(300))
        claim = tasks_pb.ClaimTasksRequest(role=WORKER)
        for request in (create(f"{number}"), update(session.id, f"n{number}"), claim):
            key = f"k{number}"
            answers = await asyncio.gather(*(agents[n % 2].ask(request, key=key) for n in range(40)))
            assert {answer.code.name for answer in answers} == {"OK"}, str(answers[0])
            assert len({answer.body for answer in answers}) == 1
            assert sum(not answer.replayed for answer in answers) == 1
    assert world.tables.sessions(tenant.name) == 6
    assert world.tables.audits(tenant.name) == 1 + 5 * 4
    world.tables.check()
    await tenant.close()


# -- Postgres away --


@pytest.fixture(scope="module")
def own_postgres_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A Postgres that only this module's tests stop and start."""
    folder = tmp_path_factory.mktemp("postgres")
    server = Postgres(folder / "data", port=free_port(), log=folder / "log", durable=False)
    server.start()
    yield server
    server.stop()


@repeated(short=2, soak=100)
async def test_without_postgres_what_redis_knows_is_replayed(
    rounds: int, own_postgres_of_module: Postgres, start_world: Callable[..., World], issuer: Issuer
) -> None:
    """Postgres is killed: known answers are told, new calls are refused and leave their keys."""
    postgres = own_postgres_of_module
    world = start_world(controllers=2, controller_env=NEAR_OFF, database_url=postgres.url)
    tenant = Tenant(issuer, world.pair.controller_target)
    agents = [tenant.agent(target=target) for target in world.pair.controller_targets]
    try:
        for number in range(rounds):
            key = f"known-{number}"
            known = await agents[0].insist(create(key), key=key)
            await is_recorded(world.valkey, known, agents[0], key)
            await asyncio.to_thread(postgres.child.kill)
            try:
                for agent in agents:
                    await eventually(lambda agent=agent: is_without_postgres(agent))  # type: ignore[misc]
                    again = await agent.insist(create(key), key=key)  # only Redis can answer
                    assert again.said == known.said and again.replayed
                    new = await agent.ask(create("new"), key=f"new-{number}")
                    assert new.refusal == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            finally:
                await asyncio.to_thread(postgres.start)
            made = [await agent.insist(create("new"), key=f"new-{number}", seconds=28) for agent in agents]
            assert made[0].ok and made[0].said == made[1].said
            show("kills of Postgres", number + 1, rounds)
        tables = Tables(postgres.url)
        assert tables.sessions(tenant.name) == 2 * rounds
        tables.check()
        tables.close()
    finally:
        await tenant.close()


async def is_without_postgres(agent: Agent) -> bool:
    return (await agent.status()).postgres.state == status_pb.Component.STATE_DOWN


# -- the same request, encoded otherwise --


async def test_another_encoding_is_the_same_request(agents: Two) -> None:
    """Map entries and mask paths in another order, a field at its default: what clients of other languages send."""
    session = await agents[0].create()
    values = {secrets.token_hex(2): n for n in range(6)}
    one, two = update(session.id, "n"), update(session.id, "n")
    for request, names in ((one, list(values)), (two, list(reversed(values)))):
        request.update_mask.paths[:] = [f"metadata.{name}" for name in names]
        request.metadata.Clear()
        for name in names:
            request.metadata[name] = values[name]
    # The wire form of a field at its default: etag, of length 0.
    number = two.DESCRIPTOR.fields_by_name["etag"].number
    raw = two.SerializeToString() + bytes([number << 3 | 2, 0])
    method = two.DESCRIPTOR.file.services_by_name["SessionService"].methods_by_name["UpdateSession"]
    first = await agents[0].ask(one, key="k")
    again = await agents[1].send(method, raw, metadata=[("idempotency-key", "k")])
    assert one.SerializeToString() != raw
    assert first.ok and again.body == first.body and again.replayed
