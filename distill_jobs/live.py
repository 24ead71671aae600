"""What a running command says of itself in ``live.json`` of its workdir, for ``distill status``.

A thread rewrites the file about every five seconds (fifteen in an object store, and never so often that writing takes
more than a twentieth of its time), when a stage begins, and at the end. The work never waits for it: trouble with the
file costs one warning. A command that was killed leaves no last word, and its lease on the workdir runs out.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from cluster.errors import ClusterError, FileError, one_line
from cluster.files import Folder
from cluster.metrics import Publisher
from cluster.standing import STANDING
from distill_jobs.errors import DistillError
from distill_jobs.progress import Progress

LIVE = "live.json"
SCHEMA = 1
State = Literal["running", "waiting", "finished", "failed", "stopped"]

_log = logging.getLogger(__name__)
_TRAINING = {
    "loss": "training_loss",
    "step_seconds": "step_seconds",
    "tokens_per_second": "tokens_per_second",
    "waiting": "reader_waiting",
}
_EVERY_SECONDS, _EVERY_SECONDS_REMOTE, _WRITING_SHARE = 5.0, 15.0, 0.05
_LAST_WORD_SECONDS = 10.0
_READS, _READ_PAUSE_SECONDS = 5, 0.2
_UNITS = {"prepare": "rows", "capture": "rows", "evaluate": "parts", "tune": "trials"}  # the others count steps


class Live:
    """The running command's side.

    Args:
        name: the pipeline's.
        workdir: where the file lies.
        usd: US dollars spent by now, earlier stages and attempts included.
        budget: US dollars; None for as much as it takes.
        expected: seconds that each stage was predicted to take, in the order of the stages.
    """

    def __init__(
        self,
        name: str,
        workdir: Folder,
        usd: Callable[[], float],
        budget: float | None = None,
        expected: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._name, self._workdir, self._usd, self._budget, self._expected = name, workdir, usd, budget, expected
        self._every = _EVERY_SECONDS if workdir.is_local else _EVERY_SECONDS_REMOTE
        self._progress: Progress | None = None
        self._publisher, self._rows = Publisher(name), 0.0
        self._state: State = "running"
        self._why: str | None = None
        self._earlier: dict[str, int] = {}
        self._owner, self._began = _owner(), time.time()
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._warned = self._closed = False

    def __enter__(self) -> Self:
        """Begin to write. What an earlier command has survived that didn't come to its end is counted in."""
        self._began, here = time.time(), STANDING.faults()
        with suppress(FileError, ClusterError):
            before = read(self._workdir)
            if before is not None and before.get("state") != "finished":
                self._earlier = {kind: int(times) for kind, times in before.get("faults", {}).items()}
        for kind, times in here.items():
            # A process may run several pipelines, one after another.
            self._earlier[kind] = self._earlier.get(kind, 0) - times
        self._thread = threading.Thread(target=self._run, daemon=True, name="live")
        self._thread.start()
        return self

    def follow(self, progress: Progress | None) -> None:
        """A stage has begun, of which ``progress`` tells; or, with None, it has come to its end."""
        self._progress = progress
        STANDING.stage = progress.stage if progress else ""
        self._rows = 0.0
        self._wake.set()

    def ended(self, error: BaseException | None) -> None:
        """The work has ended, with an error or without."""
        with self._lock:
            self._state = "finished" if error is None else "stopped" if _is_stop(error) else "failed"
            self._why = None if error is None or _is_stop(error) else sentence(error)
        STANDING.stage, STANDING.waiting = "", None
        self._publisher.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write for the last time; waits for that, but not long."""
        if self._state in ("running", "waiting"):
            self.ended(error)
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_LAST_WORD_SECONDS)

    def faults(self) -> dict[str, int]:
        """What has been survived, by its name in ``FAULTS``: also by earlier commands that didn't come to their end."""
        here = STANDING.faults()
        found = {kind: self._earlier.get(kind, 0) + here.get(kind, 0) for kind in self._earlier.keys() | here.keys()}
        return {kind: times for kind, times in found.items() if times}

    def page(self) -> dict[str, Any]:
        """What the file holds now; times are seconds since the epoch."""
        with self._lock:
            state, why = self._state, self._why
        if state == "running" and STANDING.waiting:
            state, why = "waiting", STANDING.waiting
        now = time.time()
        return {
            "schema_version": SCHEMA,
            "name": self._name,
            "owner": self._owner,
            "state": state,
            "why": why,
            "began": self._began,
            "renewed": now,
            "every": self._every,
            "usd": self._usd(),
            "budget_usd": self._budget,
            "faults": self.faults(),
            **self._stage(now),
        }

    def _stage(self, now: float) -> dict[str, Any]:
        progress = self._progress
        if progress is None:
            return {"stage": None}
        left = progress.left
        ends = None if left is None else now + left
        return {
            "stage": progress.stage,
            "stage_began": progress.began,
            "done": progress.done,
            "total": progress.total,
            "unit": _UNITS.get(progress.stage, "steps") if progress.total > 1 else "",
            "rate": progress.rate,
            "note": progress.note,
            "stage_ends": ends,
            "ends": self._end_of_all(progress.stage, ends),
            "numbers": {name: value for (name, of, _), value in STANDING.latest().items() if of == progress.stage},
        }

    def _end_of_all(self, stage: str, ends: float | None) -> float | None:
        """When the last stage is expected to end, where all of them were predicted."""
        expected = self._expected()
        if ends is None or stage not in expected:
            return None
        names = list(expected)
        return ends + sum(expected[name] for name in names[names.index(stage) + 1 :])

    def _show(self) -> None:
        """Tell the metrics what this knows."""
        progress, stage = self._progress, STANDING.stage
        STANDING.show("usd", self._usd())
        if self._budget is not None:
            STANDING.show("budget_usd", self._budget)
        if progress is None or progress.stage != stage or progress.found is None:
            return
        STANDING.show("done", progress.done)
        STANDING.show("total", progress.total)
        if _UNITS.get(stage) == "rows":
            rows = progress.done - progress.found
            STANDING.add("rows", max(0.0, rows - self._rows))
            self._rows = rows

    def _run(self) -> None:
        while True:
            self._wake.clear()
            last = self._closed
            began = time.monotonic()
            try:
                self._show()
                self._publisher.publish()
                self._workdir.write_json(LIVE, self.page())
            except Exception as error:
                if not self._warned:
                    self._warned = True
                    _log.warning("%s/%s can't be written (%s); the work goes on", self._workdir, LIVE, one_line(error))
            if last:
                return
            self._wake.wait(max(self._every, (time.monotonic() - began) / _WRITING_SHARE))


def show_training(arm: str, step: int, values: Mapping[str, Any], bad: str | None) -> None:
    """Tell what a rank has reported of an arm."""
    STANDING.survived("bad_steps", int(bad is not None))
    STANDING.show("training_step", step, arm=arm)
    for name, shown in _TRAINING.items():
        if name in values:
            STANDING.show(shown, values[name], arm=arm)


def read(workdir: Folder) -> dict[str, Any] | None:
    """What the last command in a workdir has said of itself; None where none has.

    Raises:
        FileError, TransientFileError: it can't be read.
    """
    page = None
    for left in reversed(range(_READS)):
        try:
            data = workdir.find(LIVE)
            page = None if data is None else json.loads(data)
            break
        except (FileError, ValueError) as error:
            # It may be made between two looks, and not every store replaces an object in one step.
            if not left:
                damaged = FileError(f"{workdir}/{LIVE} is not valid JSON; it was damaged or edited: remove it")
                raise (error if isinstance(error, FileError) else damaged) from None
        time.sleep(_READ_PAUSE_SECONDS)
    if page is None:
        return None
    if not isinstance(page, dict) or page.get("schema_version") != SCHEMA:
        raise FileError(f"{workdir}/{LIVE} is not of this version of distill-jobs; look with the one that runs there")
    return page


def _owner() -> dict[str, Any]:
    """Who writes: a Ray job's id where there is one, and the process."""
    return {
        "job": os.environ.get("DISTILL_JOB") or None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | SystemExit)


def sentence(error: BaseException) -> str:
    """What to tell of an error: ours speak for themselves."""
    return str(error) if isinstance(error, (DistillError, ClusterError)) else one_line(error)
