"""Forged, broken and foreign tokens against a live server, and an issuer that misbehaves under it."""

from __future__ import annotations

import asyncio
import hmac
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from structlog.testing import capture_logs

from svckit import errors
from svckit.auth import SERVICE, Principal, ServiceProfile, TokenSigner, TokenVerifier
from svckit.jwks import MAX_WAITING, JwksCache, StaticKeys
from tests.oracle import eventually
from tests.rpc.svckit_parts import (
    EC,
    ED,
    OTHER_RSA,
    P384,
    PROBE,
    RSA,
    FakeIssuer,
    Probe,
    Text,
    ask,
    b64,
    bearer,
    claims,
    jwk,
    profile,
    refused,
    running_issuer,
    serving,
    sign,
    sign_raw,
    user_verifier,
)


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with running_issuer() as one:
        one.keys = [jwk(RSA, "k1"), jwk(EC, "ec"), jwk(P384, "p384"), jwk(ED, "ed"), jwk(OTHER_RSA, "pss", alg="PS256")]
        yield one


@pytest.fixture
def now() -> int:
    """When `live` takes all calls to be made."""
    return int(time.time())


@pytest.fixture
async def live(issuer: FakeIssuer, now: int) -> AsyncIterator[tuple[Any, Probe]]:
    probe = Probe()
    verifier = TokenVerifier(user_verifier(issuer).keys, profile(issuer.url), clock=lambda: now)
    async with (
        serving(verifier, (PROBE, probe)) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield ask(channel), probe


def hs(secret: bytes, payload: dict[str, Any]) -> str:
    """A token signed with HMAC, as one who takes a public key for a secret would."""
    signed = b64(b'{"alg": "HS256", "typ": "at+jwt", "kid": "k1"}') + b"." + b64(json.dumps(payload).encode())
    return (signed + b"." + b64(hmac.digest(secret, signed, "sha256"))).decode()


def unsigned(algorithm: str, payload: dict[str, Any]) -> str:
    header = json.dumps({"alg": algorithm, "typ": "at+jwt", "kid": "k1"}).encode()
    return (b64(header) + b"." + b64(json.dumps(payload).encode()) + b".").decode()


def good_tokens(issuer: FakeIssuer, now: int) -> dict[str, str]:
    make = issuer.token
    return {
        "RS256": make(),
        "RS512 by a key published without alg": make(header={"algorithm": "RS512"}),
        "PS256": make(OTHER_RSA, header={"kid": "pss", "algorithm": "PS256"}),
        "ES256": make(EC, header={"kid": "ec"}),
        "ES384": make(P384, header={"kid": "p384"}),
        "EdDSA": make(ED, header={"kid": "ed"}),
        "typ long": make(header={"typ": "application/at+jwt"}),
        "typ in capitals": make(header={"typ": "AT+JWT"}),
        "aud list with ours": make(aud=["account", "orchestrator"]),
        "exp within leeway": make(exp=now - 28, iat=now - 300),
        "nbf within leeway": make(nbf=now + 28),
        "iat within leeway": make(iat=now + 28),
        "24 h": make(exp=now + 86400, iat=now),
        "permission by scope": make(realm_access=..., scope="openid orchestrator.agent"),
        "jku and jwk of a stranger are not looked at": make(
            header={"jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/", "jwk": jwk(EC, "k1")}
        ),
        "7.9 KB": make(pad="x" * 5500),
    }


async def test_good_tokens(live: tuple[Any, Probe], issuer: FakeIssuer, now: int) -> None:
    call, _ = live
    for name, token in good_tokens(issuer, now).items():
        assert (await call(Text(value=name), metadata=bearer(token), timeout=5)).value == f"{name}!"
        assert (await call(Text(value=name), metadata=bearer(token), timeout=5)).value == f"{name}!"


def forged_tokens(issuer: FakeIssuer, now: int) -> dict[str, str]:
    """T2 to T17 of the threat table; all of them are answered alike."""
    make = issuer.token
    good = claims(issuer.url)
    token = make()
    public = RSA.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    head, body, signature = token.split(".")
    deep = b"[" * 100000 + b"]" * 100000
    kids: list[Any] = ["../../etc/passwd", "' OR 1=1 --", "k" * 4000, 7, None, [], {"a": 1}, ""]
    audiences: list[Any] = [..., [], "idempotency_svc", "orchestra", "orchestrators", ["account"], None, 1, {}, [[]]]
    other_claims = b64(json.dumps({**good, "sub": "root"}).encode()).decode()
    return {
        **{f"T2 alg {name}": unsigned(name, good) for name in ("none", "None", "nOnE", "NONE")},
        "T3 HMAC over PEM": hs(pem, good),
        "T3 HMAC over PEM without newline": hs(pem.strip(), good),
        "T3 HMAC over DER": hs(der, good),
        "T3 HMAC over JWK": hs(json.dumps(jwk(RSA, "k1")).encode(), good),
        "T4 other algorithm than the key is published for": make(
            OTHER_RSA, header={"kid": "pss", "algorithm": "RS256"}
        ),
        "T4 ES256 header on an RSA signature": sign_raw(
            b'{"alg": "ES256", "typ": "at+jwt", "kid": "k1"}', json.dumps(good).encode(), RSA, "RS256"
        ),
        "signed by another key": make(OTHER_RSA),
        **{f"T5 kid {str(kid)[:20]!r}": make(header={"kid": kid}) for kid in kids},
        "T5 no kid among several keys": make(header={"kid": ...}),
        "T8 unknown crit": make(header={"crit": ["x"], "x": 1}),
        "T8 b64 false": make(header={"b64": False, "crit": ["b64"]}),
        **{
            f"T9 iss {iss!r}": make(iss=iss)
            for iss in (
                "http://evil.example",
                issuer.url[:-1],
                issuer.url + "x",
                issuer.url + "/",
                issuer.url.upper(),
                [issuer.url],
                ...,
                None,
            )
        },
        **{f"T10 aud {aud!r}": make(aud=aud) for aud in audiences},
        "T11 ID token": make(header={"typ": "JWT"}),
        "T11 no typ": make(header={"typ": ...}),
        "T11 logout token": make(header={"typ": "logout+jwt"}),
        **{
            f"T12 exp {exp!r}": make(exp=exp)
            for exp in (..., "9999999999", now + 60.5, 1e308, -1, True, None, 10**400, [now + 60])
        },
        "T12 lifetime over 24 h": make(exp=now + 86401, iat=now),
        "T13 nbf in the future": make(nbf=now + 33),
        "T13 iat in the future": make(iat=now + 33),
        "T13 nbf no integer": make(nbf=str(now)),
        "T13 iat missing": make(iat=...),
        "T13 iat float": make(iat=now + 0.5),
        **{
            f"T14 sub {str(sub)[:12]!r}": make(sub=sub)
            for sub in (..., "", 7, None, ["a"], "x" * 256, "a\0b", "a\nb", "a\u202eb", "\ud800", "a\x1b[31m")
        },
        "T15 8.1 KB": "x" * 8300,
        "T15 8.1 KB signed": make(pad="x" * 6000),
        "T16 nested payload": sign_raw(b'{"alg": "RS256", "typ": "at+jwt", "kid": "k1"}', deep, RSA, "RS256")[:8000],
        "T16 nested": (b64(b"[" * 3000) + b"." + b64(b"[" * 2000) + b".x").decode(),
        "T16 nested signed": sign(b"[" * 2500 + b"]" * 2500),
        "T17 truncated": token[:-4],
        "T17 padded": token + "==",
        "T17 two segments": f"{head}.{body}",
        "T17 four segments": f"{token}.x",
        "T17 JWE": f"{token}.x.y",
        "T17 empty segments": "..",
        "T17 no signature": f"{head}.{body}.",
        "T17 signature of another body": f"{head}.{other_claims}.{signature}",
        "T17 not base64": f"{head}.!!!.{signature}",
        "T17 claims are a list": sign([1]),
        "T17 claims are text": sign("x"),
        "T17 claims are no JSON": sign(b"{"),
        "T17 header is no object": f"{b64(b'[1]').decode()}.{body}.{signature}",
        "T17 inner space": token[:40] + " " + token[40:],
    }


async def test_forged_tokens(live: tuple[Any, Probe], issuer: FakeIssuer, now: int) -> None:
    call, probe = live
    for name, token in forged_tokens(issuer, now).items():
        refusal = await refused(call(Text(), metadata=bearer(token), timeout=5))
        assert refusal.reason == "UNAUTHENTICATED TOKEN_INVALID", name
        assert refusal.message == "a valid bearer token is required", name
        assert dict(refusal.info.metadata) == {}, name
        assert len(refusal.status.details) == 1, name
    assert probe.calls == []
    assert issuer.hits == 1, "no forged token caused a second fetch"


async def test_expired(live: tuple[Any, Probe], issuer: FakeIssuer, now: int) -> None:
    call, _ = live
    refusal = await refused(call(Text(), metadata=bearer(issuer.token(exp=now - 31, iat=now - 60)), timeout=5))
    assert refusal.reason == "UNAUTHENTICATED TOKEN_EXPIRED"
    assert refusal.message == "a valid bearer token is required"


async def test_authorization_header(live: tuple[Any, Probe], issuer: FakeIssuer) -> None:
    call, probe = live
    token = issuer.token()
    for metadata, reason in (
        ((), "TOKEN_MISSING"),
        ((("authorization", ""),), "TOKEN_INVALID"),
        ((("authorization", "Basic dTpw"),), "TOKEN_INVALID"),
        ((("authorization", "Bearer"),), "TOKEN_INVALID"),
        ((("authorization", token),), "TOKEN_INVALID"),
        ((("authorization", f"Token {token}"),), "TOKEN_INVALID"),
        ((*bearer(token), *bearer(token)), "TOKEN_INVALID"),
        ((*bearer(token), *bearer("x")), "TOKEN_INVALID"),
        ((("x-authorization", f"Bearer {token}"), ("x-tenant-id", "acme")), "TOKEN_MISSING"),
    ):
        assert (await refused(call(Text(), metadata=metadata, timeout=5))).reason == f"UNAUTHENTICATED {reason}"
    assert probe.calls == []
    await call(Text(), metadata=(("authorization", f"bearer {token}"), ("x-a", "1"), ("x-a", "2")), timeout=5)


async def test_tenant(issuer: FakeIssuer) -> None:
    verifier = user_verifier(issuer)
    for tenant in (..., "", " ", "a/b", "-a", "a" * 64, "a\n", 7, None, ["acme"], "\u0430cme"):
        with pytest.raises(errors.PermissionDenied) as error:
            await verifier.verify(issuer.token(tenant=tenant))
        assert error.value.reason == "TENANT_MISSING"
    fallback = TokenVerifier(verifier.keys, profile(issuer.url, default_tenant="home"))
    assert (await fallback.verify(issuer.token(tenant=...))).tenant == "home"
    assert (await fallback.verify(issuer.token(tenant="acme"))).tenant == "acme"
    with pytest.raises(errors.PermissionDenied):
        await fallback.verify(issuer.token(tenant="a/b"))


async def test_roles_and_permissions(issuer: FakeIssuer) -> None:
    verifier = user_verifier(issuer)

    async def of(**changed: Any) -> tuple[set[str], set[str]]:
        principal = await verifier.verify(issuer.token(**changed))
        return set(principal.roles), set(principal.permissions)

    roles = ["planner", "orchestrator.audit", "orchestrator.service", "orchestrator.x", 7]
    assert await of(realm_access={"roles": roles}, scope="a orchestrator.approve") == (
        {"planner"},
        {"orchestrator.audit", "orchestrator.approve"},
    )
    # Who operates may do what agents do and read what auditors read; approving is for approvers only.
    assert await of(realm_access=..., scope="orchestrator.operate") == (
        set(),
        {"orchestrator.operate", "orchestrator.agent", "orchestrator.audit"},
    )
    useless: list[Any] = [..., None, "orchestrator.agent", {"roles": "orchestrator.agent"}, {"roles": None}, []]
    for nothing in useless:
        assert await of(realm_access=nothing) == (set(), set())
    flat = TokenVerifier(verifier.keys, profile(issuer.url, roles_claim="https://x.example/roles"))
    named: Any = {"https://x.example/roles": ["a.b"]}
    principal = await flat.verify(issuer.token(**named))
    assert principal.roles == {"a.b"}


def test_a_digest_stands_for_the_caller_and_its_rights() -> None:
    one = Principal("i", "t", "s", frozenset({"a", "b"}), frozenset({"p"}), "o", 100.0)
    assert replace(one, roles=frozenset(["b", "a"]), expires_at=200.0).digest == one.digest
    others = [
        replace(one, issuer="j"),
        replace(one, tenant="u"),
        replace(one, subject="r"),
        replace(one, issuer="it", tenant=""),
        replace(one, tenant="s", subject="t"),
        replace(one, roles=frozenset({"a"})),
        replace(one, roles=frozenset({"a,b"})),
        replace(one, roles=frozenset({"a", "b", "p"}), permissions=frozenset()),
        replace(one, permissions=frozenset()),
        replace(one, permissions=frozenset({"p", "q"})),
        replace(one, on_behalf_of=""),
        replace(one, subject="\U0001f600"),
        replace(one, subject="\ud83d\ude00"),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)


async def test_keycloak_tokens_are_told_apart_by_their_typ_claim(issuer: FakeIssuer) -> None:
    verifier = TokenVerifier(user_verifier(issuer).keys, profile(issuer.url, token_type="Bearer"))
    await verifier.verify(issuer.token(typ="Bearer", header={"typ": "JWT"}))
    for typ in ("ID", "Refresh", "Offline", "Logout", "bearer", ["Bearer"], ...):
        with pytest.raises(errors.Unauthenticated):
            await verifier.verify(issuer.token(typ=typ, header={"typ": "JWT"}))
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(issuer.token())


async def test_fuzz(live: tuple[Any, Probe], issuer: FakeIssuer) -> None:
    call, probe = live
    verifier = user_verifier(issuer)
    token = issuer.token()
    dice = random.Random(1)
    bad = [*(chr(code) for code in range(256)), "\U0001f600", ""]
    for _ in range(5000):
        place = dice.randrange(len(token))
        forged = token[:place] + dice.choice(bad) + token[place + dice.randrange(3) :]
        if forged == token:
            continue
        try:
            await verifier.verify(forged)
        except errors.Unauthenticated:
            continue
        # base64 leaves bits of a segment's last character unused
        assert len(forged) == len(token)
        assert sum(a != b for a, b in zip(forged, token, strict=True)) <= 1
    for place in range(0, len(token), 7):
        refusal = await refused(call(Text(), metadata=bearer(token[:place] + "~" + token[place + 1 :]), timeout=5))
        assert refusal.reason == "UNAUTHENTICATED TOKEN_INVALID"
    assert probe.calls == []


async def test_a_huge_token_never_reaches_us(live: tuple[Any, Probe], issuer: FakeIssuer) -> None:
    call, _ = live
    assert (await refused(call(Text(), metadata=bearer("x" * 65536), timeout=5))).code == "RESOURCE_EXHAUSTED"
    await call(Text(), metadata=bearer(issuer.token()), timeout=5)


async def test_no_token_in_logs(live: tuple[Any, Probe], issuer: FakeIssuer) -> None:
    call, _ = live
    forged = issuer.token(OTHER_RSA)
    with capture_logs() as logs:
        await refused(call(Text(), metadata=bearer(forged), timeout=5))
        await asyncio.sleep(0.02)
    assert any(line.get("reason") == "TOKEN_INVALID" and line.get("notes") for line in logs)
    for part in forged.split("."):
        assert part not in str(logs)


# --- what was verified before -----------------------------------------------------------------------------------------


async def test_verified_tokens_are_kept_until_they_expire(issuer: FakeIssuer) -> None:
    now = time.time()
    verifier = TokenVerifier(user_verifier(issuer).keys, profile(issuer.url), clock=lambda: now)
    token = issuer.token(exp=int(now) + 100, iat=int(now))
    assert verifier.cached(token) is None
    await verifier.verify(token)
    verifier.cached(token)  # notices that keys came, and forgets what was verified before them
    principal = await verifier.verify(token)
    assert verifier.cached(token) is principal
    now += 129
    assert verifier.cached(token) is principal
    now += 2
    assert verifier.cached(token) is None
    with pytest.raises(errors.Unauthenticated) as error:
        await verifier.verify(token)
    assert error.value.reason == "TOKEN_EXPIRED"


async def test_the_cache_of_tokens_is_bounded(issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svckit.auth.MAX_CACHED_TOKENS", 4)
    verifier = user_verifier(issuer)
    tokens = [issuer.token(sub=f"agent-{number}") for number in range(4)]
    await verifier.verify(tokens[0])
    verifier.cached(tokens[0])
    for token in tokens[:3]:
        await verifier.verify(token)
    assert verifier.cached(tokens[0]) is not None  # used again, so it stays
    await verifier.verify(tokens[3])
    assert [verifier.cached(token) is not None for token in tokens] == [True, False, True, True]


# --- the issuer -------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


DOWN = ["500", "hang", "trickle", "garbage", "empty", "redirect", "large", "reset"]


@pytest.mark.parametrize("mode", DOWN)
async def test_known_keys_outlive_the_issuer(issuer: FakeIssuer, clock: Clock, mode: str) -> None:
    verifier = user_verifier(issuer, clock=clock, timeout=1)
    await verifier.verify(issuer.token())
    issuer.mode = mode
    clock.now += 86000
    with pytest.raises(errors.Unavailable):  # the issuer that hangs does so for longer than this waits
        await asyncio.wait_for(verifier.verify(issuer.token(header={"kid": "unknown"})), 15)
    await verifier.verify(issuer.token())
    hits = issuer.hits
    with pytest.raises(errors.Unavailable) as error:  # within the cooldown: no second fetch, the same answer
        await verifier.verify(issuer.token(header={"kid": "unknown2"}))
    assert error.value.reason == "IDENTITY_UNAVAILABLE"
    assert error.value.retry_after is not None
    assert issuer.hits == hits
    clock.now += 401  # 24 h after the last success
    with pytest.raises(errors.Unavailable):
        await verifier.verify(issuer.token())
    issuer.mode = "ok"
    clock.now += 30
    await verifier.verify(issuer.token())


@pytest.mark.parametrize("mode", DOWN)
async def test_cold_start_without_issuer(issuer: FakeIssuer, mode: str) -> None:
    issuer.mode = mode
    verifier = user_verifier(issuer, cooldown=0.2, timeout=1)
    async with (
        serving(verifier, (PROBE, Probe())) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        refusal = await refused(ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=5))
        assert refusal.reason == "UNAVAILABLE IDENTITY_UNAVAILABLE"
        assert not verifier.keys.loaded.is_set()
        issuer.mode = "ok"
        await asyncio.wait_for(verifier.keys.loaded.wait(), 60)  # by itself, without a call
        await ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=5)
        issuer.mode = mode
        assert verifier.keys.loaded.is_set()
        assert server.metrics_port > 0


@pytest.mark.parametrize("mode", ["ok", "500", "hang"])
async def test_hammering_unknown_keys(issuer: FakeIssuer, mode: str) -> None:
    verifier = user_verifier(issuer, timeout=6, cooldown=1.0)  # long enough for a slow machine to ask 2000 times
    known = issuer.token()
    await verifier.verify(known)
    verifier.cached(known)
    issuer.mode = mode
    await asyncio.sleep(1.05)
    body = known.split(".")[1]
    tokens = [
        f"{b64(json.dumps({'alg': 'RS256', 'typ': 'at+jwt', 'kid': f'u{number}'}).encode()).decode()}.{body}.c2ln"
        for number in range(2000)
    ]
    hits = issuer.hits
    tasks = [asyncio.ensure_future(verifier.verify(token)) for token in tokens]
    await asyncio.sleep(0)
    await verifier.verify(known)
    if mode == "hang":
        # As many as may wait still do: a look-up of a known key did not wait for the fetch.
        assert sum(not task.done() for task in tasks) == MAX_WAITING
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert issuer.hits == hits + 1
    assert {type(answer) for answer in answers} <= {errors.Unauthenticated, errors.Unavailable}


async def test_one_fetch_for_all_and_a_leaving_caller_does_not_end_it(issuer: FakeIssuer) -> None:
    verifier = user_verifier(issuer)
    first = asyncio.ensure_future(verifier.verify(issuer.token()))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(verifier.verify(issuer.token(sub=f"s{number}"))) for number in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(*others)
    assert issuer.hits == 1


async def test_rotation(issuer: FakeIssuer, clock: Clock) -> None:
    verifier = user_verifier(issuer, clock=clock)
    old = issuer.token()
    await verifier.verify(old)
    assert verifier.cached(old) is None
    await verifier.verify(old)
    assert verifier.cached(old) is not None
    clock.now += 31
    issuer.keys = [jwk(RSA, "k1"), jwk(OTHER_RSA, "k2")]
    await verifier.verify(issuer.token(OTHER_RSA, header={"kid": "k2"}))
    await verifier.verify(old)
    clock.now += 31
    issuer.keys = [jwk(OTHER_RSA, "k2")]
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(issuer.token(header={"kid": "k3"}))
    assert verifier.cached(old) is None  # a key was taken back: also what was verified before is
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(old)


async def test_keys_are_refreshed_without_calls(issuer: FakeIssuer) -> None:
    cache = JwksCache(issuer.url, f"{issuer.url}/jwks", refresh=0.05, cooldown=0.01)
    running = asyncio.ensure_future(cache.run())
    await asyncio.wait_for(cache.loaded.wait(), 30)
    assert cache.generation == 1
    issuer.keys = [jwk(OTHER_RSA, "k2")]
    await eventually(lambda: cache.generation > 1)
    assert (await cache.find("k2")).kid == "k2"
    issuer.mode = "500"
    await asyncio.sleep(0.2)
    issuer.mode = "ok"
    hits = issuer.hits
    await eventually(lambda: issuer.hits > hits)
    running.cancel()


async def test_keys_that_are_refused(issuer: FakeIssuer) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    private = json.loads(json.dumps(jwk(RSA, "private")))
    issuer.keys = [
        jwk(RSA, "k1"),
        {"kty": "oct", "kid": "oct", "k": "c2VjcmV0", "alg": "HS256", "use": "sig"},
        jwk(RSA, "enc", use="enc"),
        jwk(RSA, "ops", key_ops=["encrypt"]),
        jwk(weak, "weak"),
        jwk(OTHER_RSA, "twice"),
        jwk(EC, "twice"),
        {**private, "d": "AQAB"},
        jwk(RSA, "alg", alg="ES256"),
        jwk(RSA, "hs", alg="HS256"),
        {"kty": "RSA", "kid": "broken", "n": "!", "e": []},
        {"kty": "EC", "kid": "curve", "crv": "P-999", "x": "AA", "y": "AA"},
        {"kid": 7, **{k: v for k, v in jwk(RSA, None).items() if k != "kid"}},
        {},
        "text",  # type: ignore[list-item]
    ]
    cache = JwksCache(issuer.url, f"{issuer.url}/jwks")
    assert (await cache.find("k1")).kid == "k1"
    assert (await cache.find(None)).kid == "k1"  # the only one left
    assert issuer.hits == 1


async def test_discovery(issuer: FakeIssuer, clock: Clock) -> None:
    verifier = TokenVerifier(JwksCache(issuer.url, clock=clock), profile(issuer.url))
    await verifier.verify(issuer.token())
    assert (issuer.discoveries, issuer.hits) == (1, 1)
    issuer.named_issuer = issuer.url + "/"
    fresh = TokenVerifier(JwksCache(issuer.url), profile(issuer.url))
    with pytest.raises(errors.Unavailable):
        await fresh.verify(issuer.token())
    assert issuer.hits == 1


async def test_plaintext_issuer_outside_loopback_is_not_asked() -> None:
    with socket.socket() as canary:
        canary.bind(("127.0.0.1", 0))
        cache = JwksCache("http://issuer.example", "http://issuer.example/jwks")
        with capture_logs() as logs, pytest.raises(errors.Unavailable):
            await cache.find("k1")
    assert any("plaintext" in line.get("reason", "") for line in logs)


async def test_nobody_is_called_for_a_token(issuer: FakeIssuer) -> None:
    """jku, x5u: where a forged token says that its keys are."""
    with socket.socket() as canary:
        canary.bind(("127.0.0.1", 0))
        canary.listen()
        canary.setblocking(False)
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/"
        verifier = user_verifier(issuer)
        for header in ({"jku": url}, {"x5u": url}, {"jku": url, "kid": "theirs"}, {"jwk": jwk(OTHER_RSA, "k1")}):
            with pytest.raises(errors.Unauthenticated):
                await verifier.verify(issuer.token(OTHER_RSA, header=header))
        with pytest.raises(BlockingIOError):
            canary.accept()


# --- the pair's own tokens --------------------------------------------------------------------------------------------


def pem_files(folder: Path, key: Any, name: str = "key") -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


IDENTITY: dict[str, Any] = {"issuer": "controller_svc", "subject": "controller_svc", "audience": "idempotency_svc"}


@pytest.mark.parametrize("key", [RSA, EC, P384, ED], ids=["RS256", "ES256", "ES384", "EdDSA"])
async def test_service_tokens(tmp_path: Path, key: Any) -> None:
    private, public = pem_files(tmp_path, key)
    verifier = TokenVerifier(StaticKeys(public), ServiceProfile(**IDENTITY))
    signer = TokenSigner(private, **IDENTITY)
    principal = await verifier.verify(signer.token())
    assert principal.permissions == {SERVICE}
    assert (principal.tenant, principal.subject, principal.roles) == ("", "controller_svc", frozenset())
    assert verifier.cached(signer.token()) is principal
    for changed in ({"issuer": "x"}, {"subject": "x"}, {"audience": "orchestrator"}):
        with pytest.raises(errors.Unauthenticated):
            await verifier.verify(TokenSigner(private, **{**IDENTITY, **changed}).token())
    other, _ = pem_files(tmp_path, OTHER_RSA, "other")
    with pytest.raises(errors.Unauthenticated):
        await verifier.verify(TokenSigner(other, **IDENTITY).token())


async def test_service_tokens_are_renewed_early(tmp_path: Path) -> None:
    now = 1_000_000.0
    private, public = pem_files(tmp_path, EC)
    signer = TokenSigner(private, **IDENTITY, clock=lambda: now)
    verifier = TokenVerifier(StaticKeys(public), ServiceProfile(**IDENTITY), clock=lambda: now)
    first = signer.token()
    now += 199
    assert signer.token() == first
    now += 2
    second = signer.token()
    assert second != first
    now += 299
    await verifier.verify(second)


async def test_service_keys_rotate_by_two_keys_in_a_file(tmp_path: Path) -> None:
    old, old_public = pem_files(tmp_path, EC, "old")
    new, new_public = pem_files(tmp_path, RSA, "new")
    both = tmp_path / "both.pub"
    both.write_bytes(old_public.read_bytes() + new_public.read_bytes())
    verifier = TokenVerifier(StaticKeys(both), ServiceProfile(**IDENTITY))
    for private in (old, new):
        await verifier.verify(TokenSigner(private, **IDENTITY).token())


def test_unusable_key_files(tmp_path: Path) -> None:
    weak, weak_public = pem_files(tmp_path, rsa.generate_private_key(65537, 1024), "weak")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    private, public = pem_files(tmp_path, EC)
    for path in (weak_public, empty, private):
        with pytest.raises(ValueError):
            StaticKeys(path)
    for path in (weak, empty, public):
        with pytest.raises(ValueError):
            TokenSigner(path, **IDENTITY)


def test_no_verifier_without_issuer_or_audience(issuer: FakeIssuer) -> None:
    keys = JwksCache(issuer.url)
    for missing in ("issuer", "audience"):
        with pytest.raises(ValueError):
            TokenVerifier(keys, profile(**{"issuer": issuer.url, missing: ""}))
