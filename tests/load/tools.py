"""The tools that make load: the aio client, ghz and pgbench. Each says what became of the calls of some seconds."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from psycopg import conninfo

from deploy.local.processes import ROOT, LocalError
from deploy.local.servers import embedded_postgres
from tests.load.calls import CONNECTIONS, ECHOES, REPLAYS, config, protoset
from tests.load.stack import Stack

GHZ_INSTALL = "go install github.com/bojand/ghz/cmd/ghz@v0.93.0"

SHORTEST_GHZ = 0.4
"""Seconds. On a busy machine ghz panics when its time is over before all of its workers have started."""


@dataclass
class Stretch:
    """Calls of one kind over some seconds, or over several such stretches together.

    `calls` are all OK ones, to which CPU time is related; `latencies` in ms and `seconds` are of the steady part only,
    from which the start and the last calls are cut off.
    """

    calls: int = 0
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Stretch) -> None:
        """Count another stretch in."""
        self.calls += other.calls
        self.latencies += other.latencies
        self.seconds += other.seconds
        self.errors += other.errors


def lead_in(seconds: float) -> float:
    """Seconds at the start of a stretch that are not counted: the calls in flight come into their rhythm."""
    return seconds / 4


def steady(calls: Sequence[tuple[float, float]], seconds: float, in_flight: int) -> Stretch:
    """The stretch of these OK calls: (end in seconds since the start, latency in ms) each.

    The steady part begins after the lead-in and lasts `seconds`, or until the last calls, when fewer are in flight.
    When that leaves next to nothing, because calls are slow and the stretch is short, all of it counts.
    """
    ends = sorted(end for end, _ in calls)
    begin = lead_in(seconds)
    until = min(begin + seconds, ends[-in_flight] if len(ends) >= in_flight else 0.0)
    part = [latency for end, latency in calls if begin <= end < until]
    if len(part) < 10 or until - begin < seconds / 4:
        begin, until = 0.0, ends[-1] if ends else seconds
        part = [latency for _, latency in calls]
    return Stretch(len(calls), part, until - begin)


class Aio:
    """The aio client in its process."""

    name = "aio"
    calls = ("echo", "echo-keyed", "create", "get", "list", "replay", "loop", "mix")

    def __init__(self, stack: Stack) -> None:
        self._log = (stack.folder / "client.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.load.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            text=True,
        )
        self.pid = self._process.pid
        self._tell([stack.target, stack.echo_target, stack.token])

    def prepare(self) -> list[str]:
        """Create the sessions that are read and replayed; answers their ids."""
        report = self._ask("prepare")
        if len(report["sessions"]) < REPLAYS:
            raise LocalError(f"preparing failed: {report['errors']}")
        sessions: list[str] = report["sessions"]
        return sessions

    def fill(self, tasks: int) -> None:
        """Route this many tasks to the role `queue`."""
        errors = self._ask("fill", tasks)["errors"]
        if errors:
            raise LocalError(f"preparing tasks failed: {errors}")

    def make_ready(self, call: str, in_flight: int) -> None:
        """See to it that the call finds what it needs: nothing is needed."""

    def run(self, call: str, in_flight: int, seconds: float) -> Stretch:
        """Keep this many calls in flight."""
        report = self._ask("measure", call, in_flight, lead_in(seconds) + seconds)
        calls = [(end / 1e6, latency / 1e3) for end, latency in zip(report["ends"], report["latencies"], strict=True)]
        stretch = steady(calls, seconds, in_flight)
        stretch.errors.update(report["errors"])
        return stretch

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, *command: object) -> dict[str, Any]:
        self._tell(list(command))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = Path(self._log.name).read_text().strip().splitlines()[-1:]
            raise LocalError(f"the aio client ended with code {self._process.returncode}: {''.join(last)}")
        report: dict[str, Any] = json.loads(line)
        return report

    def _tell(self, what: list[Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


class Ghz:
    """ghz with the configurations of tests/load/ghz, a process per stretch of at least SHORTEST_GHZ seconds."""

    name = "ghz"
    calls = ("echo", "echo-keyed", "create", "get", "list", "replay", "route", "claim")
    pid = None

    def __init__(self, program: str, stack: Stack, sessions: Sequence[str], aio: Aio) -> None:
        self._program = program
        self._stack = stack
        self._sessions = sessions[:100]
        self._aio = aio
        self._backlog = 0
        # Not the .proto files, whose optional fields ghz cannot parse; nor reflection, which the echo has not.
        self._protoset = stack.folder / "protos.binpb"
        self._protoset.write_bytes(protoset())

    def make_ready(self, call: str, in_flight: int) -> None:
        """See to it that the call finds what it needs: some tasks to claim, should route have made too few."""
        missing = 4 * in_flight - self._backlog
        if call == "claim" and missing > 0:
            self._aio.fill(missing)
            self._backlog += missing

    def run(self, call: str, in_flight: int, seconds: float) -> Stretch:
        """Keep this many calls in flight; claims claim what is left of what was routed, and no more."""
        file = self._stack.folder / f"{call}.json"
        output = self._stack.folder / "ghz-output.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(self._config(call)))
        seconds = max(seconds, SHORTEST_GHZ)
        wanted = lead_in(seconds) + seconds
        limit = ["-z", f"{wanted:.3f}s"]
        if call == "claim":
            limit = ["-x", f"{wanted:.3f}s", "-n", str(self._backlog)]
        ended = subprocess.run(
            [
                self._program, "--config", str(file), "--protoset", str(self._protoset),
                *limit, "--duration-stop=wait", "-c", str(in_flight), "--connections", str(min(in_flight, CONNECTIONS)),
                "-O", "json", "-o", str(output), self._stack.echo_target if call in ECHOES else self._stack.target,
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ended.returncode != 0:
            return Stretch(errors=Counter([f"ghz: {(ended.stderr or ended.stdout).strip()}"]))
        stretch = self._stretch(json.loads(output.read_text())["details"] or [], in_flight, seconds)
        if call == "route":
            self._backlog += stretch.calls
        elif call == "claim":
            self._backlog -= stretch.calls
        return stretch

    def _config(self, call: str) -> dict[str, Any]:
        """The configuration with the token, and with the request once for each of the sessions if it names one."""
        made = config(call, TOKEN=self._stack.token)
        if "$SESSION_ID" in json.dumps(made["data"]):
            made["data"] = [
                config(call, TOKEN=self._stack.token, SESSION_ID=session)["data"] for session in self._sessions
            ]
        return made

    @staticmethod
    def _stretch(details: list[dict[str, Any]], in_flight: int, seconds: float) -> Stretch:
        ends = [datetime.fromisoformat(detail["timestamp"]).timestamp() for detail in details]
        start = min((end - detail["latency"] / 1e9 for end, detail in zip(ends, details, strict=True)), default=0.0)
        calls = [
            (end - start, detail["latency"] / 1e6)
            for end, detail in zip(ends, details, strict=True)
            if detail["status"] == "OK"
        ]
        stretch = steady(calls, seconds, in_flight)
        stretch.errors.update(
            f"{detail['status']}: {detail['error']}" for detail in details if detail["status"] != "OK"
        )
        return stretch


class Pgbench:
    """pgbench with the statement of one CreateSession."""

    name = "pgbench"
    clients = (1, 16, 64)
    """Beyond that, connections cost more than they bring, and Postgres' usual limit is 100."""

    def __init__(self, program: Path, stack: Stack) -> None:
        self._program = program
        self._folder = stack.folder
        connection = conninfo.conninfo_to_dict(stack.database_url)
        self._environment = {**os.environ, "PGPASSWORD": str(connection.pop("password", ""))}
        self._rate = 0.0
        self._connection = conninfo.make_conninfo("", **connection)

    def run(self, clients: int, seconds: float) -> Stretch:
        """As many clients, each with one statement after another."""
        prefix = self._folder / "pgbench"
        duration = math.ceil(lead_in(seconds) + seconds)
        # The time that -T sets runs while connections are made, which on a busy machine can be all of it.
        limit = ["-T", str(duration)]
        if self._rate:
            limit = ["-t", str(max(10, round(self._rate * duration / clients)))]
        threads = min(clients, os.cpu_count() or 1)
        ended = subprocess.run(
            [
                str(self._program), "-n", "-M", "prepared", "-f", str(Path(__file__).parent / "create.sql"),
                "-c", str(clients), "-j", str(threads), *limit, "-l", f"--log-prefix={prefix}", self._connection,
            ],
            env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = []
        for log in self._folder.glob("pgbench.*"):
            for line in log.read_text().splitlines():
                fields = line.split()
                end = int(fields[4]) + int(fields[5]) / 1e6
                calls.append((end, int(fields[2]) / 1e3))
            log.unlink()
        start = min((end - latency / 1e3 for end, latency in calls), default=0.0)
        calls = [(end - start, latency) for end, latency in calls]
        stretch = steady(calls, seconds, clients)
        self._rate = len(stretch.latencies) / stretch.seconds
        if ended.returncode != 0:
            stretch.errors["pgbench: " + " ".join(ended.stderr.strip().splitlines()[-1:])] += 1
        return stretch


def find_ghz() -> str | None:
    """The ghz on PATH, or the one that `make tools` has put into .local/bin."""
    return shutil.which("ghz") or shutil.which("ghz", path=ROOT / ".local" / "bin")


def find_pgbench() -> Path | None:
    """The pgbench beside the embedded Postgres, or the one on PATH."""
    try:
        program = embedded_postgres() / "pgbench"
    except LocalError:
        program = Path()
    if program.is_file():
        return program
    found = shutil.which("pgbench")
    return Path(found) if found else None
