"""The pair as processes of its own: what a test starts, kills and starts again."""

from __future__ import annotations

import os
import secrets
import signal
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from deploy.local import services
from deploy.local.issuer import Issuer
from deploy.local.processes import LOOPBACK, ROOT, free_port
from tests.system.failpoints import Failpoints


class Pair:
    """idempotency_svc and one or more controllers on free ports, their logs under `directory`.

    They are named `idempotency`, `controller`, `controller-2`, …. Each keeps its port over a restart.
    `env` is for all of them, `controller_env` and `idempotency_env` for those alone. With `failpoints` each can be made
    to fail at the places of tests/system/failpoints.py, by `failpoints[name]`; then `tree` is the folder that the
    services' code is taken from. Its methods block for up to some seconds; call them from an async test with
    asyncio.to_thread when the test's own calls must go on meanwhile.
    """

    def __init__(
        self,
        *,
        database_url: str,
        redis_url: str,
        issuer: Issuer,
        service_key: Path,
        directory: Path,
        controllers: int = 1,
        env: Mapping[str, str] | None = None,
        controller_env: Mapping[str, str] | None = None,
        idempotency_env: Mapping[str, str] | None = None,
        failpoints: bool = False,
        tree: Path = ROOT,
    ) -> None:
        self.issuer = issuer
        # Nobody has to move away before a test stops a service.
        env = {"DRAIN_SECONDS": "0", **(env or {})}
        self.metrics_ports = {"idempotency": free_port()}
        cache = services.idempotency(
            name="idempotency",
            port=free_port(),
            metrics_port=self.metrics_ports["idempotency"],
            redis_url=redis_url,
            service_key=service_key,
            log=directory / "idempotency.log",
            env={**env, **(idempotency_env or {})},
        )
        self.services = {cache.name: cache}
        page_token_key = secrets.token_hex(32)
        for number in range(1, controllers + 1):
            name = "controller" if number == 1 else f"controller-{number}"
            self.metrics_ports[name] = free_port()
            self.services[name] = services.controller(
                name=name,
                port=free_port(),
                metrics_port=self.metrics_ports[name],
                database_url=database_url,
                idempotency_target=cache.target,
                issuer=issuer,
                service_key=service_key,
                page_token_key=page_token_key,
                log=directory / f"{name}.log",
                env={**env, **(controller_env or {})},
            )
        self.failpoints: dict[str, Failpoints] = {}
        if failpoints:
            for service in self.services.values():
                self._start_with_failpoints(service, directory, tree)

    def _start_with_failpoints(self, service: services.Service, directory: Path, tree: Path) -> None:
        module = service.command[-1]
        failpoints = self.failpoints[service.name] = Failpoints(module, directory / f"{service.name}.failpoint")
        service.command = (*service.command[:-1], "tests.system.failpoints", module)
        # Without the working directory on the path, a module comes from the first folder that has it.
        path = os.pathsep.join(str(folder) for folder in (tree, tree / "gen", ROOT))
        service.env = {**(service.env or {}), **failpoints.env, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}

    @property
    def controller_target(self) -> str:
        """Where the first controller listens."""
        return self.services["controller"].target

    @property
    def controller_targets(self) -> list[str]:
        """Where the controllers listen."""
        return [service.target for name, service in self.services.items() if name != "idempotency"]

    @property
    def idempotency_target(self) -> str:
        """Where idempotency_svc listens."""
        return self.services["idempotency"].target

    def metric(self, service: str, name: str, **labels: str) -> float:
        """The value of a service's metric now; 0 while it has none with these labels."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{LOOPBACK}:{self.metrics_ports[service]}/metrics") as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        )

    def start(self, *names: str, health: str = "") -> None:
        """Start these services (all when none is named) and return when each is ready.

        With `health="liveness"` it is enough that each runs: without its database a controller is never ready.
        """
        for name in names or self.services:
            self.services[name].start()
        for name in names or self.services:
            self.services[name].wait(health)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send one service a signal; SIGKILL also ends the processes it has started, and waits for its end."""
        if number == signal.SIGKILL:
            self.services[name].kill()
        else:
            self.services[name].send(number)

    def restart(self, name: str, *, health: str = "") -> None:
        """Stop one service with SIGTERM if it still runs, start it again, and return when it is ready."""
        self.services[name].stop()
        self.start(name, health=health)

    def stop(self) -> dict[str, int | None]:
        """Stop everything with SIGTERM, controllers first, and answer the exit codes (None: was never started)."""
        for service in reversed(self.services.values()):
            service.send(signal.SIGCONT)
            service.send(signal.SIGTERM)
        return {name: service.stop() for name, service in reversed(self.services.items())}

    def log(self, name: str) -> str:
        """What one service has written since its last start."""
        return self.services[name].output()
