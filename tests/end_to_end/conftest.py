"""Whole jobs through the real command, on small real data: scikit-learn's digits, and its own licence text."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

Distill = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,797 scans of handwritten digits, 8×8, as Parquet: pixels as a list, single columns, the digit, a slice."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    ink = np.where(loaded.data.sum(axis=1) > np.median(loaded.data.sum(axis=1)), "bold", "faint")
    columns: dict[str, Any] = {"image": [row.tolist() for row in loaded.data], "digit": loaded.target, "ink": ink}
    columns |= {f"p{i}": loaded.data[:, i] for i in range(64)}
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English documents of two styles: the descriptions of scikit-learn's data sets, and Python's own help."""
    from pydoc_data.topics import topics

    import sklearn.datasets

    described = sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst"))
    documents = [(path.read_text(encoding="utf-8")[:6000], "data") for path in described]
    documents += [(text[:3000], "python") for _, text in sorted(topics.items())[:24]]
    path = tmp_path_factory.mktemp("prose") / "prose.parquet"
    pq.write_table(pa.table({"text": [t for t, _ in documents], "corpus": [c for _, c in documents]}), path)
    return path


def digits_spec(data: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    """A job that distils a small CNN into a smaller one."""
    train = {"epochs": 4, "batch_size": 64, "learning_rate": 0.003}
    spec: dict[str, Any] = {
        "name": "digits",
        "task": "classification",
        "workdir": str(workdir),
        "data": {
            "train": str(data),
            "label": "digit",
            "slices": ["ink"],
            "features": {"image": {"column": "image", "shape": [1, 8, 8], "scale": 16.0}},
            "rows_per_part": 500,
        },
        "teacher": {
            "model": {"cnn": {"channels": [16, 32]}},
            "train": {**train, "epochs": 10, "early_stopping": {"patience": 2}},
        },
        "student": {"model": {"cnn": {"channels": [4]}}, "train": {**train, "workers": 2}},
        "distill": {"temperature": 2.0, "alpha": 0.7},
        "capture": {"actors": 2},
        "seeds": [0, 1],
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        node = spec
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return spec


def write_spec(path: Path, spec: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="session")
def distill() -> Distill:
    """Runs the command in a folder of its own; returns what it printed and its exit code."""

    def call(*arguments: str | Path, timeout: float = 280, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("distill")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return subprocess.run(
            [str(program), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env=environment,
            check=False,
        )

    return call
