"""The keys tokens are verified with: a file's, or an issuer's, kept fresh without ever blocking the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from svckit import errors
from svckit.config import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192  # verifying gets slow with the size; an issuer's mistake must not become our outage
MAX_KEYS = 100

REFRESH_SECONDS = 300.0
"""A key taken out of the issuer's set is refused at most this long (and one fetch) later."""
COOLDOWN_SECONDS = 30.0
"""At least this long between the starts of two fetches, whether they succeed or fail."""
MAX_STALE_SECONDS = 86400.0
"""While the issuer is away, its last keys are good for this long."""
FETCH_SECONDS = 3.0
FETCH_BYTES = 1 << 20
MAX_WAITING = 32
"""How many callers with an unknown key may wait for a fetch; others are told to come back."""

log = structlog.get_logger()


class UnknownKeyError(Exception):
    """The issuer has no such key."""


class FetchError(Exception):
    """The issuer gave no usable answer; the text says why."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the algorithms a signature of it may have."""

    kid: str | None
    key: PublicKey
    algorithms: tuple[str, ...]


class KeySource(Protocol):
    """Where a verifier finds keys."""

    generation: int
    """Advances when keys changed: what was verified before must be verified again."""
    loaded: asyncio.Event
    """Set once there were keys; stays set when the issuer is away later."""

    async def find(self, kid: str | None) -> Key:
        """The key named by a token's header. Raises UnknownKeyError, or Unavailable IDENTITY_UNAVAILABLE."""
        ...

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        ...


class StaticKeys:
    """The public keys in a PEM file, each under its thumbprint as kid: two of them are a rotation."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, with the reason, for a file that has no usable key."""
        self.generation = 0
        self.loaded = asyncio.Event()
        self.loaded.set()
        blocks = path.read_bytes().replace(b"-----BEGIN", b"\0-----BEGIN").split(b"\0")
        self._keys: dict[str, Key] = {}
        for block in blocks[1:]:
            try:
                key = load_pem_public_key(block)
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ValueError(f"{path}: not a PEM public key") from error
            kid = thumbprint(key)
            self._keys[kid] = usable_key(kid, key, "")
        if not self._keys:
            raise ValueError(f"{path}: not a PEM public key")

    async def find(self, kid: str | None) -> Key:
        """The key with this thumbprint; without one, the only key."""
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        found = self._keys.get(kid or "")
        if found is None:
            raise UnknownKeyError
        return found

    async def run(self) -> None:
        """Nothing to do: a new file needs a restart."""


class JwksCache:
    """An issuer's JSON Web Key Set.

    Known keys are answered from memory without waiting. An unknown one causes a fetch: one for all who ask meanwhile,
    and none within the cooldown of the last, failed ones counted. When the issuer is away, the last keys stay good for
    MAX_STALE_SECONDS.

    issuer: the exact issuer; its discovery document is asked for the key set's address unless jwks_url is given.
    allow_plaintext: take http:// outside loopback. The numbers are seconds; tests shorten them.
    """

    def __init__(
        self,
        issuer: str,
        jwks_url: str = "",
        *,
        allow_plaintext: bool = False,
        refresh: float = REFRESH_SECONDS,
        cooldown: float = COOLDOWN_SECONDS,
        max_stale: float = MAX_STALE_SECONDS,
        timeout: float = FETCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.generation = 0
        self.loaded = asyncio.Event()
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._allow_plaintext = allow_plaintext
        self._refresh = refresh
        self._cooldown = cooldown
        self._max_stale = max_stale
        self._timeout = timeout
        self._clock = clock
        self._keys: dict[str | None, Key] = {}
        self._fetched_at = float("-inf")
        self._asked_at = float("-inf")
        self._failed = False
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0

    async def find(self, kid: str | None) -> Key:
        """The key named `kid`; a token without one is taken only while the set has a single key."""
        found = self._known(kid)
        if found is None:
            fetch = self._fetch()
            if fetch is not None:
                if self._waiting >= MAX_WAITING:
                    raise _unavailable(1.0)
                self._waiting += 1
                try:
                    # The fetch is everybody's: a caller that leaves must not end it.
                    await asyncio.shield(fetch)
                finally:
                    self._waiting -= 1
                found = self._known(kid)
        if found is None:
            if self._failed:
                raise _unavailable(self._asked_at + self._cooldown - self._clock())
            raise UnknownKeyError
        return found

    async def run(self) -> None:
        """Fetch now, then every `refresh` seconds; after a failure again when the cooldown is over."""
        while True:
            fetch = self._fetch()
            if fetch is not None:
                await asyncio.shield(fetch)
            pause = self._cooldown if self._failed else self._refresh
            await asyncio.sleep(max(0.01, self._asked_at + pause - self._clock()))

    def _known(self, kid: str | None) -> Key | None:
        if self._keys and self._clock() - self._fetched_at > self._max_stale:
            self._replace({})
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def _fetch(self) -> asyncio.Task[None] | None:
        """The fetch under way, or a new one; None while the cooldown of the last one lasts."""
        if self._fetching is None:
            if self._clock() - self._asked_at < self._cooldown:
                return None
            self._asked_at = self._clock()
            self._fetching = asyncio.create_task(self._fetch_once())
        return self._fetching

    async def _fetch_once(self) -> None:
        """Replace the keys, or note the failure; never raises."""
        reason = ""
        try:
            async with asyncio.timeout(self._timeout):
                url = self._jwks_url or await self._discover()
                keys = parse_jwks(await http_get(url, allow_plaintext=self._allow_plaintext))
            self._fetched_at = self._clock()
            if keys != self._keys:
                self._replace(keys)
            self.loaded.set()
        except TimeoutError:
            reason = "no answer in time"
        except (FetchError, OSError, ValueError) as error:
            reason = str(error)
        except Exception as error:
            # Whatever it is, the next fetch must come.
            log.exception("issuer_fetch_failed", issuer=self._issuer)
            reason = type(error).__name__
        finally:
            self._fetching = None
        if bool(reason) != self._failed:
            self._failed = bool(reason)
            if reason:
                log.warning("issuer_unavailable", issuer=self._issuer, reason=reason)
            else:
                log.info("issuer_available", issuer=self._issuer)
        self._known(None)  # drops keys that are too old

    def _replace(self, keys: dict[str | None, Key]) -> None:
        self._keys = keys
        self.generation += 1

    async def _discover(self) -> str:
        address = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
        document = _object(await http_get(address, allow_plaintext=self._allow_plaintext))
        if document.get("issuer") != self._issuer:
            raise FetchError("the discovery document names another issuer")
        url = document.get("jwks_uri")
        if not isinstance(url, str):
            raise FetchError("the discovery document has no jwks_uri")
        return url


def _unavailable(retry_after: float) -> errors.Unavailable:
    return errors.Unavailable(
        "IDENTITY_UNAVAILABLE", "the issuer's keys cannot be fetched now", retry_after=max(1.0, retry_after)
    )


def thumbprint(key: Any) -> str:
    """A public key's name: the start of the SHA-256 of its DER form."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:32]


def usable_key(kid: str | None, key: Any, algorithm: str) -> Key:
    """`key` with the algorithms that fit it, or the one it is published for. Raises ValueError for a key we refuse."""
    if isinstance(key, RSAPublicKey):
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise ValueError(f"RSA of {key.key_size} bits")
        fitting: tuple[str, ...] = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    elif isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        fitting = ("ES256",)
    elif isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1):
        fitting = ("ES384",)
    elif isinstance(key, Ed25519PublicKey):
        fitting = ("EdDSA",)
    else:
        raise ValueError("not an asymmetric key of a kind we take")
    if algorithm:
        if algorithm not in fitting:
            raise ValueError(f"algorithm {algorithm!r} does not fit the key")
        fitting = (algorithm,)
    return Key(kid, key, fitting)


def parse_jwks(body: bytes) -> dict[str | None, Key]:
    """The usable signature keys of a key set, by kid.

    Left out: symmetric keys, keys for encryption, weak ones, those published with their private half, and all keys
    that share a kid. Raises FetchError when none is left.
    """
    entries = _object(body).get("keys")
    if not isinstance(entries, list):
        raise FetchError("not a key set")
    published = [entry for entry in entries[:MAX_KEYS] if isinstance(entry, dict)]
    kids = Counter(str(entry.get("kid")) for entry in published)
    keys: dict[str | None, Key] = {}
    for entry in published:
        try:
            if kids[str(entry.get("kid"))] > 1:
                raise ValueError("its kid is not unique")
            key = _key_of(entry)
        except (ValueError, TypeError, UnsupportedAlgorithm, jwt.PyJWTError) as error:
            log.info("key_ignored", kid=str(entry.get("kid")), reason=str(error))
        else:
            keys[key.kid] = key
    if not keys:
        raise FetchError("the key set has no usable key")
    return keys


def _key_of(entry: dict[str, Any]) -> Key:
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise ValueError("its kid is not a string")
    if entry.get("kty") not in ("RSA", "EC", "OKP"):
        raise ValueError("not an asymmetric key")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        raise ValueError("not a key for signatures")
    if "d" in entry:
        raise ValueError("published with its private half")
    algorithm = entry.get("alg", "")
    if not isinstance(algorithm, str):
        raise ValueError("its alg is not a string")
    return usable_key(kid, jwt.PyJWK(entry, algorithm=_any_algorithm(entry)).key, algorithm)


def _any_algorithm(entry: dict[str, Any]) -> str:
    """An algorithm that lets PyJWK read the key; which ones a signature may have is decided by usable_key."""
    if entry["kty"] == "RSA":
        return "RS256"
    if entry["kty"] == "OKP":
        return "EdDSA"
    return "ES384" if entry.get("crv") == "P-384" else "ES256"


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise FetchError("not JSON") from None
    if not isinstance(value, dict):
        raise FetchError("not a JSON object")
    return value


class _Received:
    """Lets http.client parse an answer that was received already."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


async def http_get(url: str, *, allow_plaintext: bool = False) -> bytes:
    """The body behind a URL: status 200 only, no redirects, at most FETCH_BYTES. Raises FetchError or OSError.

    Plain asyncio, so that a server that hangs or trickles holds no thread; the caller sets the time limit.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in ("https", "http") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise FetchError("not an https URL")
    if parts.scheme == "http" and not allow_plaintext and not is_loopback(host):
        raise FetchError("plaintext outside loopback")
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    reader, writer = await asyncio.open_connection(host, parts.port or (443 if secure else 80), ssl=secure)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        writer.write(
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\nAccept: application/json\r\n"
            "User-Agent: orchestrator\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        received = bytearray()
        while chunk := await reader.read(65536):
            received += chunk
            if len(received) > FETCH_BYTES:
                raise FetchError("the answer is too large")
    finally:
        writer.transport.abort()
    response = http.client.HTTPResponse(_Received(bytes(received)), method="GET")  # type: ignore[arg-type]
    try:
        response.begin()
        if response.status != http.HTTPStatus.OK:
            raise FetchError(f"status {response.status}")
        return response.read()
    except http.client.HTTPException as error:
        raise FetchError("not an HTTP answer") from error
