"""The controller's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FilePath, SecretStr, field_validator, model_validator

from controller_svc.mutation import LONGEST_ATTEMPT
from svckit.config import ListenHost, OidcSettings, Port, ServiceKeySettings


class ControllerSettings(OidcSettings, ServiceKeySettings):
    """Read by `svckit.config.load`. A field's environment variable is its name in upper case."""

    controller_host: ListenHost = Field(default="127.0.0.1", description="Host to listen on.")
    controller_port: Port = Field(default=8088, description="Port to listen on. 0: any.")
    database_url: SecretStr = Field(
        description="Postgres, as a libpq URL or connection string; of several servers, with"
        " target_session_attrs=read-write. A pooler has to pool sessions, not transactions."
    )
    write_lanes: int = Field(
        default=1, ge=1, le=16, description="Groups of writes under way at once, a connection each."
    )
    page_token_key: SecretStr = Field(
        description="Signs page tokens: at least 32 characters, the same on all replicas and across restarts."
    )
    session_retention_days: float = Field(
        default=7, gt=0, le=3650, description="Days without a change after which a session expires."
    )
    idempotency_enabled: bool = Field(
        default=True, description="Use idempotency_svc. Off, Postgres alone keeps every write to once."
    )
    idempotency_target: str = Field(default="127.0.0.1:8090", min_length=1, description="host:port of idempotency_svc.")
    idempotency_ca_file: FilePath | None = Field(
        default=None, description="PEM authorities of idempotency_svc's certificate; set: TLS."
    )
    idempotency_cert_file: FilePath | None = Field(
        default=None, description="PEM certificate this service shows idempotency_svc (mTLS)."
    )
    idempotency_key_file: FilePath | None = Field(default=None, description="PEM private key of that certificate.")
    idempotency_ttl_seconds: float = Field(
        default=86400, ge=2 * LONGEST_ATTEMPT, le=30 * 86400, description="How long OK answers are replayed."
    )
    idempotency_error_ttl_seconds: float = Field(
        default=600,
        ge=2 * LONGEST_ATTEMPT,
        le=86400,
        description="How long at most error answers are replayed; at least twice the longest attempt.",
    )
    near_replay_bytes: int = Field(
        default=32 << 20,
        ge=0,
        le=4 << 30,
        description="Memory for OK answers and their requests, replayed without asking anybody; 0: none.",
    )
    idempotency_require_key: Literal["method", "all"] = Field(
        default="method",
        description="Which guarded methods need an idempotency key: those whose proto says so, or all.",
    )
    service_key_file: FilePath | None = Field(
        default=None,
        description="PEM private key that signs this service's tokens; required unless IDEMPOTENCY_ENABLED=false.",
    )

    @field_validator("page_token_key")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 32:
            raise ValueError("must be at least 32 characters")
        return value

    @model_validator(mode="after")
    def _together(self) -> ControllerSettings:
        if self.idempotency_enabled and self.service_key_file is None:
            raise ValueError("SERVICE_KEY_FILE is required unless IDEMPOTENCY_ENABLED=false")
        return self
