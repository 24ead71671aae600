"""A user's mistake ends in one sentence and exit code 2, with nothing half-written."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Distill, digits_spec, write_spec


def refused(distill: Distill, spec: Path, *said: str, verb: str = "run") -> None:
    done = distill(verb, spec)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("distill: ") and "Traceback" not in done.stderr, done.stderr
    for words in said:
        assert words in sentence, sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill__temprature": 3}, "did you mean temperature"),
        ({"distill__alpha": 2}, "distill.alpha"),
        ({"distill__temperature": 99}, "distill.temperature"),
        ({"data__train": "nowhere/*.parquet"}, "nowhere"),
        ({"data__label": "digitt"}, "digit"),
    ],
)
def test_before_anything_starts(
    distill: Distill, digits: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    refused(distill, write_spec(tmp_path / "job.yaml", digits_spec(digits, tmp_path / "run", **changes)), said)
    assert not list((tmp_path / "run").rglob("manifest.json"))


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def tabular(data: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    model = {"mlp": {"hidden": [8]}}
    return digits_spec(
        data,
        workdir,
        **{
            "data__features": {"tabular": {"numeric": ["x"]}},
            "data__slices": [],
            "data__label": "y",
            "teacher__model": model,
            "student__model": model,
            **changes,
        },
    )


def test_an_empty_file(distill: Distill, tmp_path: Path) -> None:
    data = table(tmp_path / "empty.parquet", x=np.array([], dtype=float), y=np.array([], dtype=int))
    refused(distill, write_spec(tmp_path / "job.yaml", tabular(data, tmp_path / "run")), "no rows", verb="prepare")


@pytest.mark.slow
def test_a_bad_row_found_by_an_actor(distill: Distill, tmp_path: Path) -> None:
    """NaN features; labels out of range and the rest are tested without a cluster, beside the data package."""
    good = np.arange(200.0)
    data = table(tmp_path / "nan.parquet", x=np.where(good == 7, np.nan, good), y=good.astype(int) % 2)
    spec = tabular(data, tmp_path / "run", data__classes=[0, 1])
    refused(distill, write_spec(tmp_path / "job.yaml", spec), "row 8 of nan.parquet", verb="prepare")
    assert not (tmp_path / "run" / "data" / "manifest.json").exists()


@pytest.mark.slow
def test_more_workers_than_the_cluster_has(distill: Distill, digits: Path, tmp_path: Path) -> None:
    spec = digits_spec(digits, tmp_path / "run", capture__actors=64, cluster={"cpus": 2})
    refused(distill, write_spec(tmp_path / "job.yaml", spec), "64", "capture.actors")


def test_a_stage_before_its_turn(distill: Distill, digits: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "job.yaml", digits_spec(digits, tmp_path / "run"))
    refused(distill, spec, "capture needs prepare", "distill prepare SPEC", verb="capture")


@pytest.mark.slow
def test_a_cut_gguf(distill: Distill, tmp_path: Path, prose: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    spec = digits_spec(
        prose,
        tmp_path / "run",
        task="causal_lm",
        data__label=None,
        data__slices=[],
        data__features={"documents": {}},
        teacher={"model": {"gguf": str(model)}},
        student__model={"init_from_teacher": {"layers": [0]}},
    )
    refused(distill, write_spec(tmp_path / "job.yaml", spec), "model.gguf")


def test_a_store_that_does_not_exist(distill: Distill, tmp_path: Path) -> None:
    done = distill("store", "inspect", tmp_path / "none")
    assert done.returncode == 2 and "there is no logit store" in done.stderr and "Traceback" not in done.stderr
