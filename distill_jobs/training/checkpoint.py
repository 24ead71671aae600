"""Checkpoints of an arm in training: its whole state, so that no step is lost.

One is taken between two optimizer steps as a copy in the host's memory; writing it is left to a thread, and rank 0's
thread commits it when all ranks have written theirs.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

from cluster.engine import Engine
from cluster.engine_state import Snapshot
from cluster.errors import CheckpointError
from cluster.files import Folder
from cluster.gang import Rank
from distill_jobs.spec.train import Checkpoint
from distill_jobs.training.chances import Chances, restore_chances, take_chances
from distill_jobs.training.shelf import Record, Shelf

_POLL_SECONDS, _PATIENCE_SECONDS = 0.1, 1800.0

State = dict[str, Any]

_log = logging.getLogger(__name__)


class Errand(IntEnum):
    """What is to be done after a step; only rank 0 knows, and tells the others."""

    NONE = 0
    SAVE = 1
    LEAVE = 2
    """Save, wait until it is written, and give up the ranks: the gang starts again, as large as there is room for."""


class Keeper:
    """Keeps the last checkpoints of one arm and its best one; every rank has a keeper, and calls the same in step.

    Args:
        folder: where they lie.
        digest: of all that the arm depends on; checkpoints of another are removed.
        spec: when to keep one, and how many.
        rank: this rank.
        usage: what the arm has used until now, kept with each.
        clock: seconds, from any moment on.
    """

    def __init__(
        self,
        folder: Folder,
        digest: str,
        spec: Checkpoint,
        rank: Rank,
        usage: Callable[[], State] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec, self.rank, self._usage, self._clock = spec, rank, usage, clock
        self.shelf = Shelf(folder, digest, f"{rank.agreed(uuid.uuid4().int % 2**32):08x}")
        self._last = clock()
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def errand(self, step: int) -> Errand:
        """What rank 0 wants done after ``step``; nothing on other ranks."""
        if self.rank.rank:
            return Errand.NONE
        if self.rank.must_leave():
            return Errand.LEAVE
        spec = self.spec
        if spec.every_steps is not None and step % spec.every_steps == 0:
            return Errand.SAVE
        minutes = (self._clock() - self._last) / 60.0
        # Where writing takes longer than the time between two, the next one waits for its end.
        due = spec.every_minutes is not None and minutes >= spec.every_minutes and not self._busy
        return Errand.SAVE if due else Errand.NONE

    def save(self, engine: Engine, loop: State, best: bool = False) -> None:
        """Copy the state of this moment, and write it behind the training's back; every rank must call.

        Waits for the one before where that is still being written, so that there is never more than one copy.

        Args:
            loop: what the loop knows, in plain values; ``loop["step"]`` is the steps done.
            best: whether the model is the best so far.

        Raises:
            FileError, TransientFileError: the one before could not be written.
        """
        self.wait()
        self._last = self._clock()
        record = {"step": loop["step"], "world": self.rank.world_size, "best": best, "loop": loop}
        work = (engine.snapshot(), take_chances(self.rank.device), {**record, "usage": self._usage()})
        self._writing = threading.Thread(target=self._write, args=work, daemon=True, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait until what has been saved is written, on rank 0 by all ranks."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            raise self._error

    def leave(self) -> NoReturn:
        """End this gang when all is written; every rank must call. Another goes on from here."""
        self.wait()
        self.rank.leave()

    def finish(self) -> None:
        """The run has come to its end: what is still being written is no longer needed."""
        self._ended.set()
        if self._writing is not None:
            self._writing.join()

    def restore(self, engine: Engine) -> Record | None:
        """Take up the newest checkpoint that is whole; every rank must call.

        Returns:
            Its record, with the loop's state under ``loop``; None where there is none.

        Raises:
            CheckpointError: it is of another model.
        """
        if self.rank.rank == 0:
            self.shelf.tidy()
        while True:
            steps = self.shelf.records() if self.rank.rank == 0 else {}
            step = self.rank.agreed(max(steps, default=-1))
            if step < 0:
                return None
            record = self.shelf.read(step)
            if self._whole(engine, record):
                break
            if self.rank.rank == 0:
                self.shelf.remove(record)
        copy = self.shelf.copy(record)
        engine.load_state(copy)
        chances = json.loads((copy / _chances(self.rank.rank % record["world"])).read_text())
        restore_chances(chances, self.rank.device)
        return record

    def load_best(self, engine: Engine, step: int) -> None:
        """Take the engine back to the checkpoint of ``step``; every rank must call.

        Raises:
            CheckpointError: it is damaged.
        """
        self.wait()
        engine.barrier()  # Only now rank 0 has committed what it has to.
        record = self.shelf.read(step)
        if not self._whole(engine, record):
            raise CheckpointError(f"the best checkpoint in {self.shelf.folder}, of step {step}, is damaged; remove it")
        engine.load_state(self.shelf.copy(record))

    @property
    def _busy(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def _whole(self, engine: Engine, record: Record) -> bool:
        """Whether all files are as they were written; each rank looks at its share."""
        bad = self.shelf.damaged(record, self.rank.rank, self.rank.world_size)
        return engine.sum([float(bad)]) == [0.0]

    def _write(self, snapshot: Snapshot, chances: Chances, record: Record) -> None:
        def files(folder: Path) -> list[str]:
            name = _chances(self.rank.rank)
            (folder / name).write_text(json.dumps(chances))
            return [*snapshot.write(folder), name]

        try:
            self.shelf.put(record["step"], self.rank.rank, files)
            if self.rank.rank == 0:
                self._commit(record)
        except BaseException as error:
            self._error = error

    def _commit(self, record: Record) -> None:
        begun = time.monotonic()
        while (files := self.shelf.complete(record["step"], record["world"])) is None:
            if self._ended.wait(_POLL_SECONDS):
                return
            if time.monotonic() - begun > _PATIENCE_SECONDS:
                raise CheckpointError(
                    f"not all of {record['world']} ranks have written their part of the checkpoint of step "
                    f"{record['step']} to {self.shelf.folder}: give all nodes the same workdir"
                )
        self.shelf.commit({**record, "files": files})
        about = {"step": record["step"], "seconds": round(time.monotonic() - begun, 3)}
        _log.info("checkpoint saved", extra={**about, "folder": str(self.shelf.folder)})
        self.rank.kept()
        self.shelf.retain(self.spec.keep)


def _chances(rank: int) -> str:
    return f"chances-{rank:05d}.json"
