"""A loop of one rank in the test's own process: a small network on rows of numbers that a test can spoil."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.engine import Engine
from cluster.files import Folder
from cluster.gang import Rank
from distill_jobs.data.facts import DataFacts
from distill_jobs.models.build import build_model
from distill_jobs.spec import Model, Train
from distill_jobs.training.checkpoint import Keeper
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Columns, Source
from distill_jobs.training.task import Arm

ROWS, WIDTH, CLASSES, BATCH = 64, 6, 3, 8
FACTS = DataFacts(
    task="classification",
    features="tabular",
    fingerprint="made up",
    feature_width=WIDTH,
    classes=("a", "b", "c"),
)
MODEL = Model.model_validate({"mlp": {"hidden": (16,)}})


class Said(Rank):
    """The one rank, alone; what it reports stays with it."""

    def __init__(self) -> None:
        super().__init__(0, 1, "cpu", cast(Any, None))
        self.reports: list[dict[str, Any]] = []

    def report(self, values: dict[str, Any]) -> None:
        self.reports.append(values)

    def must_leave(self) -> bool:
        return False

    def kept(self) -> None:
        """Nobody counts what would be lost."""


def rows(spoil: Callable[[np.ndarray], None] | None = None, count: int = ROWS) -> Source:
    """Rows whose class is the largest of their first three numbers; sample ids are row numbers plus 1,000."""
    features = np.random.default_rng(1).normal(size=(count, WIDTH)).astype(np.float32)
    labels = features[:, :CLASSES].argmax(axis=1)
    if spoil is not None:
        spoil(features)

    def take(numbers: np.ndarray) -> Columns:
        return {"features": features[numbers], "label": labels[numbers], "sample_id": numbers + 1000}

    return Source(FACTS, count, take)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one, as a gang would have it."""
    places = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, str(value))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@contextmanager
def training(
    train: Source, folder: Path, validation: Source | None = None, taught: dict[str, Any] | None = None, **spec: Any
) -> Iterator[Loop]:
    """A loop that is ready to run, with a keeper in ``folder``; a baseline's, but for what ``taught`` says."""
    options = {"steps": 24, "batch_size": BATCH, "micro_batch": 4, "learning_rate": 0.05, "precision": "fp32"} | spec
    what = Train.model_validate({"checkpoint": {"every_steps": 4}, **options})
    arm = Arm("baseline", 5, Folder(str(folder)), MODEL, what, 0.0, 1.0, "digest", {})
    arm = replace(arm, **(taught or {}))
    rank, steps = Said(), what.steps or 0
    torch.manual_seed(0)
    engine = Engine(build_model(MODEL, FACTS, seed=5), what.engine(steps, 1, "fp32"), "cpu")
    keeper = Keeper(arm.folder / "checkpoints", "digest", what.checkpoint, rank)
    try:
        yield Loop(arm, engine, train, validation or Source(FACTS, 0, lambda _: {}), rank, steps, None, keeper)
    finally:
        keeper.finish()
        engine.close()
