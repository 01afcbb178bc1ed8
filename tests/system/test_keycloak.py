"""The pair behind a real Keycloak with the realm of deploy/keycloak, called with grpcurl."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import jwt
import pytest

from deploy.local.issuer import Issuer
from tests.conftest import ServiceKeys
from tests.system.grpcurl import Grpcurl, Refused, grpcurl
from tests.system.keycloak import Keycloak, KeycloakMissing, keycloak
from tests.system.pair import Pair

AUDIENCE = "orchestrator-controller"


@pytest.fixture(scope="module")
def realm() -> Iterator[Keycloak]:
    """A running Keycloak with our realm."""
    try:
        with keycloak() as running:
            yield running
    except KeycloakMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def pair(
    realm: Keycloak,
    new_database: Callable[..., str],
    redis_engine: str,
    service_keys: ServiceKeys,
    issuer: Issuer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    """The pair, taking that Keycloak's tokens; it finds the keys by discovery."""
    services = Pair(
        database_url=new_database(),
        redis_url=redis_engine,
        issuer=issuer,
        service_key=service_keys.private,
        directory=tmp_path_factory.mktemp("pair"),
        controller_env={
            "OIDC_ISSUER_URL": realm.issuer,
            "OIDC_JWKS_URL": "",
            "OIDC_AUDIENCE": AUDIENCE,
            "OIDC_TOKEN_TYPE": "Bearer",
            "REFLECTION": "authenticated",
        },
    )
    try:
        services.start()
        yield services
    finally:
        services.stop()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Grpcurl:
    """The controller, called with grpcurl."""
    return grpcurl(pair.controller_target)


def claims(token: str) -> dict[str, Any]:
    """A token's claims, unverified."""
    found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return found


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and reason with which a call is refused."""
    with pytest.raises(Refused) as refused:
        call()
    return refused.value.code, refused.value.reason


def open_session(server: Grpcurl, token: str, role: str, *, key: str = "") -> dict[str, Any]:
    """The session that CreateSession answers."""
    answer = server.call("SessionService/CreateSession", {"agent_role": role}, token, key=key)
    session: dict[str, Any] = answer["session"]
    return session


@pytest.mark.parametrize(
    ("who", "tenant", "roles"),
    [
        ("agent-finance", "acme", {"orchestrator.agent", "finance"}),
        ("agent-manager", "acme", {"orchestrator.agent", "manager"}),
        ("ada", "acme", {"orchestrator.agent", "orchestrator.approve", "orchestrator.audit", "engineering"}),
        ("gus", "globex", {"orchestrator.agent", "orchestrator.audit", "orchestrator.operate", "engineering"}),
    ],
)
def test_an_access_token_says_who_and_nothing_more(realm: Keycloak, who: str, tenant: str, roles: set[str]) -> None:
    token = realm.by_client(who) if who.startswith("agent-") else realm.by_password(who)["access_token"]
    found = claims(token)
    assert jwt.get_unverified_header(token)["alg"] == "RS256"
    assert found["typ"] == "Bearer"
    assert found["iss"] == realm.issuer
    assert found["aud"] == AUDIENCE
    assert found["sub"]
    assert found["tenant"] == tenant
    assert set(found["realm_access"]["roles"]) == roles
    assert found["exp"] - found["iat"] in (300, 301)  # Keycloak reads its clock twice, and a second may pass between


def test_nobody_moves_to_another_tenant_by_themselves(realm: Keycloak) -> None:
    profile = {"username": "ada", "firstName": "Ada", "lastName": "Changed", "email": "ada@acme.example"}
    token = realm.by_password("ada", client="reporting")["access_token"]
    assert realm.change_account(token, profile)[0] == 204  # this token does reach the account
    status, body = realm.change_account(token, {**profile, "attributes": {"tenant": ["globex"]}})
    assert status == 400
    assert "error-user-attribute-read-only" in body
    assert claims(realm.by_password("ada")["access_token"])["tenant"] == "acme"


def test_a_role_that_is_held_opens_a_session(realm: Keycloak, server: Grpcurl) -> None:
    by_client = open_session(server, realm.by_client("agent-finance"), "finance")
    by_password = open_session(server, realm.by_password("ada")["access_token"], "engineering")
    assert (by_client["agentRole"], by_password["agentRole"]) == ("finance", "engineering")


def test_a_role_that_is_not_held_does_not(realm: Keycloak, server: Grpcurl) -> None:
    expected = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_HELD")
    for token, role in (
        (realm.by_client("agent-finance"), "manager"),
        (realm.by_password("ada")["access_token"], "finance"),
        (realm.by_password("ada")["access_token"], "default-roles-orchestrator"),
    ):
        assert refusal(partial(open_session, server, token, role)) == expected


@pytest.mark.parametrize(
    ("client", "kind", "typ", "cause"),
    [
        ("orchestrator-cli", "id_token", "ID", "not an access token"),
        ("orchestrator-cli", "refresh_token", "Refresh", "an algorithm that is not taken"),
        ("reporting", "access_token", "Bearer", "another audience"),
        ("reporting", "id_token", "ID", "not an access token"),
        ("admin-cli", "access_token", "Bearer", "another audience"),
    ],
)
def test_every_other_token_is_refused(
    realm: Keycloak, server: Grpcurl, pair: Pair, client: str, kind: str, typ: str, cause: str
) -> None:
    """Real ones, of someone whose access token from our client is taken; the cause is in the log only."""
    token = realm.by_password("ada", client=client)[kind]
    assert claims(token)["typ"] == typ
    logged = len(pair.log("controller"))
    with pytest.raises(Refused) as refused:
        open_session(server, token, "engineering")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    pair.services["controller"].wait_until(lambda: cause in pair.log("controller")[logged:], seconds=60)
    assert cause not in str(refused.value)
    assert token not in pair.log("controller")


def test_the_other_application_differs_in_its_audience_only(realm: Keycloak) -> None:
    """So that a server which does not look at the audience takes it, and fails the test above."""
    ours = claims(realm.by_password("ada")["access_token"])
    theirs = claims(realm.by_password("ada", client="reporting")["access_token"])
    for claim in ("iss", "sub", "typ", "tenant"):
        assert ours[claim] == theirs[claim]
    assert set(ours["realm_access"]["roles"]) <= set(theirs["realm_access"]["roles"])
    assert AUDIENCE not in theirs["aud"]


def test_no_token_and_a_changed_one_are_refused(realm: Keycloak, server: Grpcurl) -> None:
    head, payload, signature = realm.by_client("agent-finance").split(".")
    others = realm.by_client("agent-manager").split(".")
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    assert refusal(lambda: open_session(server, "", "finance")) == (unauthenticated, "TOKEN_MISSING")
    for token in (f"{head}.{others[1]}.{signature}", f"{head}.{payload}."):
        assert refusal(partial(open_session, server, token, "finance")) == (unauthenticated, "TOKEN_INVALID")


def test_a_retry_with_a_refreshed_token_gets_the_first_answer(realm: Keycloak, server: Grpcurl) -> None:
    """An idempotency key belongs to the subject, not to one token of theirs."""
    key = secrets.token_hex(16)
    tokens = realm.by_password("ada")
    first = open_session(server, tokens["access_token"], "engineering", key=key)
    refreshed = realm.refreshed(tokens["refresh_token"])["access_token"]
    assert refreshed != tokens["access_token"]
    assert open_session(server, refreshed, "engineering", key=key) == first


def test_one_agent_routes_a_task_and_another_does_it(realm: Keycloak, server: Grpcurl) -> None:
    finance, manager = realm.by_client("agent-finance"), realm.by_client("agent-manager")
    session = open_session(server, finance, "finance")
    request = {"session_id": session["id"], "type": "ROUTING", "target_role": "manager", "data": {"invoice": 7}}
    task = server.call("TaskService/RouteTask", request, finance, key=secrets.token_hex(16))["task"]

    expected = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_HELD")
    claim = {"role": "manager", "max_tasks": 1}
    assert refusal(lambda: server.call("TaskService/ClaimTasks", claim, finance)) == expected
    (claimed,) = server.call("TaskService/ClaimTasks", claim, manager)["tasks"]
    assert claimed["task"]["id"] == task["id"]
    assert claimed["task"]["fromRole"] == "finance"
    done = {"task_id": task["id"], "lease_id": claimed["leaseId"], "result": {"approved": True}}
    server.call("TaskService/CompleteTask", done, manager)
    seen = server.call("TaskService/GetTask", {"task_id": task["id"]}, finance)["task"]
    assert (seen["state"], seen["result"]) == ("STATE_SUCCEEDED", {"approved": True})


def test_another_tenant_sees_nothing(realm: Keycloak, server: Grpcurl) -> None:
    session = open_session(server, realm.by_client("agent-finance"), "finance")
    stranger = realm.by_password("gus")["access_token"]  # who may operate, in another tenant
    expected = (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    request = {"session_id": session["id"]}
    assert refusal(lambda: server.call("SessionService/GetSession", request, stranger)) == expected
    assert refusal(lambda: server.call("SessionService/ActivateSession", request, stranger)) == expected
    assert server.call("SessionService/ListSessions", {}, stranger).get("sessions", []) == []


def test_permissions_are_the_realm_roles_of_that_name(realm: Keycloak, server: Grpcurl) -> None:
    finance = realm.by_client("agent-finance")
    ada = realm.by_password("ada")["access_token"]
    gus = realm.by_password("gus")["access_token"]
    open_session(server, ada, "engineering")
    expected = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")

    subject = claims(ada)["sub"]
    (event,) = server.call("AuditService/ListAuditEvents", {"subject": subject, "page_size": 1}, ada)["auditEvents"]
    assert event["subject"] == subject
    assert refusal(lambda: server.call("AuditService/ListAuditEvents", {}, finance)) == expected

    assert server.call("StatusService/GetStatus", {}, gus)["version"]
    assert refusal(lambda: server.call("StatusService/GetStatus", {}, ada)) == expected

    assert "orchestrator.controller.v1.SessionService" in server.services(gus)
