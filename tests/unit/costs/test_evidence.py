"""What is gathered from a workdir's files."""

from pathlib import Path

import pytest

from cluster.files import Folder
from distill_jobs.costs.evidence import _tuned, gather
from distill_jobs.costs.options import _trials
from distill_jobs.spec import Job, parse_job


def job(workdir: Path, gates: list[str]) -> Job:
    model, train = {"mlp": {"hidden": [4]}}, {"epochs": 1, "batch_size": 8}
    return parse_job(
        {
            "name": "small",
            "task": "classification",
            "workdir": str(workdir),
            "data": {"train": "rows.parquet", "label": "y", "features": {"tabular": {"numeric": ["x"]}}},
            "teacher": {"model": model, "train": train},
            "student": {"model": model, "train": train},
            "audit": {"gates": gates},
            "seeds": [0, 1],
        }
    )


@pytest.mark.parametrize(("gates", "arms"), [([], 4), (["drop", "swap"], 8)])
def test_training_alone_is_an_arm_of_all_that_are_predicted_together(
    tmp_path: Path, gates: list[str], arms: int
) -> None:
    stages = [{"stage": "teacher", "usd": 3.0}, {"stage": "capture", "usd": 1.0}, {"stage": "train", "usd": 2.0 * arms}]
    Folder(str(tmp_path)).write_json("plan.json", {"stages": stages})
    evidence = gather(job(tmp_path, gates), Folder(str(tmp_path)))
    assert evidence.predicted and (evidence.extra_usd, evidence.alone_usd) == (4.0, 2.0)


def test_students_of_a_tuning_are_those_that_were_taught(tmp_path: Path) -> None:
    assert _trials(Folder(str(tmp_path))) == 0
    trials = [{"role": role} for role in ("student", "baseline", "student")]
    Folder(str(tmp_path)).write_json("tune/trials.json", {"trials": trials})
    assert _trials(Folder(str(tmp_path))) == 2


def test_tuned_is_what_was_searched(tmp_path: Path) -> None:
    small, rate, alpha = job(tmp_path, []), "student.train.learning_rate", "distill.alpha"
    trials = {"student": {"settings": {rate: small.student.train.learning_rate}}, "baseline": None}
    assert _tuned(small, trials, "student", (rate,)) and not _tuned(small, trials, "student", (alpha,))
    assert not _tuned(small, trials, "baseline", (rate,)) and not _tuned(small, None, "student", (rate,))
    trials["student"] = {"settings": {alpha: 0.123}}
    assert not _tuned(small, trials, "student", (alpha,)), "the job has another"
