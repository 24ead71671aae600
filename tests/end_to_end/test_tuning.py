"""``distill tune`` for real: killed in mid-sweep and run again, and its best spec taken by ``distill run``."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Distill, digits_spec, write_spec

SEARCH = {
    "distill.temperature": {"uniform": [1, 6]},
    "distill.alpha": {"uniform": [0, 1]},
    "student.train.learning_rate": {"log_uniform": [1e-4, 1e-2]},
}


def tune_spec(digits: Path, workdir: Path, **tune: Any) -> dict[str, Any]:
    spec = digits_spec(digits, workdir, student__train__workers=1, student__train__epochs=2)
    return {**spec, "tune": {"search": SEARCH, "trials": 5, "finalists": 1, **tune}}


def runs_of(workdir: Path) -> dict[str, Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workdir.parent / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "digits"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_name: run for run in runs}


def stopped(spec: Path, how: int, until: Path, count: int) -> int:
    """Begin tuning, and signal the command when so many trials have ended; its exit code."""
    program = Path(sys.executable).with_name("distill")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = subprocess.Popen(
        [program, "tune", spec], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and command.poll() is None:
        ended = [p for p in until.glob("*-search-*/*.json") if '"state": "begun"' not in p.read_text()]
        if len(ended) >= count:
            break
        time.sleep(0.1)
    command.send_signal(how)
    return command.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_killed_stopped_and_run_again(digits: Path, distill: Distill, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    spec = write_spec(tmp_path / "spec.yaml", tune_spec(digits, workdir))
    work = workdir / "tune" / "work"
    assert stopped(spec, signal.SIGKILL, work, 2) == -signal.SIGKILL
    first = {p.name: p.read_text() for p in work.glob("student-search-*/*.json") if '"begun"' not in p.read_text()}
    assert stopped(spec, signal.SIGTERM, work, len(first) + 1) == 130
    statuses = {name: run.info.status for name, run in runs_of(workdir).items() if name.startswith("tune/")}
    assert "RUNNING" not in statuses.values() and "KILLED" in statuses.values() and "FINISHED" in statuses.values()
    assert any(entry["stage"] == "tune" for entry in json.loads((workdir / "ledger.json").read_text())["entries"])

    done = distill("tune", spec, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "capture" in done.stdout and "skipped" in done.stdout
    for name, text in first.items():
        [kept] = work.glob(f"student-search-*/{name}")
        assert kept.read_text() == text, "an ended trial is kept as it was"

    found = json.loads((workdir / "tune" / "trials.json").read_text())
    search = [trial for trial in found["trials"] if trial["round"] == "search"]
    assert [sum(t["role"] == role for t in search) for role in ("student", "baseline")] == [5, 5]
    assert {t["name"] for t in search if t["name"].endswith("default")} == {"student-default", "baseline-default"}
    assert all(set(t["settings"]) == {"student.train.learning_rate"} for t in search if t["role"] == "baseline")
    assert found["metric"] == "accuracy" and found["split"]["name"] == "validation"
    assert [len(f["scores"]) for f in found["student"]["finalists"]] == [2, 2]
    for trial in search:
        assert 0 < trial["score"] <= 1 and trial["usd"] > 0 and (trial["curve"] or trial["state"] == "failed")
        assert all(0 < look["share"] < 1 for look in trial["curve"])
    assert found["saved"]["against_capture_each"]["value"] == pytest.approx(
        (found["saved"]["trainings"] - 1) * found["saved"]["capture_usd"]
    )
    shares = json.loads((workdir / "tune" / "importance.json").read_text())
    assert "takes 12 trials" in shares["student"]["parameters"]["distill.alpha"]["why"]
    assert json.loads((workdir / "tune" / "surface.json").read_text())["mean"] is None

    ledger = json.loads((workdir / "ledger.json").read_text())
    [entry] = [entry for entry in ledger["entries"] if entry["stage"] == "tune"]
    assert entry["usd"] == pytest.approx(found["usd"]) and entry["usd"] == pytest.approx(
        sum(trial["usd"] for trial in found["trials"])
    )
    runs = runs_of(workdir)
    assert {f"tune/{trial['name']}" for trial in found["trials"]} <= set(runs)
    one = runs["tune/student-default"].data
    assert one.params["distill.temperature"] == "2.0" and one.tags["distill.trial"] in ("FINISHED", "PRUNED")
    assert "cost/usd" in one.metrics and "quality/validation_accuracy" in one.metrics

    again = distill("tune", spec)
    assert again.returncode == 0 and "tune         skipped" in again.stdout
    best = yaml.safe_load((workdir / "tune" / "best.yaml").read_text())
    assert best["workdir"] == str(workdir) and "learning_rate" in best["baseline"]["train"]
    ran = distill("run", workdir / "tune" / "best.yaml", timeout=280)
    assert ran.returncode == 0, ran.stderr
    for stage in ("prepare", "teacher", "capture"):
        assert f"{stage:<12} skipped" in ran.stdout, ran.stdout
    assert (workdir / "report.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_that_are_gangs_of_two(digits: Path, distill: Distill, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    tree = tune_spec(digits, workdir, trials=2, baseline=False, early_stopping=None)
    tree["student"]["train"]["workers"], tree["seeds"] = 2, [0]
    done = distill("tune", write_spec(tmp_path / "spec.yaml", tree), timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "tune" / "trials.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 4 and found["baseline"] is None
    assert "nobody can tell" in done.stdout or "No settings tried" in done.stdout


def test_what_is_wrong_is_told_before_anything_is_spent(digits: Path, distill: Distill, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    spec = write_spec(tmp_path / "spec.yaml", tune_spec(digits, workdir))
    wrong = distill("tune", spec, "--set", "tune.search={distill.temprature: {uniform: [1, 2]}}")
    assert wrong.returncode == 2 and "did you mean temperature" in wrong.stderr and wrong.stderr.count("\n") == 1
    assert not workdir.exists()
