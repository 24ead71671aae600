"""What the tests of resuming run on the ranks: the real training, with a hand on its moments."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from safetensors.torch import load_file

from cluster.files import Folder
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session
from distill_jobs.data.prepare import prepare
from distill_jobs.errors import DistillError
from distill_jobs.spec import Job, parse_job
from distill_jobs.training.arm import train_arms
from distill_jobs.training.checkpoint import Errand, Keeper
from distill_jobs.training.feed import Order
from distill_jobs.training.task import Arm, TrainTask


@dataclass(frozen=True)
class Fate:
    """What befalls a run.

    Attributes:
        task: what is trained.
        notes: where ranks leave what they saw, and whether the kill is done.
        kill: (rank, step) whose process is killed in the middle of a step, once.
        pause: seconds that each step takes longer.
    """

    task: TrainTask
    notes: Path
    kill: tuple[int, int] | None = None
    pause: float = 0.0


def train_by_fate(rank: Rank, fate: Fate) -> list[dict[str, Any]]:
    checkpoints = fate.task.arms[0].folder.path("checkpoints")
    errand, take = Keeper.errand, Order.take

    def with_fate(self: Keeper, step: int) -> Errand:
        time.sleep(fate.pause)
        if rank.rank == 0:
            node = ray.get_runtime_context().get_node_id()
            _note(fate.notes / "steps.jsonl", {"step": step, "world": rank.world_size, "node": node})
        mark = fate.notes / "killed"
        if fate.kill == (rank.rank, step) and not mark.exists():
            while not list(checkpoints.glob("step-*.json")):
                time.sleep(0.05)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return errand(self, step)

    def seen(self: Order, consumed: int, count: int) -> np.ndarray:
        rows = take(self, consumed, count)
        if rank.rank == 0:
            _note(fate.notes / "rows.jsonl", [consumed, rows.tolist()])
        return rows

    Keeper.errand, Order.take = with_fate, seen  # type: ignore[method-assign]
    return train_arms(rank, fate.task)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _note(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def prepared(session: Session, folder: Path, dropout: float, steps: int) -> Job:
    """A small job over documents of unequal lengths; with dropout, random numbers have to go on where they were."""
    texts = [("word " * (1 + (i * 7) % 23)).strip() for i in range(80)]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attention_dropout": dropout,
    }
    # Half precision, where the processor has it, would round what runs of other layouts are compared by.
    train = {"steps": steps, "batch_size": 8, "micro_batch": 2, "learning_rate": 0.01, "zero_stage": 1, "ema": 0.9}
    train["precision"] = "fp32"
    model = {"model": {"config": config}, "train": {**train, "checkpoint": {"every_steps": 2}}}
    job = parse_job(
        {
            "name": "resume",
            "task": "causal_lm",
            "workdir": str(folder / "run"),
            "data": {
                "train": str(folder / "text.parquet"),
                "features": {"documents": {"sequence_length": 64, "tokenizer": "bytes"}},
                "rows_per_part": 40,
            },
            "teacher": model,
            "student": model,
        }
    )
    prepare(job, session, Folder(job.workdir), lambda *_: None)
    return job


def fate_of(job: Job, folder: Path, workers: int, session: str = "one", **more: Any) -> Fate:
    folder.mkdir(exist_ok=True)
    spec = job.student.train.model_copy(update={"workers": workers})
    arm = Arm("baseline", 3, Folder(str(folder / "arm")), job.student.model, spec, 0.0, 1.0, "digest", {})
    return Fate(
        TrainTask((arm,), Folder(job.workdir) / "data", None, None, workers, 0, session=session), folder, **more
    )


def run(
    session: Session, fate: Fate, gang: Gang, on_report: Callable[[dict[str, Any]], None] = lambda _: None
) -> tuple[dict[str, Any], list[str]]:
    """The arm's record, and what was told meanwhile."""
    notes: list[str] = []
    [record], _ = run_gang(session, train_by_fate, fate, gang, on_report, fatal=(DistillError,), on_note=notes.append)
    return record, notes


def weights(fate: Fate) -> dict[str, torch.Tensor]:
    return load_file(fate.task.arms[0].folder.path("model") / "model.safetensors")
