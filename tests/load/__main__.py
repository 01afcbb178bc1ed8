"""`python -m tests.load`: start everything fresh, measure, print one table on stdout; progress is on stderr."""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import psycopg

from deploy.local.processes import LocalError
from tests.load.calls import ECHOES
from tests.load.probes import cpu_seconds, group_sizes, hardware, sizes
from tests.load.stack import Stack, running
from tests.load.table import LEGEND, Row, add_groups, errors, summary, table, write
from tests.load.tools import GHZ_INSTALL, Aio, Ghz, Pgbench, Stretch, find_ghz, find_pgbench

TOOLS = ("aio", "ghz", "pgbench")
CALLS = tuple(dict.fromkeys((*Aio.calls, *Ghz.calls)))


class Bench:
    """Makes the rows of the table."""

    def __init__(self, stack: Stack, options: argparse.Namespace, stretches: int) -> None:
        self._stack = stack
        self._seconds: float = options.seconds
        self._rounds: int = options.rounds
        self._stretches = stretches
        self._done = 0

    def of_calls(self, tool: Aio | Ghz, calls: Sequence[str], in_flight: int) -> Iterator[Row]:
        """The rows of one tool at one number in flight: echo, calls, echo, in each round."""
        rows = {call: Row(tool.name, call, in_flight) for call in ("echo", *calls)}
        for _ in range(self._rounds):
            for call in ("echo", *calls, "echo"):
                self._measure(rows[call], tool)
        yield from rows.values()

    def of_statement(self, tool: Pgbench) -> Iterator[Row]:
        """The rows of pgbench."""
        for clients in Pgbench.clients:
            row = Row(tool.name, "create", clients)
            before, own = cpu_seconds(self._stack.pids), _own_children()
            row.total.add(tool.run(clients, self._seconds))
            time.sleep(0.3)  # pgbench's backends have ended, and their time is counted with Postgres' once it knows
            after = cpu_seconds(self._stack.pids)
            if "Postgres" in after:
                row.cpu["Postgres"] = after["Postgres"] - before["Postgres"]
            row.cpu["client"] = _own_children() - own
            self._progress(row, row.total)
            yield row

    def _measure(self, row: Row, tool: Aio | Ghz) -> None:
        pids = dict(self._stack.pids)
        echo_pid = pids.pop("echo")
        if row.call in ECHOES:
            pids = {"controller": echo_pid}
        if tool.pid is not None:
            pids["client"] = tool.pid
        tool.make_ready(row.call, row.in_flight)
        groups = group_sizes(self._stack.metrics_url)
        cpu, own = cpu_seconds(pids), _own_children()
        stretch = tool.run(row.call, row.in_flight, self._seconds / self._rounds)
        spent = {name: after - cpu[name] for name, after in cpu_seconds(pids).items()}
        spent.setdefault("client", _own_children() - own)
        for name, seconds in spent.items():
            row.cpu[name] += seconds
        if row.call not in ECHOES:
            add_groups(row, groups, group_sizes(self._stack.metrics_url))
        row.total.add(stretch)
        self._progress(row, stretch)

    def _progress(self, row: Row, stretch: Stretch) -> None:
        self._done += 1
        rate = len(stretch.latencies) / stretch.seconds if stretch.seconds else 0.0
        failed = f", {stretch.errors.total()} errors" if stretch.errors else ""
        _say(f"[{self._done}/{self._stretches}] {row.tool} {row.call}, {row.in_flight} in flight: {rate:.0f}/s{failed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the exit code: 0, 1 when a call failed, 2 when nothing could be measured."""
    options = _options(arguments)
    _say("starting Postgres, Valkey, the pair and the echo")
    try:
        with running() as stack, ExitStack() as cleanup:
            machine = hardware(stack.database_url, stack.redis_url)
            rows, notes = _rows(stack, options, cleanup)
            notes += asyncio.run(sizes(stack.database_url, stack.redis_url))
    except LocalError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    failed = errors(rows)
    command = " ".join(["python -m tests.load", *(sys.argv[1:] if arguments is None else arguments)])
    lines = "\n".join(f"- {line}" for line in (*summary(rows), *notes, *failed))
    report = f"`{command}` on {machine}\n\n{table(rows)}\n\n{lines}\n\n{LEGEND}"
    print(report)
    if failed:
        _say("some calls failed")
        return 1
    if options.write:
        write(report)
    return 0


def _rows(stack: Stack, options: argparse.Namespace, cleanup: ExitStack) -> tuple[list[Row], list[str]]:
    """The rows, and a note for each tool that was not there."""
    notes = []
    calls = [call for call in CALLS if call in options.calls]
    if "claim" in calls and "route" not in calls:
        calls.insert(calls.index("claim"), "route")  # there must be something to claim
    _say("preparing and warming up")
    aio = Aio(stack)
    cleanup.callback(aio.stop)
    sessions = aio.prepare()
    tools: list[Aio | Ghz] = [aio] if "aio" in options.tools else []
    program = find_ghz()
    if "ghz" in options.tools and program is not None:
        tools.append(Ghz(program, stack, sessions, aio))
    elif "ghz" in options.tools:
        notes.append(f"No rows of ghz, which is not installed: `{GHZ_INSTALL}`")
    pgbench = find_pgbench()
    if "pgbench" in options.tools and pgbench is None:
        notes.append("No rows of pgbench, which is neither in the embedded Postgres nor on PATH.")
    for note in notes:
        _say(note)

    of_tools = {tool: [call for call in calls if call in tool.calls and call != "echo"] for tool in tools}
    stretches = sum(len(options.in_flight) * options.rounds * (len(calls) + 2) for calls in of_tools.values())
    with_pgbench = "pgbench" in options.tools and pgbench is not None
    bench = Bench(stack, options, stretches + (len(Pgbench.clients) if with_pgbench else 0))
    for tool, calls in of_tools.items():
        for call in ("echo", *calls):  # connections, statements and caches are made before they are measured
            tool.make_ready(call, 64)
            tool.run(call, 64, min(0.3, options.seconds))
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute("ANALYZE")
    rows: list[Row] = []
    for in_flight in options.in_flight:
        for tool, calls in of_tools.items():
            rows += bench.of_calls(tool, calls, in_flight)
    if with_pgbench and pgbench is not None:
        rows += bench.of_statement(Pgbench(pgbench, stack))
    return sorted(rows, key=lambda row: TOOLS.index(row.tool)), notes


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def some_of(known: Sequence[str], given: str) -> list[str]:
        chosen = given.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    def numbers(given: str) -> list[int]:
        if not all(number.isdecimal() and 1 <= int(number) <= 512 for number in given.split(",")):
            raise argparse.ArgumentTypeError("numbers from 1 to 512, with commas between them")
        return [int(number) for number in given.split(",")]

    parser = argparse.ArgumentParser("python -m tests.load", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=2.1, help="how long each row is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 101),
        metavar="1..100",
        default=3,
        help="in how many stretches (default: %(default)s)",
    )
    parser.add_argument("--in-flight", type=numbers, default=[1, 64, 256], help="calls in flight (default: 1,64,256)")
    parser.add_argument(
        "--tools", type=lambda given: some_of(TOOLS, given), default=list(TOOLS), help=f"some of {','.join(TOOLS)}"
    )
    parser.add_argument(
        "--calls", type=lambda given: some_of(CALLS, given), default=list(CALLS), help=f"some of {','.join(CALLS)}"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/PERFORMANCE.md")
    return parser.parse_args(arguments)


def _own_children() -> float:
    """CPU seconds of this process's children that have ended: ghz and pgbench."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _say(line: str) -> None:
    print(f"load: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
