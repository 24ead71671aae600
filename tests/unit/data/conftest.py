"""Jobs over small files, prepared in this process: the workers that the actors would run, without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.files import Folder
from distill_jobs.data import prepare as stage
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.workers import FitWorker, PrepareWorker
from distill_jobs.spec import Job, parse_job

_TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def job_of(workdir: Path, data: dict[str, Any]) -> Job:
    features = data["features"]
    documents, words = "documents" in features, "documents" in features or "text" in features
    model = {"config": {"model_type": "llama", **_TINY}} if words else {"mlp": {"hidden": [4]}}
    return parse_job(
        {
            "name": "small",
            "task": "causal_lm" if documents else "classification",
            "workdir": str(workdir),
            "data": data,
            "teacher": {"model": model, "train": {}},
            "student": {"model": model, "train": {}},
        }
    )


def prepare_here(job: Job) -> DataFacts:
    """What ``prepare`` does, one shard after the other in this process."""
    work, shards = stage.plan(job, Folder(job.workdir) / "data")
    if stage._must_fit(job):
        worker = FitWorker(work)
        for shard in shards["train"]:
            worker.run(shard)
        work = stage.fitted(job, work, len(shards["train"]))
    cutter = PrepareWorker(work)
    for group in shards.values():
        for shard in group:
            cutter.run(shard)
    return stage.finish(job, work, shards)[0]


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """``make_job(features={...}, train=...)``: a job with its workdir in the test's folder."""
    return lambda **data: job_of(tmp_path / "work", data)


@pytest.fixture
def prepared() -> Callable[[Job], DataFacts]:
    return prepare_here


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., str]:
    """``parquet(name, **columns)`` writes a file and returns its path."""

    def write(name: str, /, row_group_size: int | None = None, **columns: Any) -> str:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return str(path)

    return write
