"""From ``distill submit`` to the first committed shard of a capture; the floor is the same job on an embedded Ray.

The teacher is brought and answers at once, so that all that is measured is what lies around it.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray_head import Head, ray_head
from sklearn.datasets import load_digits

TEACHER = """
import torch
def make(feature_width, classes):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(feature_width, classes))
"""
ROUNDS = 3


def job(folder: Path) -> Path:
    """A job in a new folder, of which nothing has been done."""
    folder.mkdir()
    (folder / "brought.py").write_text(TEACHER)
    loaded = load_digits()
    table = pa.table({"image": [row.tolist() for row in loaded.data], "digit": loaded.target})
    pq.write_table(table, folder / "digits.parquet")
    train = {"epochs": 1, "batch_size": 64}
    spec = {
        "name": "digits",
        "task": "classification",
        "workdir": "run",
        "data": {
            "train": "digits.parquet",
            "label": "digit",
            "features": {"image": {"shape": [1, 8, 8], "scale": 16.0}},
            "rows_per_part": 500,
        },
        "teacher": {"model": {"factory": {"target": "brought:make"}}},
        "student": {"model": {"cnn": {"channels": [4]}}, "train": train},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return folder


def first_shard(command: list[str], folder: Path, env: dict[str, str]) -> dict[str, float]:
    """Seconds from the command's start to what it leaves behind."""
    marks = {"first part of data": "data/train", "first shard of the capture": "store/parts"}
    found: dict[str, float] = {}
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "distill_jobs", *command], cwd=folder, env=env, stdout=log, stderr=log
        )
        while running.poll() is None:
            for name, place in marks.items():
                if name not in found and list((folder / "run" / place).glob("part-*.json")):
                    found[name] = time.perf_counter() - began
            if "started" not in found and "\nstarted " in (folder / "log").read_text():
                found["started"] = time.perf_counter() - began
            time.sleep(0.02)
    assert running.returncode == 0 and set(marks) <= found.keys(), (folder / "log").read_text()
    return found


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_submission_to_first_shard(tmp_path: Path) -> None:
    with ray_head(cpus=2) as head:
        submitted, embedded = _rounds(head, tmp_path)
    told = {name: statistics.median(each[name] for each in submitted) for name in submitted[0]}
    alone = {name: statistics.median(each[name] for each in embedded) for name in embedded[0]}
    print(f"\nmedians of {ROUNDS}, interleaved, in seconds from the command's start")
    print(f"submitted: the look has passed and the job is started {told['started']:.1f}")
    for name, value in alone.items():
        print(f"{name}: submitted {told[name]:.1f}, on an embedded Ray {value:.1f}, ratio {told[name] / value:.2f}")


def _rounds(head: Head, folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    submitted, embedded = [], []
    for i in range(ROUNDS):
        place = job(folder / f"submitted-{i}")
        submitted.append(first_shard(["submit", "job.yaml", "--address", head.dashboard], place, dict(head.env)))
        place = job(folder / f"embedded-{i}")
        embedded.append(first_shard(["run", "job.yaml"], place, dict(head.env)))
    return submitted, embedded
