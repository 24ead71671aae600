"""Ray nodes that are as far apart as one machine allows: network namespaces on a bridge, each with an address, a
working folder and temporary files of its own. A node can be killed with all its processes, or cut off the network.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")
_PORT, _SECONDS = 6379, 120.0
_ASK = """
import sys, time
from ray._raylet import GcsClient
head, address, wanted, seconds = sys.argv[1:]
end, client = time.monotonic() + float(seconds), None
while time.monotonic() < end:
    try:
        client = client or GcsClient(address=head)
        alive = {n.node_manager_address for n in client.get_all_node_info(timeout=5).values() if n.state == 0}
        if (address in alive) == bool(int(wanted)):
            sys.exit(0)
    except Exception:
        client = None
    time.sleep(0.3)
sys.exit(1)
"""
# Ray asks each node every so often, and takes it for dead after so many answers that did not come: a minute by default.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
}


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.getuid():
        return "network namespaces need root"
    name = f"dj{os.getpid()}"
    made = _ip("link", "add", name, "type", "bridge") or _ip("netns", "add", name)
    for command in (("link", "del", name), ("netns", "del", name)):
        _ip(*command)
    return f"network namespaces can't be made here: {made}" if made else None


@dataclass
class Node:
    """One node: the commands that run in its namespace see its address and none of this machine's."""

    name: str
    address: str
    folder: Path
    env: Mapping[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def popen(self, *command: object, log: str = "log") -> subprocess.Popen[bytes]:
        """Start a command in the namespace, with its output in a file of the node's folder."""
        with (self.folder / log).open("ab") as out:
            inside = ["ip", "netns", "exec", self.name, *map(str, command)]
            started = subprocess.Popen(
                inside, stdout=out, stderr=out, cwd=self.folder, env=dict(self.env), start_new_session=True
            )
        self.running.append(started)
        return started

    def kill(self) -> None:
        """SIGKILL for every process of the namespace, all at once as far as that goes."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        for pid in map(int, told.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for each in self.running:
            each.wait(30)

    def cut(self) -> None:
        """Take the node off the network; its processes live on."""
        assert _ip("link", "set", self.name, "down") is None


class Network:
    """A bridge, on which this machine has the first address, and the Ray nodes on it.

    Attributes:
        address: this machine's.
        env: what nodes that are started from now on have in their environment.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._bridge, self._folder, self.env = f"dj{os.getpid()}", folder, env
        self._prefix = f"10.213.{os.getpid() % 250}"
        self._token = secrets.token_hex(32)
        self._nodes: list[Node] = []
        self.open = ExitStack()
        self._do("link", "add", self._bridge, "type", "bridge")
        self.open.callback(_ip, "link", "del", self._bridge)
        self.address = f"{self._prefix}.1"
        self._do("addr", "add", f"{self.address}/24", "dev", self._bridge)
        self._do("link", "set", self._bridge, "up")

    def node(self, cpus: int) -> Node:
        """Start a Ray node: the head first, others after it; ready when the head counts it."""
        number = len(self._nodes) + 2
        name = f"{self._bridge}n{number}"
        self._do("netns", "add", name)
        self.open.callback(_ip, "netns", "del", name)
        # On the machine's side the cable has the namespace's name.
        self._do("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._do("link", "set", name, "master", self._bridge, "up")
        address = f"{self._prefix}.{number}"
        for inside in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            # Ray finds out its own address by asking for a way out.
            ("route", "add", "default", "via", self.address),
        ):
            self._do("-n", name, *inside)
        folder = self._folder / name
        # Ray's sockets lie there, whose names may not be long.
        temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
        self.open.callback(subprocess.run, ["rm", "-rf", temporary], check=False)
        folder.mkdir(parents=True)
        own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST", "GLOO"))}
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_USAGE_STATS_ENABLED": "0"}
        own |= _HEALTH
        own |= {"TMPDIR": str(folder), "DISTILL_NODE_CACHE": str(folder / "node"), "HOME": str(folder)}
        node = Node(name, address, folder, {**own, **self.env})
        self.open.callback(node.kill)
        head = self._nodes[0].address if self._nodes else None
        command = ["start", "--block", f"--node-ip-address={address}", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += ["--disable-usage-stats", f"--temp-dir={temporary}", "--object-store-memory=100000000"]
        command += ["--include-dashboard=false"] if head is None else []
        command += ["--head", f"--port={_PORT}"] if head is None else [f"--address={head}:{_PORT}"]
        self._nodes.append(node)
        node.popen(RAY, *command, log="ray.log")
        assert self.becomes(node, alive=True), (folder / "ray.log").read_text()
        return node

    @property
    def ray(self) -> str:
        """The cluster's address for drivers, which run on the head."""
        return f"{self._nodes[0].address}:{_PORT}"

    def becomes(self, node: Node, alive: bool) -> bool:
        """Wait until the head believes a node alive, or dead; whether it came to that in time."""
        head = self._nodes[0]
        command = ["ip", "netns", "exec", head.name, sys.executable, "-c", _ASK, self.ray, node.address]
        asked = subprocess.run(
            [*command, str(int(alive)), str(_SECONDS)], capture_output=True, env=dict(head.env), check=False
        )
        return asked.returncode == 0

    def _do(self, *command: str) -> None:
        problem = _ip(*command)
        assert problem is None, (command, problem)


@contextmanager
def network(folder: Path, **env: str) -> Iterator[Network]:
    """A bridge that goes with the block, with all that was started on it."""
    made = Network(folder, env)
    with made.open:
        yield made


def _ip(*command: str) -> str | None:
    """Run ``ip``; what it complains of."""
    try:
        done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no ip command"
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
