"""A lease on a folder: one owner at a time, and none for ever.

``lease.json`` names the owner, who renews it while the work goes on. One that was killed renews nothing: its lease runs
out, and where its process can be seen to be gone (same machine, same process namespace) it is over at once.

On disk a free lease is taken by one process alone. An object store has no such operation here: of two that write within
the same moment the later one stays, and both look again before they start. Should one be so late that the other has
started, that one finds out at its next renewal and stops; the commit records of the work hold in any case.
"""

import _thread
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import Self

import psutil

from cluster.errors import ClusterError, FileError, LeaseError
from cluster.files import Folder

NAME = "lease.json"
SECONDS, RENEW_SECONDS = 60.0, 10.0
_LOOK_SECONDS = 0.5
# How long after writing a lease whoever wrote in the same moment must have been seen.
_SETTLE_LOCAL, _SETTLE_REMOTE = 0.3, 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Lease:
    """Who works in a folder.

    Attributes:
        owner: in words: a Ray job's id, or a machine and process.
        job: the id of the Ray job, if it is one.
        token: tells two leases of one owner apart.
        host, pid, born: the process, where it can be looked for, and when that process started.
        started, renewed, expires: seconds since the epoch.
    """

    owner: str
    job: str
    token: str
    host: str
    pid: int
    born: float
    started: float
    renewed: float
    expires: float

    @property
    def gone(self) -> bool:
        """Whether it has run out, or its process is seen to be gone."""
        return time.time() > self.expires or self._alive() is False

    @property
    def seen_alive(self) -> bool:
        """Whether its process runs on this machine."""
        return self._alive() is True

    def _alive(self) -> bool | None:
        if self.host != _host():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.born) < 1.0
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


def holder(folder: Folder) -> Lease | None:
    """Who holds the lease of ``folder`` now; None where nobody does."""
    found = _read(folder)
    return None if found is None or found.gone else found


class Hold:
    """A context manager that holds the lease of ``folder``, and releases it at the end.

    Args:
        job: the id of the Ray job that this process belongs to, if any.
        dead: the token of a lease whose owner is known to be gone.
        say: told when there is something to wait for.

    Attributes:
        lost: why the lease is no longer this process's; the main thread gets a SIGTERM then.

    Raises:
        LeaseError: on entering, when another owner is at work.
    """

    def __init__(self, folder: Folder, job: str = "", dead: str = "", say: Say = lambda _: None) -> None:
        self.folder, self.lost = folder, ""
        process, now = psutil.Process(), time.time()
        owner = f"Ray job {job}" if job else f"process {process.pid} on {socket.gethostname()}"
        self.lease = Lease(
            owner, job, uuid.uuid4().hex, _host(), process.pid, process.create_time(), now, now, now + SECONDS
        )
        self._dead, self._say = dead, say
        self._end = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._take(free=self._wait())
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._renewing.join()
        try:
            found = _read(self.folder)
            if found is not None and found.token == self.lease.token:
                self.folder.remove(NAME)
        except ClusterError:  # it runs out by itself
            return

    def _wait(self) -> bool:
        """Until no living owner holds the lease; whether there is none at all, so that it is free to be made."""
        free, first = _look(self.folder)
        if first is None or first.gone or first.token == self._dead:
            return free
        if first.seen_alive:
            raise LeaseError(refusal(self.folder, first))
        self._say(f"{self.folder} was last worked on by {first.owner}: looking whether that still lives")
        found: Lease | None = first
        while found is not None and not found.gone:
            if (found.token, found.renewed) != (first.token, first.renewed):
                raise LeaseError(refusal(self.folder, found))
            time.sleep(_LOOK_SECONDS)
            free, found = _look(self.folder)
        return free

    def _take(self, free: bool) -> None:
        taken = self.folder.write_json(NAME, asdict(self._renewed()), once=free)
        if not (free and self.folder.is_local):
            time.sleep(_SETTLE_LOCAL if self.folder.is_local else _SETTLE_REMOTE)
        found = _read(self.folder)
        if not taken or found is None or found.token != self.lease.token:
            raise LeaseError(refusal(self.folder, found or self.lease))

    def _renewed(self) -> Lease:
        now = time.time()
        return replace(self.lease, renewed=now, expires=now + SECONDS)

    def _renew(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            try:
                found = _read(self.folder)
                if found is not None and found.token != self.lease.token:
                    self.lost = refusal(self.folder, found)
                    _thread.interrupt_main(signal.SIGTERM)
                    return
                self.folder.write_json(NAME, asdict(self._renewed()))
            except ClusterError:  # the storage's trouble, which the work itself meets and tells
                continue


def refusal(folder: Folder, lease: Lease) -> str:
    """One sentence: who is at work here, and what to do."""
    since = datetime.fromtimestamp(lease.started).strftime("%Y-%m-%d %H:%M")
    end = f"`distill jobs stop {lease.job}`" if lease.job else "that command"
    return (
        f"{folder} is being worked on by {lease.owner} since {since}: wait for it, or end it ({end}), or give another "
        "workdir"
    )


def _read(folder: Folder) -> Lease | None:
    return _look(folder)[1]


def _look(folder: Folder) -> tuple[bool, Lease | None]:
    """Whether there is no lease at all, and the lease; a damaged one is nobody's."""
    try:
        data = folder.find(NAME)
    except FileError:  # released and taken again between two looks
        data = folder.read(NAME)
    try:
        return data is None, None if data is None else Lease(**json.loads(data))
    except (ValueError, TypeError):
        return False, None


def _host() -> str:
    """Where process numbers mean the same: this boot of this machine, this namespace of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
