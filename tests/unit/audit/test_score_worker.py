"""Real models scored on real files by the actor's own code, and audited from what it committed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.files import Folder
from distill_jobs.audit.findings import AUDIT, lines, refuse_gaps
from distill_jobs.audit.score import ScoreTask, ScoreWorker
from distill_jobs.audit.scores import Scores
from distill_jobs.audit.stage import audit
from distill_jobs.data.batch import Batch, make_batch
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.errors import AuditError, DataError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.scorer import Scorer
from distill_jobs.spec import Model, parse_job

LENGTH, VOCABULARY, ROWS = 12, 40, 60
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
NAMES = ("teacher", "student/0", "student/1", "baseline/0", "baseline/1")


def facts_of(task: str) -> DataFacts:
    splits = {"test": {"rows": 2 * ROWS, "tokens": 2 * ROWS, "parts": 2}}
    if task == "causal_lm":
        return DataFacts(
            task,
            "documents",
            "data-1",
            sequence_length=LENGTH,
            vocabulary=VOCABULARY,
            tokenizer_sha="t",
            pad_id=0,
            packing="documents",
            slices=("style",),
            splits=splits,
        )
    return DataFacts(
        task, "tabular", "data-1", feature_width=3, classes=("a", "b", "c"), slices=("style",), splits=splits
    )


def write_test_split(folder: Folder, facts: DataFacts) -> None:
    rng = np.random.default_rng(0)
    commits = Commits.open(folder / "test", 2, "x")
    for part in range(2):
        columns = {
            "sample_id": pa.array([sample_id(part, row) for row in range(ROWS)], pa.int64()),
            "source": pa.array([f"p{part}.txt:{row // 2} (+1)" for row in range(ROWS)]),
            "slice.style": pa.array(rng.choice(["verse", "prose"], ROWS).tolist()),
        }
        if facts.task == "causal_lm":
            segments = np.tile([1] * 5 + [2] * 4 + [0] * 3, (ROWS, 1))
            ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH))
            columns |= {
                name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.int32()), LENGTH)
                for name, values in (("input_ids", ids), ("segments", segments))
            } | {"tokens": pa.array([9] * ROWS, pa.int32())}
        else:
            features = pa.array(rng.normal(size=ROWS * 3), pa.float32())
            columns |= {
                "features": pa.FixedSizeListArray.from_arrays(features, 3),
                "label": pa.array(rng.integers(0, 3, ROWS), pa.int64()),
            }
        whole = pa.RecordBatch.from_pydict(columns)
        size = facts.rows_per_batch
        batches = [whole.slice(i, size) for i in range(0, ROWS, size)]
        commits.add(commit_part(folder / "test", part, whole.schema, batches, inputs="x"))
    commits.manifest(rows_per_batch=facts.rows_per_batch)
    facts.save(folder)


def scored(root: Path, task: str) -> tuple[Folder, DataFacts, dict[str, Folder]]:
    folder, facts = Folder(str(root)), facts_of(task)
    write_test_split(folder / "data", facts)
    model = Model.model_validate({"config": LLAMA} if task == "causal_lm" else {"mlp": {"hidden": (4,)}})
    models = {name: folder / name for name in NAMES}
    for seed, place in enumerate(models.values()):
        save_model(build_model(model, facts, seed=seed), place, facts, folder / "data")
    work = ScoreTask(folder / "data", folder / "evaluation", models, 64, 1, "fp32", "i", 1, 0, 9.0, 0.02)
    worker = ScoreWorker(work)
    for part in range(2):
        worker.run(("part", part))
    Commits.open(folder / "evaluation", 2, "i").manifest()
    return folder, facts, models


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_sums_are_the_models_own_and_the_audit_takes_them(tmp_path: Path, task: str) -> None:
    folder, facts, models = scored(tmp_path, task)
    scores = Scores.read(folder / "evaluation")
    table = TableReader(folder / "data" / "test")
    batch = make_batch(table.take(np.arange(table.rows)), facts)
    keep = batch.keep
    for name, place in models.items():
        with torch.inference_mode():
            logits = load_model(place)(**batch.inputs).flatten(0, -2)[keep.flatten()]
        said = torch.log_softmax(logits[:, : facts.targets].double(), dim=-1)
        gold = batch.labels.flatten()[keep.flatten()]
        nll = -said.gather(1, gold[:, None])[:, 0]
        assert scores.of_model(name, "nll").sum() == pytest.approx(float(nll.sum()), rel=1e-5)
        assert scores.of_model(name, "correct").sum() == float((said.argmax(-1) == gold).sum())
    assert scores.positions.sum() == int(keep.sum()) and scores.language == (task == "causal_lm")
    if scores.language:
        # Each row holds the first document of its source, which the next row goes on with, and one of its own.
        assert len(scores.positions) == 4 * ROWS and len(set(scores.units)) == ROWS + 2 * ROWS
        assert scores.columns["student/0.bin_count"].sum() == scores.positions.sum()

    train = {"epochs": 1, "batch_size": 8}
    model = {"hf": "here"} if scores.language else {"mlp": {"hidden": [4]}}
    features = {"documents": {"sequence_length": LENGTH}} if scores.language else {"tabular": {"numeric": ["x"]}}
    job = parse_job(
        {
            "name": "j",
            "task": task,
            "workdir": str(tmp_path),
            "data": {
                "train": "x",
                "slices": ["style"],
                "features": features,
                **({} if scores.language else {"label": "y"}),
            },
            "teacher": {"model": model} if scores.language else {"model": model, "train": train},
            "student": {"model": model, "train": train},
            "distill": {"soft_labels": "live"},
            "audit": {"draws": 200, "min_slice_rows": 10, "low_entropy": 9.0, "tiny_gold": 0.02, "max_gap": 0.0001},
        }
    )
    made, usage = audit(job, folder)
    assert made["quality"]["student_ece"] > 0 and usage.wall_seconds > 0
    found = folder.read_json(AUDIT)
    assert found["negative"]["train"]["value"] is None and "live" in found["negative"]["train"]["why"]
    assert any("calibration error" in line for line in lines(found))
    with pytest.raises(AuditError, match=r"over style is .* above audit.max_gap 0.0001.* everything that was made is"):
        refuse_gaps(folder)
    arm = found["ceiling"]["arms"]["student"]
    assert arm["quality"]["low"] < arm["quality"]["value"] < arm["quality"]["high"]
    assert not found["ceiling"]["enough_seeds"] and found["bias"]["limit"]["over"]
    if scores.language:
        assert found["ceiling"]["unit"] == "document" and set(found["bias"]["columns"]["style"]["groups"]) == {
            "prose",
            "verse",
        }
        assert arm["quality"]["value"] == pytest.approx(np.exp(arm["nll"]["value"]))
        assert found["negative"]["heldout"]["mistakes"] > 0


@pytest.mark.parametrize("name", ["teacher", "baseline/1"])
def test_a_model_that_gives_nan_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    finite = ScoreWorker._log_probs

    def broken(self: ScoreWorker, model: Scorer, batch: Batch) -> torch.Tensor:
        return finite(self, model, batch) * (torch.nan if model is self.models[name] else 1.0)

    monkeypatch.setattr(ScoreWorker, "_log_probs", broken)
    with pytest.raises(DataError, match=rf"^{name} can't be scored on the held-out row p0.txt:0 "):
        scored(tmp_path, "classification")
