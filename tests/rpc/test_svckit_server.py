"""The server around the chain: health, reflection, channelz, metrics, TLS, start-up faults and the quiet end."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.processes import free_port, port_is_free
from svckit.auth import ServiceProfile, TokenSigner, TokenVerifier
from svckit.client import ClientTls, open_channel
from svckit.config import ServiceSettings
from svckit.interceptors import Call
from svckit.jwks import StaticKeys
from svckit.options import PolicyError
from svckit.server import LIVENESS, Server, StartError
from svckit.telemetry import current_trace, new_trace
from tests.oracle import eventually
from tests.rpc.svckit_parts import (
    PROBE,
    FakeIssuer,
    Probe,
    Text,
    ask,
    bearer,
    make_service,
    refused,
    running_issuer,
    serving,
    user_verifier,
    watch,
)

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with running_issuer() as one:
        yield one


def operator(issuer: FakeIssuer) -> tuple[tuple[str, str], ...]:
    return bearer(issuer.token(realm_access={"roles": ["orchestrator.operate"]}))


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status)


def health_watch(channel: grpc.aio.Channel) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest())


# --- what every server has --------------------------------------------------------------------------------------------


async def test_health(issuer: FakeIssuer) -> None:
    issuer.mode = "500"
    verifier = user_verifier(issuer, cooldown=0.1)
    async with (
        serving(verifier, (PROBE, Probe())) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        # Ready by its own word, but without keys no call can be answered.
        assert await health(channel, LIVENESS) == SERVING
        assert [await health(channel, name) for name in ("", "svckit.test.Probe")] == [NOT_SERVING] * 2
        watching = health_watch(channel)
        assert (await watching.read()).status == NOT_SERVING
        issuer.mode = "ok"
        assert (await asyncio.wait_for(watching.read(), 60)).status == SERVING
        assert await health(channel, "svckit.test.Probe") == SERVING
        issuer.mode = "500"  # an outage later is no reason to send callers away
        await asyncio.sleep(0.3)
        assert await health(channel) == SERVING
        await server.set_ready(False)
        assert (await watching.read()).status == NOT_SERVING
        assert await health(channel, LIVENESS) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health(channel, "no.such.Service")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        stub: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert (await refused(stub(b"\xff", timeout=5))).reason == "INVALID_ARGUMENT REQUEST_MALFORMED"
        unlisted: Any = channel.unary_unary("/grpc.health.v1.Health/List")
        assert (await refused(unlisted(b"", timeout=5))).code == "UNIMPLEMENTED"
        watching.cancel()


async def test_health_is_answered_by_a_full_server(issuer: FakeIssuer) -> None:
    leave = asyncio.Event()
    probe = Probe()

    async def slow(request: Any, call: Call) -> Any:
        await leave.wait()
        return request

    probe.ask = slow  # type: ignore[method-assign]
    async with (
        serving(user_verifier(issuer), (PROBE, probe), max_in_flight=1) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = asyncio.ensure_future(ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=9))
        while not server.chain.admission.in_flight:
            await asyncio.sleep(0.01)
        assert await health(channel, LIVENESS) == SERVING
        leave.set()
        await call


async def test_strangers_cannot_use_up_the_places_of_long_polls(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svckit.interceptors.FOREIGN_STREAMS", 3)
    probe = Probe()

    async def poll(request: Any, call: Call) -> Any:
        with call.waiting():
            return request

    probe.ask = poll  # type: ignore[method-assign]
    async with (
        serving(user_verifier(issuer), (PROBE, probe), max_waiting=1) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        watches = [health_watch(channel) for _ in range(3)]
        for one in watches:
            await one.read()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health_watch(channel).read()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=5)
        assert server.chain.admission.waiting == 0


async def test_a_compressed_bomb_is_refused_unpacked(issuer: FakeIssuer) -> None:
    async with (
        serving(user_verifier(issuer), (PROBE, Probe())) as (_, address),
        grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel,
    ):
        call = ask(channel)(Text(value="0" * (64 << 20)), metadata=bearer(issuer.token()), timeout=20)
        assert (await refused(call)).code == "RESOURCE_EXHAUSTED"
        small = ask(channel)(Text(value="0" * 10000), metadata=bearer(issuer.token()), timeout=5)
        assert len((await small).value) == 10001


async def test_silent_connections_are_closed(issuer: FakeIssuer) -> None:
    async with serving(user_verifier(issuer), (PROBE, Probe())) as (_, address):
        host, _, port = address.rpartition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
        async with asyncio.timeout(120):
            for reader, writer in opened:
                while await reader.read(4096):
                    pass
                writer.close()


@pytest.mark.parametrize(("mode", "anonymous", "operate"), [
    ("open", "OK", "OK"), ("authenticated", "UNAUTHENTICATED", "OK"), ("off", "UNIMPLEMENTED", "UNIMPLEMENTED"),
])  # fmt: skip
async def test_reflection(issuer: FakeIssuer, mode: str, anonymous: str, operate: str) -> None:
    # Not by grpc.aio: where the refusal overtakes the request, its client says INTERNAL.
    def listed(metadata: Any) -> str:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with grpc.insecure_channel(address) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            try:
                for answer in stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=5):
                    assert "svckit.test.Probe" in {service.name for service in answer.list_services_response.service}
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    async with (
        serving(user_verifier(issuer), (PROBE, Probe()), reflection=mode) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert await asyncio.to_thread(listed, ()) == anonymous
        assert await asyncio.to_thread(listed, operator(issuer)) == operate
        if mode == "open":
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
            for symbol, known in (("svckit.test.Probe.Ask", True), ("svckit.test.Probe.Nope", False), ("x", False)):
                request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
                async for answer in stub.ServerReflectionInfo(iter([request]), timeout=5):
                    assert answer.HasField("file_descriptor_response") is known
        if mode == "authenticated":
            assert await asyncio.to_thread(listed, bearer(issuer.token())) == "PERMISSION_DENIED"


async def test_channelz_is_for_operators(issuer: FakeIssuer) -> None:
    async with (
        serving(user_verifier(issuer), (PROBE, Probe())) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = channelz_pb2_grpc.ChannelzStub(channel)  # type: ignore[arg-type]
        request = channelz_pb2.GetServersRequest()
        assert (await refused(stub.GetServers(request, timeout=5))).reason == "UNAUTHENTICATED TOKEN_MISSING"
        refusal = await refused(stub.GetServers(request, metadata=bearer(issuer.token()), timeout=5))
        assert refusal.reason == "PERMISSION_DENIED PERMISSION_MISSING"
        servers = await stub.GetServers(request, metadata=operator(issuer), timeout=5)
        assert len(servers.server) >= 1


async def test_metrics(issuer: FakeIssuer) -> None:
    async with (
        serving(user_verifier(issuer), (PROBE, Probe())) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        await ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=5)
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    labels = 'code="OK",method="/svckit.test.Probe/Ask"'
    count = values[f"orchestrator_rpc_seconds_count{{{labels}}}"]
    assert count >= 1
    assert values['orchestrator_rpc_seconds_bucket{code="OK",le="+Inf",method="/svckit.test.Probe/Ask"}'] == count
    assert values[f"orchestrator_rpc_seconds_sum{{{labels}}}"] > 0
    assert values["orchestrator_rpc_in_flight"] == 0
    assert values["orchestrator_rpc_waiting"] == 0


def test_a_method_without_policy_stops_the_start(issuer: FakeIssuer) -> None:
    open_service = make_service("Open", {"Ask": {}, "Forgotten": {"policy": False}})
    server = Server(ServiceSettings(metrics_port=0), user_verifier(issuer), host="127.0.0.1", port=0)
    with pytest.raises(PolicyError, match="Forgotten"):
        server.register(open_service, Probe())
    with pytest.raises(AttributeError):
        server.register(PROBE, object())


# --- TLS --------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, ca: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A key and a certificate as <name>.key and <name>.pem, signed by `ca` or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer, issuer_name = (key, subject) if ca is None else (ca[0], ca[1].subject)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return key, made


IDENTITY: dict[str, Any] = {"issuer": "controller_svc", "subject": "controller_svc", "audience": "probe_svc"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """service.key and service.pub: the caller's identity; ca, server, client, stranger: certificates."""
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "service.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "service.pub").write_bytes(public)
    ca = certificate(tmp_path, "ca")
    certificate(tmp_path, "server", ca)
    certificate(tmp_path, "client", ca)
    certificate(tmp_path, "stranger")
    return tmp_path


BACK = make_service("Back", {"Ask": {"permission": "orchestrator.service"}})


def service_verifier(keys: Path) -> TokenVerifier:
    return TokenVerifier(StaticKeys(keys / "service.pub"), ServiceProfile(**IDENTITY))


@pytest.fixture
def signer(keys: Path) -> TokenSigner:
    return TokenSigner(keys / "service.key", **IDENTITY)


def back(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        "/svckit.test.Back/Ask", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
    )


async def test_mutual_tls(keys: Path, signer: TokenSigner) -> None:
    settings = {
        "tls_cert_file": keys / "server.pem",
        "tls_key_file": keys / "server.key",
        "tls_client_ca_file": keys / "ca.pem",
    }
    ours = ClientTls(keys / "ca.pem", keys / "client.pem", keys / "client.key")
    async with serving(service_verifier(keys), (BACK, Probe()), **settings) as (_, address):
        async with open_channel(address, signer=signer, tls=ours) as channel:
            assert (await back(channel)(Text(value="a"), timeout=5)).value == "a!"
        for wrong in (
            ClientTls(keys / "ca.pem"),
            ClientTls(keys / "ca.pem", keys / "stranger.pem", keys / "stranger.key"),
            ClientTls(keys / "stranger.pem", keys / "client.pem", keys / "client.key"),
        ):
            async with open_channel(address, signer=signer, tls=wrong) as channel:
                assert (await refused(back(channel)(Text(), timeout=5))).code == "UNAVAILABLE"
        async with open_channel(address, signer=signer) as channel:
            assert (await refused(back(channel)(Text(), timeout=5))).code == "UNAVAILABLE"


# --- the client channel -----------------------------------------------------------------------------------------------


async def test_the_channel_carries_token_and_trace(keys: Path, signer: TokenSigner) -> None:
    probe = Probe()
    async with (
        serving(service_verifier(keys), (BACK, probe)) as (_, address),
        open_channel(address, signer=signer) as channel,
    ):
        trace = new_trace()
        token = current_trace.set(trace)
        await back(channel)(Text(), timeout=5, metadata=(("x-more", "1"),))
        current_trace.reset(token)
        ((_, call),) = probe.calls
        assert (call.trace.trace_id, call.trace.parent_id) == (trace.trace_id, trace.span_id)
        assert call.values("x-more") == ["1"]
        assert call.principal.permissions == {"orchestrator.service"}
        with pytest.raises(TypeError):
            back(channel)(Text())
        with pytest.raises(NotImplementedError):
            channel.unary_stream("/svckit.test.Back/Ask")
        await channel.channel_ready()


async def test_the_channel_goes_round_replicas_that_are_ready(keys: Path, signer: TokenSigner) -> None:
    first, second = Probe(), Probe()
    async with (
        serving(service_verifier(keys), (BACK, first)) as (leaving, one),
        serving(service_verifier(keys), (BACK, second)) as (_, two),
        open_channel(f"ipv4:{one},{two}", signer=signer, allow_plaintext=True) as channel,
    ):
        for _ in range(20):
            await back(channel)(Text(), timeout=5)
        assert first.calls
        assert second.calls
        await leaving.set_ready(False)

        async def avoided() -> bool:
            first.calls.clear()
            for _ in range(10):
                await back(channel)(Text(), timeout=5)
            return not first.calls

        await eventually(avoided)


def test_no_plaintext_outside_loopback(signer: TokenSigner) -> None:
    for target in ("10.0.0.1:8090", "idempotency:8090", "dns:///idempotency:8090", "dns://1.1.1.1/idempotency:8090"):
        with pytest.raises(ValueError, match="plaintext"):
            open_channel(target, signer=signer)


async def test_plaintext_on_loopback(signer: TokenSigner) -> None:
    for target in ("127.0.0.1:8090", "localhost:8090", "[::1]:8090", "dns:///localhost:8090", "unix:/run/x.sock"):
        await open_channel(target, signer=signer).close()
    await open_channel("idempotency:8090", signer=signer, allow_plaintext=True).close()


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_drain(issuer: FakeIssuer) -> None:
    inside, leave = asyncio.Event(), asyncio.Event()
    probe = Probe()

    async def slow(request: Any, call: Call) -> Any:
        if request.value == "slow":
            inside.set()
            await leave.wait()
        return Text(value="done")

    async def endless(request: Any, call: Call) -> AsyncIterator[Any]:
        yield Text(value="first")
        await asyncio.sleep(60)

    probe.ask, probe.watch = slow, endless  # type: ignore[method-assign]
    metadata = bearer(issuer.token())
    async with (
        serving(user_verifier(issuer), (PROBE, probe), drain_seconds=4) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        working = asyncio.ensure_future(ask(channel)(Text(value="slow"), metadata=metadata, timeout=20))
        await inside.wait()
        stream = watch(channel)(Text(), metadata=metadata)
        await stream.read()
        watching = health_watch(channel)
        assert (await watching.read()).status == SERVING

        server.stop()
        assert (await asyncio.wait_for(watching.read(), 30)).status == NOT_SERVING
        await server.set_ready(True)  # too late
        assert not server.stopping.is_set()
        # Not ready is not closed: who has not moved yet is still answered.
        assert (await ask(channel)(Text(), metadata=metadata, timeout=5)).value == "done"
        await asyncio.wait_for(server.stopping.wait(), 60)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError):
            await watching.read()
        async with grpc.aio.insecure_channel(address) as late:
            assert (await refused(ask(late)(Text(), metadata=metadata, timeout=5))).code == "UNAVAILABLE"
        leave.set()
        assert (await working).value == "done"
        await asyncio.wait_for(server.wait(), 60)


async def test_a_second_stop_ends_at_once(issuer: FakeIssuer) -> None:
    inside = asyncio.Event()
    probe = Probe()

    async def slow(request: Any, call: Call) -> Any:
        inside.set()
        await asyncio.sleep(100)

    probe.ask = slow  # type: ignore[method-assign]
    async with (
        serving(user_verifier(issuer), (PROBE, probe), drain_seconds=60, grace_seconds=60) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = asyncio.ensure_future(refused(ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=20)))
        await inside.wait()
        server.stop()
        await asyncio.sleep(0.05)
        server.stop()
        await asyncio.wait_for(server.wait(), 30)
        assert (await call).code in ("UNAVAILABLE", "CANCELLED")


async def test_calls_over_the_grace_are_cut(issuer: FakeIssuer) -> None:
    inside, cancelled = asyncio.Event(), asyncio.Event()
    probe = Probe()

    async def slow(request: Any, call: Call) -> Any:
        inside.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    probe.ask = slow  # type: ignore[method-assign]
    async with (
        serving(user_verifier(issuer), (PROBE, probe), grace_seconds=0.3) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = asyncio.ensure_future(refused(ask(channel)(Text(), metadata=bearer(issuer.token()), timeout=20)))
        await inside.wait()
        server.stop()
        await asyncio.wait_for(server.wait(), 30)
        assert cancelled.is_set()
        assert (await call).code in ("UNAVAILABLE", "CANCELLED")


# --- as a program -----------------------------------------------------------------------------------------------------


class Program:
    """tests.rpc.svckit_program as a process."""

    def __init__(self, keys: Path, port: int, **environment: str) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rpc.svckit_program", str(port), str(keys / "service.pub")],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}",
                "METRICS_PORT": "0",
                "DRAIN_SECONDS": "0.2",
                "GRACE_SECONDS": "10",
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self, event: str) -> dict[str, Any]:
        """The next log line with this event."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            line: dict[str, Any] = json.loads(text)
            if line["event"] == event:
                return line
        raise AssertionError(f"no line {event!r}")

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and what else it said."""
        _, rest = self.process.communicate(timeout=45)
        return self.process.returncode, rest.splitlines()


@pytest.fixture
def program_signer(keys: Path) -> TokenSigner:
    return TokenSigner(keys / "service.key", **{**IDENTITY, "audience": "program"})


def program_ask(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        "/svckit.test.Program/Ask", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_sigterm_lets_calls_finish(keys: Path, program_signer: TokenSigner, number: signal.Signals) -> None:
    program = Program(keys, 0, DRAIN_SECONDS="1")
    line = await asyncio.to_thread(program.line, "serving")
    assert line["service"] == "program"
    async with open_channel(f"127.0.0.1:{line['port']}", signer=program_signer) as channel:
        await program_ask(channel)(Text(value="0"), timeout=9)
        call = asyncio.ensure_future(program_ask(channel)(Text(value="3"), timeout=30))
        await asyncio.sleep(0.3)
        program.process.send_signal(number)
        assert (await call).value == str(program.process.pid)
    code, lines = await asyncio.to_thread(program.end)
    assert code == 0
    assert json.loads(lines[-1])["event"] == "stopped"


async def test_a_second_sigterm_ends_at_once(keys: Path, program_signer: TokenSigner) -> None:
    program = Program(keys, 0, DRAIN_SECONDS="60")
    line = await asyncio.to_thread(program.line, "serving")
    async with open_channel(f"127.0.0.1:{line['port']}", signer=program_signer) as channel:
        await program_ask(channel)(Text(value="0"), timeout=9)
        call = asyncio.ensure_future(refused(program_ask(channel)(Text(value="25"), timeout=29)))
        await asyncio.sleep(0.3)
        program.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(program.line, "draining")
        program.process.send_signal(signal.SIGTERM)
        code, _ = await asyncio.to_thread(program.end)  # waits for less than it may drain
        assert code == 0
        await call


def test_all_files_that_are_allowed(keys: Path) -> None:
    """Connections are files: not the soft limit bounds them but the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        program = Program(keys, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    program.line("serving")
    assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    program.process.kill()
    program.end()


@pytest.mark.parametrize("what", ["port", "metrics"])
def test_a_busy_port_is_one_line(keys: Path, what: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        program = Program(
            keys, port if what == "port" else 0, **({"METRICS_PORT": str(port)} if what == "metrics" else {})
        )
        code, lines = program.end()
    assert code == 1
    (line,) = lines
    assert f"127.0.0.1:{port}" in line
    assert "Address already in use" in line


async def test_a_busy_port_in_process(issuer: FakeIssuer) -> None:
    async with serving(user_verifier(issuer)) as (_, address):
        port = int(address.rpartition(":")[2])
        second = Server(ServiceSettings(metrics_port=0), user_verifier(issuer), host="127.0.0.1", port=port)
        with pytest.raises(StartError, match="Address already in use"):
            await second.start()


async def test_processes_share_the_port_and_end_together(keys: Path, program_signer: TokenSigner) -> None:
    metrics = free_port()
    while not port_is_free(metrics + 1):  # the second process' own: free_port() gives it to others
        metrics = free_port()
    program = Program(keys, free_port(), PROCESSES="2", METRICS_PORT=str(metrics))
    lines = [await asyncio.to_thread(program.line, "serving") for _ in range(2)]
    assert {line["metrics_port"] for line in lines} == {metrics, metrics + 1}
    answered = set()
    for _ in range(40):
        async with open_channel(f"127.0.0.1:{program.port}", signer=program_signer) as channel:
            answered.add((await program_ask(channel)(Text(value="0"), timeout=9)).value)
    assert len(answered) == 2
    assert str(program.process.pid) not in answered
    program.process.send_signal(signal.SIGTERM)
    code, _ = await asyncio.to_thread(program.end)
    assert code == 0
    for pid in answered:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_one_process_that_dies_ends_all(keys: Path, program_signer: TokenSigner) -> None:
    program = Program(keys, free_port(), PROCESSES="2")
    for _ in range(2):
        await asyncio.to_thread(program.line, "serving")
    async with open_channel(f"127.0.0.1:{program.port}", signer=program_signer) as channel:
        victim = int((await program_ask(channel)(Text(value="0"), timeout=9)).value)
    os.kill(victim, signal.SIGKILL)
    code, _ = await asyncio.to_thread(program.end)
    assert code != 0
