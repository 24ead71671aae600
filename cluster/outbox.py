"""What is to be logged, in order, until a server has taken it.

Whoever logs never waits: entries go to a queue, and a thread sends them. What is not sent within moments another thread
writes to the workdir, so that neither the process's end nor its sudden death loses it, and the next command on the
workdir sends it. Entries are plain JSON; delivering one twice leaves a server as delivering it once.
"""

import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from cluster.files import Folder
from cluster.logged import one_line
from cluster.outbox_batch import Batch, ElsewhereError, Entry, LaterError, RefusedError, load, store

OUTBOX = "outbox"
GATHER_SECONDS = 2.0  # what comes in this time is sent together
KEEP_SECONDS = 3.0  # what has waited for longer is written down
PAUSES = (1.0, 30.0)  # between tries while the server is away: the first, and the longest
_FULL = 2000  # entries and points of one batch
_TICK = 1.0

_log = logging.getLogger(__name__)


class Carrier(Protocol):
    """Brings entries to a server."""

    def arrive(self, place: Any) -> None:
        """Raise ElsewhereError where entries for ``place`` don't belong to the server."""

    def deliver(self, entry: Entry, again: bool) -> None:
        """Bring one entry; RefusedError where that is of no use, any other error where it may succeed later.

        Args:
            again: an earlier try may have succeeded although its answer was never heard.
        """

    def answers(self) -> bool:
        """Whether the server answers anything."""


class Outbox:
    """A queue of entries that is kept in ``folder``.

    Args:
        place: where the entries of this process belong, see ``Carrier.arrive``.
        before: called before entries are written down, and every now and then: saves what they refer to.
        on_trouble: called with the error of each failed try, and with None when the server takes entries again.
    """

    def __init__(
        self,
        folder: Folder,
        carrier: Carrier,
        place: Any,
        before: Callable[[], None],
        on_trouble: Callable[[Exception | None], None],
    ) -> None:
        self._folder, self._carrier, self._place = folder, carrier, place
        self._before, self._on_trouble = before, on_trouble
        self._changed, self._writing = threading.Condition(), threading.Lock()
        self._batches = deque(Batch(name, old=True) for name in folder.names(".json"))
        self._number = max((int(b.name[:8]) for b in self._batches if b.name[:8].isdigit()), default=0)
        self._mark = uuid.uuid4().hex[:6]  # a process that was taken for dead may still be writing its own
        self._sending: Batch | None = None
        self._hurried = self._stopped = self._uploading = self._started = self._told = False
        self._failures, self._progress = 0, time.monotonic()

    def waiting(self) -> int:
        """How many batches are not delivered."""
        return len(self._batches)

    def held(self) -> int:
        """How many of them belong to another server, or can't be read."""
        with self._changed:
            return sum(batch.held for batch in self._batches)

    def start(self) -> None:
        """Begin to send what is there; ``post`` does it, too."""
        with self._changed:
            if self._started:
                return
            self._started = True
        for run in (self._send, self._keep):
            threading.Thread(target=run, name=f"outbox{run.__name__}", daemon=True).start()

    def post(self, entry: Entry) -> None:
        """Log an entry: ``do`` says what, ``run`` to which run. Returns at once."""
        with self._changed:
            if not self._batches or not self._batches[-1].open:
                self._batches.append(Batch(self._name(), self._place, [], open=True))
            batch = self._batches[-1]
            assert batch.entries is not None
            # Points of one run travel together, unless something else was logged to it between them.
            last = batch.last.get(entry["run"])
            if last is not None and last["do"] == entry["do"] == "metrics":
                last["points"].extend(entry["points"])
            else:
                batch.entries.append(entry)
                batch.last[entry["run"]] = entry
            batch.weight += len(entry.get("points", "1"))
            batch.open = batch.weight < _FULL
            if self._hurried or not batch.open or len(batch.entries) == 1:
                self._changed.notify_all()
        self.start()

    def drain(self, patience: float, uploads: bool = True) -> int:
        """Send everything now; returns the number of batches that are left.

        Args:
            patience: how many seconds without anything delivered are enough.
            uploads: while nothing fails, wait for the end of one that is under way.
        """
        self.start()
        with self._changed:
            self._hurried, self._progress = True, time.monotonic()
            for batch in self._batches:
                batch.due = min(batch.due, self._progress + PAUSES[0])
            self._changed.notify_all()
            try:
                while not self._stopped and any(not batch.held for batch in self._batches):
                    left = self._progress + patience - time.monotonic()
                    if left <= 0 and not (uploads and self._uploading and not self._failures):
                        break
                    self._changed.wait(min(max(left, 0.1), 0.2))
                return len(self._batches)
            finally:
                self._hurried = False

    def close(self) -> None:
        """Send no more, and write down what is left.

        Raises:
            OSError, ClusterError: it can't be written.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._write(0.0)

    def _send(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._deliver(batch)
            except ElsewhereError:
                batch.held = True
            except LaterError:
                pass
            except Exception as error:
                batch.tried = True
                self._pause(error)
            else:
                self._remove(batch)

    def _next(self) -> Batch | None:
        """The first batch, when it is time to send it; None when no more are to be sent."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                waits = [self._wait(batch, now) for batch in self._batches]
                first = next((batch for batch, wait in zip(self._batches, waits, strict=True) if wait <= 0), None)
                if first is not None:
                    first.open, self._sending = False, first
                    return first
                wait = min(waits, default=math.inf)
                self._changed.wait(wait if math.isfinite(wait) else None)
            return None

    def _wait(self, batch: Batch, now: float) -> float:
        """For how many seconds a batch is not to be sent."""
        if batch.held:
            return math.inf
        gather = batch.since + GATHER_SECONDS if batch.open and not self._hurried else 0.0
        return max(gather, batch.due) - now

    def _deliver(self, batch: Batch) -> None:
        entries = load(self._folder, batch) if batch.entries is None else batch.entries
        self._carrier.arrive(batch.place)
        for entry in entries[batch.sent :]:
            if self._stopped:
                raise InterruptedError("stopped")
            if not self._deliver_one(entry, batch):
                batch.sent, batch.tried = batch.sent + 1, False
                continue
            batch.sent, batch.tried, self._progress = batch.sent + 1, False, time.monotonic()
            if self._failures:
                self._failures = 0
                self._on_trouble(None)

    def _deliver_one(self, entry: Entry, batch: Batch) -> bool:
        """False if it is put off: the place for files is away, and all else goes on."""
        # What is about an upload comes after it.
        if "after" in entry and batch.late != entry["run"] and self._late(entry["run"]) is not None:
            self._put_off(entry, batch)
            return False
        self._uploading = "upload" in entry
        try:
            self._carrier.deliver(entry, batch.old or batch.tried or "again" in entry)
        except RefusedError as error:
            _log.warning("MLflow doesn't take a run's %s (%s); it is left out", entry["do"], error)
        except Exception as error:
            if not self._uploading or not self._carrier.answers():
                raise
            if not self._told:
                self._told = True
                _log.warning("MLflow takes no files (%s); they are kept and sent later", one_line(error))
            if batch.late:
                batch.due, batch.tried = time.monotonic() + (PAUSES[0] if self._hurried else PAUSES[1]), True
                raise LaterError from None
            self._put_off(entry, batch)
            return False
        finally:
            self._uploading = False
        return True

    def _late(self, run: str) -> Batch | None:
        with self._changed:
            return next((batch for batch in self._batches if batch.late == run), None)

    def _put_off(self, entry: Entry, batch: Batch) -> None:
        """Put an entry into the batch of what is late for its run, behind all others."""
        data = self._folder.find(entry["data"]) if isinstance(entry.get("data"), str) else entry.get("data")
        again = {**entry, "again": True, **({"data": data} if "data" in entry else {})}
        with self._changed:
            late = self._late(entry["run"])
            if late is None or late.entries is None:
                self._batches[-1].open = False
                late = Batch(self._name(), batch.place, [], due=time.monotonic() + PAUSES[0], late=entry["run"])
                self._batches.append(late)
            assert late.entries is not None
            late.entries.append(again)
            late.weight += 1

    def _name(self) -> str:
        self._number += 1
        return f"{self._number:08}-{self._mark}.json"

    def _pause(self, error: Exception) -> None:
        if self._stopped:
            return
        self._failures += 1
        self._on_trouble(error)
        failed, (first, longest) = time.monotonic(), PAUSES
        with self._changed:
            while not self._stopped:
                pause = first if self._hurried else min(first * 2 ** min(self._failures - 1, 10), longest)
                left = failed + pause - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def _remove(self, batch: Batch) -> None:
        with self._changed:
            batch.gone, self._sending = True, None  # from here on nobody writes it
        with self._writing, suppress(Exception):  # what stays is sent once more, which changes nothing
            for name in [batch.name, *batch.blobs] if batch.old or batch.written else ():
                self._folder.remove(name)
        with self._changed:
            self._batches.remove(batch)
            self._changed.notify_all()

    def _keep(self) -> None:
        warned = False
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, _TICK):
                    return
            try:
                self._write(KEEP_SECONDS)
            except Exception as error:
                if not warned:
                    warned = True
                    _log.warning("%s can't be written (%s); it is tried again", self._folder, error)

    def _write(self, older: float) -> None:
        """Write down the batches that have changed and have waited for ``older`` seconds."""
        self._before()
        now = time.monotonic()
        with self._changed:
            due = [batch for batch in self._batches if now - batch.since >= older or not older]
        for batch in due:
            with self._writing:
                self._write_batch(batch)

    def _write_batch(self, batch: Batch) -> None:
        with self._changed:
            if batch.entries is None or batch.gone or batch.written == batch.weight:
                return
            weight, entries = batch.weight, [dict(entry) for entry in batch.entries]
            for entry in entries:
                if "points" in entry:
                    entry["points"] = list(entry["points"])
        store(self._folder, batch, entries)
        with self._changed:
            batch.written = weight
            if not batch.open and not batch.late and batch.written == batch.weight and batch is not self._sending:
                batch.entries, batch.last = None, {}
