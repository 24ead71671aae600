"""One Ray session: embedded on this machine, or joined to a cluster that is already there."""

import json
import os
import re
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import ray_constants
from ray.exceptions import RayError
from ray.experimental import internal_kv

from cluster.errors import ResourceError, one_line
from cluster.mailbox import Mailbox
from cluster.meter import Usage
from cluster.room import ACCELERATOR, Need, lacking, room

# Ray's own chatter and side services that a job never reads, and Ray Train's pace: it looks at its workers every
# 2 seconds by default, which would be most of a short run. A user's own setting of any of them wins.
_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_KNOCK_SECONDS = 10.0


class Session:
    """A context manager in which work runs on Ray.

    Args:
        address: the cluster to join; without it ``RAY_ADDRESS`` (which Ray sets inside a submitted job), and without
            that either, an embedded cluster on this machine that ends with the session.
        cpus, gpus: how many of this machine an embedded cluster may use; all by default.

    Attributes:
        on_usage: told what every map and gang has held so far, by a name that it has for itself.

    Raises:
        ResourceError: on entering, when the cluster can't be reached or started.
    """

    def __init__(self, address: str | None = None, cpus: int | None = None, gpus: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.cpus, self.gpus = cpus, gpus
        self.on_usage: Callable[[str, Usage], None] = lambda _name, _usage: None
        self._mailbox: Mailbox | None = None

    @property
    def embedded(self) -> bool:
        """Whether the cluster lives and dies with this session."""
        return self.address is None or self.address == "local"

    @classmethod
    def of_this_process(cls) -> "Session":
        """The session of a process that Ray itself has started, such as an actor's; not to be entered."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        return cls(address="auto")

    def __enter__(self) -> Self:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.embedded:
                with _search_path(), _own_sigterm():
                    ray.init(address="local", num_cpus=self.cpus, num_gpus=self.gpus, include_dashboard=False, **quiet)
            else:
                _knock(str(self.address))
                with _own_sigterm():
                    ray.init(address=self.address, **quiet)
        except Exception as error:  # Ray raises plain ones, too
            where = "an embedded Ray cluster can't start" if self.embedded else f"no Ray cluster at {self.address}"
            raise ResourceError(f"{where}: {one_line(error)}; check cluster.address") from None
        self._mailbox = Mailbox()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mailbox = None
        ray.shutdown()

    @property
    def mailbox(self) -> Mailbox:
        """Where ranks leave their reports for the driver: one actor, replaced should it die."""
        if self._mailbox is None or not self._mailbox.alive():
            self._mailbox = Mailbox()
        return self._mailbox

    def spending(self) -> Callable[[Usage], None]:
        """What a new map or gang tells how much it has held so far, about once a second and when it ends.

        It arrives at ``on_usage`` under a name of its own; what that raises ends the map or gang.
        """
        name = uuid.uuid4().hex
        return lambda usage: self.on_usage(name, usage)

    def resources(self) -> dict[str, float]:
        """What the whole cluster has, by Ray's names: ``CPU``, ``GPU``, ``memory`` (bytes), …"""
        return dict(ray.cluster_resources())

    def accelerator(self) -> str | None:
        """Ray's name for the cluster's accelerator, such as ``H100``; the first by name where there are several."""
        found = (name for name in self.resources() if name.startswith(ACCELERATOR))
        return min((name.removeprefix(ACCELERATOR) for name in found), default=None)

    @property
    def grows(self) -> bool:
        """Whether an autoscaler looks after the cluster, as far as can be told: one that has node types to start."""
        if self.embedded:
            return False
        try:
            if internal_kv._internal_kv_get(b"__autoscaler_v2_enabled") == b"1":
                return True
            # Without a configuration Ray's monitor only watches, and calls each node's type "node_" and its id.
            status = json.loads(internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or b"{}")
            nodes = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
        except (RayError, RuntimeError, ValueError):
            return False
        return any(not re.fullmatch("node_[0-9a-f]{56}", name) for name in nodes)

    def lacks(self, needs: Sequence[Need]) -> str | None:
        """Why the whole cluster, were it idle, has no room for all workers together; None when it has."""
        return lacking(self._nodes(), needs)

    def room(self, held: Mapping[str, float]) -> int:
        """For how many workers that hold so much the cluster has room, were it idle."""
        return room(self._nodes(), held)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def require(self, needs: Mapping[str, Sequence[Need]]) -> None:
        """Check that the workers of each entry fit into the whole cluster together.

        Args:
            needs: by what asks for them, in words.

        Raises:
            ResourceError: they don't, and the cluster won't grow.
        """
        for what, workers in needs.items():
            problem = self.lacks(workers)
            if problem is not None and not self.grows:
                raise ResourceError(f"{what} {problem}")


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's own answer to SIGTERM: Ray's would end it on the spot, with nothing closed behind it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _search_path() -> Iterator[None]:
    """Workers import what the driver can import: an embedded cluster's processes inherit this environment."""
    before = os.environ.get("PYTHONPATH")
    own = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
    os.environ["PYTHONPATH"] = os.pathsep.join(own)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _knock(address: str) -> None:
    # Ray itself would try for minutes, and complain of it all the while.
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
