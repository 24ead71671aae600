"""What a trial reports of its training, without one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning_cases import job

from cluster.files import Folder
from distill_jobs.errors import TrainingError
from distill_jobs.spec.tune import SEARCH
from distill_jobs.tuning import trial
from distill_jobs.tuning.space import student_space
from distill_jobs.tuning.trial import TrialTask, run_trial


def test_a_look_at_a_loss_that_is_not_finite_leaves_it_to_the_training_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(_: Any, arm: Any, on_report: Callable[[dict[str, Any]], None]) -> None:
        on_report({"arm": arm.name, "step": 1, "of": 4, "validation": 0.7, "validation_accuracy": 0.5})
        on_report({"arm": arm.name, "step": 2, "of": 4, "loss": 0.6})
        on_report({"arm": arm.name, "step": 3, "of": 4, "validation": math.nan, "validation_accuracy": 0.5})
        raise TrainingError("validation loss is nan")

    monkeypatch.setattr(trial, "_train", train)
    space, looks = student_space(job(tmp_path), SEARCH), list[tuple[float, float]]()
    task = TrialTask(space, "digest", Folder(str(tmp_path)), 1, "accuracy", 40, None)
    with pytest.raises(TrainingError):
        run_trial(task, "one", space.parameters(), lambda share, score, _: looks.append((share, score)))
    assert looks == [(0.25, 0.5)]
