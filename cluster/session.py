"""One Ray session: embedded on this machine, or joined to a cluster that is already there."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray

from cluster.errors import ResourceError, one_line
from cluster.mailbox import Mailbox

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

    Raises:
        ResourceError: on entering, when the cluster can't be reached or started.
    """

    def __init__(self, address: str | None = None, cpus: int | None = None, gpus: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.cpus, self.gpus = cpus, gpus
        self._mailbox: Mailbox | None = None

    @property
    def embedded(self) -> bool:
        """Whether the cluster lives and dies with this session."""
        return self.address is None or self.address == "local"

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
        except (OSError, RuntimeError, ValueError) as error:
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

    def resources(self) -> dict[str, float]:
        """What the whole cluster has, by Ray's names: ``CPU``, ``GPU``, ``memory`` (bytes), …"""
        return dict(ray.cluster_resources())

    def accelerator(self) -> str | None:
        """Ray's name for the cluster's accelerator, such as ``H100``; the first by name where there are several."""
        prefix = "accelerator_type:"
        return min((name.removeprefix(prefix) for name in self.resources() if name.startswith(prefix)), default=None)

    def require(self, what: str, count: int, cpus: float, gpus: float) -> None:
        """Check that ``count`` workers of ``cpus`` and ``gpus`` each fit into the whole cluster together.

        Raises:
            ResourceError: they don't.
        """
        have = self.resources()
        for unit, each in (("CPU", cpus), ("GPU", gpus)):
            if count * each > have.get(unit, 0.0) + 1e-6:
                raise ResourceError(
                    f"{what} asks for {count} {'worker' if count == 1 else 'workers'} of {each:g} {unit} "
                    f"({count * each:g} in all), but the cluster has {have.get(unit, 0.0):g}: ask for fewer, "
                    f"or use a larger cluster"
                )


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
