"""What a process says about itself: JSON log lines on stderr, Prometheus metrics, W3C trace context."""

from __future__ import annotations

import logging
import os
import re
import select
import stat
import sys
import threading
from bisect import bisect_left
from contextlib import suppress
from contextvars import ContextVar
from random import getrandbits
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog
from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

# --- trace context ----------------------------------------------------------------------------------------------------

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_NO_TRACE = "0" * 32
_NO_SPAN = "0" * 16


class Trace:
    """Where a piece of work stands in a W3C trace: a new span, inside the caller's trace if its header is valid.

    trace_id, span_id and parent_id are lower-case hex, parent_id empty at the root; flags are two hex digits. They are
    made when first asked for: many calls never need them.
    """

    __slots__ = ("_ids", "_traceparent")

    def __init__(self, traceparent: str = "") -> None:
        self._traceparent = traceparent
        self._ids: tuple[str, str, str, str] | None = None

    @property
    def trace_id(self) -> str:
        """32 digits."""
        return (self._ids or self._make())[0]

    @property
    def span_id(self) -> str:
        """16 digits."""
        return (self._ids or self._make())[1]

    @property
    def parent_id(self) -> str:
        """16 digits, or empty."""
        return (self._ids or self._make())[2]

    @property
    def flags(self) -> str:
        """01: sampled, 00: not."""
        return (self._ids or self._make())[3]

    def traceparent(self) -> str:
        """The header for a call made as part of this span."""
        trace_id, span_id, _, flags = self._ids or self._make()
        return f"00-{trace_id}-{span_id}-{flags}"

    def _make(self) -> tuple[str, str, str, str]:
        span_id = f"{getrandbits(64) | 1:016x}"
        self._ids = (f"{getrandbits(128) | 1:032x}", span_id, "", "01")
        match = self._traceparent and _TRACEPARENT.fullmatch(self._traceparent)
        if match:
            version, trace_id, parent_id, flags, rest = match.groups()
            # Version ff is forbidden, and only later versions may carry more than four fields.
            known = version != "ff" and (version != "00" or rest is None)
            if known and trace_id != _NO_TRACE and parent_id != _NO_SPAN:
                self._ids = (trace_id, span_id, parent_id, "01" if int(flags, 16) & 1 else "00")
        return self._ids


def new_trace(traceparent: str = "") -> Trace:
    """A new span below the one in the header, or at the root of a new trace."""
    return Trace(traceparent)


current_trace: ContextVar[Trace | None] = ContextVar("current_trace", default=None)
"""The trace of the call that runs; clients pass it on, log lines carry it."""


# --- metrics ----------------------------------------------------------------------------------------------------------

_BOUNDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_LABELS = [str(bound) for bound in _BOUNDS] + ["+Inf"]


class RpcSeconds(Collector):
    """`orchestrator_rpc_seconds{method,code}`: one sample per RPC, with its final code.

    Its own collector, since prometheus_client's histogram takes a lock per bucket and a look-up of labels per sample.
    """

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], list[float]] = {}

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count one RPC. Called on the event loop's thread only; scrapes may read meanwhile."""
        cell = self._cells.get((method, code))
        if cell is None:
            cell = self._cells[method, code] = [0.0] * (len(_LABELS) + 1)
        cell[bisect_left(_BOUNDS, seconds)] += 1
        cell[-1] += seconds

    def count(self, method: str, code: str) -> int:
        """How many RPCs of `method` ended with `code` (its name, as "OK")."""
        return int(sum(self._cells.get((method, code), ())[:-1]))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The samples, for a scrape."""
        family = HistogramMetricFamily(
            "orchestrator_rpc_seconds", "Duration of RPCs by method and final code.", labels=["method", "code"]
        )
        for key, cell in list(self._cells.items()):
            *counts, total = cell
            buckets: list[tuple[str, float]] = []
            reached = 0.0
            for label, count in zip(_LABELS, counts, strict=True):
                reached += count
                buckets.append((label, reached))
            family.add_metric(list(key), buckets, total)
        yield family


RPC_SECONDS = RpcSeconds()
REGISTRY.register(RPC_SECONDS)
IN_FLIGHT = Gauge("orchestrator_rpc_in_flight", "Calls worked on now.")
WAITING = Gauge("orchestrator_rpc_waiting", "Long polls, waits for another's answer and streams open now.")


# --- logs -------------------------------------------------------------------------------------------------------------

_VALUE_CHARS = 2000
_TRACEBACK_CHARS = 20000

LOST_LINES = Counter("orchestrator_log_lines_lost", "Log lines that stderr did not take at once.")


class LogFile:
    """Where log lines go: a write to it never raises, and waits for nobody who reads them.

    What cannot be written now is lost and counted, so that a full disk, or a reader that stands still or has gone,
    costs log lines and no call; a disk that hangs is waited for. The line after one that was cut short begins anew.
    """

    def __init__(self, descriptor: int) -> None:
        """`descriptor` stays open, and as it is: others may write to it as well."""
        self._descriptor = descriptor
        self._at_once = sys.maxsize
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            # What a pipe has room for when it has any. Who shares it may have filled it up since we looked; so we open
            # it anew, not to wait even then, where that is possible: not a socket, nor a pipe of another user.
            self._at_once = select.PIPE_BUF
            with suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._lock = threading.Lock()
        self._torn = False

    def write(self, line: str) -> None:
        """Write a line, or as much of it as there is room for."""
        with self._lock:
            whole = left = ("\n" * self._torn + line).encode(errors="backslashreplace")
            with suppress(OSError):
                while left and self._poll.poll(0):
                    left = left[os.write(self._descriptor, left[: self._at_once]) :]
            if left:
                LOST_LINES.inc()
            self._torn = bool(left) and (self._torn or left != whole)

    def flush(self) -> None:
        """Nothing is kept back."""


def configure_logging(level: str, service: str) -> None:
    """Send every log line of the process, also those of libraries, to stderr (a LogFile), one JSON object per line.

    level: the lowest level that is written. service: put into each line, to tell the processes apart.
    """
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    last: list[Any] = [structlog.processors.format_exc_info, _bound, structlog.processors.JSONRenderer(sort_keys=False)]

    def add_service(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    file = LogFile(sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY))
    structlog.configure(
        processors=[*shared, add_service, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level.lower()),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", file)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(file)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, add_service],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)


def _add_trace(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    trace = current_trace.get()
    if trace is not None and "trace_id" not in event:
        event["trace_id"] = trace.trace_id
        event["request_id"] = trace.span_id
    return event


def _bound(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cut long texts, so that nobody fills the disk through a log line."""
    for key, value in event.items():
        limit = _TRACEBACK_CHARS if key == "exception" else _VALUE_CHARS
        if isinstance(value, str) and len(value) > limit:
            event[key] = value[:limit] + "…"
    return event
