"""`make up` as its user sees it: the first job, pasted calls, Ctrl-C, kept data, one line for each thing in the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.folder import PORTS
from deploy.local.processes import LOOPBACK, ROOT, Child, free_port, port_is_free
from deploy.local.servers import Postgres, unprivileged

READY = "Up. Ctrl-C stops everything."
NOT_INHERITED = {"DATABASE_URL", "REDIS_URL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}


class Up:
    """A `make up` with a folder and ports of its own."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.ports = {variable: free_port() for variable in PORTS}
        own = {"LOCAL_DIR": str(folder / "local"), **{name: str(number) for name, number in self.ports.items()}}
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        self.env = {**inherited, **own, **env}
        self.child = Child("make up", ["make", "up"], log=folder / "up.log", env=self.env)

    def start(self) -> str:
        """Start it, and answer what it has printed when it is up."""
        self.child.start()
        self.child.wait_until(lambda: READY in self.child.output(), seconds=60)
        return self.child.output()

    def fail(self) -> str:
        """Start it, and answer the one line it must end with: nothing may run after it."""
        self.child.start()
        self.child.wait_until(lambda: not self.child.running or READY in self.child.output(), seconds=60)
        lines = [line for line in self.child.output().splitlines() if not line.startswith("make: ***")]
        assert self.child.exit_code, "it ended well"
        assert "Traceback" not in self.child.output()
        assert lines[-1].startswith("make up: ")
        return lines[-1]

    def press_ctrl_c(self) -> str:
        """Do what the terminal does on Ctrl-C, wait for the end, and answer everything it has printed."""
        os.killpg(self.child.pid, signal.SIGINT)
        self.child.stop(signal.SIGCONT)
        return self.child.output()

    def runs_nothing(self) -> bool:
        """Whether all its ports are free."""
        return all(port_is_free(number) for number in self.ports.values())


@pytest.fixture(scope="module", autouse=True)
def listening() -> Iterator[None]:
    """What is started listens to Ctrl-C, even if this run is in the background and does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One that is up."""
    local = Up(tmp_path_factory.mktemp("up"))
    local.start()
    yield local
    local.press_ctrl_c()
    assert local.runs_nothing()


def pasted(line: str) -> dict[str, object]:
    """What a printed call answers, pasted into a shell that stands elsewhere."""
    done = subprocess.run(line, shell=True, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def printed(output: str, program: str) -> str:
    """The call of this program among the printed lines."""
    return next(line for line in output.splitlines() if re.match(rf"(/\S+/)?{program} ", line))


def until(true: Callable[[], bool]) -> None:
    """Wait up to a minute for something to become true."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it did not happen within 60 s"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The process ids of a process's children."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            found += [int(file.parent.name)] if parent == pid else []
    return found


def test_the_first_job_is_shown(up: Up) -> None:
    steps = up.child.output().split("The first job:")[1].split("A token")[0]
    for step in ("CreateSession", "RouteTask", "ClaimTasks", "CompleteTask", "SUCCEEDED", "idempotency-replayed: true"):
        assert step in steps


def test_the_printed_buf_call_works_and_is_replayed(up: Up) -> None:
    line = printed(up.child.output(), "buf curl")
    first = pasted(line)
    assert first["session"]["agentRole"] == "planner"  # type: ignore[index]
    assert pasted(line) == first


def test_the_printed_grpcurl_call_works_and_is_replayed(up: Up) -> None:
    line = printed(up.child.output(), "grpcurl")
    if shutil.which(line.split()[0]) is None:
        pytest.skip("grpcurl is not here: `make tools` gets it (with Go)")
    first = pasted(line)
    assert first["session"]["agentRole"] == "planner"  # type: ignore[index]
    assert pasted(line) == first


def test_a_made_token_is_taken(up: Up) -> None:
    made = subprocess.run(
        ["make", "-s", "token", "ROLE=painter"], cwd=ROOT, env=up.env, capture_output=True, text=True, check=True
    )
    call = printed(up.child.output(), "buf curl").replace("planner", "painter").replace("my-first-key", "painters-key")
    answer = pasted(re.sub(r"Bearer [^']+", f"Bearer {made.stdout.strip()}", call))
    assert answer["session"]["agentRole"] == "painter"  # type: ignore[index]


def test_a_second_one_says_that_one_runs(up: Up, tmp_path: Path) -> None:
    second = Up(tmp_path, LOCAL_DIR=up.env["LOCAL_DIR"])
    assert "runs already" in second.fail()
    assert up.child.running


def test_ctrl_c_stops_everything_and_the_data_stay(tmp_path: Path) -> None:
    local = Up(tmp_path)
    first = pasted(printed(local.start(), "buf curl"))
    assert "stopped" in local.press_ctrl_c()
    assert local.runs_nothing()
    assert pasted(printed(local.start(), "buf curl")) == first  # the same key, days later: the first answer
    local.press_ctrl_c()
    assert local.runs_nothing()


def test_a_service_that_dies_is_named_and_everything_stops(tmp_path: Path) -> None:
    local = Up(tmp_path)
    local.start()
    [python] = children_of(local.child.pid)
    controller = next(
        pid for pid in children_of(python) if b"controller_svc" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(controller, signal.SIGKILL)
    until(lambda: not local.child.running)
    assert "controller_svc ended by itself with code -9" in local.child.output()
    assert local.runs_nothing()


def test_nothing_outlives_it(tmp_path: Path) -> None:
    local = Up(tmp_path)
    local.start()
    [python] = children_of(local.child.pid)
    os.kill(python, signal.SIGKILL)
    until(local.runs_nothing)
    local.child.stop()


@pytest.mark.parametrize("variable", ["CONTROLLER_PORT", "POSTGRES_PORT", "ISSUER_PORT"])
def test_a_busy_port_is_named(tmp_path: Path, variable: str) -> None:
    local = Up(tmp_path)
    with socket.create_server((LOOPBACK, local.ports[variable])):
        line = local.fail()
    assert f"port {local.ports[variable]} is in use" in line
    assert variable in line


@pytest.mark.parametrize(
    ("variable", "url"), [("DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x"), ("REDIS_URL", "redis://127.0.0.1:1")]
)
def test_a_given_server_that_is_away_is_named(tmp_path: Path, variable: str, url: str) -> None:
    local = Up(tmp_path, **{variable: url})
    assert local.fail().startswith(f"make up: {variable}: ")
    assert "secret" not in local.child.output()
    assert local.runs_nothing()


def test_postgres_goes_on_after_a_kill_and_a_lock_left_behind(tmp_path: Path) -> None:
    server = Postgres(tmp_path, port=free_port(), log=tmp_path / "log")
    server.start()
    server.child.kill()
    lock = tmp_path / "data" / "postmaster.pid"
    lines = lock.read_text().split("\n")
    lock.write_text("\n".join([str(os.getpid()), *lines[1:]]))  # its id is another program's by now
    server.start()
    server.stop()
    assert server.child.exit_code == 0


def test_postgres_starts_where_user_namespaces_are_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unshare").write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    unprivileged.cache_clear()
    server = Postgres(tmp_path / "postgres", port=free_port(), log=tmp_path / "log", durable=False)
    try:
        server.start()
        server.stop()
    finally:
        unprivileged.cache_clear()
    assert server.child.exit_code == 0


def test_without_a_python_there_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    done = subprocess.run(
        [tmp_path / ".ci" / "venv"],
        env={**os.environ, "PYTHON": "python2.6"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "needs Python 3.11 or newer" in line


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_in_ci_a_skip_is_a_failure(tmp_path: Path, ci: str, code: int) -> None:
    (tmp_path / "test_skip.py").write_text("import pytest\ndef test_it():\n    pytest.skip('no tool')\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_skip.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CI": ci}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
