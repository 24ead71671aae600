"""Runs that are killed in the middle: they go on from a checkpoint, to the very weights of an undisturbed run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import Fate, fate_of, prepared, read, run, weights

from cluster.errors import GangError
from cluster.gang import Gang
from cluster.session import Session
from distill_jobs.spec import Job

STEPS = 6


@pytest.fixture(scope="module")
def job(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return prepared(session, tmp_path_factory.mktemp("resume"), dropout=0.2, steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(session: Session, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Fate:
    """A run on two ranks that nothing befalls, and its checkpoints gone."""
    fate = fate_of(job, tmp_path_factory.mktemp("undisturbed"), 2)
    run(session, fate, Gang(2))
    assert not fate.task.arms[0].folder.path("checkpoints").exists()
    return fate


def test_a_killed_rank_costs_no_step(session: Session, job: Job, undisturbed: Fate, tmp_path: Path) -> None:
    fate = fate_of(job, tmp_path / "killed", 2, kill=(1, 5))
    reports: list[dict[str, Any]] = []
    record, notes = run(session, fate, Gang(2, max_failures=1), reports.append)
    assert (tmp_path / "killed" / "killed").exists() and any("starts again" in note for note in notes)
    resumed = [report["step"] for report in reports if report.get("resumed")]
    assert len(resumed) == 1 and resumed[0] in (2, 4)
    found, expected = weights(fate), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # What is trained again is the same again.
    once = dict(map(tuple, read(undisturbed.notes / "rows.jsonl")))
    assert all(once[consumed] == rows for consumed, rows in read(fate.notes / "rows.jsonl"))
    history = [entry["step"] for entry in fate.task.arms[0].folder.read_json("history.json")]
    assert history == sorted(history)
    assert record["usage"]["core_seconds"] > 0 and record["usage"]["rows"] == STEPS * 8
    assert not fate.task.arms[0].folder.path("checkpoints").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_ranks(
    session: Session, job: Job, undisturbed: Fate, tmp_path: Path
) -> None:
    fate = fate_of(job, tmp_path / "stopped", 2, kill=(0, 5))
    with pytest.raises(GangError, match="the process of rank 0 died"):
        run(session, fate, Gang(2))
    alone = fate_of(job, tmp_path / "stopped", 1, session="two")
    begun = len(read(alone.notes / "steps.jsonl"))
    record, _ = run(session, alone, Gang(1))
    steps = [entry["step"] for entry in read(alone.notes / "steps.jsonl")[begun:]]
    assert steps in ([3, 4, 5], [5])
    # Dropout differs between one rank and two, so that the weights do; the samples are the same.
    once = dict(map(tuple, read(undisturbed.notes / "rows.jsonl")))
    assert all(once[consumed] == rows for consumed, rows in read(alone.notes / "rows.jsonl"))
    assert record["usage"]["earlier"]["wall_seconds"] > 0
    assert record["usage"]["rows"] == STEPS * 8


_DRIVER = """
import json, sys
from pathlib import Path
from resume_cases import Gang, Session, fate_of, parse_job, run
job = parse_job(json.loads(sys.argv[1]))
with Session(cpus=2) as session:
    run(session, fate_of(job, Path(sys.argv[2]), 2, session="killed", pause=3.0), Gang(2))
"""


@pytest.mark.slow
def test_a_killed_driver_costs_no_step(session: Session, job: Job, undisturbed: Fate, tmp_path: Path) -> None:
    fate = fate_of(job, tmp_path / "driver", 2)
    spec = json.dumps(job.model_dump(mode="json", exclude_none=True))
    paths = os.pathsep.join(path for path in sys.path if path)
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, spec, str(tmp_path / "driver")], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        deadline = time.monotonic() + 300
        first = fate.task.arms[0].folder.path("checkpoints") / "step-000002.json"
        while not first.exists() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first.exists() and driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    reports: list[dict[str, Any]] = []
    record, _ = run(session, fate, Gang(2), reports.append)
    assert [report["step"] for report in reports if report.get("resumed")] in ([2], [4])
    found, expected = weights(fate), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert record["usage"]["earlier"]["wall_seconds"] > 0
