"""What a run costs and where it ran: CPU time by process, group sizes of the controller, the machine."""

from __future__ import annotations

import os
import platform
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import grpc
import psycopg
import redis
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.processes import LocalError
from idempotency_svc.cache import CompleteItem, RedisCache

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Mapping[str, int | None]) -> dict[str, float]:
    """The CPU time so far of each process and its children, also ended ones; a process without a pid is left out."""
    times: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text()
        except OSError:  # it has ended
            continue
        fields = status.rpartition(")")[2].split()
        times[int(folder.name)] = sum(int(field) for field in fields[11:15]) / _TICKS
        children.setdefault(int(fields[1]), []).append(int(folder.name))

    def total(pid: int) -> float:
        return times.get(pid, 0.0) + sum(total(child) for child in children.get(pid, ()))

    return {name: total(pid) for name, pid in pids.items() if pid is not None}


_RECORDS = 65536
_ANSWER = 256


class Groups(NamedTuple):
    """How many groups a queue has formed, of how many items together."""

    items: float
    groups: float


def group_sizes(metrics_url: str) -> dict[str, Groups]:
    """The controller's groups so far, by queue. Raises LocalError when it does not answer."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=10) as response:
            text = response.read().decode()
    except OSError as error:
        raise LocalError(f"the controller's metrics do not answer: {error}") from None
    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name == "orchestrator_group_size":
            for sample in family.samples:
                values.setdefault(sample.labels["queue"], {})[sample.name.rpartition("_")[2]] = sample.value
    return {queue: Groups(parts["sum"], parts["count"]) for queue, parts in values.items()}


async def sizes(database_url: str, redis_url: str) -> list[str]:
    """What is kept of a key, in bytes. Forgets all that Redis has; the guards are those of the rows measured."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "SELECT pg_total_relation_size('idempotency_guards') / greatest(count(*), 1), avg(length(answer))"
            " FROM idempotency_guards"
        ).fetchone()
    assert row is not None
    cache = RedisCache(redis_url, timeout=10)
    await cache.start()
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command("FLUSHDB", "SYNC")  # by itself Valkey frees the memory later
        before = client.info("memory")["used_memory"]
        for _ in range(_RECORDS // 256):
            await cache.complete([_record() for _ in range(256)])
        record = (client.info("memory")["used_memory"] - before) / _RECORDS
        client.flushdb()
    await cache.stop()
    return [
        f"A record with an answer of {_ANSWER} bytes takes {record:.0f} bytes of Redis, with key and expiry.",
        f"A guard takes {row[0]} bytes of Postgres with its indexes; its answer has {row[1] or 0:.0f} on average.",
    ]


def _record() -> CompleteItem:
    return CompleteItem(
        scope=os.urandom(32),
        fingerprints=((2, os.urandom(32)), (3, os.urandom(32))),
        nonce=os.urandom(16),
        code=0,
        answer=os.urandom(_ANSWER),
        ttl_millis=3_600_000,
        durable=True,
        timeline=1,
    )


def hardware(database_url: str, redis_url: str) -> str:
    """One line on the machine and on what ran on it."""
    with psycopg.connect(database_url) as connection:
        version = _setting(connection, "server_version").split()[0]
        durability = ", ".join(f"{name} {_setting(connection, name)}" for name in ("fsync", "synchronous_commit"))
    with redis.Redis.from_url(redis_url) as client:
        server = client.info("server")
        name = "Valkey" if "valkey_version" in server else "Redis"
        cache = f"{name} {server.get('valkey_version', server['redis_version'])}, appendfsync {_appendfsync(client)}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({_cpu_model()}), {memory:.0f} GiB, {platform.system()} {platform.release()}, load"
        f" {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, grpcio {grpc.__version__};"
        f" Postgres {version}, {durability}; {cache}"
    )


def _setting(connection: psycopg.Connection[tuple[str]], name: str) -> str:
    row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return row[0]


def _appendfsync(client: redis.Redis) -> str:
    try:
        return str(client.config_get("appendfsync")["appendfsync"])
    except redis.ResponseError:  # managed servers hide their configuration
        return "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()
