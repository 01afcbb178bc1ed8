"""The two services as child processes: the environment each needs, and when it is ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from deploy.local.issuer import Issuer, public_key_file
from deploy.local.processes import LOOPBACK, Child

LIVENESS = "liveness"
"""The name under which a service's health says that it runs; the empty name says that it is ready."""


class Service(Child):
    """One of our services on a loopback port; `env` is put over the environment of this process."""

    def __init__(self, name: str, module: str, *, port: int, env: Mapping[str, str], log: Path) -> None:
        super().__init__(name, [sys.executable, "-m", module], log=log, env={**os.environ, **env})
        self.port = port
        self.target = f"{LOOPBACK}:{port}"

    def wait(self, health: str = "", *, seconds: float = 30) -> None:
        """Return when the health service says SERVING for `health`; raises LocalError as Child.wait_until does."""
        with grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )

            def serving() -> bool:
                try:
                    answer = check(health_pb2.HealthCheckRequest(service=health), timeout=1)
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            self.wait_until(serving, seconds=seconds)


def controller(
    *,
    name: str = "controller_svc",
    port: int,
    metrics_port: int,
    database_url: str,
    idempotency_target: str,
    issuer: Issuer,
    service_key: Path,
    page_token_key: str,
    log: Path,
    env: Mapping[str, str],
) -> Service:
    """The controller; whatever is in `env` wins over what the other arguments say."""
    own = {
        "CONTROLLER_PORT": str(port),
        "METRICS_PORT": str(metrics_port),
        "DATABASE_URL": database_url,
        "IDEMPOTENCY_TARGET": idempotency_target,
        "OIDC_ISSUER_URL": issuer.url,
        "OIDC_AUDIENCE": issuer.audience,
        "OIDC_JWKS_URL": issuer.jwks_url,
        "OIDC_TOKEN_TYPE": "at+jwt",
        "OIDC_TENANT_CLAIM": "tenant",
        "OIDC_ROLES_CLAIM": "realm_access.roles",
        "SERVICE_KEY_FILE": str(service_key),
        "PAGE_TOKEN_KEY": page_token_key,
        "REFLECTION": "open",
    }
    return Service(name, "controller_svc", port=port, env={**own, **env}, log=log)


def idempotency(
    *,
    name: str = "idempotency_svc",
    port: int,
    metrics_port: int,
    redis_url: str,
    service_key: Path,
    log: Path,
    env: Mapping[str, str],
) -> Service:
    """The idempotency service, which takes calls signed with `service_key`; `env` wins over the other arguments."""
    own = {
        "IDEMPOTENCY_PORT": str(port),
        "METRICS_PORT": str(metrics_port),
        "REDIS_URL": redis_url,
        "SERVICE_PUBLIC_KEY_FILE": str(public_key_file(service_key)),
        "REFLECTION": "open",
    }
    return Service(name, "idempotency_svc", port=port, env={**own, **env}, log=log)
