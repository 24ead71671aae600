"""The probe's few rows: prepared as the whole will be."""

from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.files import Folder
from distill_jobs.costs.sample import prepare_sample
from distill_jobs.data.encoder import ENCODER, Encoder
from distill_jobs.data.prepare import fitted, plan
from distill_jobs.data.workers import FitWorker
from distill_jobs.spec import Job, parse_job

ROWS = 6000


def job(folder: Path, teacher: object) -> Job:
    train = {"epochs": 1, "batch_size": 8}
    return parse_job(
        {
            "name": "x",
            "task": "classification",
            "workdir": str(folder / "run"),
            "data": {
                "train": str(folder / "rows.parquet"),
                "label": "y",
                "classes": ["a", "b"],
                "features": {"tabular": {"numeric": ["n"], "categorical": ["c"]}},
                "rows_per_part": 8192,
            },
            "teacher": {"model": {"saved": str(folder / "saved")}} if teacher == "saved" else {
                "model": {"mlp": {}}, "train": train
            },
            "student": {"model": {"mlp": {}}, "train": train},
        }
    )  # fmt: skip


def test_a_saved_model_sees_rows_by_its_own_encoder(tmp_path: Path) -> None:
    """A category that only later rows have would be missing in an encoder of the first few thousand."""
    kinds = ["early"] * 5000 + ["late"] * (ROWS - 5000)
    rows = {"n": [float(i) for i in range(ROWS)], "c": kinds, "y": ["a", "b"] * (ROWS // 2)}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    own = job(tmp_path, "own")
    work, shards = plan(own, Folder(str(tmp_path / "whole")))
    deque(map(FitWorker(work).run, shards["train"]), maxlen=0)
    whole = fitted(own, work, len(shards["train"])).folder
    Folder(str(tmp_path / "saved")).write(ENCODER, whole.read(ENCODER))

    def width(of: Job, name: str) -> int:
        folder = Folder(str(tmp_path / name))
        sizes = prepare_sample(of, folder)
        assert sizes.source_rows > 0
        return Encoder.load(folder / "data").width

    assert width(own, "one") < Encoder.load(whole).width == width(job(tmp_path, "saved"), "two")
