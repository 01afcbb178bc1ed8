"""A token issuer for one machine: it signs access tokens, and serves OIDC discovery and its public key over HTTP."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from deploy.local.processes import LOOPBACK

AUDIENCE = "orchestrator"
"""The audience of every token that says no other."""


class Issuer:
    """An issuer on a loopback port with one ES256 key, which is kept in `key_file` and made there when it is missing.

    Tokens can be had before `start`, and by any process with the same key file and port.
    """

    def __init__(self, key_file: Path, *, port: int, audience: str = AUDIENCE) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.jwks_url = f"{self.url}/jwks"
        self.audience = audience
        self.key = private_key(key_file)
        self.key_id = self.public_jwk()["kid"]
        self._port = port
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Serve the discovery document and the key from a thread; raises OSError when the port is taken."""
        documents = {
            "/.well-known/openid-configuration": {
                "issuer": self.url,
                "jwks_uri": self.jwks_url,
                "id_token_signing_alg_values_supported": ["ES256"],
                "response_types_supported": ["token"],
                "subject_types_supported": ["public"],
            },
            "/jwks": {"keys": [self.public_jwk()]},
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                document = documents.get(self.path)
                body = json.dumps(document).encode()
                self.send_response(404 if document is None else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing: the services log what they fetch."""

        self._server = ThreadingHTTPServer((LOOPBACK, self._port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="issuer", daemon=True).start()

    def stop(self) -> None:
        """Stop serving; `start` serves again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def public_jwk(self) -> dict[str, str]:
        """The public key as the JWKS document holds it; its `kid` is derived from the key."""
        jwk: dict[str, str] = ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        key_id = uuid.uuid5(uuid.NAMESPACE_URL, jwk["x"] + jwk["y"])
        return {**jwk, "kid": str(key_id), "use": "sig", "alg": "ES256"}

    def claims(
        self,
        *,
        subject: str = "agent-1",
        tenant: str = "local",
        roles: Sequence[str] = ("orchestrator.agent",),
        seconds: float = 300,
        **overrides: Any,
    ) -> dict[str, Any]:
        """The claims of an access token that lives `seconds`; an override replaces a claim, and None leaves it out."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": self.audience,
            "sub": subject,
            "iat": now,
            "exp": now + int(seconds),
            "jti": str(uuid.uuid4()),
            "tenant": tenant,
            "realm_access": {"roles": list(roles)},
            **overrides,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self,
        *,
        subject: str = "agent-1",
        tenant: str = "local",
        roles: Sequence[str] = ("orchestrator.agent",),
        seconds: float = 300,
        **overrides: Any,
    ) -> str:
        """A signed access token with the claims of `claims`."""
        return self.sign(self.claims(subject=subject, tenant=tenant, roles=roles, seconds=seconds, **overrides))

    def sign(
        self,
        claims: Mapping[str, Any],
        *,
        key: Any = None,
        algorithm: str = "ES256",
        headers: Mapping[str, Any] | None = None,
    ) -> str:
        """Any claims under any header, signed by our key or another; a header given as None is left out."""
        header = {"typ": "at+jwt", "kid": self.key_id, **(headers or {})}
        given = {name: value for name, value in header.items() if value is not None or name == "typ"}
        return jwt.encode(dict(claims), self.key if key is None else key, algorithm=algorithm, headers=given)


def private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in this PEM file, which is made, readable by its owner only, when it is missing."""
    if not file.exists():
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(file, pem)
    key = serialization.load_pem_private_key(file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), f"{file} holds no P-256 key"
    return key


def write_secret(file: Path, content: bytes) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    half = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    half.touch(mode=0o600)
    half.write_bytes(content)
    half.rename(file)


def public_key_file(private: Path) -> Path:
    """The PEM file with the public half of a private key file, written beside it."""
    public = private.with_suffix(".pub.pem")
    key = private_key(private).public_key()
    write_secret(public, key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return public
