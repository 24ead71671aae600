"""Verdicts by real runs: a teacher that knows the true odds, and one that knows nothing."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Distill, write_spec

WIDTH, TRAIN, TEST = 24, 300, 4000

# A teacher of one's own: the true odds, or odds of another world; and ballast, so that its size is another than its
# student's.
TEACHERS = f"""
import numpy as np
import torch
from torch import nn


class Odds(nn.Module):
    def __init__(self, seed):
        super().__init__()
        direction = torch.from_numpy(np.random.default_rng(seed).normal(size={WIDTH})).float()
        self.register_buffer("direction", direction / direction.norm())
        self.register_buffer("ballast", torch.zeros(4_000_000))

    def forward(self, features):
        odds = 3 * features @ self.direction
        return torch.stack([-odds / 2, odds / 2], dim=-1)


def right(): return Odds(0)
def wrong(): return Odds(1)
"""


def write_rows(path: Path, rows: int, seed: int) -> None:
    direction = np.random.default_rng(0).normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    rng = np.random.default_rng(100 + seed)
    features = rng.normal(size=(rows, WIDTH))
    label = (rng.random(rows) < 1 / (1 + np.exp(-3 * features @ direction))).astype(int)
    pq.write_table(pa.table({f"x{i}": features[:, i] for i in range(WIDTH)} | {"label": label}), path)


def spec(folder: Path, teacher: str) -> dict[str, Any]:
    return {
        "name": f"verdict-{teacher}",
        "task": "classification",
        "workdir": str(folder / teacher),
        "data": {
            "train": str(folder / "train.parquet"),
            "test": str(folder / "test.parquet"),
            "validation": 0.2,
            "label": "label",
            "classes": [0, 1],
            "features": {"tabular": {"numeric": [f"x{i}" for i in range(WIDTH)]}},
        },
        "teacher": {"model": {"factory": {"target": f"odds:{teacher}"}}},
        "student": {
            "model": {"mlp": {"hidden": [16]}},
            "train": {"epochs": 60, "batch_size": 32, "learning_rate": 0.01, "evaluate_every": 40},
        },
        "distill": {"temperature": 1.0, "alpha": 0.9},
        "capture": {"precision": "fp32"},
        "seeds": [0, 1, 2],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    write_rows(folder / "train.parquet", TRAIN, 0)
    write_rows(folder / "test.parquet", TEST, 1)
    (folder / "odds.py").write_text(TEACHERS)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_answer_is_reached_by_real_runs(distill: Distill, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    job = write_spec(folder / "right.yaml", spec(folder, "right"))

    def ask(*overrides: str) -> str:
        done = distill("advise", job, *(word for each in overrides for word in ("--set", each)), cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = ask("goal.accuracy={}")
    assert "not yet known: measure this first" in before and "predicted" in before
    assert "train the student alone" in ask("goal.iterate.runs=1", "teacher.cost.usd=100")
    done = distill("run", job, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "verdict for accuracy: " in done.stdout
    verdict = json.loads((folder / "right" / "verdict.json").read_text())
    assert any(reason["low"] is not None for reason in verdict["reasons"])
    # The teacher knows the truth and is better than any student; it is too large for the small device.
    assert verdict["answer"] == "keep the teacher"
    small = ask("goal.deploy.memory_mb=5")
    assert "verdict for deploy: distil." in small and "The teacher breaks the limit" in small
    assert "against it: " in small
    assert "keep the teacher" in ask("goal.deploy.memory_mb=500")
    assert "not yet known" in ask("goal.deploy.memory_mb=5", "goal.deploy.hardware=a phone")
    assert "not yet known" in ask("goal.deploy.memory_mb=0.000001")

    misled = distill("run", write_spec(folder / "wrong.yaml", spec(folder, "wrong")), cwd=folder)
    assert misled.returncode == 0, misled.stderr
    assert "verdict for accuracy: train the student alone" in misled.stdout
