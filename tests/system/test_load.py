"""The benchmark runs, its table is whole, and no call fails; what it measures is for people, never for an assertion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from deploy.local.processes import ROOT
from tests.load import __main__ as load
from tests.load import table, tools


def rows_of(report: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The table's rows by tool, call and number in flight, each a value by column."""
    lines = [line.strip("| ").split("|") for line in report.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {(row[0], row[1], row[2]): dict(zip(header, row, strict=True)) for row in rows}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.load", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_one_run_measures_everything() -> None:
    ended = run("--seconds=0.1", "--rounds=1", "--in-flight=64")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    rows = rows_of(ended.stdout)
    expected = [("aio", call, "64") for call in tools.Aio.calls]
    if tools.find_ghz() is None:
        assert tools.GHZ_INSTALL in ended.stdout
    else:
        expected += [("ghz", call, "64") for call in tools.Ghz.calls]
    if tools.find_pgbench() is not None:
        expected += [("pgbench", "create", str(clients)) for clients in tools.Pgbench.clients]
    assert list(rows) == expected
    for (tool, call, _), row in rows.items():
        assert row["errors"] == "0"
        assert float(row["calls/s"]) > 0
        assert 0 < float(row["p50 ms"]) <= float(row["p95 ms"]) <= float(row["p99 ms"])
        assert (row["of echo"] == "–") == (call == "echo" or tool == "pgbench")
        assert (row["controller CPU"] == "–") == (tool == "pgbench")
        if tool != "pgbench" and call in {"create", "route", "loop", "mix"}:
            assert "write" in row["mean group"]
    share = rows["aio", "create", "64"]["of echo"]
    assert f"aio: CreateSession at 64 in flight reaches {share} of the bare echo, " in ended.stdout
    assert " cores (" in ended.stdout
    assert re.search(r"A record with an answer of 256 bytes takes [2-5]\d\d bytes of Redis", ended.stdout)
    assert re.search(r"A guard takes \d+ bytes of Postgres with its indexes", ended.stdout)


def test_a_missing_tool_and_a_failed_call_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "find_ghz", lambda: None)
    monkeypatch.setattr("tests.load.stack.ROLES", ("orchestrator.agent", "planner", "loop"))
    assert load.main(["--seconds=0.1", "--rounds=1", "--in-flight=1", "--tools=aio,ghz", "--calls=get,mix"]) == 1
    printed = capsys.readouterr()
    assert tools.GHZ_INSTALL in printed.err
    assert tools.GHZ_INSTALL in printed.out
    rows = rows_of(printed.out)
    assert list(rows) == [("aio", "echo", "1"), ("aio", "get", "1"), ("aio", "mix", "1")]
    assert rows["aio", "get", "1"]["errors"] == "0"
    assert rows["aio", "mix", "1"]["errors"].endswith(" PERMISSION_DENIED")
    assert "× PERMISSION_DENIED: " in printed.out


def test_the_statement_of_pgbench_writes_what_a_create_writes(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for _ in range(2):
            connection.execute((ROOT / "tests" / "load" / "create.sql").read_bytes())
        joined = connection.execute(
            "select count(*) from sessions s join audit_events a on a.tenant = s.tenant and a.resource_id = s.id"
            " join idempotency_guards g on g.tenant = s.tenant and g.command_id = a.command_id"
        ).fetchone()
        each = connection.execute(
            "select count(*) from sessions union all select count(*) from audit_events union all"
            " select count(*) from idempotency_guards"
        ).fetchall()
    assert joined == (2,)
    assert each == [(2,)] * 3


def test_the_document_takes_a_new_report(tmp_path: Path) -> None:
    document = tmp_path / "PERFORMANCE.md"
    shutil.copy(table.DOCUMENT, document)
    before, _, after = table.DOCUMENT.read_text().partition(table.BEGIN)
    table.write("a report", document)
    table.write("another report", document)
    text = document.read_text()
    assert text == f"{before}{table.BEGIN}\nanother report\n{table.END}{after.partition(table.END)[2]}"


def test_a_database_that_is_not_there_is_said_in_one_line() -> None:
    environment = {**os.environ, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.load"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "DATABASE_URL" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
