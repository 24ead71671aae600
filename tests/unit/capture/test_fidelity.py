"""An actor's measurement: rows that the teacher can't score are left out of it, and never fail a capture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import columns_of, fail_with, gives, lm_facts, make_task, raises, table_facts

from distill_jobs.capture.worker import CaptureWorker
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.fidelity.held_back import HeldBack
from distill_jobs.store.fidelity.measure import FIDELITY, numbers, read, why_unmeasured

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fail", [gives(float("nan")), raises(ValueError("odd row"))])
def test_bad_rows_are_left_out_and_counted(tmp_path: Path, fail: Any) -> None:
    facts = table_facts(20)
    columns = columns_of(facts, 20)
    columns["features"][[4, 11], 0] = 99.0
    columns["features"][7, 2] = np.inf
    task = make_task(tmp_path, facts, columns, batch_tokens=8, fidelity_positions=20)
    worker = CaptureWorker(task)
    fail_with(worker, fail)
    told = worker.run(FIDELITY)
    page = read(task.store)
    assert page is not None and (page["positions"], page["rows_left_out"]) == (17, 3)
    assert told == numbers(page) and told["t1_kl"] < 1e-3
    assert why_unmeasured(task.store) is None


def test_nothing_to_measure_on_leaves_one_reason(tmp_path: Path) -> None:
    facts = table_facts(20)
    columns = columns_of(facts, 20)
    columns["features"][:, 0] = 99.0
    task = make_task(tmp_path, facts, columns, fidelity_positions=20)
    worker = CaptureWorker(task)
    fail_with(worker, raises(ValueError("odd row")))
    assert worker.run(FIDELITY) == {}
    assert read(task.store) is None
    assert why_unmeasured(task.store) == (
        "there are no scored positions to measure on; sample 0 (part0.jsonl:0): ValueError: odd row"
    )


def test_faults_of_the_machine_are_no_reason(tmp_path: Path) -> None:
    facts = table_facts(20)
    columns = columns_of(facts, 20)
    columns["features"][3, 0] = 99.0
    worker = CaptureWorker(make_task(tmp_path, facts, columns, fidelity_positions=20))
    fail_with(worker, raises(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        worker.run(FIDELITY)


def test_memory_that_runs_out_halves_the_rows(tmp_path: Path) -> None:
    facts = lm_facts(24)
    task = make_task(tmp_path, facts, columns_of(facts, 24), HybridCodec(8, 4), fidelity_positions=30)
    worker = CaptureWorker(task)
    held = HeldBack(task.data, facts, 30, seed=0)

    def found(most: int) -> torch.Tensor:
        def ask(inputs: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
            if len(inputs["input_ids"]) > most:
                raise NO_MEMORY
            return worker.tools.scoring.ask(inputs, chosen)

        return torch.cat([chunk.logits for chunk in held.chunks(worker.teacher, {}, "cpu", 12, ask)])

    # The same positions, from the head apart as from the whole forward.
    whole = torch.cat([chunk.logits for chunk in held.chunks(worker.teacher, {}, "cpu", 12)])
    torch.testing.assert_close(found(12), whole)
    torch.testing.assert_close(found(1), whole)
    with pytest.raises(torch.OutOfMemoryError):
        found(0)
