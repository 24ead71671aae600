"""A small capture whose actors kill themselves, or meet broken storage, at chosen moments of chosen parts.

A plan is a folder of files ``<part>.<moment>``, one for each fault that is still to come: an actor that meets one
takes it away and dies, so that every fault strikes once, whichever actor meets it and whatever came before.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from cluster.errors import FileError, TransientFileError
from cluster.files import Folder
from cluster.session import Session
from distill_jobs.capture import stage
from distill_jobs.capture.stage import capture
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data import table
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.prepare import prepare
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Job, parse_job

PACE = "DISTILL_TEST_PACE"
"""Seconds by which every part takes longer, where this is set."""
MOMENTS = ("begun", "before", "middle", "between", "after")
"""Of an attempt: nothing done yet, before its file is created, in the middle of it, between the file and the commit
record, and after the record, before anybody was told."""


def make_job(folder: Path, rows: int = 600, per_part: int = 60, far_off: int = 0, **capture_spec: Any) -> Job:
    """The spec of a job, and its rows of two columns; every ``far_off``-th is far from all others."""
    rng = np.random.default_rng(0)
    columns = {"x": rng.normal(size=rows), "y": rng.normal(size=rows), "label": rng.integers(0, 3, rows)}
    if far_off:
        columns["x"][::far_off] = 1000.0
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    train = {"steps": 1, "batch_size": 4}
    tree = {
        "name": "faults",
        "task": "classification",
        "workdir": str(folder / "run"),
        "data": {
            "train": str(folder / "rows.parquet"),
            "label": "label",
            "features": {"tabular": {"numeric": ["x", "y"]}},
            "rows_per_part": per_part,
            "validation": 0.1,
            "test": 0.0,
        },
        "teacher": {"model": {"mlp": {"hidden": [8]}}, "train": train},
        "student": {"model": {"mlp": {"hidden": [4]}}, "train": train},
        "capture": {"batch_tokens": 16, "fidelity_positions": 0, **capture_spec},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return parse_job(tree)


def make_ready(job: Job, session: Session, overflows: bool = False) -> Folder:
    """Prepare the job's data and save a fresh teacher; the workdir.

    Args:
        overflows: the teacher's numbers leave the range of fp32 on rows that are far from all others.
    """
    workdir = Folder(job.workdir)
    prepare(job, session, workdir, lambda *_: None)
    facts = DataFacts.load(workdir / "data")
    teacher = build_model(job.teacher.model, facts, seed=0)
    if overflows:
        first, *_, last = (p for p in teacher.parameters() if p.ndim == 2)
        with torch.no_grad():
            first[0, 0], last[:, 0] = 1e38, 0.0  # infinity times nothing
    save_model(teacher, workdir / "teacher" / "model", facts, workdir / "data")
    return workdir


def plan_faults(folder: Path, faults: dict[int, str]) -> None:
    """Plan a fault (a moment, or ``full``, ``flaky``, ``leave``) for each of these parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, moment in faults.items():
        (folder / f"{part}.{moment}").touch()


class FaultyWorker(CaptureWorker):
    """The real worker, in whose process the real functions are interrupted where the plan says so."""

    def __init__(self, task: CaptureTask) -> None:
        super().__init__(task)
        self.plan_folder = Path(task.store.uri).parent / "faults"
        self.part = -1
        _interrupt(self)

    def run(self, shard: int | str) -> dict[str, Any]:
        self.part = shard if isinstance(shard, int) else -1
        with open(self.plan_folder.parent / "attempts", "a") as begun:
            begun.write(f"{self.part}\n")
        time.sleep(float(os.environ.get(PACE, "0")))
        self.meet("begun")
        if self.take("leave"):
            os.kill(os.getpid(), signal.SIGTERM)
        told = super().run(shard)
        self.meet("after")
        return told

    def take(self, moment: str) -> bool:
        """Whether this fault is planned for the present part; it is then used up."""
        try:
            (self.plan_folder / f"{self.part}.{moment}").unlink()
        except FileNotFoundError:
            return False
        return True

    def meet(self, moment: str) -> None:
        if self.take(moment):
            os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(worker: FaultyWorker) -> None:
    create, write_json = Folder.create, Folder.write_json

    @contextmanager
    def faulty_create(self: Folder, name: str) -> Iterator[Any]:
        if not name.endswith(".arrow"):
            with create(self, name) as stream:
                yield stream
            return
        worker.meet("before")
        if worker.take("full"):
            raise FileError(f"{self}/{name}: no space left on device; free some space and run the same command again")
        if worker.take("flaky"):
            raise TransientFileError(f"{self}/{name}: the storage answered 503")
        with create(self, name) as stream:
            stream.write(b"")
            yield stream
            worker.meet("middle")

    def faulty_write_json(self: Folder, name: str, *arguments: Any, **more: Any) -> Any:
        if name == table.record_name(worker.part):
            worker.meet("between")
        return write_json(self, name, *arguments, **more)

    Folder.create, Folder.write_json = faulty_create, faulty_write_json  # type: ignore[method-assign, assignment]


def run_capture(job: Job, session: Session) -> dict[str, Any]:
    """The real stage, with faulty workers; what it made."""
    stage.CaptureWorker = FaultyWorker  # type: ignore[misc]
    try:
        return capture(job, session, Folder(job.workdir), lambda *_: None)[0]
    finally:
        stage.CaptureWorker = CaptureWorker  # type: ignore[misc]


def content(store: Path) -> list[str]:
    """The SHA-256 of every part, by the manifest."""
    return list(Folder(str(store / "parts")).read_json("manifest.json")["part_sha256"])


def main() -> None:
    """Capture the job of a folder in a process of its own, that can be killed; die before the manifest if planned."""
    folder = Path(sys.argv[1])
    job = parse_job(yaml.safe_load((folder / "job.yaml").read_text()))
    if (folder / "run/faults/driver.manifest").exists():
        (folder / "run/faults/driver.manifest").unlink()
        stage.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    with Session(cpus=2) as session:
        run_capture(job, session)


if __name__ == "__main__":
    main()
