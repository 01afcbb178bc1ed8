"""What the tests of svckit are made with: a small service, raw tokens, an issuer that can misbehave, a server."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import grpc
import grpc.aio
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from orchestrator.options.v1 import options_pb2
from svckit.auth import TokenVerifier, UserProfile
from svckit.config import ServiceSettings
from svckit.interceptors import Call
from svckit.jwks import JwksCache
from svckit.server import Server

Text = wrappers_pb2.StringValue
AUDIENCE = "orchestrator"

# --- a small service --------------------------------------------------------------------------------------------------


def make_service(name: str, methods: dict[str, dict[str, Any]]) -> ServiceDescriptor:
    """A service `svckit.test.<name>` of StringValue methods.

    methods: name → permission, write, key_required, max_request_bytes, stream (server streaming), upload (client
    streaming), policy=False (no option at all).
    """
    file = descriptor_pb2.FileDescriptorProto(
        name=f"svckit/test/{name}.proto",
        package="svckit.test",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto", "orchestrator/options/v1/options.proto"],
    )
    service = file.service.add(name=name)
    for method_name, facts in methods.items():
        method = service.method.add(
            name=method_name,
            input_type=".google.protobuf.StringValue",
            output_type=".google.protobuf.StringValue",
            server_streaming=facts.get("stream", False),
            client_streaming=facts.get("upload", False),
        )
        if facts.get("policy", True):
            policy = method.options.Extensions[options_pb2.policy]
            policy.permission = facts.get("permission", "orchestrator.agent")
            policy.write = facts.get("write", options_pb2.WRITE_MODE_NONE)
            policy.key_required = facts.get("key_required", False)
            policy.max_request_bytes = facts.get("max_request_bytes", 0)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(f"svckit.test.{name}")


PROBE = make_service(
    "Probe",
    {
        "Ask": {},
        "Small": {"max_request_bytes": 16},
        "Write": {"write": options_pb2.WRITE_MODE_GUARDED, "max_request_bytes": 64},
        "Watch": {"stream": True},
    },
)


class Probe:
    """Its methods do what the test says: `ask` for the unary ones, `watch` for the stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Call]] = []

    def replay(self, call: Call) -> Awaitable[bytes] | None:
        return None

    async def ask(self, request: Any, call: Call) -> Any:
        return Text(value=f"{request.value}!")

    async def watch(self, request: Any, call: Call) -> AsyncIterator[Any]:
        for part in request.value:
            yield Text(value=part)

    async def Ask(self, request: Any, call: Call) -> Any:
        self.calls.append((request, call))
        return await self.ask(request, call)

    Small = Write = Ask

    async def Watch(self, request: Any, call: Call) -> AsyncIterator[Any]:
        self.calls.append((request, call))
        async for part in self.watch(request, call):
            yield part


# --- tokens -----------------------------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()
_ALGORITHM = {id(RSA): "RS256", id(OTHER_RSA): "RS256", id(EC): "ES256", id(P384): "ES384", id(ED): "EdDSA"}


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    """The public half of a private key as a JWK."""
    public = key.public_key()
    algorithm: Any
    if isinstance(public, rsa.RSAPublicKey):
        algorithm = jwt.algorithms.RSAAlgorithm
    elif isinstance(public, ec.EllipticCurvePublicKey):
        algorithm = jwt.algorithms.ECAlgorithm
    else:
        algorithm = jwt.algorithms.OKPAlgorithm
    entry: dict[str, Any] = json.loads(algorithm.to_jwk(public))
    entry.pop("key_ops", None)
    return {**entry, "use": "sig", **({} if kid is None else {"kid": kid}), **more}


def claims(issuer: str, **changed: Any) -> dict[str, Any]:
    """Good claims, changed; a change to `...` leaves the claim out."""
    now = int(time.time())
    good = {
        "iss": issuer,
        "aud": AUDIENCE,
        "sub": "agent-1",
        "tenant": "acme",
        "iat": now,
        "exp": now + 300,
        "realm_access": {"roles": ["planner", "orchestrator.agent"]},
    }
    return {name: value for name, value in {**good, **changed}.items() if value is not ...}


def sign(payload: Any, key: Any = RSA, *, algorithm: str = "", **header: Any) -> str:
    """Sign anything, with no opinion about it. payload: bytes, or what json can dump; header: `...` leaves one out."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    algorithm = algorithm or _ALGORITHM[id(key)]
    fields = {"typ": "at+jwt", "kid": "k1", "alg": algorithm, **header}
    fields = {name: value for name, value in fields.items() if value is not ...}
    return sign_raw(json.dumps(fields).encode(), body, key, algorithm)


def sign_raw(header: bytes, body: bytes, key: Any, algorithm: str) -> str:
    """A JWS over exactly these header bytes."""
    signed = b64(header) + b"." + b64(body)
    signer = jwt.PyJWS().get_algorithm_by_name(algorithm)
    return (signed + b"." + b64(signer.sign(signed, key))).decode()


def b64(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


# --- an issuer --------------------------------------------------------------------------------------------------------


class FakeIssuer:
    """An OIDC issuer on loopback. mode: ok, 500, hang, trickle, garbage, empty, redirect, large, reset."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.keys: list[dict[str, Any]] = [jwk(RSA, "k1")]
        self.named_issuer: str | None = None
        self.hits = 0
        self.discoveries = 0
        self._over = Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/realm"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/.well-known/openid-configuration"):
            self.discoveries += 1
            document = {"issuer": self.named_issuer or self.url, "jwks_uri": f"{self.url}/jwks"}
            self._send(handler, json.dumps(document).encode())
            return
        self.hits += 1
        good = json.dumps({"keys": self.keys}).encode()
        match self.mode:
            case "ok":
                self._send(handler, good)
            case "500":
                handler.send_error(500)
            case "hang":
                self._over.wait(20)
            case "trickle":
                handler.send_response(200)
                handler.end_headers()
                with contextlib.suppress(OSError):
                    while not self._over.wait(0.05):
                        handler.wfile.write(b" ")
                        handler.wfile.flush()
            case "garbage":
                self._send(handler, b"\x00<html>")
            case "empty":
                self._send(handler, b'{"keys": []}')
            case "redirect":
                handler.send_response(302)
                handler.send_header("Location", f"{self.url}/other")
                handler.end_headers()
            case "large":
                with contextlib.suppress(OSError):
                    self._send(handler, good[:-1] + b" " * (10 << 20) + b"}")
            case "reset":
                handler.connection.close()

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def token(self, key: Any = RSA, *, header: dict[str, Any] | None = None, **changed: Any) -> str:
        """A token of this issuer; `changed` claims, see claims()."""
        return sign(claims(self.url, **changed), key, **(header or {}))


@contextlib.contextmanager
def running_issuer() -> Iterator[FakeIssuer]:
    issuer = FakeIssuer()
    try:
        yield issuer
    finally:
        issuer.close()


def profile(issuer: str, **changed: str) -> UserProfile:
    facts = {
        "issuer": issuer,
        "audience": AUDIENCE,
        "token_type": "at+jwt",
        "tenant_claim": "tenant",
        "roles_claim": "realm_access.roles",
        "default_tenant": "",
    }
    return UserProfile(**{**facts, **changed})


def user_verifier(issuer: FakeIssuer, **jwks: Any) -> TokenVerifier:
    return TokenVerifier(JwksCache(issuer.url, f"{issuer.url}/jwks", **jwks), profile(issuer.url))


# --- a server ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(
    verifier: TokenVerifier, *services: tuple[ServiceDescriptor, object], **settings: Any
) -> AsyncIterator[tuple[Server, str]]:
    """A Server on a free port, ready, and its address; drained at the end if the test did not."""
    given = {"metrics_port": 0, "drain_seconds": 0.0, "grace_seconds": 5.0, **settings}
    server = Server(ServiceSettings(**given), verifier, host="127.0.0.1", port=0)
    for descriptor, servicer in services:
        replay = (lambda call, probe=servicer: probe.replay(call)) if isinstance(servicer, Probe) else None
        server.register(descriptor, servicer, replay)
    port = await server.start()
    await server.set_ready(True)
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        server.stop()
        await server.wait()


def bearer(token: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"), *more)


def ask(channel: grpc.aio.Channel, method: str = "Ask", *, raw: bool = False) -> Callable[..., Any]:
    """The unary call of a Probe method; with raw, the request is sent as the bytes given."""
    return channel.unary_unary(
        f"/svckit.test.Probe/{method}",
        request_serializer=None if raw else Text.SerializeToString,
        response_deserializer=Text.FromString,
    )


def watch(channel: grpc.aio.Channel) -> Callable[..., Any]:
    return channel.unary_stream(
        "/svckit.test.Probe/Watch", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
    )


class Refusal:
    """What a caller was told: code, message, ErrorInfo and the other details, trailers."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code().name
        self.message = error.details() or ""
        self.trailers = dict(error.trailing_metadata() or ())
        self.initial = tuple(error.initial_metadata() or ())
        self.status = status_pb2.Status()
        self.info = error_details_pb2.ErrorInfo()
        self.retry = error_details_pb2.RetryInfo()
        self.bad = error_details_pb2.BadRequest()
        raw = self.trailers.get("grpc-status-details-bin")
        if isinstance(raw, bytes):
            self.status.ParseFromString(raw)
        for detail in self.status.details:
            for message in (self.info, self.retry, self.bad):
                detail.Unpack(message)

    @property
    def reason(self) -> str:
        """ "CODE REASON", what most tests compare."""
        return f"{self.code} {self.info.reason}"


async def refused(call: Any) -> Refusal:
    """The refusal of a unary call; fails the test if it was answered."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    raise AssertionError(f"answered: {answer!r}")
