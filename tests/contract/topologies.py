"""Redis as sentinels watch it, and as a cluster, on loopback: real servers that tests stop, kill and start again."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local.processes import LOOPBACK, Child, free_port
from deploy.local.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

USER, PASSWORD = "app", "of-the-app"
RULES = (
    "on >of-the-app ~idem:* +evalsha +script|load +get +set +setrange +pexpire +pttl +time"
    " +info +cluster|info +cluster|slots +asking"
)
"""All that idempotency_svc needs."""
SLOTS = 16384
_SERVICE = "main"
_SENTINEL_PASSWORD = "of-the-sentinels"
_NODE_TIMEOUT_MILLIS = 1000


def wait(condition: Callable[[], bool]) -> None:
    """Returns when the condition is true; a server that is away counts as false. Fails after a minute."""
    start = time.monotonic()
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() - start < 60, "not in time"
        time.sleep(0.02)


def _client(port: int, password: str) -> redis.Redis:
    client = redis.Redis(
        host=LOOPBACK, port=port, password=password, protocol=2, socket_timeout=5, retry=Retry(NoBackoff(), 0)
    )
    client.response_callbacks.clear()  # answers as they come
    return client


class Node:
    """One server, which others can be told to follow; all have the same passwords."""

    def __init__(self, folder: Path, binary: Path, settings: dict[str, str] | None = None) -> None:
        self.port = free_port()
        folder.mkdir(parents=True)
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(PASSWORD)
        own = {"masterauth": PASSWORD, "user": f"{USER} {RULES}", "repl-diskless-sync-delay": "0", **(settings or {})}
        log = folder / "log"
        self._server = Valkey(folder, port=self.port, log=log, binary=binary, durable=False, settings=own)
        self._admin = _client(self.port, PASSWORD)
        self._started = False

    def start(self) -> None:
        """Starts it and returns when it answers."""
        self._started = True
        self._server.start()

    def kill(self) -> None:
        """SIGKILL; nothing happens when it has ended, or was never started."""
        self._admin.close()
        if self._started:
            self._server.child.kill()

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self._server.child.send(number)

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended yet."""
        return self._started and self._server.child.running

    def ask(self, *words: object) -> Any:
        """A command as its owner, and the answer."""
        return self._admin.execute_command(*words)  # type: ignore[no-untyped-call]

    def spread(self) -> None:
        """Returns when its replicas have all that was written so far. WAIT is about writes of its own connection."""
        _, offset, _ = self.ask("ROLE")
        wait(lambda: all(int(replica[2]) >= offset for replica in self.ask("ROLE")[2]))

    def configure(self, **settings: str) -> None:
        """CONFIG SET, with dashes for underscores."""
        for name, value in settings.items():
            self.ask("CONFIG", "SET", name.replace("_", "-"), value)

    @property
    def replicates(self) -> int | None:
        """The port of the primary that it follows, and has caught up with; 0 before that, None for a primary."""
        role, *rest = self.ask("ROLE")
        if role == b"master":
            return None
        _, port, state, _ = rest
        return int(port) if state == b"connected" else 0


class Sentinels:
    """A primary, a replica, and three sentinels that make the replica the primary when the other is gone."""

    def __init__(self, folder: Path, binary: Path) -> None:
        self.nodes = [Node(folder / f"node-{number}", binary) for number in (1, 2)]
        self.ports = [free_port() for _ in range(3)]
        self._processes = [self._sentinel(folder / f"sentinel-{port}", binary, port) for port in self.ports]
        self._admins = [_client(port, _SENTINEL_PASSWORD) for port in self.ports]

    @property
    def url(self) -> str:
        """What REDIS_URL is for it."""
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self.ports)
        return f"redis+sentinel://{USER}:{PASSWORD}@{hosts}/{_SERVICE}?sentinel_password={_SENTINEL_PASSWORD}"

    @property
    def primary(self) -> Node | None:
        """The one that all sentinels name; None while they differ."""
        ports = {int(port) for _, port in self._ask_all("GET-MASTER-ADDR-BY-NAME")}
        named = [node for node in self.nodes if node.port in ports]
        return named[0] if len(named) == 1 else None

    def start(self) -> None:
        """Starts all of it and returns when a failover could be."""
        primary, replica = self.nodes
        primary.start()
        replica.start()
        replica.ask("REPLICAOF", LOOPBACK, primary.port)
        wait(lambda: replica.replicates == primary.port)
        for process in self._processes:
            process.start()
        self.wait_whole()

    def fail_over(self) -> None:
        """A planned failover; returns when the sentinels name the other one. The old primary does not know yet."""
        before = self.primary
        wait(lambda: self._ask(self._admins[0], "FAILOVER") == b"OK")  # refused until the replica is known to be well
        wait(lambda: self.primary not in (before, None))

    def wait_whole(self) -> None:
        """Starts what was killed and has it follow the primary at once, for which sentinels take 8 s or more."""
        for node in self.nodes:
            if not node.running:
                node.start()
        wait(lambda: self.primary is not None)
        primary, replica = sorted(self.nodes, key=lambda node: node is not self.primary)
        replica.ask("REPLICAOF", LOOPBACK, primary.port)
        wait(lambda: replica.replicates == primary.port)
        wait(lambda: all(answer.startswith(b"OK 3") for answer in self._ask_all("CKQUORUM")))

    def close(self) -> None:
        """Ends all of it."""
        for process in self._processes:
            process.kill()
        for node in self.nodes:
            node.kill()
        for admin in self._admins:
            admin.close()

    def _ask_all(self, word: str) -> list[Any]:
        return [self._ask(admin, word) for admin in self._admins]

    def _ask(self, admin: redis.Redis, word: str) -> Any:
        return admin.execute_command("SENTINEL", word, _SERVICE)  # type: ignore[no-untyped-call]

    def _sentinel(self, folder: Path, binary: Path, port: int) -> Child:
        folder.mkdir(parents=True)
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            f"port {port}\nbind {LOOPBACK}\ndir {folder}\nrequirepass {_SENTINEL_PASSWORD}\n"
            f"sentinel sentinel-pass {_SENTINEL_PASSWORD}\n"
            f"sentinel monitor {_SERVICE} {LOOPBACK} {self.nodes[0].port} 2\n"
            f"sentinel auth-pass {_SERVICE} {PASSWORD}\n"
            f"sentinel down-after-milliseconds {_SERVICE} 500\n"
            f"sentinel failover-timeout {_SERVICE} 2000\n"
        )
        return Child("Sentinel", [str(binary), str(configuration), "--sentinel"], log=folder / "log")


class Cluster:
    """Three primaries with a third of the slots each, and a replica of each."""

    def __init__(self, folder: Path, binary: Path) -> None:
        self._buses = [free_port() for _ in range(6)]
        settings = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": str(_NODE_TIMEOUT_MILLIS),
            "cluster-replica-validity-factor": "0",
            # While a primary is away, the others go on.
            "cluster-require-full-coverage": "no",
        }
        self.nodes = [
            Node(folder / f"node-{bus}", binary, {**settings, "cluster-port": str(bus)}) for bus in self._buses
        ]

    @property
    def url(self) -> str:
        """What REDIS_URL is for it."""
        return f"redis+cluster://{USER}:{PASSWORD}@" + ",".join(f"{LOOPBACK}:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Starts all of it and returns when each primary has its slots and its replica."""
        for node in self.nodes:
            node.start()
        for epoch, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for node in self.nodes:
            for other, bus in zip(self.nodes, self._buses, strict=True):
                if other is not node:
                    node.ask("CLUSTER", "MEET", LOOPBACK, other.port, bus)
        primaries, replicas = self.nodes[:3], self.nodes[3:]
        for number, primary in enumerate(primaries):
            first, end = SLOTS * number // 3, SLOTS * (number + 1) // 3
            primary.ask("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for primary, replica in zip(primaries, replicas, strict=True):
            wait(lambda replica=replica, primary=primary: self._follow(replica, primary))  # type: ignore[misc]
        self.wait_whole()

    def primary_of(self, slot: int) -> Node:
        """The node that has a slot, according to one whose cluster is well."""
        for node in self.nodes:
            if node.running and b"cluster_state:ok" in node.ask("CLUSTER", "INFO"):
                for first, last, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"no node has slot {slot}")

    def wait_whole(self) -> None:
        """Starts what was killed or stopped and waits until all agree on three primaries, each with a replica."""
        for node in self.nodes:
            if node.running:
                node.send(signal.SIGCONT)
            else:
                node.start()
        wait(self._is_whole)

    def close(self) -> None:
        """Ends all of it."""
        for node in self.nodes:
            node.kill()

    def open(self, slot: int, source: Node, target: Node) -> None:
        """Begins to move a slot: keys that the source has not are asked of the target."""
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))

    def move(self, key: str, source: Node, target: Node) -> None:
        """Moves a key of a slot that is on its way."""
        source.ask("MIGRATE", LOOPBACK, target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", key)

    def give(self, slot: int, source: Node, target: Node) -> None:
        """Ends the move of a slot: it is the target's from now on."""
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def id_of(self, node: Node) -> str:
        """Its name in the cluster."""
        return str(node.ask("CLUSTER", "MYID").decode())

    def _is_whole(self) -> bool:
        views = [self._nodes_as_seen_by(node) for node in self.nodes]
        seen = {flag for view in views for _, flags, *_ in view for flag in flags}
        links = {link for view in views for *_, link, _ in view}
        if seen != {"myself", "master", "slave"} or links != {"connected"} or any(len(view) < 6 for view in views):
            return False  # one is not known to another, or believed to be away
        if any(b"cluster_state:ok" not in node.ask("CLUSTER", "INFO") for node in self.nodes):
            return False
        holders = [sorted((port, slots) for port, flags, _, slots in view if "master" in flags) for view in views]
        followed = sorted(port for node in self.nodes if (port := node.replicates) is not None)
        return all(one == holders[0] for one in holders) and followed == [port for port, slots in holders[0] if slots]

    @staticmethod
    def _nodes_as_seen_by(node: Node) -> list[tuple[int, list[str], str, list[str]]]:
        """Of each node that this one knows: its port, its flags, the state of the link to it, its slots."""
        lines = [line.split() for line in node.ask("CLUSTER", "NODES").decode().splitlines()]
        return [
            (int(address.partition("@")[0].rpartition(":")[2]), flags.split(","), link, slots)
            for _, address, flags, _, _, _, _, link, *slots in lines
        ]

    def _follow(self, replica: Node, primary: Node) -> bool:
        """It cannot before it has heard of the primary."""
        return bool(replica.ask("CLUSTER", "REPLICATE", self.id_of(primary)))
