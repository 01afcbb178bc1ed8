"""A service as a program, for tests that send it signals: Probe behind a static key, its port from the command line."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from svckit.auth import ServiceProfile, TokenVerifier
from svckit.config import ServiceSettings, load
from svckit.interceptors import Call
from svckit.jwks import StaticKeys
from svckit.server import Server, run
from svckit.telemetry import configure_logging
from tests.rpc.svckit_parts import Probe, Text, make_service

SERVICE = make_service("Program", {"Ask": {"permission": "orchestrator.service"}})


async def main() -> None:
    settings = load(ServiceSettings)
    configure_logging(settings.log_level, "program")
    keys = StaticKeys(Path(sys.argv[2]))
    verifier = TokenVerifier(keys, ServiceProfile("controller_svc", "program", "controller_svc"))
    server = Server(settings, verifier, host="127.0.0.1", port=int(sys.argv[1]))
    probe = Probe()

    async def ask(request: Any, call: Call) -> Any:
        """Sleeps for the seconds asked for; answers with the process it ran in."""
        await asyncio.sleep(float(request.value))
        return Text(value=str(os.getpid()))

    probe.ask = ask  # type: ignore[method-assign]
    server.register(SERVICE, probe)
    await server.start()
    await server.set_ready(True)
    await server.wait()


if __name__ == "__main__":
    run(main, processes=load(ServiceSettings).processes)
