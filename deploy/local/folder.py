"""Where the local stack keeps what outlives it, and on which ports it listens."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.issuer import Issuer, write_secret
from deploy.local.processes import ROOT, LocalError, port_is_free

PORTS = {
    "CONTROLLER_PORT": 8088,
    "IDEMPOTENCY_PORT": 8090,
    "CONTROLLER_METRICS_PORT": 9088,
    "IDEMPOTENCY_METRICS_PORT": 9090,
    "ISSUER_PORT": 8089,
    "POSTGRES_PORT": 15432,
    "VALKEY_PORT": 16379,
}
"""The variables that name the ports, and their defaults, all below those the kernel takes for outgoing calls."""


class Folder:
    """The folder `.local`, or LOCAL_DIR: `data/`, `keys/`, `logs/`."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("LOCAL_DIR") or ROOT / ".local").resolve()
        self.data = self.path / "data"
        self.logs = self.path / "logs"
        self.service_key = self.path / "keys" / "controller.pem"

    def issuer(self) -> Issuer:
        """The issuer with the key kept here; it does not serve yet."""
        return Issuer(self.path / "keys" / "issuer.pem", port=port("ISSUER_PORT"))

    def page_token_key(self) -> str:
        """The key that signs page tokens, made the first time."""
        file = self.path / "keys" / "page_token"
        if not file.exists():
            write_secret(file, secrets.token_hex(32).encode())
        return file.read_text()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone; raises LocalError while another has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "up.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise LocalError(
                    f"it runs already, as process {lock.read().strip()}: end that one with Ctrl-C first"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def port(variable: str) -> int:
    """The port this environment variable names, or its default; raises LocalError when it is no port."""
    text = os.environ.get(variable) or str(PORTS[variable])
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise LocalError(f"{variable}={text} is not a port")
    return int(text)


def refuse_busy_ports(*variables: str) -> None:
    """Raises LocalError when one of these ports is taken, or named twice."""
    seen: dict[int, str] = {}
    for variable in variables:
        number = port(variable)
        if number in seen:
            raise LocalError(f"{seen[number]} and {variable} are both {number}")
        seen[number] = variable
        if not port_is_free(number):
            raise LocalError(
                f"port {number} is in use by another program: end it, or choose another, as in `make up {variable}=…`"
            )
