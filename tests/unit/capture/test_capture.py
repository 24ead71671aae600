"""What a worker commits: the teacher's own distributions, whatever the batches, windows and chunks were."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import LENGTH, columns_of, fail_with, gives, lm_facts, make_task, raises, table_facts, text_facts

from cluster import notice
from cluster.errors import FileError
from cluster.notice import HandBack
from distill_jobs.capture import batches
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.batch import make_batch
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import CaptureError
from distill_jobs.models.files import load_model
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    notice.forget()
    assert not [thread for thread in threading.enumerate() if thread.name in ("ahead", "behind")]
    assert not list(tmp_path.rglob("*.tmp"))


def finished(task: CaptureTask) -> LogitStore:
    """Declare the store complete, prove it, and open it."""
    plan = StorePlan.load(task.store)
    shas = TableReader(task.data / "train").facts["part_sha256"]
    finish(task.store, plan, Commits.open(task.store / PARTS, plan.parts, lambda part: plan.part_inputs(shas[part])))
    assert verify(task.store, task.data) == []
    return LogitStore.open(task.store, task.data)


def expected(task: CaptureTask, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probabilities [N, V] at the scored positions of some rows, from the model's own whole forward, row by row."""
    facts, table, teacher = DataFacts.load(task.data), TableReader(task.data / "train"), load_model(task.teacher)
    found, gold = [], []
    for row in rows:
        batch = make_batch(table.take(np.array([row])), facts)
        with torch.inference_mode():
            logits = teacher(**batch.inputs).flatten(0, -2)[:, : facts.targets].float()
        keep = batch.keep.flatten()
        found.append(logits.log_softmax(-1)[keep])
        gold.append(batch.labels.flatten()[keep])
    return torch.cat(found), torch.cat(gold)


def stored(store: LogitStore, rows: int) -> Any:
    """The signal at the scored positions of the first ``rows`` rows of a store."""
    columns = store.take(np.arange(rows))
    batch = make_batch(columns, store.facts)
    return store.signal(columns, "cpu", batch.keep)


@pytest.mark.parametrize("kind", [lm_facts, text_facts, table_facts])
@pytest.mark.parametrize("chunk", [None, 7, 0])
def test_what_is_stored_is_what_the_teacher_says(tmp_path: Path, kind: Any, chunk: int | None) -> None:
    facts = kind(40, parts=2)
    task = make_task(tmp_path, facts, columns_of(facts, 40), chunk_positions=chunk)
    worker = CaptureWorker(task)
    told = [worker.run(part) for part in range(2)]
    assert [t["rows"] for t in told] == [20, 20] and [t["quarantined"] for t in told] == [0, 0]
    logprob, gold = expected(task, np.arange(40))
    signal = stored(finished(task), 40)
    torch.testing.assert_close(signal.head_logprob, logprob, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(signal.gold_logprob, logprob.gather(1, gold[:, None])[:, 0], atol=1e-3, rtol=0)


def test_batches_windows_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = lm_facts(24)
    columns = columns_of(facts, 24)
    signals = []
    for number, (tokens, chunk, window) in enumerate([(4096, None, 32 << 20), (50, 3, 1 << 13), (1, 1, 1)]):
        monkeypatch.setattr(batches, "TARGET_BYTES", window)
        task = make_task(
            tmp_path / str(number), facts, columns, HybridCodec(8, 4), batch_tokens=tokens, chunk_positions=chunk
        )
        CaptureWorker(task).run(0)
        signals.append(stored(finished(task), 24))
    for other in signals[1:]:
        torch.testing.assert_close(other.gold_logprob, signals[0].gold_logprob, atol=2e-3, rtol=0)
        # The draws are the position's own. Where two logits are alike to the last bits their order may differ.
        for name in ("head_ids", "draw_ids"):
            assert (getattr(other, name) == getattr(signals[0], name)).float().mean() > 0.99


def test_the_same_sizes_give_the_same_bytes(tmp_path: Path) -> None:
    facts = lm_facts(30)
    made = [
        CaptureWorker(make_task(tmp_path / name, facts, columns_of(facts, 30), HybridCodec(8, 4))).run(0)["record"]
        for name in ("a", "b")
    ]
    assert made[0]["sha256"] == made[1]["sha256"] and made[0]["file"] != made[1]["file"]
    assert made[0]["extra"]["kind"] == "actors"


def test_positions_that_are_not_scored_hold_zeros(tmp_path: Path) -> None:
    facts = lm_facts(10)
    task = make_task(tmp_path, facts, columns_of(facts, 10), HybridCodec(8, 4))
    CaptureWorker(task).run(0)
    columns = finished(task).take(np.arange(10))
    batch = make_batch(columns, facts)
    codes = columns["t.ids"].reshape(10 * LENGTH, -1)
    keep = batch.keep.flatten().numpy()
    assert not codes[~keep].any() and codes[keep].any(axis=1).all()


def test_a_part_without_rows_is_committed(tmp_path: Path) -> None:
    facts = replace(table_facts(4, parts=2), splits={"train": {"rows": 0, "tokens": 0, "parts": 1}})
    task = make_task(tmp_path, facts, columns_of(facts, 1))
    told = CaptureWorker(task).run(0)
    assert told["rows"] == 0 and told["record"]["file"] is None


def test_a_part_that_somebody_committed_is_taken_as_it_is(tmp_path: Path) -> None:
    facts = table_facts(20)
    task = make_task(tmp_path, facts, columns_of(facts, 20))
    first = CaptureWorker(task).run(0)
    again = CaptureWorker(task)
    core = fail_with(again, raises(AssertionError("nothing may be scored")))
    # Who computed nothing says so, for the ledger.
    assert first["flops"] > 0
    assert again.run(0) == {**first, "flops": 0.0} and core.calls == []


def test_the_driver_is_told_how_far_it_is(tmp_path: Path) -> None:
    facts = lm_facts(40, parts=2)
    columns = columns_of(facts, 40)
    task = make_task(tmp_path, facts, columns)
    worker = CaptureWorker(task)
    worker.run(0)
    half = notice.told()
    worker.run(1)
    whole = notice.told()
    assert half["tokens"] == columns["tokens"][:20].sum() and whole["tokens"] == columns["tokens"].sum()
    assert 0 < half["teacher_seconds"] < whole["teacher_seconds"] <= whole["busy_seconds"]
    assert 0 <= whole["padding"] <= 7 * 40, "sorted by length, rows are padded by few positions"


def test_an_actor_that_has_to_go_hands_its_part_back(tmp_path: Path) -> None:
    facts = lm_facts(40)
    task = make_task(tmp_path, facts, columns_of(facts, 40))
    worker = CaptureWorker(task)
    notice.leave(0)
    with pytest.raises(HandBack, match="part 0 was 0 of 40 rows"):
        worker.run(0)
    assert not (tmp_path / "store" / PARTS).exists() or not list((tmp_path / "store" / PARTS).iterdir())
    notice.forget()
    assert worker.run(0)["rows"] == 40, "and is able to go on"


def test_it_finishes_where_there_is_time_for_that(tmp_path: Path) -> None:
    facts = lm_facts(40)
    worker = CaptureWorker(make_task(tmp_path, facts, columns_of(facts, 40)))
    scoring = worker.tools.scoring

    class LeavesAtTheSecondBatch:
        calls = 0

        def __call__(self, group: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                notice.leave(3600)
            return scoring(group)

    worker.tools.scoring = LeavesAtTheSecondBatch()  # type: ignore[assignment]
    assert worker.run(0)["rows"] == 40


@pytest.mark.parametrize("codec", [DenseCodec(), HybridCodec(2, 1)])
@pytest.mark.parametrize("fail", [gives(float("nan")), gives(float("inf")), raises(ValueError("odd row"))])
def test_bad_rows_go_into_quarantine_and_the_rest_is_committed(tmp_path: Path, codec: Codec, fail: Any) -> None:
    facts = table_facts(50)
    columns = columns_of(facts, 50)
    bad = [3, 17, 18, 49]
    columns["features"][bad, 0] = 99.0
    columns["features"][20, 1] = np.nan
    task = make_task(tmp_path, facts, columns, codec, batch_tokens=16)
    worker = CaptureWorker(task)
    fail_with(worker, fail)
    told = worker.run(0)
    assert told["rows"] == 45 and told["quarantined"] == 5
    reasons = dict(told["quarantine_samples"])
    assert "features hold nan at place 1" in reasons["part0.jsonl:20"]
    wanted = "odd row" if "odd" in reasons["part0.jsonl:3"] else "not finite"
    assert all(wanted in reasons[f"part0.jsonl:{row}"] for row in bad)
    store = finished(task)
    kept = np.array([row for row in range(50) if row not in [*bad, 20]])
    np.testing.assert_array_equal(store.take(np.arange(45))["sample_id"], kept)
    logprob, gold = expected(task, kept)
    torch.testing.assert_close(
        stored(store, 45).gold_logprob, logprob.gather(1, gold[:, None])[:, 0], atol=2e-3, rtol=0
    )


def test_more_bad_rows_than_allowed_are_named(tmp_path: Path) -> None:
    facts = table_facts(50)
    columns = columns_of(facts, 50)
    columns["features"][[5, 6, 7], 0] = 99.0
    worker = CaptureWorker(make_task(tmp_path, facts, columns, quarantine_limit=2))
    said = r"3 or more rows of part 0.*max_quarantined allows 2: sample 5 \(part0.jsonl:5\)"
    for fail in (raises(ValueError("odd row")), gives(float("nan"))):
        core = worker.teacher.core
        fail_with(worker, fail)
        with pytest.raises(CaptureError, match=said):
            worker.run(0)
        worker.teacher.core = core
    columns["features"][:, 0] = np.inf
    unscorable = CaptureWorker(make_task(tmp_path / "all", facts, columns, quarantine_limit=49))
    with pytest.raises(CaptureError, match="50 or more rows"):
        unscorable.run(0)
    allowed = make_task(tmp_path / "some", facts, columns)
    assert CaptureWorker(allowed).run(0)["record"]["file"] is None, "no limit, no rows"


def test_a_storage_that_fails_ends_the_attempt(tmp_path: Path) -> None:
    facts = lm_facts(40)
    task = make_task(tmp_path, facts, columns_of(facts, 40))
    worker = CaptureWorker(task)
    (tmp_path / "store" / PARTS).write_text("a file where a folder should be")
    with pytest.raises(FileError):
        worker.run(0)


@pytest.mark.parametrize(
    ("how", "off"),
    [
        ({"autocast": True}, 0.05),
        # It starts a compiler, and processes that help it and stay.
        pytest.param({"compile": True}, 2e-3, marks=pytest.mark.slow),
    ],
)
def test_autocast_and_compile_say_nearly_the_same(tmp_path: Path, how: dict[str, bool], off: float) -> None:
    facts = lm_facts(12)
    task = make_task(tmp_path, facts, columns_of(facts, 12), **how)
    task = replace(task, precision="bf16" if "autocast" in how else "fp32")
    worker = CaptureWorker(task)
    worker.run(0)
    lengths = [g.longest for w in batches.windows(worker.table.batches(0), facts, {}) for g in _groups(worker, w)]
    assert set(lengths) == {LENGTH} if task.compile else len(set(lengths)) > 1, "few shapes for the compiler"
    logprob, gold = expected(task, np.arange(12))
    signal = stored(finished(task), 12)
    torch.testing.assert_close(signal.gold_logprob, logprob.gather(1, gold[:, None])[:, 0], atol=off, rtol=off)


def _groups(worker: CaptureWorker, window: batches.Window) -> Any:
    return batches.groups(window, lambda: worker.sizes.tokens, worker.tools.trim)
