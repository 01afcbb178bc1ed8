"""The rules of sessions: the state table, etags, roles, metadata and expiry."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from controller_svc.core.audit import AuditEvent
from controller_svc.core.ids import new_id
from controller_svc.core.mutations import SYSTEM, Actor, Decision, Key, Lookup, system_actor
from controller_svc.core.sessions import (
    ENDED,
    MAX_METADATA_BYTES,
    ChangeSession,
    CreateSession,
    Session,
    SessionMutations,
    SessionState,
    UpdateSession,
    metadata_size,
)
from svckit.errors import Aborted, FailedPrecondition, NotFound, PermissionDenied

if TYPE_CHECKING:
    from uuid import UUID

    from controller_svc.core.mutations import Mutation, Rows

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEFORE = NOW - timedelta(hours=2)
RETENTION = timedelta(days=7)
MUTATIONS = SessionMutations(RETENTION)

ACTOR = Actor(issuer="https://issuer", tenant="acme", subject="agent-1", roles=frozenset({"planner"}), operate=False)
OTHER = replace(ACTOR, roles=frozenset({"coder"}))
OPERATOR = replace(OTHER, operate=True)

# The table of the design, cell by cell: = changes nothing and answers OK, x is refused, - leaves the session alone.
TABLE = """
| from | Activate | Pause | Resume | Complete | Fail | sweeper |
|---|---|---|---|---|---|---|
| PENDING | ACTIVE | x | x | x | x | EXPIRED |
| ACTIVE | = | PAUSED | = | COMPLETED | FAILED | EXPIRED |
| PAUSED | x | = | ACTIVE | x | x | EXPIRED |
| COMPLETED | x | x | x | = | x | - |
| FAILED | x | x | x | x | = | - |
| EXPIRED | x | x | x | x | x | - |
"""


def cells() -> list[tuple[str, str, str]]:
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.strip().splitlines()]
    return [(line[0], verb, cell) for line in lines for verb, cell in zip(head[1:], line[1:], strict=True)]


CELLS = cells()
REFUSED = [(state, verb) for state, verb, cell in CELLS if cell == "x"]
KEPT = [(state, verb) for state, verb, cell in CELLS if cell == "="]


def a_session(state: str = "ACTIVE", **changes: Any) -> Session:
    """A session as it comes to stand in this state, due for expiry."""
    return replace(
        Session(
            tenant="acme",
            id=new_id(),
            version=4,
            agent_role="planner",
            state=SessionState(state),
            task_id=None,
            metadata={"goal": "ship", "model": "m-1"},
            create_time=BEFORE,
            update_time=BEFORE,
            expire_time=NOW,
            start_time=None if state == "PENDING" else BEFORE,
            pause_time=BEFORE if state == "PAUSED" else None,
            end_time=BEFORE if state in ENDED else None,
        ),
        **changes,
    )


def decide(mutation: Mutation[Any], command: Any, found: Rows, now: datetime = NOW) -> Decision:
    """Asks for keys as the door does, until nothing new is asked, then decides on what was asked for only."""
    asked: dict[Any, Any] = {}
    while True:
        keys = mutation.reads(command, asked)
        missing = [key for key in (*keys.change, *keys.look) if key not in asked]
        if not missing:
            break
        asked.update({key: found.get(key) for key in missing})
    decision = mutation.decide(command, asked, now)
    assert len(decision.events) == len(decision.rows)
    assert {Key(row.table, row.tenant, row.id) for row in decision.rows if row.version > 1} <= set(keys.change)
    return decision


def verb_mutation(verb: str) -> Mutation[ChangeSession]:
    mutation: Mutation[ChangeSession] = getattr(MUTATIONS, "expire" if verb == "sweeper" else verb.lower())
    return mutation


def change(verb: str, session: Session, *, actor: Actor = ACTOR, etag: str = "", now: datetime = NOW) -> Decision:
    found: dict[Any, Any] = {
        Key("sessions", "acme", session.id): session,
        Lookup("unfinished_tasks", "acme", session.id): 0,
    }
    return decide(verb_mutation(verb), ChangeSession(actor=actor, id=session.id, etag=etag), found, now)


def update(
    session: Session,
    paths: tuple[str, ...],
    metadata: dict[str, Any] | None = None,
    task_id: UUID | None = None,
    **more: Any,
) -> Decision:
    command = UpdateSession(
        actor=more.pop("actor", ACTOR),
        id=session.id,
        etag=more.pop("etag", ""),
        paths=paths,
        metadata=metadata or {},
        task_id=task_id,
    )
    found: dict[Any, Any] = {Key("sessions", "acme", session.id): session, **more.pop("found", {})}
    assert not more
    return decide(MUTATIONS.update, command, found)


def after(decision: Decision) -> Session:
    assert len(decision.rows) == 1
    assert decision.answer is decision.rows[0]
    assert isinstance(decision.answer, Session)
    return decision.answer


def test_the_table_has_36_cells_and_every_state_and_verb() -> None:
    assert len(CELLS) == 36
    assert {state for state, _, _ in CELLS} == set(SessionState)


@pytest.mark.parametrize(("state", "verb", "cell"), CELLS)
def test_every_cell_of_the_state_table(state: str, verb: str, cell: str) -> None:
    session = a_session(state)
    actor = system_actor("acme") if verb == "sweeper" else ACTOR
    if cell == "x":
        with pytest.raises(FailedPrecondition) as refusal:
            change(verb, session, actor=actor)
        assert refusal.value.reason == "SESSION_STATE_INVALID"
        assert refusal.value.metadata == {"state": state, "verb": verb, "session_id": str(session.id)}
        ((kind, subject, description),) = refusal.value.violations
        assert (kind, subject) == ("SESSION_STATE_INVALID", str(session.id))
        assert state in description
    elif cell in ("=", "-"):
        assert change(verb, session, actor=actor) == Decision((), session, ())
    else:
        decision = change(verb, session, actor=actor)
        moved = after(decision)
        assert moved.state == cell
        assert moved.version == session.version + 1
        assert decision.events == (
            AuditEvent(
                resource_type="session",
                resource_id=session.id,
                version_before=4,
                version_after=5,
                state_before=state,
                state_after=cell,
                role="" if verb == "sweeper" else "planner",
            ),
        )


@pytest.mark.parametrize(
    ("state", "verb", "changed"),
    [
        ("PENDING", "Activate", {"start_time"}),
        ("ACTIVE", "Pause", {"pause_time"}),
        ("PAUSED", "Resume", set()),
        ("ACTIVE", "Complete", {"end_time"}),
        ("ACTIVE", "Fail", {"end_time"}),
    ],
)
def test_a_verb_sets_its_time_and_no_other(state: str, verb: str, changed: set[str]) -> None:
    session = a_session(state)
    moved = after(change(verb, session))
    for name in ("start_time", "pause_time", "end_time"):
        assert getattr(moved, name) == (NOW if name in changed else getattr(session, name)), name
    assert (moved.update_time, moved.expire_time) == (NOW, NOW + RETENTION)
    assert (moved.create_time, moved.metadata, moved.agent_role) == (BEFORE, session.metadata, "planner")


def test_a_resumed_session_keeps_the_time_of_its_first_start() -> None:
    paused = after(change("Pause", a_session("ACTIVE")))
    resumed = after(change("Resume", paused, now=NOW + timedelta(hours=1)))
    assert (resumed.start_time, resumed.pause_time) == (BEFORE, NOW)


def test_update_time_never_goes_back_with_the_clock() -> None:
    ahead = NOW + timedelta(seconds=3)
    moved = after(change("Complete", a_session("ACTIVE", update_time=ahead)))
    assert (moved.update_time, moved.end_time, moved.expire_time) == (ahead, ahead, ahead + RETENTION)


# -- etag --


@pytest.mark.parametrize("etag", ["", "4"])
def test_an_empty_and_the_right_etag_pass(etag: str) -> None:
    assert after(change("Pause", a_session(), etag=etag)).version == 5
    assert after(update(a_session(), ("metadata",), {"a": 1}, etag=etag)).version == 5


@pytest.mark.parametrize("etag", ["3", "5", "04", "4 ", "+4", "4.0", "٤", "x", "W/4", "\0"])
def test_any_other_etag_is_aborted(etag: str) -> None:
    with pytest.raises(Aborted) as refusal:
        change("Pause", a_session(), etag=etag)
    assert refusal.value.reason == "ETAG_MISMATCH"
    with pytest.raises(Aborted) as refusal:
        update(a_session(), ("metadata",), {"a": 1}, etag=etag)
    assert refusal.value.reason == "ETAG_MISMATCH"


@pytest.mark.parametrize(("state", "verb"), REFUSED + KEPT)
def test_a_stale_etag_is_aborted_before_the_state_is_looked_at(state: str, verb: str) -> None:
    with pytest.raises(Aborted) as refusal:
        change(verb, a_session(state), etag="3")
    assert refusal.value.reason == "ETAG_MISMATCH"


@pytest.mark.parametrize(("state", "verb"), KEPT)
def test_what_changes_nothing_answers_the_session_under_its_own_etag(state: str, verb: str) -> None:
    session = a_session(state)
    assert change(verb, session, etag="4") == Decision((), session, ())


# -- who --


@pytest.mark.parametrize("verb", ["Activate", "Pause", "Resume", "Complete", "Fail"])
@pytest.mark.parametrize("state", list(SessionState))
def test_only_holders_of_the_role_and_operators_change_a_session(state: str, verb: str) -> None:
    with pytest.raises(PermissionDenied) as refusal:
        change(verb, a_session(state), actor=OTHER, etag="3")
    assert refusal.value.reason == "ROLE_NOT_HELD"
    assert refusal.value.metadata == {"role": "planner"}
    with pytest.raises(PermissionDenied):
        update(a_session(state), ("metadata",), {"a": 1}, actor=OTHER)


def test_an_operator_changes_any_session_and_the_trail_names_no_role() -> None:
    decision = change("Pause", a_session(), actor=OPERATOR)
    assert decision.events[0].role == ""
    both = replace(OPERATOR, roles=frozenset({"planner"}))
    assert change("Pause", a_session(), actor=both).events[0].role == "planner"


@pytest.mark.parametrize("verb", ["Activate", "Pause", "Resume", "Complete", "Fail"])
def test_a_missing_session_is_not_found(verb: str) -> None:
    missing = new_id()
    with pytest.raises(NotFound) as refusal:
        decide(verb_mutation(verb), ChangeSession(actor=ACTOR, id=missing, etag="9"), {})
    assert refusal.value.reason == "SESSION_NOT_FOUND"
    assert refusal.value.metadata == {"session_id": str(missing)}


def test_another_tenants_session_is_not_even_asked_for() -> None:
    session = a_session(tenant="other")
    with pytest.raises(NotFound):
        decide(
            MUTATIONS.pause,
            ChangeSession(actor=ACTOR, id=session.id),
            {Key("sessions", "other", session.id): session},
        )


def test_the_server_itself_acts_in_a_tenant_without_issuer_or_role() -> None:
    actor = system_actor("acme")
    assert (actor.tenant, actor.subject, actor.issuer, actor.roles) == ("acme", SYSTEM, "", frozenset())
    assert actor.holds("anything")


# -- create --


def test_a_new_session_is_pending_at_version_one() -> None:
    command = CreateSession(actor=ACTOR, id=new_id(), agent_role="planner", task_id=None, metadata={"a": 1})
    decision = decide(MUTATIONS.create, command, {})
    session = after(decision)
    assert session == Session(
        tenant="acme",
        id=command.id,
        version=1,
        agent_role="planner",
        state=SessionState.PENDING,
        task_id=None,
        metadata={"a": 1},
        create_time=NOW,
        update_time=NOW,
        expire_time=NOW + RETENTION,
        start_time=None,
        pause_time=None,
        end_time=None,
    )
    assert decision.events == (
        AuditEvent(
            resource_type="session",
            resource_id=command.id,
            version_before=0,
            version_after=1,
            state_before="",
            state_after="PENDING",
            role="planner",
        ),
    )


def test_a_create_reads_nothing_but_the_task_it_names() -> None:
    command = CreateSession(actor=ACTOR, id=new_id(), agent_role="planner", task_id=None, metadata={})
    assert MUTATIONS.create.reads(command, {}) == ((), ())
    task_id = new_id()
    named = replace(command, task_id=task_id)
    assert MUTATIONS.create.reads(named, {}) == ((), (Key("tasks", "acme", task_id),))
    assert after(decide(MUTATIONS.create, named, {Key("tasks", "acme", task_id): object()})).task_id == task_id
    with pytest.raises(NotFound) as refusal:
        decide(MUTATIONS.create, named, {})
    assert refusal.value.reason == "TASK_NOT_FOUND"
    assert refusal.value.metadata == {"task_id": str(task_id)}


# -- update --


@pytest.mark.parametrize(
    ("paths", "given", "expected"),
    [
        (("metadata",), {"a": 1}, {"goal": "ship", "model": "m-1", "a": 1}),
        (("metadata",), {"goal": "stop"}, {"goal": "stop", "model": "m-1"}),
        (("metadata",), {"goal": None}, {"model": "m-1"}),
        (("metadata",), {"goal": None, "a": {"b": None}}, {"model": "m-1", "a": {"b": None}}),
        (("metadata",), {"goal": {"deep": 1}}, {"goal": {"deep": 1}, "model": "m-1"}),
        (("metadata.goal",), {"goal": "stop", "a": 1}, {"goal": "stop", "model": "m-1"}),
        (("metadata.goal",), {"a": 1}, {"model": "m-1"}),
        (("metadata.goal",), {"goal": None}, {"model": "m-1"}),
        (("metadata.a.b",), {"a.b": 2, "a": 1}, {"goal": "ship", "model": "m-1", "a.b": 2}),
        (("metadata.a", "metadata.b"), {"a": 1, "b": 2, "c": 3}, {"goal": "ship", "model": "m-1", "a": 1, "b": 2}),
        (("metadata", "metadata.model"), {"a": 1}, {"goal": "ship", "a": 1}),
        (("metadata.model", "metadata.goal"), {}, {}),
    ],
)
def test_metadata_is_merged(paths: tuple[str, ...], given: dict[str, Any], expected: dict[str, Any]) -> None:
    session = a_session()
    decision = update(session, paths, given)
    changed = after(decision)
    assert changed.metadata == expected
    assert session.metadata == {"goal": "ship", "model": "m-1"}
    assert (changed.state, changed.version, changed.update_time) == (session.state, 5, NOW)
    assert changed.expire_time == NOW + RETENTION
    assert (decision.events[0].state_before, decision.events[0].state_after) == ("ACTIVE", "ACTIVE")


@pytest.mark.parametrize(
    ("paths", "given"),
    [
        (("metadata",), {}),
        (("metadata",), {"goal": "ship"}),
        (("metadata",), {"absent": None}),
        (("metadata.absent",), {}),
        (("metadata.goal",), {"goal": "ship"}),
        (("task_id",), {}),
    ],
)
def test_an_update_that_changes_nothing_writes_nothing(paths: tuple[str, ...], given: dict[str, Any]) -> None:
    session = a_session()
    assert update(session, paths, given, etag="4") == Decision((), session, ())


def test_what_python_calls_equal_is_still_a_change() -> None:
    session = a_session(metadata={"flag": True, "deep": [1, {"x": 0}]})
    assert after(update(session, ("metadata",), {"flag": 1})).metadata["flag"] is not True
    assert json.dumps(after(update(session, ("metadata",), {"deep": [1, {"x": False}]})).metadata["deep"]) == (
        '[1, {"x": false}]'
    )


@pytest.mark.parametrize("state", list(SessionState))
def test_a_session_is_updated_in_any_state(state: str) -> None:
    session = a_session(state)
    changed = after(update(session, ("metadata",), {"note": 1}))
    assert (changed.state, changed.end_time) == (session.state, session.end_time)


def test_an_expired_session_keeps_the_time_it_expired_at() -> None:
    session = a_session("EXPIRED")
    assert after(update(session, ("metadata",), {"note": 1})).expire_time == session.expire_time


def test_update_of_the_task_looks_at_it() -> None:
    task_id = new_id()
    key = Key("tasks", "acme", task_id)
    assert after(update(a_session(), ("task_id",), task_id=task_id, found={key: object()})).task_id == task_id
    with pytest.raises(NotFound) as refusal:
        update(a_session(), ("task_id", "metadata"), {"a": 1}, task_id=task_id)
    assert refusal.value.reason == "TASK_NOT_FOUND"
    cleared = after(update(a_session(task_id=task_id), ("task_id",)))
    assert cleared.task_id is None


def test_a_task_that_the_mask_does_not_name_is_ignored() -> None:
    session = a_session()
    command = UpdateSession(actor=ACTOR, id=session.id, etag="", paths=("metadata",), metadata={}, task_id=new_id())
    assert MUTATIONS.update.reads(command, {}).look == ()
    assert after(update(session, ("metadata",), {"a": 1}, task_id=new_id())).task_id is None


def test_the_merged_metadata_may_fill_its_limit_and_not_pass_it() -> None:
    session = a_session(metadata={"kept": "k" * 8000})
    room = MAX_METADATA_BYTES - metadata_size({"kept": "k" * 8000, "new": ""})
    full = after(update(session, ("metadata",), {"new": "n" * room})).metadata
    assert metadata_size(full) == len(json.dumps(full, separators=(",", ":"))) == MAX_METADATA_BYTES
    with pytest.raises(FailedPrecondition) as refusal:
        update(session, ("metadata",), {"new": "n" * (room + 1)})
    assert refusal.value.reason == "METADATA_TOO_LARGE"
    assert refusal.value.violations[0][:2] == ("METADATA_TOO_LARGE", str(session.id))
    # What is measured is UTF-8, not characters.
    with pytest.raises(FailedPrecondition):
        update(session, ("metadata",), {"new": "ß" * (room // 2 + 1)})
    # An update that makes room is fine.
    assert after(update(session, ("metadata", "metadata.kept"), {"new": "n" * (room + 1)})).version == 5


def test_numbers_count_as_they_were_given_and_not_as_postgres_spells_them() -> None:
    stored = {"huge": [int(1e300)] * 60, "whole": 2**53 - 1}
    session = a_session(metadata=stored)
    assert metadata_size(stored) > MAX_METADATA_BYTES
    assert update(session, ("metadata",), {"huge": [1e300] * 60}) == Decision((), session, ())
    assert after(update(session, ("metadata",), {"a": 1})).metadata == {
        "huge": [1e300] * 60,
        "whole": 2**53 - 1,
        "a": 1,
    }


def test_merging_is_what_a_dictionary_does() -> None:
    rng = random.Random(7)
    keys = ["a", "b", "c", "d.e", "ß"]
    values: list[Any] = [None, 0, 1.5, "x", True, [], {}, {"n": [None]}]
    for _ in range(2000):
        current = {key: rng.choice(values[1:]) for key in rng.sample(keys, rng.randint(0, 5))}
        given = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 5))}
        masked = rng.sample(keys, rng.randint(1, 3))
        session = a_session(metadata=dict(current))

        merged = {key: value for key, value in {**current, **given}.items() if value is not None}
        result = update(session, ("metadata",), given).answer
        assert isinstance(result, Session)
        assert result.metadata == merged

        picked = {key: given.get(key) if key in masked else current.get(key) for key in keys}
        result = update(session, tuple(f"metadata.{key}" for key in masked), given).answer
        assert isinstance(result, Session)
        assert result.metadata == {key: value for key, value in picked.items() if value is not None}


# -- expiry --


def expire(session: Session | None, unfinished: int = 0, now: datetime = NOW) -> Decision:
    session_id = session.id if session else new_id()
    found: dict[Any, Any] = {
        Key("sessions", "acme", session_id): session,
        Lookup("unfinished_tasks", "acme", session_id): unfinished,
    }
    return decide(MUTATIONS.expire, ChangeSession(actor=system_actor("acme"), id=session_id), found, now)


@pytest.mark.parametrize("state", ["PENDING", "ACTIVE", "PAUSED"])
def test_a_session_expires_at_its_time_and_not_before(state: str) -> None:
    session = a_session(state)
    assert expire(session, now=NOW - timedelta(microseconds=1)) == Decision((), session, ())
    expired = after(expire(session))
    assert (expired.end_time, expired.update_time, expired.expire_time) == (NOW, NOW, session.expire_time)


def test_a_session_with_an_unfinished_task_does_not_expire() -> None:
    session = a_session()
    assert expire(session, unfinished=1) == Decision((), session, ())


def test_a_session_that_is_gone_is_nothing_to_expire() -> None:
    assert expire(None) == Decision((), None, ())


def test_each_mutation_carries_the_name_of_its_rpc() -> None:
    service = "/orchestrator.controller.v1.SessionService/"
    names = [*("create", "update"), *("activate", "pause", "resume", "complete", "fail")]
    assert [getattr(MUTATIONS, name).method for name in names] == [f"{service}{name.title()}Session" for name in names]
    assert MUTATIONS.expire.method == "/orchestrator.controller.v1.Sweeper/ExpireSession"
