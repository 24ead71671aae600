"""A student taught by its teacher's features, too: from the capture to the saved model, on one rank."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from loop_cases import Said
from safetensors import safe_open
from safetensors.torch import load_file

from cluster.files import Folder
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.errors import SpecError, StoreError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.spec import Model, Train
from distill_jobs.spec.features import MatchedFeatures
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.writer import finish
from distill_jobs.training.arm import train_arms
from distill_jobs.training.checkpoint import Keeper
from distill_jobs.training.features import FeatureStudent
from distill_jobs.training.task import Arm, TrainTask

pytestmark = pytest.mark.usefixtures("group")

ROWS, LENGTH, VOCABULARY, WIDTH, STEPS = 32, 12, 20, 6, 6
SIZES = {"intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "attention_dropout": 0.1}
TEACHER, STUDENT = ({"model_type": "llama", "hidden_size": hidden, **SIZES} for hidden in (16, 8))
LAYER = "model.layers.0"


@dataclass(frozen=True)
class Case:
    facts: DataFacts
    data: Folder
    store: Folder
    layer: str
    student: Model


def facts_of(kind: str) -> DataFacts:
    train = {"train": {"rows": ROWS, "tokens": ROWS * LENGTH, "parts": 1}}
    common: dict[str, Any] = {"fingerprint": "data-1", "splits": train}
    if kind == "tabular":
        return DataFacts("classification", "tabular", feature_width=WIDTH, classes=("a", "b", "c"), **common)
    sizes: dict[str, Any] = {"sequence_length": LENGTH, "vocabulary": VOCABULARY, "pad_id": 0, "packing": "documents"}
    return DataFacts("causal_lm", "documents", **sizes, **common)


def prepare(folder: Folder, facts: DataFacts) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array([sample_id(0, row) for row in range(ROWS)], pa.int64()),
        "source": pa.array([f"rows:{row}" for row in range(ROWS)]),
    }
    if facts.features == "tabular":
        values = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), WIDTH)
        columns["label"] = pa.array(values[:, :3].argmax(axis=1), pa.int64())
    else:
        lengths = rng.integers(4, LENGTH + 1, ROWS)
        segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
        ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH), dtype=np.int32) * segments
        for name, values in (("input_ids", ids), ("segments", segments)):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), LENGTH)
        columns["tokens"] = pa.array(lengths, pa.int32())
    batch = pa.RecordBatch.from_pydict(columns)
    commits = Commits.open(folder / "train", 1, "x")
    size = facts.rows_per_batch
    pieces = [batch.slice(start, size) for start in range(0, ROWS, size)]
    commits.add(commit_part(folder / "train", 0, batch.schema, pieces, inputs="x"))
    commits.manifest(rows_per_batch=size)
    facts.save(folder)


@pytest.fixture(scope="module", params=["tabular", "documents"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A captured store of 4 numbers a position of one layer of the teacher."""
    root, facts = Folder(str(tmp_path_factory.mktemp(request.param))), facts_of(request.param)
    prepare(root / "data", facts)
    if request.param == "tabular":
        models = [Model.model_validate({"mlp": {"hidden": (hidden,)}}) for hidden in (12, 5)]
        layer = "layers.2"
    else:
        models = [Model.model_validate({"config": config}) for config in (TEACHER, STUDENT)]
        layer = LAYER
    teacher = build_model(models[0], facts, seed=0)
    save_model(teacher, root / "teacher", facts, root / "data")
    coding = FeatureCoding((layer,), 4, 8)
    plan = StorePlan.make(facts, DenseCodec(), "teacher-1", teacher.outputs, features=coding)
    plan.save(root / "store")
    task = CaptureTask(root / "teacher", root / "data", root / "store", 64, "fp32", cores=1, devices=0)
    CaptureWorker(task).run(0)
    shas = TableReader(root / "data" / "train").facts["part_sha256"]
    finish(root / "store", plan, Commits.open(root / "store" / PARTS, 1, lambda part: plan.part_inputs(shas[part])))
    return Case(facts, root / "data", root / "store", layer, models[1])


def train(case: Case, folder: Path, wanted: MatchedFeatures | None, **spec: Any) -> list[Any]:
    """Train one arm as a gang of one does; returns its history."""
    options = {"steps": STEPS, "batch_size": 8, "micro_batch": 4, "learning_rate": 0.02, "precision": "fp32"} | spec
    what = Train.model_validate({"checkpoint": {"every_steps": 2}, **options})
    arm = Arm("student", 3, Folder(str(folder)), case.student, what, 0.5, 2.0, "digest", {}, features=wanted)
    train_arms(Said(), TrainTask((arm,), case.data, case.store, None, 1, 0))
    found: list[Any] = json.loads((folder / "history.json").read_text())
    return found


def matched(case: Case, loss: str = "mse", weight: float = 1.0) -> MatchedFeatures:
    return MatchedFeatures.model_validate({"weight": weight, "loss": loss, "pairs": {case.layer: case.layer}})


@pytest.mark.parametrize("loss", ["mse", "cosine", "cka"])
def test_training_lowers_the_feature_loss_and_counts_it(case: Case, tmp_path: Path, loss: str) -> None:
    history = train(case, tmp_path, matched(case, loss, weight=0.7), steps=20, batch_size=ROWS, micro_batch=16)
    first, last = (history[at]["features"] for at in (0, -1))
    assert last < 0.9 * first
    for entry in history:
        whole = 0.5 * entry["hard"] + 0.5 * entry["soft"] + 0.7 * entry["features"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)


def test_the_saved_student_is_without_what_compares_and_a_baseline_knows_nothing(case: Case, tmp_path: Path) -> None:
    train(case, tmp_path / "with", matched(case))
    history = train(case, tmp_path / "plain", None)
    assert all("features" not in entry for entry in history)
    found, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "plain"))
    assert found.keys() == plain.keys()
    assert any(not torch.equal(found[name], plain[name]) for name in plain)
    assert load_model(Folder(str(tmp_path / "with" / "model"))).outputs
    # Dropout draws the same numbers with and without: where the weight is next to none, so is the difference.
    train(case, tmp_path / "little", matched(case, weight=1e-9))
    little = load_file(tmp_path / "little" / "model" / "model.safetensors")
    for name, value in plain.items():
        torch.testing.assert_close(little[name], value, rtol=1e-3, atol=1e-4, msg=name)
    record = json.loads((tmp_path / "with" / "stage.json").read_text())
    plain_record = json.loads((tmp_path / "plain" / "stage.json").read_text())
    assert record["made"]["parameters"] == plain_record["made"]["parameters"]


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"activation_checkpointing": True, "fused_loss": False}])
def test_a_killed_run_goes_on_bit_for_bit(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    if changes.get("activation_checkpointing") and case.facts.features == "tabular":
        changes = {"fused_loss": False}  # an MLP has no blocks to compute twice
    undisturbed = train(case, tmp_path / "whole", matched(case), **changes)
    errand = Keeper.errand

    class KilledError(Exception):
        pass

    def fatal(self: Keeper, step: int) -> Any:
        if step == STEPS - 1:
            self.wait()
            raise KilledError
        return errand(self, step)

    monkeypatch.setattr(Keeper, "errand", fatal)
    with pytest.raises(KilledError):
        train(case, tmp_path / "killed", matched(case), **changes)
    monkeypatch.setattr(Keeper, "errand", errand)
    [state] = (tmp_path / "killed").rglob("step-000004*/*engine-00000.safetensors")
    with safe_open(state, "pt") as file:
        assert {"master:projections.0.weight", "exp_avg:projections.0.weight"} <= set(file.keys())
    again = train(case, tmp_path / "killed", matched(case), **changes)
    assert [entry["features"] for entry in again] == [entry["features"] for entry in undisturbed]
    found, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_can_not_be_matched_is_said_in_a_sentence(case: Case, tmp_path: Path) -> None:
    wrong = replace_pairs({"layers.77": case.layer})
    with pytest.raises(SpecError, match=r"distill\.features\.pairs names layers\.77, but the \w+ model has "):
        train(case, tmp_path, wrong)
    with pytest.raises(StoreError, match=r"no features of the teacher's layer nowhere \(it holds: "):
        train(case, tmp_path, replace_pairs({case.layer: "nowhere"}))


def replace_pairs(pairs: dict[str, str]) -> MatchedFeatures:
    return MatchedFeatures.model_validate({"pairs": pairs})


def test_the_linear_layers_gradients_are_those_of_the_whole_loss(case: Case) -> None:
    """By gradcheck, in float64, through the hooks and the layer they listen to."""
    scorer = build_model(case.student, case.facts, seed=1)
    student = FeatureStudent(scorer, matched(case), 4, case.facts, seed=0).double().eval()
    if case.facts.features == "tabular":
        inputs = {"features": torch.randn(3, WIDTH).double()}
        keep = torch.tensor([True, False, True])
    else:
        ids = torch.randint(1, VOCABULARY, (2, 4))
        inputs, keep = {"input_ids": ids, "segments": torch.ones_like(ids)}, torch.arange(8) % 3 > 0
    target = {case.layer: torch.randn(int(keep.sum()), 4).double()}
    names = [name for name, _ in student.named_parameters()]
    chosen = [names.index("projections.0.weight"), 1]
    start = [list(student.parameters())[at].detach().clone().requires_grad_() for at in chosen]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        changed = {names[at]: value for at, value in zip(chosen, values, strict=True)}
        _, made = torch.func.functional_call(student, changed, (keep,), inputs)
        return student.loss(made, target)

    assert torch.autograd.gradcheck(loss, start, fast_mode=True)
