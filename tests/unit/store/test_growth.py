"""A store grows with its data: what is there and unchanged is kept byte for byte, the rest is captured."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from store_cases import lm_facts, make_data, make_store

from cluster.files import Folder
from cluster.shards import PoolReport
from distill_jobs.capture import stage as capture_stage
from distill_jobs.data import prepare
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.workers import PrepareWorker
from distill_jobs.errors import StoreError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Job, parse_job
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish, start

_TINY = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and the time of its last change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_contract_leaves_out_how_many_parts_there_are() -> None:
    plan = StorePlan.make(lm_facts(), TopKCodec(4), "teacher-1", 50)
    grown = StorePlan.make(dataclasses.replace(lm_facts(parts=9), fingerprint="data-2"), TopKCodec(4), "teacher-1", 50)
    assert grown.digest != plan.digest and grown.contract == plan.contract
    assert plan.part_inputs("a") == grown.part_inputs("a") != plan.part_inputs("b")
    for change in ({"seed": 1}, {"teacher": "teacher-2"}, {"codec": {"name": "topk", "k": 5}}, {"precision": "fp32"}):
        assert dataclasses.replace(plan, **change).contract != plan.contract


def test_only_parts_of_changed_data_are_made_again(tmp_path: Path) -> None:
    folder, data, facts = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data")), lm_facts(parts=3, rows=9)
    make_data(data, facts)
    make_store(folder, facts, data, TopKCodec(4))
    plan, shas = StorePlan.load(folder), TableReader(data / "train").facts["part_sha256"]
    assert not len(start(folder, plan, shas).missing()) and folder.exists("manifest.json")
    assert start(folder, plan, [shas[0], "another", shas[2]]).missing().tolist() == [1]
    grown = dataclasses.replace(plan, parts=4)
    commits = start(folder, grown, [*shas, "new"])
    assert commits.missing().tolist() == [3]
    assert not folder.exists("manifest.json")
    with pytest.raises(StoreError, match=r"missing \(3\)"):
        finish(folder, grown, commits)
    with pytest.raises(StoreError, match="the data beside it 3"):
        start(folder, grown, shas)
    assert len(start(folder, dataclasses.replace(plan, seed=1), shas)) == 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = {"config": _TINY}
    return parse_job(
        {
            "name": "growing",
            "task": "causal_lm",
            "workdir": str(tmp_path / "work"),
            "data": {
                "train": str(tmp_path / "text*.jsonl"),
                "features": {"documents": {"sequence_length": 32, "tokenizer": "bytes"}},
                "rows_per_part": 20,
                "validation": 0.0,
                "test": 0.0,
            },
            "teacher": {"model": model, "train": {}},
            "student": {"model": model, "train": {}},
            "capture": {"codec": {"topk": {"k": 4}}, "seed": 7, "fidelity_positions": 0},
        }
    )


@pytest.fixture
def do(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Prepare and capture in this process, the actors' work one after the other; returns what capture made."""

    def here(_session: Any, crews: Any, shards: list[int], on_result: Any, **_: Any) -> Any:
        worker = crews[0].make()
        for shard in shards:
            on_result(shard, worker.run(shard))
        return PoolReport()

    monkeypatch.setattr(capture_stage, "map_shards", here)
    workdir = Folder(job.workdir)

    def both() -> dict[str, Any]:
        work, shards = prepare.plan(job, workdir / "data")
        for shard in shards["train"]:
            PrepareWorker(work).run(shard)
        facts, _ = prepare.finish(job, work, shards)
        teacher_once(job, workdir, facts)
        nowhere: Any = SimpleNamespace(accelerator=lambda: None)
        return capture_stage.capture(job, nowhere, workdir, lambda *_: None)[0]

    return both


def teacher_once(job: Job, workdir: Folder, facts: DataFacts) -> None:
    if not (workdir / "teacher").exists("model"):
        save_model(
            build_model(job.teacher.model, facts, seed=0), workdir / "teacher" / "model", facts, workdir / "data"
        )


def write_texts(path: Path, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdefgh "), rng.integers(5, 60))) for _ in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_file_that_is_added_leaves_the_captured_parts_alone(job: Job, do: Any, tmp_path: Path) -> None:
    write_texts(tmp_path / "text-1.jsonl", 50, seed=1)
    assert do()["parts_kept"] == 0
    parts, store = Path(job.workdir) / "store" / "parts", Folder(job.workdir) / "store"
    before = files_of(parts)
    plan = StorePlan.load(store)
    assert plan.parts == 3 and plan.seed == 7

    # Two parts of 20 rows are full; the third has 10, and takes 10 of the new file's 30.
    write_texts(tmp_path / "text-2.jsonl", 30, seed=2)
    made = do()
    assert made["parts"] == 4 and made["parts_kept"] == 2
    after = files_of(parts)
    kept = [name for name in before if name.startswith(("part-00000", "part-00001"))]
    assert len(kept) == 4 and all(after[name] == before[name] for name in kept)
    assert verify(store, Folder(job.workdir) / "data") == []
    opened = LogitStore.open(store)
    assert opened.rows == made["rows"] and opened.plan.contract == plan.contract

    # A file that sorts first moves every row to another part.
    write_texts(tmp_path / "text-0.jsonl", 5, seed=3)
    assert do()["parts_kept"] == 0
    assert verify(store, Folder(job.workdir) / "data") == []
