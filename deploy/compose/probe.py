"""Asks a gRPC server whether it is ready: `probe.py HOST:PORT` ends with 0 when it answers SERVING, else with 1."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2

_SECONDS = 3.0


def serving(target: str) -> bool:
    """Whether the server at `target`, without TLS, answers its health check with SERVING within 3 s."""
    with grpc.insecure_channel(target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1]) else 1)
