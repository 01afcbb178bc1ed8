"""What idempotency_svc needs to know: its Redis, its port, and whose tokens it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, FilePath

from idempotency_svc.topology import parse
from svckit.config import ListenHost, Port, ServiceKeySettings
from svckit.jwks import StaticKeys


def _redis_url(url: str) -> str:
    try:
        parse(url, timeout=1)
    except ValueError as error:
        raise ValueError(f"must be a redis://, redis+sentinel:// or redis+cluster:// URL: {error}") from None
    return url


def _public_keys(file: Path) -> Path:
    StaticKeys(file)
    return file


class IdempotencySettings(ServiceKeySettings):
    """The environment of idempotency_svc; a field's variable is its name in upper case."""

    metrics_port: Port = Field(
        default=9090, description="Port of the Prometheus endpoint, plus the process's index with PROCESSES. 0: any."
    )
    max_request_bytes: int = Field(
        default=4 << 20, ge=256, le=64 << 20, description="Largest request in bytes, of methods without an own limit."
    )
    idempotency_host: ListenHost = Field(default="127.0.0.1", description="Host to serve on.")
    idempotency_port: Port = Field(default=8090, description="Port to serve on. 0: any.")
    redis_url: Annotated[str, AfterValidator(_redis_url)] = Field(
        min_length=1,
        repr=False,
        description="Redis 7.0+ or Valkey, noeviction. One server: redis://[user:password@]host[:port][/db], or "
        "unix://. Sentinel: redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db], with options "
        "sentinel_username and sentinel_password. Cluster: redis+cluster://[user:password@]host[:port][,host[:port]…]. "
        "With rediss in place of redis: TLS.",
    )
    redis_timeout_millis: int = Field(
        default=40,
        ge=10,
        le=10_000,
        description="Longest that a call waits for Redis; then Postgres decides. A server of Redis that is silent for "
        "five times as long counts as away.",
    )
    service_public_key_file: Annotated[FilePath, AfterValidator(_public_keys)] = Field(
        description="PEM public keys of the controller, which alone may call; two of them for a rotation."
    )
