"""A gRPC server as we run it: the chain, limits, health, reflection, channelz, metrics, and a quiet end on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
import uvloop
from google.protobuf import descriptor_pool
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import start_http_server

from svckit.auth import OPERATE
from svckit.interceptors import Chain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from google.protobuf.descriptor import ServiceDescriptor

    from svckit.auth import TokenVerifier
    from svckit.config import ServiceSettings
    from svckit.interceptors import Replay

LIVENESS = "liveness"
"""Health name that is SERVING while the process can answer at all; "" and the services' names are readiness."""

_INDEX = "PROCESS_INDEX"

_OPTIONS: list[tuple[str, Any]] = [
    # A client multiplexes all its calls over one connection. What is over this limit waits in the client unseen, so it
    # stands above MAX_IN_FLIGHT's default: admission shall say no, at once and with a reason.
    ("grpc.max_concurrent_streams", 1024),
    # Beyond 1000 calls that no handler has begun with, of all connections, gRPC by itself would answer some with a bare
    # CANCELLED, which says "the caller gave up" and has no reason. In a burst there are that many for a moment.
    ("grpc.server.max_pending_requests", 32768),
    ("grpc.server.max_pending_requests_hard_limit", 65536),
    # A token may have 8 KiB; the rest of the metadata needs room beside it.
    ("grpc.max_metadata_size", 16384),
    ("grpc.absolute_max_metadata_size", 24576),
    ("grpc.keepalive_time_ms", 60000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.min_ping_interval_without_data_ms", 20000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_connection_idle_ms", 300000),
    # Connections end by themselves (gRPC adds 10 % jitter), so that clients meet new replicas; the grace is longer than
    # any unary call.
    ("grpc.max_connection_age_ms", 600000),
    ("grpc.max_connection_age_grace_ms", 60000),
    # The default of 120 s lets silent connections pile up.
    ("grpc.server_handshake_timeout_ms", 5000),
    ("grpc.enable_channelz", 1),
]

log = structlog.get_logger()


class StartError(Exception):
    """Why the server cannot start, in one line for a person."""


class Server:
    """One process's server. Build it, register services, start(), set_ready(True), then wait() until a signal ended it.

    verifier: decides who calls. host, port: where to listen; port 0 takes a free one.
    """

    def __init__(self, settings: ServiceSettings, verifier: TokenVerifier, *, host: str, port: int) -> None:
        self.stopping = asyncio.Event()
        """Set when no new calls come any more: what waits inside shall answer now."""
        self._settings = settings
        self._verifier = verifier
        self._host = host
        self._port = port
        self._names: list[str] = []
        self._ready = False
        self._draining = False
        self._hurry = asyncio.Event()
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None
        self._metrics: Any = None
        self._health = health.aio.HealthServicer()
        self.chain = Chain(
            verifier,
            max_in_flight=settings.max_in_flight,
            max_waiting=settings.max_waiting,
            log_ok_sample=settings.log_ok_sample,
        )

    def register(self, service: ServiceDescriptor, servicer: object, replay: Replay | None = None) -> None:
        """Serve one of our services; see Chain.register. Raises PolicyError for a method without a policy."""
        self.chain.register(service, servicer, self._settings.max_request_bytes, replay)
        self._names.append(service.full_name)

    async def start(self) -> int:
        """Listen and serve, not ready yet; gives the port. Raises StartError."""
        self._mount()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        settings = self._settings
        self._server = grpc.aio.server(
            options=[
                *_OPTIONS,
                # Somewhat above the largest limit of a method, so that callers see our own refusal with its reason.
                ("grpc.max_receive_message_length", self.chain.largest_request * 4),
                ("grpc.so_reuseport", int(settings.processes > 1)),
            ],
        )
        self._server.add_generic_rpc_handlers((self.chain,))
        port = self._bind(self._server)
        self._start_metrics()
        await self._server.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        self._background(self._verifier.keys.run())
        self._background(self._publish_when_loaded())
        log.info("serving", host=self._host, port=port, metrics_port=self.metrics_port, services=self._names)
        return port

    @property
    def metrics_port(self) -> int:
        """The port of the Prometheus endpoint, once started."""
        return int(self._metrics[0].server_port) if self._metrics else 0

    async def set_ready(self, ready: bool) -> None:
        """Say whether calls may come. Health shows it once the verifier had keys too, until the server drains."""
        self._ready = ready
        await self._publish()

    def stop(self) -> None:
        """Begin to drain; called again, end at once. What the first and the second SIGTERM do."""
        if self._draining:
            self._hurry.set()
        else:
            self._draining = True
            self._background(self._drain())

    async def wait(self) -> None:
        """Until the server has ended: no call runs any more, all were answered."""
        await self._stopped.wait()

    # --- start --------------------------------------------------------------------------------------------------------

    def _mount(self) -> None:
        chain, settings = self.chain, self._settings
        health_pb2_grpc.add_HealthServicer_to_server(self._health, chain.mount(""))
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), chain.mount(OPERATE))
        if settings.reflection != "off":
            names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
                reflection.aio.ReflectionServicer(names, _Symbols()),
                chain.mount("" if settings.reflection == "open" else OPERATE),
            )

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        address = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        self._probe(address)
        try:
            if settings.tls_cert_file is None or settings.tls_key_file is None:
                return server.add_insecure_port(address)
            ca = settings.tls_client_ca_file
            credentials = grpc.ssl_server_credentials(
                [(settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())],
                root_certificates=ca.read_bytes() if ca else None,
                require_client_auth=ca is not None,
            )
            return server.add_secure_port(address, credentials)
        except (RuntimeError, OSError) as error:
            raise StartError(f"cannot listen on {address}: {error}") from error

    def _probe(self, address: str) -> None:
        """Find out by ourselves whether the port is free: gRPC would explain it in many lines."""
        if self._port == 0 or self._settings.processes > 1:
            return
        try:
            family, kind, _, _, where = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
        except OSError as error:
            raise StartError(f"cannot listen on {address}: {error.strerror or error}") from error

    def _start_metrics(self) -> None:
        settings = self._settings
        port = settings.metrics_port and settings.metrics_port + int(os.environ.get(_INDEX, "0"))
        try:
            self._metrics = start_http_server(port, settings.metrics_host)
        except OSError as error:
            raise StartError(
                f"cannot serve metrics on {settings.metrics_host}:{port}: {error.strerror or error}"
            ) from error

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- health -------------------------------------------------------------------------------------------------------

    async def _publish_when_loaded(self) -> None:
        await self._verifier.keys.loaded.wait()
        await self._publish()

    async def _publish(self) -> None:
        ready = self._ready and self._verifier.keys.loaded.is_set() and not self._draining
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    # --- end ----------------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Not ready → let clients move → no new calls, finish the accepted ones → end."""
        settings = self._settings
        server = self._server
        assert server is not None
        log.info("draining", seconds=settings.drain_seconds)
        await self._publish()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), settings.drain_seconds)
        finish = asyncio.create_task(server.stop(settings.grace_seconds))
        await asyncio.sleep(0)
        self.stopping.set()
        self.chain.end_streams()
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((finish, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not finish.done():
            await server.stop(None)
        await finish
        await self._close()

    async def _close(self) -> None:
        current = asyncio.current_task()
        others = [task for task in self._tasks if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._metrics is not None:
            httpd, thread = self._metrics
            await asyncio.to_thread(httpd.shutdown)
            httpd.server_close()
            thread.join()
        log.info("stopped")
        self._stopped.set()


class _Symbols:
    """The default descriptor pool, which finds methods too: ghz asks for them, and the pool itself knows them not."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """The file of a symbol. Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            if method not in self._pool.FindServiceByName(service).methods_by_name:
                raise
            return self._pool.FindFileContainingSymbol(service)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def run(main: Callable[[], Coroutine[Any, Any, None]], *, processes: int = 1) -> None:
    """Run a service's main on uvloop; a StartError is one line on stderr and exit 1.

    processes: with more than one, this process only starts that many others of itself, and ends with them.
    """
    if processes > 1 and _INDEX not in os.environ:
        sys.exit(_supervise(processes))
    if _INDEX in os.environ:
        # Nobody would stop these processes if the one that started them were killed.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    # Each connection takes a file, and the usual limit of 1024 is a soft one.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where there are fewer than the limit says, as on macOS
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # What was imported lives as long as the process: the garbage collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    # Hundreds of calls are in flight: young collections at the default of 700 objects walk them in vain (4 % of CPU).
    gc.set_threshold(20_000, 20, 100)

    async def whole() -> None:
        await main()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # all is done: a second signal shall not turn this end into a failure

    try:
        uvloop.run(whole())
    except StartError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _supervise(processes: int) -> int:
    """Start the processes as new programs (never by fork: gRPC has threads); one that ends ends all. The exit code."""
    children = [
        # A session of its own: Ctrl-C reaches this process only, which passes it on once.
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env={**os.environ, _INDEX: str(index)}, start_new_session=True
        )
        for index in range(processes)
    ]

    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            if child.returncode is None:  # not poll(): it would take the exit code away from wait() below
                os.kill(child.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worst = 0
    for _ in children:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        for child in children:
            if child.pid == pid:
                child.returncode = code
        worst = worst or abs(code)
        if not stopping:  # a second signal would hurry the others
            stop(0, None)
    return worst
