"""The channel by which one of our services calls another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from svckit.config import is_loopback
from svckit.telemetry import current_trace

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from svckit.auth import TokenSigner

_SERVICE_CONFIG = {
    # Replicas behind one name share the calls; one that reports NOT_SERVING gets none.
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
    # The only layer that retries by itself, and only what surely was not answered.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How to trust a server, and what to show it: PEM files. Without ca_file the system's authorities are trusted."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_file.read_bytes() if self.ca_file else None,
            private_key=self.key_file.read_bytes() if self.key_file else None,
            certificate_chain=self.cert_file.read_bytes() if self.cert_file else None,
        )


def open_channel(
    target: str, *, signer: TokenSigner, tls: ClientTls | None = None, allow_plaintext: bool = False
) -> ServiceChannel:
    """A channel to a service at `target` ("host:port", or a gRPC name such as "dns:///host:port").

    Every call carries a token of `signer` and the trace of the call it serves, and must have a timeout. Raises
    ValueError for plaintext outside loopback unless that is allowed.
    """
    if tls is None and not allow_plaintext and not is_loopback(_host(target)):
        raise ValueError(f"plaintext to {target}: only on loopback, unless ALLOW_PLAINTEXT=true")
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", 30000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.max_receive_message_length", 16 << 20),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is None:
        return ServiceChannel(grpc.aio.insecure_channel(target, options=options), signer)
    return ServiceChannel(grpc.aio.secure_channel(target, tls.credentials(), options=options), signer)


def _host(target: str) -> str:
    """The host in a target; of a unix socket its "unix:" name."""
    if target.startswith("unix:"):
        return target
    return target.rpartition("/")[2].rpartition(":")[0]


class ServiceChannel(grpc.aio.Channel):
    """A channel whose unary calls carry our token and trace. Streams between services are not needed, so not there.

    Not an interceptor: grpc.aio runs each intercepted call in one more task.
    """

    def __init__(self, channel: grpc.aio.Channel, signer: TokenSigner) -> None:
        self._channel = channel
        self._signer = signer

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The call of one method, as generated stubs ask for it."""
        return _UnaryUnary(self._channel.unary_unary(method, *args, **kwargs), self._signer)

    def unary_stream(self, method: str, *_args: Any, **_kwargs: Any) -> Any:
        """Refused."""
        raise NotImplementedError(f"{method}: only unary calls go between services")

    stream_unary = unary_stream
    stream_stream = unary_stream

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; calls under way have `grace` seconds to end."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The connectivity now."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the connectivity is another one."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until a server is connected."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()


class _UnaryUnary:
    def __init__(self, call: Any, signer: TokenSigner) -> None:
        self._call = call
        self._signer = signer

    def __call__(
        self, request: Any, *, timeout: float, metadata: tuple[tuple[str, str | bytes], ...] = (), **kwargs: Any
    ) -> Any:
        trace = current_trace.get()
        if trace is not None:
            metadata = (("traceparent", trace.traceparent()), *metadata)
        token = ("authorization", f"Bearer {self._signer.token()}")
        return self._call(request, timeout=timeout, metadata=(token, *metadata), **kwargs)
