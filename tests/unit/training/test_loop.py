"""The loop on one rank: bad steps stopped, left out or rolled back, samples named; looks at the held-out split."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_cases import BATCH, FACTS, ROWS, Said, rows, training

from distill_jobs.errors import TrainingError
from distill_jobs.spec.gate import Gate
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.training.guard import FEWEST
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Columns, Source
from distill_jobs.training.validation import validate

pytestmark = pytest.mark.usefixtures("group")

BAD_ROW = 41


def not_a_number(features: np.ndarray) -> None:
    features[BAD_ROW, 2] = np.nan


def far_away(features: np.ndarray) -> None:
    features[BAD_ROW] *= -3000.0


def bad_steps(loop: Loop) -> list[dict[str, Any]]:
    return [entry for entry in loop.progress.history if "bad" in entry]


def steps_with(loop: Loop, row: int) -> list[int]:
    return [step for step in range(1, loop.steps + 1) if row in loop.order.take((step - 1) * BATCH, BATCH)]


def weights(loop: Loop) -> torch.Tensor:
    state = loop.engine.full_state()
    assert state is not None
    return torch.cat([tensor.flatten() for tensor in state.values()])


def test_a_bad_sample_is_named_where_the_run_stops(tmp_path: Path) -> None:
    with training(rows(not_a_number), tmp_path) as loop:
        before = weights(loop)
        with pytest.raises(TrainingError) as caught:
            loop.run()
        step = steps_with(loop, BAD_ROW)[0]
        assert f"loss is nan at step {step} (samples {BAD_ROW + 1000});" in str(caught.value)
        assert torch.isfinite(weights(loop)).all() and (step == 1 or not torch.equal(before, weights(loop)))


def test_skipped_steps_move_nothing_and_are_told(tmp_path: Path) -> None:
    with training(rows(not_a_number), tmp_path, on_bad_step={"action": "skip"}) as loop:
        loop.run()
        steps = steps_with(loop, BAD_ROW)
        assert len(steps) == 3 and loop.engine.steps == loop.steps - 3
        assert [entry["step"] for entry in bad_steps(loop)] == steps
        assert all(entry["samples"] == [BAD_ROW + 1000] and entry["bad"] == "loss" for entry in bad_steps(loop))
        assert torch.isfinite(weights(loop)).all()
        assert isinstance(loop.rank, Said)
        told = [report for report in loop.rank.reports if "bad_steps" in report]
        assert [report["bad_steps"] for report in told] == [1, 2, 3]
        assert told[0]["bad"] == f"the loss is nan at step {steps[0]} (samples {BAD_ROW + 1000}): left out"


def test_more_bad_steps_than_allowed_end_the_run(tmp_path: Path) -> None:
    with training(rows(not_a_number), tmp_path, on_bad_step={"action": "skip", "max": 2}) as loop:
        with pytest.raises(TrainingError, match="there were 2 bad steps before"):
            loop.run()
        assert loop.step == steps_with(loop, BAD_ROW)[2]


def test_a_rollback_goes_on_without_the_offending_sample(tmp_path: Path) -> None:
    with training(rows(not_a_number), tmp_path, on_bad_step={"action": "rollback"}) as loop:
        loop.run()
        [entry] = bad_steps(loop)
        first = steps_with(loop, BAD_ROW)[0]
        assert entry["step"] == first and entry["samples"] == [BAD_ROW + 1000]
        assert entry["back_to"] == (first - 1) // 4 * 4
        assert loop.omitted.rows == [BAD_ROW] and not loop.omitted.batches
        assert loop.step == loop.engine.steps == loop.steps
        assert loop.progress.rows == (loop.steps + first - entry["back_to"]) * BATCH
        rolled_back = weights(loop)
    # As if the sample had never been there to be scored.
    with training(rows(), tmp_path / "other") as loop:
        loop.omitted.rows = [BAD_ROW]
        loop.run()
        assert torch.equal(weights(loop), rolled_back)


def test_a_spike_is_left_out_and_its_sample_named(tmp_path: Path) -> None:
    late = next(step for step in steps_with_row() if step > FEWEST)
    with training(rows(far_away), tmp_path, steps=30, on_bad_step={"action": "skip", "spike": 8.0}) as loop:
        # It is not looked for before there are losses to compare with; so the row comes in late.
        loop.omitted.rows = [BAD_ROW]
        seen = loop.omitted.take
        loop.omitted.take = lambda order, consumed, count: (  # type: ignore[method-assign]
            (consumed, order.take(consumed, count), np.ones(count, dtype=bool))
            if consumed == (late - 1) * BATCH
            else seen(order, consumed, count)
        )
        loop.run()
        [entry] = bad_steps(loop)
        assert entry["step"] == late and entry["bad"] == "spike" and entry["samples"] == [BAD_ROW + 1000]
        assert entry["loss"] > 8 and loop.engine.steps == 29


def steps_with_row() -> list[int]:
    order = rows().order(5)
    return [step for step in range(1, 31) if BAD_ROW in order.take((step - 1) * BATCH, BATCH)]


def test_a_gradient_that_is_not_finite_passes_over_the_step_in_a_rollback(tmp_path: Path) -> None:
    with training(rows(), tmp_path, on_bad_step={"action": "rollback"}) as loop:
        backward, calls = loop.engine.backward, [0]

        def spoilt(loss: torch.Tensor) -> None:
            backward(loss)
            calls[0] += 1
            if calls[0] == 12:  # of the sixth step
                next(p for p in loop.engine._module.parameters() if p.grad is not None).grad.fill_(math.inf)  # type: ignore[union-attr]

        loop.engine.backward = spoilt  # type: ignore[method-assign]
        loop.run()
        [entry] = bad_steps(loop)
        assert entry == {**entry, "step": 6, "bad": "gradient", "samples": [], "back_to": 4}
        assert loop.omitted.batches == [5 * BATCH] and loop.consumed == (loop.steps + 1) * BATCH


def test_looks_at_the_held_out_split_come_as_often_as_asked(tmp_path: Path) -> None:
    with training(rows(), tmp_path, rows(count=30), evaluate_every=5) as loop:
        loop.run()
        looks = [entry for entry in loop.progress.history if "validation" in entry]
        assert [entry["step"] for entry in looks] == [5, 10, 15, 20, 24]
        assert looks[-1]["validation"] < looks[0]["validation"]
    with training(rows(), tmp_path / "epoch", rows(count=30)) as loop:
        loop.run()
        looks = [entry for entry in loop.progress.history if "validation" in entry]
        assert [entry["step"] for entry in looks] == [8, 16, 24], f"one look for each {ROWS} rows"


def test_stopping_early_keeps_the_best(tmp_path: Path) -> None:
    stopping = {"evaluate_every": 2, "early_stopping": {"patience": 2}, "steps": 200, "learning_rate": 0.3}
    with training(rows(count=16), tmp_path, rows(count=300), **stopping) as loop:
        progress = loop.run()
        looks = {entry["step"]: entry["validation"] for entry in progress.history if "validation" in entry}
        assert loop.step == progress.best_step + 4 < 200
        assert progress.best_loss == looks[progress.best_step] == min(looks.values())
        assert loop.keeper is not None
        loop.keeper.load_best(loop.engine, progress.best_step)
        again = validate(loop.engine, loop.score, loop.validation, 4, loop.rank)
        assert again.loss == pytest.approx(progress.best_loss, rel=1e-6)
        with torch.no_grad():
            batch, _ = loop.validation.load(np.arange(300), "cpu")
            guessed = loop.engine.forward(**batch.inputs).argmax(-1)
        assert again.accuracy == pytest.approx((guessed == batch.labels).double().mean().item(), abs=1e-12)


def test_the_history_tells_rates_and_the_time_spent_waiting(tmp_path: Path) -> None:
    with training(rows(), tmp_path) as loop:
        loop.run()
        entries = [entry for entry in loop.progress.history if "hard" in entry]
        assert len(entries) == loop.steps
        for entry in entries:
            assert 0 <= entry["waiting"] <= 1 and entry["positions_per_second"] > 0 and entry["memory_bytes"] > 1e6
            assert entry["tokens_per_second"] == entry["positions_per_second"], "each row is scored once"
            assert entry["loss"] == entry["hard"] and "mfu" not in entry
        assert entries[0]["learning_rate"] == loop.engine.config.learning_rate_at(0)


def test_a_state_taken_in_mid_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    with training(rows(not_a_number), tmp_path, on_bad_step={"action": "rollback"}) as loop:
        loop.run()
        whole, events = weights(loop), bad_steps(loop)
        assert loop.keeper is not None
        loop.keeper.wait()
    with training(rows(not_a_number), tmp_path, on_bad_step={"action": "rollback"}) as loop:
        assert loop.keeper is not None
        found = loop.keeper.restore(loop.engine)
        assert found is not None
        loop.restore(found["loop"])
        assert 0 < loop.step < loop.steps and loop.omitted.rows == [BAD_ROW]
        loop.run()
        assert torch.equal(weights(loop), whole) and bad_steps(loop) == events


def test_the_history_tells_the_share_of_gated_positions(tmp_path: Path) -> None:
    """A teacher who always says the first class is wrong about all others."""
    source = rows()

    def says_a(columns: Columns, _: Any, __: torch.Tensor) -> TeacherSignal:
        logits = torch.tensor([[3.0, 0.0, 0.0]]).expand(len(columns["label"]), -1)
        codec, gold = DenseCodec(), torch.from_numpy(columns["label"])
        return codec.decode(codec.encode(logits, gold), 3)

    train = Source(FACTS, source.rows, source.columns, says_a)
    wrong = float((source.columns(np.arange(source.rows))["label"] != 0).mean())
    losses = {}
    for name in ("none", "drop"):
        gate = Gate.model_validate(name).of("classification")
        taught = {"role": "student", "alpha": 0.9, "temperature": 2.0, "gate": gate}
        with training(train, tmp_path / name, taught=taught) as loop:
            loop.run()
            entries = [entry for entry in loop.progress.history if "hard" in entry]
        shares = [entry["gated"] for entry in entries if "gated" in entry]
        assert len(shares) == (0 if name == "none" else loop.steps)
        # Three epochs of 64 rows in 24 batches of 8.
        assert name == "none" or float(np.mean(shares)) == pytest.approx(wrong, abs=1e-6)
        losses[name] = entries[-1]["hard"]
    assert losses["drop"] < losses["none"], "what the teacher gets wrong is learnt from the labels"
