"""Trace context, the histogram, and log lines."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from svckit.telemetry import LOST_LINES, LogFile, RpcSeconds, new_trace

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize("flags", ["00", "01", "03", "ff"])
def test_a_caller_s_trace_goes_on(flags: str) -> None:
    trace = new_trace(f"00-{TRACE}-{SPAN}-{flags}")
    assert (trace.trace_id, trace.parent_id) == (TRACE, SPAN)
    assert trace.span_id != SPAN
    assert trace.flags == ("01" if int(flags, 16) & 1 else "00")
    assert trace.traceparent() == f"00-{TRACE}-{trace.span_id}-{trace.flags}"
    assert new_trace(trace.traceparent()).parent_id == trace.span_id


def test_a_later_version_is_understood() -> None:
    assert new_trace(f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like").trace_id == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-0g",
    ],
)
def test_anything_else_begins_a_new_trace(header: str) -> None:
    trace = new_trace(header)
    assert trace.trace_id != TRACE
    assert trace.parent_id == ""
    assert new_trace(trace.traceparent()).trace_id == trace.trace_id
    assert new_trace(header).trace_id != trace.trace_id


def test_one_sample_per_rpc() -> None:
    histogram = RpcSeconds()
    for seconds in (0.0001, 0.0005, 0.003, 100.0):
        histogram.observe("/a/B", "OK", seconds)
    histogram.observe("/a/B", "NOT_FOUND", 0.001)
    assert histogram.count("/a/B", "OK") == 4
    assert histogram.count("/a/B", "INTERNAL") == 0
    registry = CollectorRegistry()
    registry.register(histogram)
    lines = generate_latest(registry).decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def bucket(bound: str) -> float:
        return values[f'orchestrator_rpc_seconds_bucket{{code="OK",le="{bound}",method="/a/B"}}']

    assert [bucket(bound) for bound in ("0.0005", "0.002", "0.004", "32.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert values['orchestrator_rpc_seconds_count{code="OK",method="/a/B"}'] == 4
    assert values['orchestrator_rpc_seconds_sum{code="OK",method="/a/B"}'] == pytest.approx(100.0036)


PROGRAM = """
import logging, warnings, structlog
from svckit.telemetry import configure_logging, current_trace, new_trace
configure_logging("INFO", "controller_svc")
log = structlog.get_logger()
log.debug("hidden")
current_trace.set(new_trace("00-{trace}-{span}-01"))
log.info("injection", text="line\\nfeed \\x1b[31m \\u2028", long="x" * 100000, number=1)
try:
    raise RuntimeError("inner")
except RuntimeError:
    log.exception("failed")
logging.getLogger("library").warning("library %s", "says")
logging.getLogger("library").info("library info")
logging.getLogger("library").debug("hidden")
warnings.warn("careful")
"""


def test_log_lines_are_json_one_per_line() -> None:
    program = PROGRAM.replace("{trace}", TRACE).replace("{span}", SPAN)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"].split(":")[0] for line in lines][:4] == [
        "injection",
        "failed",
        "library says",
        "library info",
    ]
    assert "careful" in lines[4]["event"]
    for line in lines:
        assert {"level", "timestamp", "service", "trace_id"} <= set(line)
        assert line["trace_id"] == TRACE
    assert lines[0]["text"] == "line\nfeed \x1b[31m \u2028"
    assert len(lines[0]["long"]) < 3000
    assert "RuntimeError: inner" in lines[1]["exception"]
    assert (lines[2]["level"], lines[2]["logger"]) == ("warning", "library")


def test_importing_changes_no_logging() -> None:
    assert not any("structlog" in type(handler.formatter).__module__ for handler in logging.getLogger().handlers)


@pytest.fixture
def lost() -> Callable[[], float]:
    """How many lines were lost since the last look."""
    seen = 0.0

    def look() -> float:
        nonlocal seen
        before, seen = seen, LOST_LINES._value.get()
        return float(seen - before)

    look()
    return look


def test_a_full_disk_costs_lines(lost: Callable[[], float]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    file = LogFile(full)
    for _ in range(3):
        file.write("line\n")
    assert lost() == 3
    os.close(full)


def test_a_reader_that_stands_still_costs_lines(lost: Callable[[], float]) -> None:
    """Lines after those that were lost, or cut short, are whole."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    file = LogFile(writer)
    lines = [f"{n} {'x' * 10_000}\n" for n in range(20)]
    for line in lines:
        file.write(line)
    missing = lost()
    assert 0 < missing < 20
    taken = os.read(reader, 1 << 20).decode()
    assert not taken.endswith("\n"), "a line was cut short"
    file.write("after\n")
    *kept, _, after = (taken + os.read(reader, 1 << 20).decode()).splitlines(keepends=True)
    assert kept == lines[: 20 - int(missing)] and after == "after\n" and lost() == 0
    os.close(reader)
    os.close(writer)


class AlwaysRoom:
    """What a poll says of a pipe that another writer fills up right after it."""

    def poll(self, timeout: float) -> list[int]:
        return [1]


def test_a_pipe_that_another_fills_up_is_not_waited_for(
    lost: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    file = LogFile(writer)
    monkeypatch.setattr(file, "_poll", AlwaysRoom())
    for _ in range(100):
        file.write("x" * 4000 + "\n")
    assert 0 < lost() < 100 and os.get_blocking(writer), "who else writes to it still waits"
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_stands_still_costs_lines(lost: Callable[[], float]) -> None:
    master, terminal = os.openpty()
    file = LogFile(terminal)
    for _ in range(1000):
        file.write("x" * 300 + "\n")
    assert 0 < lost() < 1000
    os.close(terminal)
    os.close(master)


def test_a_long_line_of_a_file_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of several processes must not get into one another."""
    sizes: list[int] = []
    write = os.write

    def noted(file: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(file, data)

    monkeypatch.setattr(os, "write", noted)
    with (tmp_path / "log").open("ab") as log:
        LogFile(log.fileno()).write("x" * 20_000 + "\n")
    assert sizes == [20_001] == [(tmp_path / "log").stat().st_size]


def test_threads_may_log_at_the_same_time() -> None:
    file = LogFile(os.open(os.devnull, os.O_WRONLY))
    with ThreadPoolExecutor(4) as threads:
        written = [threads.submit(file.write, "line\n") for _ in range(5000)]
        assert [future.exception() for future in written if future.exception()] == []


def test_without_a_stderr_nothing_is_logged() -> None:
    program = "from svckit.telemetry import configure_logging; configure_logging('INFO', 'x')"
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60, check=False).returncode == 0


def test_a_reader_that_has_gone_costs_lines(lost: Callable[[], float]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    LogFile(writer).write("line\n")
    assert lost() == 1
    os.close(writer)
