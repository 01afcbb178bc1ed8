"""Who calls: the strict profile for access tokens, and the tokens one of our services shows to another."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from svckit import errors
from svckit.jwks import JwksCache, KeySource, StaticKeys, UnknownKeyError, thumbprint, usable_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from svckit.config import OidcSettings, ServiceKeySettings

AGENT = "orchestrator.agent"
APPROVE = "orchestrator.approve"
AUDIT = "orchestrator.audit"
OPERATE = "orchestrator.operate"
SERVICE = "orchestrator.service"

USER_PERMISSIONS = frozenset({AGENT, APPROVE, AUDIT, OPERATE})
"""What a user's token can grant, as a role or scope of that name."""
OPERATE_INCLUDES = frozenset({AGENT, AUDIT})
"""Who operates reads all of the tenant, and may change every session and task of it."""
RESERVED_PREFIX = "orchestrator."
"""Roles that start so are never agent roles."""

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Asymmetric ones only. A symmetric one among them would make public keys into secrets."""

LEEWAY_SECONDS = 30
MAX_LIFETIME_SECONDS = 86400
MAX_TOKEN_BYTES = 8192
MAX_CACHED_TOKENS = 8192

# The decoders of libraries forgive padding and foreign characters; one token shall have one form.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified caller. `roles` are agent roles; `permissions` are this system's own (orchestrator.*).

    expires_at: Unix seconds, the `exp` of the token that proved this.
    """

    issuer: str
    tenant: str
    subject: str
    roles: frozenset[str]
    permissions: frozenset[str]
    on_behalf_of: str = ""
    expires_at: float = 0.0
    digest: bytes = field(init=False, repr=False, compare=False)
    """SHA-256 of all of it but `expires_at`: the same for every token of a caller whose rights have not changed."""

    def __post_init__(self) -> None:
        who = [self.issuer, self.tenant, self.subject, self.on_behalf_of]
        facts = json.dumps([who, sorted(self.roles), sorted(self.permissions)], ensure_ascii=False)
        object.__setattr__(self, "digest", hashlib.sha256(facts.encode(errors="surrogatepass")).digest())


NOBODY = Principal("", "", "", frozenset(), frozenset())
"""Stands for the caller until it is known."""


@dataclass(frozen=True, slots=True)
class UserProfile:
    """What a user's token must be, and where in it tenant and roles are."""

    issuer: str
    audience: str
    token_type: str
    tenant_claim: str
    roles_claim: str
    default_tenant: str

    def principal(self, claims: dict[str, Any], subject: str) -> Principal:
        """Raises PermissionDenied TENANT_MISSING."""
        roles = _strings(_claim(claims, self.roles_claim))
        scope = claims.get("scope")
        scopes = frozenset(scope.split()) if isinstance(scope, str) else frozenset()
        permissions = (roles | scopes) & USER_PERMISSIONS
        if OPERATE in permissions:
            permissions |= OPERATE_INCLUDES
        return Principal(
            issuer=self.issuer,
            tenant=self._tenant(claims),
            subject=subject,
            roles=frozenset(role for role in roles if not role.startswith(RESERVED_PREFIX)),
            permissions=permissions,
            expires_at=claims["exp"],
        )

    def _tenant(self, claims: dict[str, Any]) -> str:
        tenant = _claim(claims, self.tenant_claim)
        if tenant is None:
            tenant = self.default_tenant
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise errors.PermissionDenied("TENANT_MISSING", "the token names no usable tenant")
        return tenant


@dataclass(frozen=True, slots=True)
class ServiceProfile:
    """What the token of the one service that may call must be."""

    issuer: str
    audience: str
    subject: str
    token_type: str = "at+jwt"  # noqa: S105

    def principal(self, claims: dict[str, Any], subject: str) -> Principal:
        """The service, with the permission orchestrator.service."""
        if subject != self.subject:
            raise _invalid("another subject")
        return Principal(
            issuer=self.issuer,
            tenant="",
            subject=subject,
            roles=frozenset(),
            permissions=frozenset({SERVICE}),
            expires_at=claims["exp"],
        )


class TokenVerifier:
    """From a bearer token to its Principal, by one strict profile; what was verified is kept until it expires."""

    def __init__(
        self, keys: KeySource, profile: UserProfile | ServiceProfile, *, clock: Callable[[], float] = time.time
    ) -> None:
        if not profile.issuer or not profile.audience:
            raise ValueError("a token verifier needs an issuer and an audience")
        self.keys = keys
        self._profile = profile
        self._clock = clock
        self._jws = jwt.PyJWS(algorithms=ALGORITHMS)
        # Two generations make a cheap LRU: what is used moves to the young one, and the old one is dropped when the
        # young one is full. Looked up by the token itself: to hash it would cost more than all the rest.
        self._young: dict[str, Principal] = {}
        self._old: dict[str, Principal] = {}
        self._generation = keys.generation

    @classmethod
    def for_users(cls, settings: OidcSettings) -> TokenVerifier:
        """The verifier of an OIDC issuer's access tokens."""
        keys = JwksCache(settings.oidc_issuer_url, settings.oidc_jwks_url, allow_plaintext=settings.allow_plaintext)
        profile = UserProfile(
            issuer=settings.oidc_issuer_url,
            audience=settings.oidc_audience,
            token_type=settings.oidc_token_type,
            tenant_claim=settings.oidc_tenant_claim,
            roles_claim=settings.oidc_roles_claim,
            default_tenant=settings.default_tenant,
        )
        return cls(keys, profile)

    @classmethod
    def for_service(cls, settings: ServiceKeySettings, public_key_file: Path) -> TokenVerifier:
        """The verifier of another service's tokens. Raises ValueError for a file without a usable public key."""
        profile = ServiceProfile(settings.service_issuer, settings.service_audience, settings.service_subject)
        return cls(StaticKeys(public_key_file), profile)

    def cached(self, token: str) -> Principal | None:
        """The principal of a token verified before, unless it expired or keys changed since; never waits."""
        if self._generation != self.keys.generation:
            self._generation = self.keys.generation
            self._young, self._old = {}, {}
            return None
        principal = self._young.get(token)
        if principal is None:
            principal = self._old.pop(token, None)
            if principal is None:
                return None
            self._keep(token, principal)
        if principal.expires_at + LEEWAY_SECONDS <= self._clock():
            del self._young[token]
            return None
        return principal

    def _keep(self, token: str, principal: Principal) -> None:
        if len(self._young) >= MAX_CACHED_TOKENS // 2:
            self._young, self._old = {}, self._young
        self._young[token] = principal

    async def verify(self, token: str) -> Principal:
        """The principal of a token.

        Raises Unauthenticated TOKEN_MISSING, TOKEN_INVALID or TOKEN_EXPIRED, all with the same text; PermissionDenied
        TENANT_MISSING; Unavailable IDENTITY_UNAVAILABLE when the issuer's keys are needed and cannot be had.
        """
        if not token.strip():
            raise errors.Unauthenticated("TOKEN_MISSING", _TEXT)
        if len(token) > MAX_TOKEN_BYTES:
            raise _invalid("larger than 8 KiB")
        if not _COMPACT.fullmatch(token):
            raise _invalid("not a compact JWS")
        header = self._read(lambda: self._jws.get_unverified_header(token))
        algorithm = header.get("alg")
        if algorithm not in ALGORITHMS:
            raise _invalid("an algorithm that is not taken")
        kid = header.get("kid")
        try:
            key = await self.keys.find(kid)
        except UnknownKeyError:
            raise _invalid("an unknown key") from None
        if algorithm not in key.algorithms:
            raise _invalid("an algorithm that does not fit the key")
        generation = self.keys.generation
        payload = self._read(lambda: self._jws.decode_complete(token, key.key, algorithms=[algorithm])["payload"])
        claims = self._read(lambda: json.loads(payload))
        principal = self._profile.principal(claims, self._check(header, claims))
        if generation == self._generation == self.keys.generation:
            self._keep(token, principal)
        return principal

    @staticmethod
    def _read(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _invalid(type(error).__name__) from None

    def _check(self, header: dict[str, Any], claims: Any) -> str:
        """Hold the claims to the profile; gives the subject."""
        profile = self._profile
        now = self._clock()
        if not isinstance(claims, dict):
            raise _invalid("claims that are no object")
        if profile.token_type == "Bearer":  # noqa: S105
            if claims.get("typ") != "Bearer":
                raise _invalid("not an access token")
        elif str(header.get("typ")).lower() not in ("at+jwt", "application/at+jwt"):
            raise _invalid("not an access token")
        issuer, audience = claims.get("iss"), claims.get("aud")
        if not isinstance(issuer, str) or issuer != profile.issuer:
            raise _invalid("another issuer")
        if profile.audience not in (audience if isinstance(audience, list) else [audience]):
            raise _invalid("another audience")
        expires, issued = _time(claims, "exp"), _time(claims, "iat")
        if issued > now + LEEWAY_SECONDS or ("nbf" in claims and _time(claims, "nbf") > now + LEEWAY_SECONDS):
            raise _invalid("not yet valid")
        if expires - issued > MAX_LIFETIME_SECONDS:
            raise _invalid("a lifetime over 24 h")
        if expires + LEEWAY_SECONDS <= now:
            raise errors.Unauthenticated("TOKEN_EXPIRED", _TEXT)
        subject = claims.get("sub")
        if not isinstance(subject, str) or not 0 < len(subject) <= 255 or not subject.isprintable():
            raise _invalid("no usable subject")
        return subject


_TEXT = "a valid bearer token is required"


def _invalid(cause: str) -> errors.Unauthenticated:
    """The cause is a note for our log; a stranger learns nothing from the answer."""
    error = errors.Unauthenticated("TOKEN_INVALID", _TEXT)
    error.add_note(cause)
    return error


def _time(claims: dict[str, Any], name: str) -> int:
    """A claim in Unix seconds; only a JSON integer will do."""
    value = claims.get(name)
    if type(value) is not int or value < 0:
        raise _invalid(f"no integer {name}")
    return value


def _claim(claims: dict[str, Any], path: str) -> Any:
    """The claim of this name, or along this dotted path; None when there is none."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _strings(value: Any) -> frozenset[str]:
    return frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()


class TokenSigner:
    """The short-lived tokens by which this process proves to another service which one it is.

    key_file: PEM private key (RSA from 2048 bits, P-256, P-384 or Ed25519). ttl: lifetime in seconds.
    """

    def __init__(
        self,
        key_file: Path,
        *,
        issuer: str,
        subject: str,
        audience: str,
        ttl: float = 300.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ValueError for a file without a usable private key."""
        try:
            self._key = load_pem_private_key(key_file.read_bytes(), password=None)
            public = self._key.public_key()  # a kind without signatures is refused next
            usable = usable_key(thumbprint(public), public, "")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key_file}: not a usable PEM private key ({error})") from error
        self._algorithm = usable.algorithms[0]
        self._header = {"typ": "at+jwt", "kid": usable.kid}
        self._claims = {"iss": issuer, "sub": subject, "aud": audience}
        self._ttl = ttl
        self._clock = clock
        self._token = ""
        self._renew_at = 0.0

    @classmethod
    def for_service(cls, settings: ServiceKeySettings, private_key_file: Path) -> TokenSigner:
        """The signer whose tokens TokenVerifier.for_service takes with the same settings."""
        return cls(
            private_key_file,
            issuer=settings.service_issuer,
            subject=settings.service_subject,
            audience=settings.service_audience,
        )

    def token(self) -> str:
        """A token that is good for at least a third of its lifetime."""
        now = self._clock()
        if now >= self._renew_at:
            claims = {**self._claims, "iat": int(now), "exp": int(now + self._ttl)}
            self._token = jwt.encode(claims, self._key, algorithm=self._algorithm, headers=self._header)  # type: ignore[arg-type]
            self._renew_at = now + self._ttl * 2 / 3
        return self._token
