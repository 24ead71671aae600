"""Source files and the prepared data in an object store: moto's S3 server, spoken to by pyarrow's own client."""

import numpy as np
import pytest

from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError


@pytest.fixture
def bucket(s3):
    return s3("data")


def test_prepare_from_and_to_an_object_store(bucket, make_job, prepared):
    for name in ("a", "b"):
        lines = "".join(f'{{"text": "{name} number {i}"}}\n' for i in range(40))
        (bucket / "in").write(f"{name}.jsonl", lines.encode())
    features = {"documents": {"sequence_length": 32, "tokenizer": "bytes"}}
    job = make_job(train="s3://data/in/*.jsonl", features=features, validation=0.0, test=0.2, rows_per_part=30)
    job = job.model_copy(update={"workdir": "s3://data/work"})
    facts = prepared(job)
    assert facts.splits["train"]["parts"] == 3
    found = []
    for split in ("train", "test"):
        reader = TableReader(bucket / "work" / "data" / split)
        rows = reader.take(np.arange(reader.rows)[::-1])
        for ids, segments in zip(rows["input_ids"], rows["segments"], strict=True):
            found += [bytes(ids[segments == n][:-1].tolist()).decode() for n in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(f"{name} number {i}" for name in "ab" for i in range(40))
    with pytest.raises(DataError, match=r"no file matches s3://data/in/\*\.csv"):
        prepared(make_job(train="s3://data/in/*.csv", features=features))
