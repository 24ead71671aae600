"""Bad steps on two real ranks: both see them alike, name the sample that only one of them has, and go on in step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.engine import Engine
from cluster.files import Folder
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DistillError, TrainingError
from distill_jobs.models.build import build_model
from distill_jobs.spec import Model, Train
from distill_jobs.training.checkpoint import Keeper
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Columns, Source
from distill_jobs.training.task import Arm

ROWS, BAD_ROW, STEPS = 32, 21, 12
MODEL = Model.model_validate({"mlp": {"hidden": (16,)}})
# ZeRO-3 gathers parameters in every forward pass: ranks that make unequally many wait for each other for ever.
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES: dict[str, dict[str, Any]] = {
    "rollback": {"zero_stage": 0, "on_bad_step": {"action": "rollback"}},
    "skip": {"zero_stage": 3, "deepspeed": CUT, "on_bad_step": {"action": "skip"}},
}

pytestmark = pytest.mark.slow


def source(features: np.ndarray) -> Source:
    labels = np.arange(len(features)) % 3

    def take(numbers: np.ndarray) -> Columns:
        return {"features": features[numbers], "label": labels[numbers], "sample_id": numbers + 1000}

    facts = DataFacts("classification", "tabular", "made up", feature_width=6, classes=("a", "b", "c"))
    return Source(facts, len(features), take)


def train(rank: Rank, folder: str, name: str, spoilt: bool = True, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    features = np.random.default_rng(1).normal(size=(ROWS, 6)).astype(np.float32)
    if spoilt:
        features[BAD_ROW] = np.nan
    spec = Train.model_validate(
        {"steps": STEPS, "batch_size": 8, "micro_batch": 2, "workers": rank.world_size, "learning_rate": 0.02,
         "precision": "fp32", "checkpoint": {"every_steps": 2}, **CASES[name]}
    )  # fmt: skip
    arm = Arm("baseline", 5, Folder(folder), MODEL, spec, 0.0, 1.0, "digest", {})
    engine = Engine(build_model(MODEL, source(features).facts, seed=5), spec.engine(STEPS, rank.world_size), "cpu")
    keeper = Keeper(arm.folder / "checkpoints", "digest", spec.checkpoint, rank)
    loop = Loop(arm, engine, source(features), source(features[:5]), rank, STEPS, None, keeper)
    loop.omitted.rows = list(left_out)
    try:
        progress = loop.run()
        weights = engine.full_state()
        seen = {"history": progress.history, "moved": engine.steps, "omitted": loop.omitted.rows, "weights": weights}
        equal = engine.sum([loop.guard.bad, sum(loop.omitted.rows)])
        return seen | {"equal": equal == [2.0 * loop.guard.bad, 2.0 * sum(loop.omitted.rows)]}
    finally:
        keeper.finish()
        engine.close()


def everything(rank: Rank, folder: str) -> dict[str, Any]:
    found = {name: train(rank, f"{folder}/{name}", name) for name in CASES}
    found["without"] = train(rank, f"{folder}/without", "rollback", spoilt=False, left_out=(BAD_ROW,))
    return found


def stop(rank: Rank, folder: str) -> None:
    CASES["skip"]["on_bad_step"] = {"action": "stop"}
    train(rank, folder, "skip")


@pytest.fixture(scope="module")
def results(session: Session, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("bad"))
    values, _ = run_gang(session, everything, folder, Gang(2), lambda _: None, fatal=(DistillError,))
    found: dict[str, Any] = values
    return found


def bad(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in found["history"] if "bad" in entry]


def steps_with_bad_row() -> list[int]:
    order = source(np.zeros((ROWS, 6), np.float32)).order(5)
    return [step for step in range(1, STEPS + 1) if BAD_ROW in order.take((step - 1) * 8, 8)]


def test_two_ranks_skip_the_same_steps_under_zero_3(results: dict[str, Any]) -> None:
    found = results["skip"]
    assert found["equal"] and found["moved"] == STEPS - 3
    assert [entry["step"] for entry in bad(found)] == steps_with_bad_row() and len(bad(found)) == 3
    assert all(entry["samples"] == [BAD_ROW + 1000] for entry in bad(found))
    assert all(torch.isfinite(tensor).all() for tensor in found["weights"].values())


def test_two_ranks_go_back_together_and_on_without_the_sample(results: dict[str, Any]) -> None:
    found, without = results["rollback"], results["without"]
    assert found["equal"] and found["moved"] == STEPS and found["omitted"] == [BAD_ROW]
    [entry] = bad(found)
    assert entry["step"] == steps_with_bad_row()[0] and entry["back_to"] == (entry["step"] - 1) // 2 * 2
    assert all(torch.equal(tensor, without["weights"][name]) for name, tensor in found["weights"].items())


def test_the_sample_is_named_where_the_run_stops(session: Session, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"loss is nan at step \d+ \(samples {BAD_ROW + 1000}\); nothing was"):
        run_gang(session, stop, str(tmp_path), Gang(2), lambda _: None, fatal=(DistillError,))
