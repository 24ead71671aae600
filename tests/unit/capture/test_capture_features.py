"""Features of the teacher's layers: what its own forward gives, whatever the batches were, and what can't be had."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import CLASSES, WIDTH, columns_of, fail_with, lm_facts, make_task, table_facts, text_facts
from torch import Tensor, nn

from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.batch import make_batch
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DistillError, ModelError, SpecError
from distill_jobs.models.files import load_model
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.taps import Taps, widths
from distill_jobs.store.features import FeatureCoding, matrix
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish

CASES = {
    "documents": (lm_facts, "model.layers.0"),
    "text": (text_facts, "bert.encoder.layer.0"),
    "tabular": (table_facts, "layers.2"),
}


def store_of(task: CaptureTask, parts: int = 1) -> LogitStore:
    worker = CaptureWorker(task)
    for part in range(parts):
        worker.run(part)
    plan = StorePlan.load(task.store)
    shas = TableReader(task.data / "train").facts["part_sha256"]
    finish(task.store, plan, Commits.open(task.store / PARTS, plan.parts, lambda part: plan.part_inputs(shas[part])))
    assert verify(task.store, task.data) == []
    return LogitStore.open(task.store, task.data)


def features_of(store: LogitStore, layer: str) -> Tensor:
    columns = store.take(np.arange(store.rows), layers=(layer,))
    signal = store.signal(columns, "cpu", make_batch(columns, store.facts).keep)
    assert signal.features is not None
    return signal.features[layer]


def expected(task: CaptureTask, layer: str) -> Tensor:
    """What the layer gives, row by row, the positions of a text averaged by hand."""
    facts, table = DataFacts.load(task.data), TableReader(task.data / "train")
    teacher, found = load_model(task.teacher), []
    heard: list[Any] = []
    teacher.core.get_submodule(layer).register_forward_hook(lambda _, __, output: heard.append(output))
    for row in range(table.rows):
        batch = make_batch(table.take(np.array([row])), facts)
        heard.clear()
        with torch.inference_mode():
            teacher(**batch.inputs)
        out = heard[0][0] if isinstance(heard[0], tuple) else heard[0]
        if facts.features == "documents":
            found.append(out[0][batch.keep[0]])
        elif facts.features == "text":
            found.append(out[0, : int(batch.inputs["attention_mask"].sum())].mean(dim=0)[None])
        else:
            found.append(out)
    return torch.cat(found)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_stored_is_what_the_layer_gives(tmp_path: Path, kind: str) -> None:
    make, layer = CASES[kind]
    coding = FeatureCoding((layer,), 6, 8, seed=3)
    task = make_task(tmp_path, make(40, parts=2), columns_of(make(40), 40), features=coding)
    store = store_of(task, parts=2)
    rows = expected(task, layer)
    exact = rows @ matrix(rows.shape[1], 6, f"3 {layer}")
    off = (features_of(store, layer) - exact).abs() / exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-20)
    assert float(off.max()) <= 0.5 / 127 + 1e-4
    assert store.manifest["bytes_per_position"] == store.plan.bytes_per_position


def test_batches_and_the_heads_chunks_change_nothing(tmp_path: Path) -> None:
    facts, coding = lm_facts(24), FeatureCoding(("model.layers.0", "model.norm"), 8, 16)
    columns, found = columns_of(facts, 24), []
    for number, (tokens, chunk) in enumerate([(4096, None), (50, 3), (1, 1), (64, 0)]):
        task = make_task(
            tmp_path / str(number), facts, columns, features=coding, batch_tokens=tokens, chunk_positions=chunk
        )
        store = store_of(task)
        found.append(torch.cat([features_of(store, layer) for layer in coding.layers], dim=1))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-3, rtol=0)


def test_rows_that_are_bad_are_left_out_with_their_features(tmp_path: Path) -> None:
    """By halving the batch, and where a layer's numbers alone are not finite."""
    facts = table_facts(30)
    columns = columns_of(facts, 30)
    columns["features"][[4, 17]] = 100.0
    task = make_task(tmp_path, facts, columns, features=FeatureCoding(("layers.1", "layers.2"), 4, 8))
    worker = CaptureWorker(task)

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        wrong = inputs[0].flatten(1)[:, 0] > 90
        return torch.where(wrong[:, None], torch.inf, output)

    kept = worker.teacher.core.layers[3].forward  # type: ignore[union-attr, index]
    worker.teacher.core.layers[1].register_forward_hook(spoil)  # type: ignore[union-attr, index]
    worker.teacher.core.layers[3].forward = lambda x: kept(x.clamp(max=1e6))  # type: ignore[union-attr, index]
    told = worker.run(0)
    assert told["rows"] == 28 and told["quarantined"] == 2
    assert {reason for _, reason in told["quarantine_samples"]} == {
        "what the teacher's layer layers.1 gives is not finite"
    }

    other = make_task(tmp_path / "raises", facts, columns, features=FeatureCoding(("layers.2",), 4, 8))
    worker = CaptureWorker(other)

    def fail(logits: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG001
        raise ValueError("no such row")

    fail_with(worker, fail)
    assert worker.run(0)["quarantined"] == 2


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path) -> None:
    facts, layer = table_facts(32), "layers.2"
    task = make_task(tmp_path, facts, columns_of(facts, 32), features=FeatureCoding((layer,), 4, 8))
    worker = CaptureWorker(task)

    def hungry(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        if len(output) > 8:
            raise torch.OutOfMemoryError("out of memory")

    worker.teacher.core.get_submodule(layer).register_forward_hook(hungry)
    assert worker.run(0)["rows"] == 32 and worker.sizes.tokens <= 8


@pytest.mark.parametrize(
    ("layers", "width", "said"),
    [
        (("layers.9",), 4, "capture.features.layers names layers.9, but the mlp model has layers"),
        (("layers.2", "layres.1"), 4, "names layres.1, but the mlp model has layers.1"),
        (("layers.2",), 9, "width is 9, but the teacher's layer layers.2 gives only 8 numbers a position; lower"),
        (("layers",), 4, r"width is 4|gives only 4"),
    ],
)
def test_what_a_teacher_of_tables_can_not_give(tmp_path: Path, layers: Any, width: int, said: str) -> None:
    facts = table_facts(4)
    task = make_task(tmp_path, facts, columns_of(facts, 4), features=FeatureCoding(layers, width, 8))
    if layers == ("layers",):
        # The whole stack gives the logits of so many classes: an unusual choice, but one that can be had.
        assert CaptureWorker(task).run(0)["rows"] == 4 and CLASSES == 4
        return
    with pytest.raises(SpecError, match=said):
        CaptureWorker(task)


@pytest.mark.parametrize(
    ("layer", "error", "said"),
    [
        ("lm_head", SpecError, "names lm_head, but that gives the logits"),
        ("model.layers", ModelError, "doesn't call its layer model.layers in its forward pass"),
    ],
)
def test_what_a_language_model_can_not_give(tmp_path: Path, layer: str, error: type[DistillError], said: str) -> None:
    facts = lm_facts(4)
    task = make_task(tmp_path, facts, columns_of(facts, 4), features=FeatureCoding((layer,), 4, 8))
    with pytest.raises(error, match=said):
        CaptureWorker(task)


class Twice(nn.Module):
    """Calls a layer twice, and has pictures, sequences and single numbers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.pictures, self.sequence, self.numbers = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        once = self.shared(self.shared(features))
        self.pictures(once[:, :, None, None].expand(-1, -1, 2, 3))
        self.sequence((once[:, None].expand(-1, 5, -1), None))
        self.numbers(once.sum(dim=1))
        return once


def test_layers_of_other_shapes() -> None:
    core = Twice()
    scorer = Scorer(core, {"kind": "factory", "target": "x:y"}, "tabular", None)
    inputs = {"features": torch.randn(4, WIDTH)}
    with Taps(scorer, ("pictures", "sequence"), "here").listening(inputs) as heard:
        logits = scorer(**inputs)
    assert torch.allclose(heard["pictures"], logits) and torch.allclose(heard["sequence"], logits)
    assert not core.pictures._forward_hooks
    for name, said in (("shared", "calls its layer shared more than once"), ("numbers", r"gives \[2\]")):
        with pytest.raises(ModelError, match=said):
            widths(scorer, Taps(scorer, (name,), "here"), table_facts(1))
