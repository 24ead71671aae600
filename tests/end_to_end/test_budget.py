"""A budget on a real job: it stops in the midst of training, says what to do, and goes on from there with more."""

import json
import re
from pathlib import Path

import pytest
from conftest import Distill, digits_spec, write_spec

from cluster.files import Folder
from distill_jobs.costs.ledger import Ledger, unfinished

DOLLAR_A_CORE_SECOND = {"override": {"cpu_hour": 3600.0}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_budget_stops_training_and_a_larger_one_goes_on(digits: Path, distill: Distill, tmp_path: Path) -> None:
    train = {"epochs": 1e6, "batch_size": 64, "learning_rate": 0.003}
    changes = {"student__train": train, "teacher__train": {**train, "epochs": 1.0}, "costs": DOLLAR_A_CORE_SECOND}
    spec = write_spec(tmp_path / "digits.yaml", digits_spec(digits, tmp_path / "digits", seeds=[0], **changes))
    for verb in ("prepare", "teach", "capture"):
        assert distill(verb, spec).returncode == 0
    workdir = Folder(str(tmp_path / "digits"))
    store = (tmp_path / "digits/store/stage.json").read_bytes()
    steps = []
    for _ in range(2):
        spent = Ledger(workdir).spent()
        budget = spent + 120.0
        stopped = distill("train", spec, "--set", f"costs.budget_usd={budget}")
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
        assert re.search(r"stopped before costs\.budget_usd is exceeded: of \$.* of it on train, and", stopped.stderr)
        known = Ledger(workdir).find(unfinished("train"))
        assert known is not None and spent < Ledger(workdir).spent() <= budget
        records = (tmp_path / "digits/student/0/checkpoints").glob("step-*.json")
        steps.append(max(json.loads(path.read_text())["step"] for path in records))
    # The second went on from what the first had saved when it was stopped.
    assert f"student/0 goes on from step {steps[0]:,}" in stopped.stdout and steps[1] > steps[0]
    assert (tmp_path / "digits/store/stage.json").read_bytes() == store


@pytest.mark.slow
def test_a_hopeless_budget_is_refused_before_anything_is_started(
    digits: Path, distill: Distill, tmp_path: Path
) -> None:
    changes = {"costs": {**DOLLAR_A_CORE_SECOND, "budget_usd": 1.0}}
    spec = write_spec(tmp_path / "digits.yaml", digits_spec(digits, tmp_path / "digits", **changes))
    refused = distill("run", spec)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "is spent" in refused.stderr and "costs.budget_usd" in refused.stderr
    assert not (tmp_path / "digits/data/stage.json").exists()
