"""The table of docs/IDEMPOTENCY.md names what there is: each scenario once, tests that exist, and soak runs that do."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from deploy.local.processes import ROOT

PENDING = "pending"


class Row(NamedTuple):
    """A scenario as the table has it."""

    number: int
    scenario: str
    done: str
    tests: list[str]
    runs: str
    result: str


def table() -> list[Row]:
    text = (ROOT / "docs" / "IDEMPOTENCY.md").read_text()
    rows = []
    for line in re.findall(r"^\| \d+ \|.*\|$", text, re.MULTILINE):
        number, scenario, done, tests, runs, result = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append(Row(int(number), scenario, done, tests.split(", "), runs, result))
    return rows


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """The ids of all tests in the named files, those of `make soak` included."""
    files = sorted({test.partition("::")[0] for row in table() for test in row.tests})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "soak or not soak",
    ]
    run = subprocess.run(
        [*command, *(file for file in files if (ROOT / file).exists())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return re.findall(r"^tests/.+$", run.stdout, re.MULTILINE)


def name(test: str) -> str:
    """The id without its class and parameters."""
    file, *_, function = test.partition("[")[0].split("::")
    return f"{file}::{function}"


def test_every_scenario_is_there_once_and_whole() -> None:
    assert [row.number for row in table()] == list(range(1, 37))
    for row in table():
        assert all(row), row


def test_every_named_test_exists(collected: list[str]) -> None:
    named = {test for row in table() if row.runs != PENDING for test in row.tests}
    assert named - {name(test) for test in collected} == set()


def test_what_is_repeated_in_soak_has_a_variant_for_it_and_killing_at_least_a_hundred_runs(
    collected: list[str],
) -> None:
    in_soak = {name(test) for test in collected if re.search(r"[\[-]soak\b", test)}
    for row in table():
        if row.runs == PENDING:
            continue
        short, soak = (part.strip().replace(",", "") for part in row.runs.split("/"))
        assert short.isdigit(), row
        assert (soak != "–") == bool(set(row.tests) & in_soak), row
        if re.search("SIGKILL|SIGSTOP|backends ended", row.done):
            assert int(soak) >= 100, row
