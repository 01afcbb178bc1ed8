"""Child processes that cannot outlive their parent, and the ports they listen on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The top folder of the checkout."""

LOOPBACK = "127.0.0.1"

# PR_SET_PDEATHSIG is 1. The parent may be gone before the call: then nobody is left to end us.
_LAUNCHER = """\
import os, sys
parent, death_signal, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(death_signal))
    if os.getppid() != int(parent):
        sys.exit("the parent process has gone")
os.execvp(command[0], command)
"""

# The death signal comes when the *thread* that started the child ends: so one thread that lives as long as we do starts
# them all.
_starter = ThreadPoolExecutor(1, thread_name_prefix="start-children")


class LocalError(Exception):
    """Something in the way of the local stack that its user can put right; the message is one line and says how."""


class Child:
    """A program run as our child, in a session of its own so that Ctrl-C in the terminal reaches only us.

    `command` is its argument list, `log` the file its output is appended to, `env` its whole environment (ours when
    None), and `death_signal` what it gets should this process die without stopping it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        death_signal: int = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.log = log
        self.env = env
        self._death_signal = death_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Start it and return at once. Raises LocalError when it is not there to be started."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        if shutil.which(self.command[0]) is None:
            raise LocalError(f"{self.name} needs {self.command[0]}, which is not installed")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(int(self._death_signal))]
            self._process = _starter.submit(
                subprocess.Popen,
                [*launcher, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=None if self.env is None else dict(self.env),
                cwd=ROOT,
                start_new_session=True,
            ).result()

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended yet."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, also after its end."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code, minus the signal that ended it, or None while it runs or was never started."""
        return None if self._process is None else self._process.poll()

    def send(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int | None:
        """Ask it to end and wait; killed after `seconds` or when interrupted. Answers its exit code."""
        if self._process is None:
            return None
        self._process.send_signal(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        except KeyboardInterrupt:
            self.kill()
            raise
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL it and its own children, and wait for its end."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        """What it has written since its last start."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def wait_until(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Ask `ready` every 20 ms until it is true.

        Raises LocalError with the child's last line when it ends before, or is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            running = self.running  # asked first: what it did just before its end still counts
            if ready():
                return
            if not running:
                raise LocalError(f"{self.name} ended with code {self.exit_code}: {self.last_line()} (log: {self.log})")
            if time.monotonic() > deadline:
                raise LocalError(f"{self.name} is not ready after {seconds:g} s: {self.last_line()} (log: {self.log})")
            time.sleep(0.02)

    def last_line(self) -> str:
        """The last line it wrote since its last start."""
        lines = self.output().strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


FREE_PORTS = range(20_000, 32_000)
"""Where free_port looks: below the range from which the kernel takes ports for outgoing connections, so that none of
these takes one. Processes that run beside each other can be given parts of it."""

_given: set[int] = set()


def free_port() -> int:
    """One of FREE_PORTS that is free on loopback, and that this process has not been given before."""
    while True:
        port = random.choice(FREE_PORTS)  # noqa: S311
        if port not in _given and port_is_free(port):
            _given.add(port)
            return port
