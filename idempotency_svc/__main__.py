"""Runs the service: configuration → Redis → servicer → serve."""

from __future__ import annotations

from idempotency_svc.cache import RedisCache
from idempotency_svc.config import IdempotencySettings
from idempotency_svc.servicer import IdempotencyServicer
from orchestrator.idempotency.v1 import idempotency_service_pb2 as pb
from svckit.auth import TokenVerifier
from svckit.config import load
from svckit.server import Server, run
from svckit.telemetry import configure_logging


async def _serve(settings: IdempotencySettings) -> None:
    """Serves until a signal ends it. Without Redis it serves too, but is not ready."""
    server = Server(
        settings,
        TokenVerifier.for_service(settings, settings.service_public_key_file),
        host=settings.idempotency_host,
        port=settings.idempotency_port,
    )
    cache = RedisCache(settings.redis_url, timeout=settings.redis_timeout_millis / 1000, on_ready=server.set_ready)
    server.register(pb.DESCRIPTOR.services_by_name["IdempotencyService"], IdempotencyServicer(cache))
    await cache.start()  # first, so that who calls at once is answered
    await server.start()
    await server.wait()
    await cache.stop()


def main() -> None:
    """The process."""
    settings = load(IdempotencySettings)
    configure_logging(settings.log_level, "idempotency_svc")
    run(lambda: _serve(settings), processes=settings.processes)


if __name__ == "__main__":
    main()
