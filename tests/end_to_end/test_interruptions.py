"""Stopped by SIGTERM, or killed outright, in the middle of a capture: the same command goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import Distill, digits_spec, write_spec

SLOW_TEACHER = """
import time, torch
class Slow(torch.nn.Linear):
    def forward(self, pixels):
        time.sleep(0.3)
        return super().forward(pixels.flatten(1))
def make(feature_width, classes):
    torch.manual_seed(0)
    return Slow(feature_width, classes)
"""


def slow_job(digits: Path, folder: Path) -> Path:
    """The spec of a job whose teacher takes its time, so that a capture can be caught in the middle."""
    (folder / "slow.py").write_text(SLOW_TEACHER)
    teacher = {"model": {"factory": {"target": "slow:make"}}}
    spec = digits_spec(digits, folder / "run", teacher=teacher, data__rows_per_part=120, seeds=[0])
    spec["capture"] = {"actors": 1, "batch_tokens": 32}
    return write_spec(folder / "job.yaml", spec)


def status(workdir: Path) -> dict[str, Any]:
    """What ``distill status`` says."""
    program = Path(sys.executable).with_name("distill")
    found: dict[str, Any] = json.loads(subprocess.check_output([program, "status", workdir, "--json"]))
    return found


def start_and_signal(folder: Path, spec: Path, number: signal.Signals) -> tuple[int, str]:
    """Run until the first part is committed, send the signal, and wait for the end."""
    log = folder / f"{number.name}.log"
    with log.open("w") as out:
        running = subprocess.Popen(
            [str(Path(sys.executable).with_name("distill")), "run", str(spec)],
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        end = time.monotonic() + 120
        while not list((folder / "run/store/parts").glob("*.json")):
            assert running.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        found = status(folder / "run")
        assert found["state"] == "running" and found["stage"] == "capture" and found["owner"]["pid"] == running.pid
        running.send_signal(number)
        code = running.wait(60)
    return code, log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_capture_goes_on_where_it_was_stopped(digits: Path, distill: Distill, tmp_path: Path) -> None:
    path = slow_job(digits, tmp_path)

    code, printed = start_and_signal(tmp_path, path, signal.SIGTERM)
    assert code == 130 and "the same command goes on from there" in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "run/store/manifest.json").exists()
    found = status(tmp_path / "run")
    assert found["state"] == "stopped" and found["stage"] == "capture" and 0 < found["done"] < found["total"]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits").experiment_id
    statuses = {run.info.run_name: run.info.status for run in client.search_runs([experiment])}
    assert statuses["digits"] == statuses["capture"] == "KILLED" and statuses["teacher"] == "FINISHED"

    kept = {p.name: p.read_bytes() for p in (tmp_path / "run/store/parts").glob("*.json")}
    again = distill("capture", path, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run/store/stage.json").read_text())["made"]["parts_kept"] >= len(kept)
    assert all((tmp_path / "run/store/parts" / name).read_bytes() == record for name, record in kept.items())
    assert distill("store", "verify", tmp_path / "run/store").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_driver_leaves_nothing_that_looks_whole(digits: Path, distill: Distill, tmp_path: Path) -> None:
    path = slow_job(digits, tmp_path)
    code, _ = start_and_signal(tmp_path, path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    found = status(tmp_path / "run")
    assert found["state"] == "killed" and found["stage"] == "capture"
    half = distill("store", "verify", tmp_path / "run/store")
    assert half.returncode == 1 and "Traceback" not in half.stderr
    again = distill("run", path, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert distill("store", "verify", tmp_path / "run/store").returncode == 0
    found = status(tmp_path / "run")
    assert found["state"] == "finished" and all(stage["state"] == "done" for stage in found["stages"])
