"""The configuration both services share, read from the environment and checked as a whole before anything starts."""

from __future__ import annotations

import ipaddress
import sys
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, FilePath, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]
"""A TCP port to listen on; 0 lets the system choose one."""


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach `host` (a name or an address, IPv6 with or without brackets)."""
    host = host.strip("[]")
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen_host(host: str, info: ValidationInfo) -> str:
    if is_loopback(host) or info.data.get("tls_cert_file") or info.data.get("allow_plaintext"):
        return host
    raise ValueError("plaintext outside loopback: set TLS_CERT_FILE and TLS_KEY_FILE, or ALLOW_PLAINTEXT=true")


ListenHost = Annotated[str, Field(min_length=1), AfterValidator(_listen_host)]
"""A host to listen on. Anything but loopback needs TLS, or plaintext allowed explicitly."""


def _secure_url(url: str, info: ValidationInfo) -> str:
    if not url:
        return url
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("must be an https:// URL")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not info.data.get("allow_plaintext"):
        raise ValueError("must be https:// outside loopback, or set ALLOW_PLAINTEXT=true")
    return url


SecureUrl = Annotated[str, AfterValidator(_secure_url)]
"""An https URL; http is taken for loopback, or with ALLOW_PLAINTEXT=true."""


class ServiceSettings(BaseSettings):
    """What every service needs to serve. A field's environment variable is its name in upper case.

    Fields of services (host, port, addresses) are added by subclasses; they come after these, so that validators see
    these in `info.data`.
    """

    model_config = SettingsConfigDict(validate_default=True, extra="ignore", frozen=True, env_ignore_empty=True)

    allow_plaintext: bool = Field(default=False, description="Serve and call without TLS outside loopback.")
    tls_cert_file: FilePath | None = Field(
        default=None, description="PEM chain of this server; with TLS_KEY_FILE: TLS."
    )
    tls_key_file: FilePath | None = Field(default=None, description="PEM private key of this server.")
    tls_client_ca_file: FilePath | None = Field(
        default=None, description="PEM authorities of client certificates; set, every client must present one (mTLS)."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Host of the Prometheus endpoint.")
    metrics_port: Port = Field(
        default=9088, description="Port of the Prometheus endpoint, plus the process's index with PROCESSES. 0: any."
    )
    max_request_bytes: int = Field(
        default=16384, ge=256, le=64 << 20, description="Largest request in bytes, of methods without an own limit."
    )
    max_in_flight: int = Field(
        default=512, ge=1, description="Calls worked on at once per process; others are refused."
    )
    max_waiting: int = Field(
        default=4096, ge=1, description="Long polls, waits for another's answer and streams at once per process."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Lowest level that is logged."
    )
    log_ok_sample: float = Field(
        default=0.0, ge=0, le=1, description="Share of OK calls that are logged; errors always are."
    )
    reflection: Literal["open", "authenticated", "off"] = Field(
        default="authenticated", description="gRPC reflection: for everyone, for orchestrator.operate, or for nobody."
    )
    drain_seconds: float = Field(
        default=2.0,
        ge=0,
        le=300,
        description="On SIGTERM: time between not ready and no new calls, for clients to move away.",
    )
    grace_seconds: float = Field(
        default=35.0, ge=0, le=600, description="On SIGTERM: time for accepted calls to finish after that."
    )
    processes: int = Field(default=1, ge=1, le=256, description="Processes that share the port by SO_REUSEPORT.")

    @field_validator("tls_key_file")
    @classmethod
    def _both_or_none(cls, value: object, info: ValidationInfo) -> object:
        if "tls_cert_file" in info.data and (value is None) != (info.data["tls_cert_file"] is None):
            raise ValueError("TLS_CERT_FILE and TLS_KEY_FILE go together")
        return value

    @field_validator("tls_client_ca_file")
    @classmethod
    def _only_with_tls(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("tls_cert_file") is None:
            raise ValueError("needs TLS_CERT_FILE and TLS_KEY_FILE")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


class OidcSettings(ServiceSettings):
    """The access tokens a service takes from users: whose, for whom, and where in them the tenant and the roles are."""

    oidc_issuer_url: SecureUrl = Field(min_length=1, description="Exact `iss` of the tokens taken.")
    oidc_audience: str = Field(min_length=1, description="`aud` that must be in a token: this service's own.")
    oidc_jwks_url: SecureUrl = Field(
        default="", description="Where the issuer's keys are; empty: found by OIDC discovery."
    )
    oidc_tenant_claim: str = Field(
        default="tenant", min_length=1, description="Claim with the tenant; dots go into objects."
    )
    oidc_roles_claim: str = Field(
        default="realm_access.roles", min_length=1, description="Claim with the list of roles; dots go into objects."
    )
    oidc_token_type: Literal["at+jwt", "Bearer"] = Field(
        default="at+jwt",
        description="What marks an access token: header typ at+jwt (RFC 9068), or claim typ Bearer (Keycloak).",
    )
    default_tenant: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$",
        description="Tenant of tokens without one; empty: refused.",
    )


class ServiceKeySettings(ServiceSettings):
    """The identity with which one of our services calls another."""

    service_issuer: str = Field(default="controller_svc", min_length=1, description="`iss` of the service tokens.")
    service_audience: str = Field(default="idempotency_svc", min_length=1, description="`aud` of the service tokens.")
    service_subject: str = Field(default="controller_svc", min_length=1, description="`sub` of the service tokens.")


S = TypeVar("S", bound=ServiceSettings)


def load(settings: type[S]) -> S:
    """The settings from the environment; else every fault on stderr, one `NAME: what is wrong` per line, and exit 2."""
    try:
        return settings()
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in fault["loc"]).upper() or settings.__name__
            message = "is required" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ")
            print(f"{name}: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
