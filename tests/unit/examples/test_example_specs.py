"""Every shipped spec parses, and asks only for files that ``fetch`` makes."""

from pathlib import Path

import pytest

import distill_jobs.examples
from distill_jobs.spec import load_job

SPECS = sorted(Path(distill_jobs.examples.__file__).parent.glob("*.yaml"))
MADE = {
    "adult/train.parquet",
    "adult/test.parquet",
    "adult_damaged/train.parquet",
    "digits/digits.parquet",
    "lm/kjv.parquet",
    "lm/news.parquet",
    "lm/train.parquet",
    "lm/train_long.parquet",
    "lm/test.parquet",
    "lm/SmolLM2-135M-Instruct.Q4_1.gguf",
}


def test_there_are_specs():
    assert {"adult", "lm", "lm_long"} <= {path.stem for path in SPECS}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_spec_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_job(path)
    asked = [p for p in (job.data.train, job.data.validation, job.data.test) if not isinstance(p, float)]
    files = [file for paths in asked for file in ([paths] if isinstance(paths, str) else paths)]
    files += [job.teacher.model.gguf] if job.teacher.model.gguf else []
    assert {str(Path(file).relative_to(tmp_path / "demo")) for file in files} <= MADE
    assert Path(job.workdir).parent == tmp_path / "runs"
