"""The proof of the proof: each bug in tests/system/bugs, planted into a copy of the code, is caught by its test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.processes import ROOT

BUGS = sorted((Path(__file__).parent / "bugs").glob("*.patch"))
CODE = ("controller_svc", "idempotency_svc", "svckit", "deploy", "gen", "tests", "pyproject.toml")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.stem)
def test_a_planted_bug_is_caught(bug: Path, tmp_path: Path) -> None:
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    applied = subprocess.run(["git", "apply", str(bug)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"make {bug.name} anew, the code has changed: {applied.stderr}"

    [catcher] = re.findall(r"^Caught by: (\S+)$", bug.read_text(), re.MULTILINE)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", catcher],
        cwd=tmp_path,
        env={**os.environ, "CI": "", "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'gen'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    # By what it did: a copy that does not start is an error, and one that does not go on runs out of time.
    failed = re.search(r"^\d+ failed", run.stdout, re.MULTILINE) and "Failed: Timeout" not in run.stdout
    assert failed, f"not caught: {run.stdout[-3000:]}{run.stderr[-1000:]}"
