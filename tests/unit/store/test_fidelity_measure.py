"""The measurement as a whole: which positions, what the page holds, and what reading it again refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import VOCABULARY, lm_facts, make_data, make_store, table_facts
from typer.testing import CliRunner

from cluster.files import Folder
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.cli import app
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError, ModelError, StoreError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import model_digest, save_model
from distill_jobs.models.scorer import Scorer
from distill_jobs.spec import Model
from distill_jobs.spec.model import Mlp
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.fidelity.beside import fidelity_of
from distill_jobs.store.fidelity.held_back import RANDOM, HeldBack
from distill_jobs.store.fidelity.measure import FIDELITY, measure, measure_store, numbers, read
from distill_jobs.store.plan import StorePlan

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def teacher_of(facts: DataFacts, seed: int = 0) -> Scorer:
    if facts.task == "causal_lm":
        return build_model(Model(config={**LLAMA, "num_hidden_layers": 1}), facts, seed=seed)
    return build_model(Model(mlp=Mlp(hidden=(8,))), facts, seed=seed)


def page_of(tmp_path: Path, facts: DataFacts, codec: Codec, **more: Any) -> tuple[dict[str, Any], StorePlan]:
    data, store = Folder(str(tmp_path / "data")), Folder(str(tmp_path / "store"))
    make_data(data, facts)
    make_store(store, facts, data, codec)
    plan = StorePlan.load(store)
    arguments = {"positions": 20, "rows_at_once": 6, **more}
    return measure_store(plan, data, teacher_of(facts), **arguments), plan


def test_the_page_of_a_language_model(tmp_path: Path) -> None:
    facts = lm_facts()
    page, _ = page_of(
        tmp_path, facts, HybridCodec(8, 4), students={"student": teacher_of(facts, seed=1)}, thorough=True
    )
    assert page["split"] == "train" and page["positions"] == 20 and page["students"] == [RANDOM, "student"]
    own, *others = page["codings"]
    assert own["own"] and own["name"] == "hybrid 8+4" and not any(entry["own"] for entry in others)
    assert {entry["family"] for entry in others} >= {"topk", "sampled", "top-k renormalised", "random sampling"}
    assert list(own["at"]) == ["1", "2", "4"] and own["top1_kept"] == own["gold_rank_kept"] == 1.0
    for means in own["at"].values():
        for student in page["students"]:
            gradient = means[f"gradient_{student}"]
            # No bound above: a student that nobody trained is near such a teacher, its gradient small beside any error.
            assert all(value > 0 for value in gradient.values())
    verse = own["slices"]["style"]["verse"]
    assert verse["positions"] == 20 and verse["at"]["1"]["kl"] == own["at"]["1"]["kl"]
    # It is a page of plain values, whatever was infinite or unknown.
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    told = numbers(page)
    assert told["t2_gradient_student_angle"] == own["at"]["2"]["gradient_student"]["angle"]
    assert all(isinstance(value, float | int) for value in told.values())


def test_what_is_exact_is_found_to_be_exact(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, table_facts(), DenseCodec())
    own = page["codings"][0]
    assert own["top1_kept"] == 1.0 and own["gold_logprob_off"] < 1e-3 and own["log_partition_off"]["max"] < 5e-3
    for means in own["at"].values():
        assert means["kl"] < 1e-5 and means["total_variation"] < 1e-3 and means["gradient_random"]["error"] < 2e-3
    by_family = {entry["family"]: entry for entry in page["codings"][1:]}
    assert list(by_family["hybrid"]["at"]) == ["1"], "others are measured at T = 1 only, unless asked for more"


def test_validation_rows_come_first_and_spread_over_the_split(tmp_path: Path) -> None:
    facts, data = lm_facts(parts=2, rows=40), Folder(str(tmp_path / "data"))
    make_data(data, facts)
    facts = DataFacts.of({**facts.as_dict(), "splits": {**facts.splits, "validation": facts.splits["train"]}})
    make_data(Folder(str(tmp_path / "other")), facts, seed=1)
    (tmp_path / "other" / "train").rename(tmp_path / "data" / "validation")
    held = HeldBack(data, facts, positions=25, seed=3)
    assert held.split == "validation"
    chunks = list(held.chunks(teacher_of(facts), {}, "cpu", rows_at_once=7))
    again = list(held.chunks(teacher_of(facts), {}, "cpu", rows_at_once=3))
    gold = torch.cat([chunk.gold for chunk in chunks])
    assert len(gold) == 25 and bool((gold >= 0).all()) and len(gold.unique()) > 5
    # The same positions and draws, however they are batched.
    assert torch.equal(gold, torch.cat([chunk.gold for chunk in again]))
    assert torch.equal(torch.cat([c.uniforms for c in chunks]), torch.cat([c.uniforms for c in again]))
    assert all(chunk.logits.shape[1] == VOCABULARY for chunk in chunks)
    few = HeldBack(data, facts, positions=3, seed=3)
    assert sum(len(chunk.gold) for chunk in few.chunks(teacher_of(facts), {}, "cpu", 1)) == 3


def test_no_rows_and_no_positions_are_said(tmp_path: Path) -> None:
    facts = DataFacts.of({**lm_facts().as_dict(), "splits": {"train": {"rows": 0, "tokens": 0, "parts": 0}}})
    with pytest.raises(DataError, match="no rows to measure"):
        _ = HeldBack(Folder(str(tmp_path)), facts, 8, 0).split
    with pytest.raises(StoreError, match="no scored positions"):
        measure([], [])


def test_a_page_of_another_plan_or_a_changed_one_is_not_read(tmp_path: Path) -> None:
    page, plan = page_of(tmp_path, table_facts(), DenseCodec(), positions=4)
    store = Folder(str(tmp_path / "store"))
    assert read(store) is None
    store.write_json(FIDELITY, page)
    assert read(store, plan) == page
    store.write_json(FIDELITY, {**page, "plan": "another"})
    assert read(store) is None, "its digest is of another plan"
    store.write_json(FIDELITY, {**page, "positions": 5})
    assert read(store) is None
    for damaged in (b"", b"[]", b"{", b'{"version": 1}', b"\xff"):
        store.write(FIDELITY, damaged)
        assert read(store) is None


def test_a_capture_actor_measures_with_the_teacher_that_it_holds(tmp_path: Path) -> None:
    facts, root = lm_facts(), Folder(str(tmp_path))
    make_data(root / "data", facts)
    save_model(teacher_of(facts), root / "teacher", facts, root / "data")
    plan = StorePlan.make(facts, HybridCodec(8, 4), "teacher-1", outputs=VOCABULARY)
    plan.save(root / "store")
    worker = CaptureWorker(CaptureTask(root / "teacher", root / "data", root / "store", 64, "fp32", 1, 0, 12))
    told = worker.run(FIDELITY)
    page = read(root / "store", plan)
    assert page is not None and page["positions"] == 12 and told == numbers(page)
    assert worker.run(0)["rows"] == 3, "and captures as before"


@pytest.fixture
def workdir(tmp_path: Path) -> Folder:
    """A workdir with data, a teacher, its store and a student."""
    facts, root = lm_facts(), Folder(str(tmp_path))
    make_data(root / "data", facts)
    for seed, place in enumerate(("teacher/model", "student/1/model")):
        save_model(teacher_of(facts, seed), root / place, facts, root / "data")
    make_store(root / "store", facts, root / "data", HybridCodec(8, 4))
    made = StorePlan.make(facts, HybridCodec(8, 4), model_digest(root / "teacher" / "model"), outputs=VOCABULARY)
    made.save(root / "store")
    return root


def test_the_command_measures_again_beside_the_store(workdir: Folder) -> None:
    done = CliRunner().invoke(app, ["store", "fidelity", f"{workdir}/store", "--positions", "9"])
    assert done.exit_code == 0, done.output
    assert "hybrid 8+4 (this)" in done.output and "fidelity.png" in done.output
    page = read(workdir / "store")
    assert page is not None and page["students"] == [RANDOM, "student/1"] and page["positions"] == 9
    assert (workdir / "store").read("fidelity.png").startswith(b"\x89PNG")
    given, new = fidelity_of(workdir / "store", 4, student=workdir / "student" / "1" / "model")
    assert new and given["students"] == [RANDOM, "student"]


def test_without_the_teacher_it_tells_what_was_measured(workdir: Folder) -> None:
    fidelity_of(workdir / "store", 5)
    (workdir / "teacher" / "model").clear()
    done = CliRunner().invoke(app, ["store", "fidelity", f"{workdir}/store"])
    assert done.exit_code == 0 and "measured at capture" in done.output and "at 5 train positions" in done.output
    (workdir / "store").remove(FIDELITY)
    with pytest.raises(StoreError, match="nothing was measured"):
        fidelity_of(workdir / "store", 5)


def test_another_teacher_or_student_is_refused(workdir: Folder) -> None:
    facts = lm_facts()
    save_model(teacher_of(facts, seed=7), workdir / "teacher" / "model", facts, workdir / "data")
    with pytest.raises(StoreError, match="another teacher"):
        fidelity_of(workdir / "store", 5)
    with pytest.raises(ModelError, match="no complete model"):
        fidelity_of(again(workdir), 5, student=Folder(f"{workdir}/nowhere"))


def again(workdir: Folder) -> Folder:
    """The store with the plan of the teacher that lies there now."""
    digest = model_digest(workdir / "teacher" / "model")
    StorePlan.make(lm_facts(), HybridCodec(8, 4), digest, outputs=VOCABULARY).save(workdir / "store")
    return workdir / "store"
