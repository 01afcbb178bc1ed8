"""Many writer processes, few rows, the same keys, no Redis, and bad luck: every write still takes effect once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest

from svckit.statuses import STORED_CODES

SESSIONS = 30
WRITERS = 4


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(25, id="short"), pytest.param(600, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
)
def test_every_write_takes_effect_once_under_kills(database_url: str, tmp_path: Path, seconds: int) -> None:
    """SIGKILL, SIGSTOP and ended backends all the while; then the answers are held against the tables."""
    rng = random.Random(7)
    keys = 400 * seconds
    sessions = _sessions(database_url, tmp_path)
    writers: dict[int, subprocess.Popen[bytes]] = {}
    kills = stops = ended = 0
    started = 0

    def start(index: int) -> None:
        nonlocal started
        started += 1
        arguments = [database_url, str(tmp_path / f"answers-{started}"), str(started), str(keys), str(sessions)]
        command = [sys.executable, "-m", "tests.system.writer", *arguments]
        with (tmp_path / f"writer-{started}.log").open("wb") as log:
            writers[index] = subprocess.Popen(command, stderr=log, stdout=log)

    try:
        for index in range(WRITERS):
            start(index)
        end = time.monotonic() + seconds
        enough = 100 * seconds
        with psycopg.connect(database_url, autocommit=True) as connection:
            while time.monotonic() < end or (
                (_written(tmp_path) <= enough or not ended) and time.monotonic() < end + 180
            ):
                time.sleep(rng.uniform(0.1, 0.5))
                index = rng.randrange(WRITERS)
                assert writers[index].poll() is None, (tmp_path / "writer-1.log").read_text()[-2000:]
                match rng.choice(("kill", "stop", "backend", "backend")):
                    case "kill":
                        writers[index].kill()
                        writers[index].wait()
                        kills += 1
                        start(index)
                    case "stop":
                        writers[index].send_signal(signal.SIGSTOP)
                        time.sleep(rng.uniform(0.05, 1.0))
                        writers[index].send_signal(signal.SIGCONT)
                        stops += 1
                    case "backend":
                        ended += connection.execute(
                            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                            " and application_name like 'controller_svc%%' and state = 'active'"
                            " order by random() limit 1"
                        ).rowcount
    finally:
        for writer in writers.values():
            writer.send_signal(signal.SIGCONT)
            writer.kill()
            writer.wait()

    answers = _answers(tmp_path)
    kept = {
        key: {answer for answer in given if answer[0] == 0 or answer[0] in STORED_CODES}
        for key, given in answers.items()
    }
    total = sum(sum(given.values()) for given in answers.values())
    codes = Counter(code for given in answers.values() for (code, _), n in given.items() for _ in range(n))
    print(
        f"{total} answers over {len(answers)} keys, by code {dict(codes)};"
        f" {kills} kills, {stops} stops, {ended} ended backends"
    )
    assert total > enough, "too little traffic for the run to count"
    assert kills and stops and ended
    assert [key for key, given in kept.items() if len(given) > 1] == []
    assert set(codes) <= {0, 3, 5, 9, 10, 14, 4}, "no caller is told UNKNOWN or INTERNAL"
    _check_tables(database_url)


def _sessions(url: str, directory: Path) -> Path:
    """A file with the ids of the few sessions that all writers change."""
    ids = [f"01000000-0000-7000-8000-{number:012x}" for number in range(1, SESSIONS + 1)]
    with psycopg.connect(url, autocommit=True) as connection:
        for id_ in ids:
            connection.execute(
                "insert into sessions"
                " (tenant, id, version, agent_role, state, metadata, create_time, update_time, expire_time)"
                " values ('stress', %s, 1, 'writer', 'PENDING', '{}', now(), now(), now() + interval '7 days')",
                (id_,),
            )
    file = directory / "sessions"
    file.write_text("\n".join(ids))
    return file


def _written(directory: Path) -> int:
    """How many answers there are so far, at least."""
    return sum(file.stat().st_size for file in directory.glob("answers-*")) // 40


def _answers(directory: Path) -> dict[int, Counter[tuple[int, str]]]:
    answers: dict[int, Counter[tuple[int, str]]] = {}
    for file in directory.glob("answers-*"):
        for line in file.read_text().splitlines():
            key, code, digest = line.split(" ")
            answers.setdefault(int(key), Counter())[(int(code), digest)] += 1
    return answers


def _check_tables(url: str) -> None:
    """Versions without gaps or doubles, one audit row each, each of a command whose guard says OK; no deadlock."""
    with psycopg.connect(url, autocommit=True) as connection:

        def rows(query: Any) -> list[tuple[Any, ...]]:
            return connection.execute(query).fetchall()

        assert (
            rows(
                "with r as (select id, version, case when id::text like '01000000-%' then 1 else 0 end as given"
                "             from sessions union all select id, version, 0 from tasks),"
                " a as (select resource_id, count(*) n, count(distinct version_after) d,"
                "   min(version_after) low, max(version_after) high from audit_events group by resource_id)"
                " select r.id, r.version, a.* from r left join a on a.resource_id = r.id"
                " where coalesce(a.n, 0) <> r.version - r.given or coalesce(a.d, 0) <> coalesce(a.n, 0)"
                "    or a.n > 0 and (a.high <> r.version or a.low <> 1 + r.given)"
            )
            == []
        )
        assert (
            rows(
                "select a.id from audit_events a left join idempotency_guards g"
                " on g.tenant = a.tenant and g.command_id = a.command_id where g.command_id is null or g.code <> 0"
            )
            == []
        )
        assert rows("select resource_id, command_id from audit_events group by 1, 2 having count(*) > 1") == []
        assert rows("select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]
        # A create's key names one new session or task: as many rows as OK guards with an audit row of version 1.
        assert rows(
            "select (select count(*) from sessions where id::text not like '01000000-%') + (select count(*) from tasks)"
            " - (select count(*) from audit_events where version_after = 1)"
        ) == [(0,)]
