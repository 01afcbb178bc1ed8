"""The one table, as Markdown, and its place in docs/PERFORMANCE.md."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.processes import ROOT
from tests.load.probes import Groups
from tests.load.tools import Stretch

DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
BEGIN, END = "<!-- load: begin -->", "<!-- load: end -->"

PROCESSES = ("controller", "idempotency", "Postgres", "Redis", "client")
_HEADER = (
    "tool", "call", "in flight", "calls/s", "p50 ms", "p95 ms", "p99 ms", "errors", "of echo",
    *(f"{name} CPU" for name in PROCESSES), "mean group",
)  # fmt: skip
_TEXT_COLUMNS = {"tool", "call", "mean group"}

LEGEND = """\
- *calls/s* counts RPCs that were answered OK, also in `loop` (route, claim, complete) and `mix` (create, route, claim,
  heartbeat, complete); the percentiles are of single RPCs.
- *of echo* is calls/s divided by those of the bare echo of the same tool at the same number in flight.
- `echo-keyed` is the echo again, sent token and key as CreateSession is.
- *CPU* is milliseconds of a process per 1000 calls; in rows of the echo, *controller* is the echo process.
- *mean group* is the mean number of items per group, by the controller's queue: writes, claims of tasks (*take*) and
  of keys, completions of keys, heartbeats (*beat*), reads.
- pgbench runs the statement of one CreateSession (tests/load/create.sql), one per transaction."""


@dataclass
class Row:
    """All stretches of one call by one tool at one number in flight, and what they cost."""

    tool: str
    call: str
    in_flight: int
    total: Stretch = field(default_factory=Stretch)
    cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by process; a process that cannot be seen is absent."""
    groups: dict[str, Groups] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """OK calls per second."""
        return len(self.total.latencies) / self.total.seconds if self.total.seconds else 0.0

    def percentile(self, percent: int) -> float:
        """Of the latencies, in ms."""
        latencies = self.total.latencies
        if len(latencies) < 2:
            return latencies[0] if latencies else 0.0
        return statistics.quantiles(latencies, n=100, method="inclusive")[percent - 1]


def echo_of(row: Row, rows: Iterable[Row], call: str = "echo") -> Row | None:
    """The echo that this row is compared with."""
    for other in rows:
        if (other.tool, other.call, other.in_flight) == (row.tool, call, row.in_flight):
            return other
    return None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table whose columns also line up in a terminal."""
    lines = [list(_HEADER), *(_cells(row, rows) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    rule = [
        "-" * width if name in _TEXT_COLUMNS else "-" * (width - 1) + ":"
        for name, width in zip(_HEADER, widths, strict=True)
    ]
    text = []
    for line in (lines[0], rule, *lines[1:]):
        cells = [
            cell.ljust(width) if name in _TEXT_COLUMNS else cell.rjust(width)
            for name, cell, width in zip(_HEADER, line, widths, strict=True)
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    echo = echo_of(row, rows)
    calls = row.total.calls
    cpu = [f"{row.cpu[name] / calls * 1e6:.0f}" if calls and name in row.cpu else "–" for name in PROCESSES]
    groups = [f"{queue} {of.items / of.groups:.1f}" for queue, of in row.groups.items() if of.groups]
    codes: Counter[str] = Counter()
    for what, count in row.total.errors.items():
        codes[what.partition(":")[0]] += count
    return [
        row.tool,
        row.call,
        str(row.in_flight),
        f"{row.rate:.0f}",
        *(f"{row.percentile(percent):.2f}" for percent in (50, 95, 99)),
        ", ".join(f"{count} {code}" for code, count in codes.items()) or "0",
        f"{row.rate / echo.rate:.2f}" if echo is not None and echo is not row and echo.rate else "–",
        *cpu,
        ", ".join(groups) or "–",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """The two figures by which the way of one write is judged, for each tool that has them."""
    lines = []
    for row in rows:
        echo = echo_of(row, rows)
        if row.call != "create" or echo is None or not echo.rate or not row.rate:
            continue
        if row.in_flight == 64:
            line = f"{row.tool}: CreateSession at 64 in flight reaches {row.rate / echo.rate:.2f} of the bare echo"
            keyed = echo_of(row, rows, "echo-keyed")
            if keyed is not None and keyed.rate:
                line += f", {row.rate / keyed.rate:.2f} of an echo that is sent the same token and key"
            lines.append(f"{line}.")
        elif row.in_flight == 1:
            times = row.percentile(50) / echo.percentile(50)
            lines.append(f"{row.tool}: CreateSession alone takes {times:.1f} times the echo's p50.")
    return lines


def errors(rows: Sequence[Row]) -> list[str]:
    """One line for each kind of error, at most five a row."""
    return [
        f"{row.tool} {row.call}, {row.in_flight} in flight: {count} × {what}"
        for row in rows
        for what, count in row.total.errors.most_common(5)
    ]


def add_groups(row: Row, before: Mapping[str, Groups], after: Mapping[str, Groups]) -> None:
    """Count in the groups that were formed between two looks at the controller's metrics."""
    for queue, now in after.items():
        then = before.get(queue, Groups(0, 0))
        so_far = row.groups.get(queue, Groups(0, 0))
        row.groups[queue] = Groups(so_far.items + now.items - then.items, so_far.groups + now.groups - then.groups)


def write(report: str, document: Path = DOCUMENT) -> None:
    """Put a report between the markers of the document."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} lacks the markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n{report}\n{END}{after}")
