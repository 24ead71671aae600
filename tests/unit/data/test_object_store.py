"""Source files and the prepared data in object stores: moto's S3 server, and one that speaks Google's protocol."""

import numpy as np
import pytest
from object_server import gcs

from cluster.files import Folder, filesystem
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILL_PART_CACHE", str(tmp_path / "parts"))
    if request.param == "s3":
        yield request.getfixturevalue("s3")("data")
        return
    with gcs() as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
        filesystem("gs://data/x")[0].create_dir("data")
        yield Folder("gs://data")


def test_prepare_from_and_to_an_object_store(bucket, make_job, prepared):
    for name in ("a", "b"):
        lines = "".join(f'{{"text": "{name} number {i}"}}\n' for i in range(40))
        (bucket / "in").write(f"{name}.jsonl", lines.encode())
    features = {"documents": {"sequence_length": 32, "tokenizer": "bytes"}}
    job = make_job(train=f"{bucket}/in/*.jsonl", features=features, validation=0.0, test=0.2, rows_per_part=30)
    job = job.model_copy(update={"workdir": f"{bucket}/work"})
    facts = prepared(job)
    assert facts.splits["train"]["parts"] == 3
    found = []
    for split in ("train", "test"):
        reader = TableReader(bucket / "work" / "data" / split)
        rows = reader.take(np.arange(reader.rows)[::-1])
        for ids, segments in zip(rows["input_ids"], rows["segments"], strict=True):
            found += [bytes(ids[segments == n][:-1].tolist()).decode() for n in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(f"{name} number {i}" for name in "ab" for i in range(40))
    with pytest.raises(DataError, match=r"no file matches (s3|gs)://data/in/\*\.csv"):
        prepared(make_job(train=f"{bucket}/in/*.csv", features=features))
