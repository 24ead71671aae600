"""Exports to and imports from an object store: moto's S3 server, spoken to by pyarrow's own client."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exchange_cases import teacher, write_topk

from cluster.files import Folder
from distill_jobs.errors import StoreError
from distill_jobs.store.exchange.export import export_store
from distill_jobs.store.exchange.filling import Layout
from distill_jobs.store.exchange.importing import import_store
from distill_jobs.store.verify import verify


@pytest.fixture
def bucket(s3: Callable[[str], Folder]) -> Folder:
    return s3("exchange")


def test_there_and_back_through_an_object_store(tmp_path: Path, bucket: Folder) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, 9).tolist() for _ in range(3)]
    write_topk(tmp_path / "in.parquet", rows, [teacher(rng, 9, 258) for _ in rows], 8)
    (bucket / "in").write("one.parquet", (tmp_path / "in.parquet").read_bytes())
    manifest = import_store(f"{bucket}/in", bucket / "a", "bytes", Layout())
    assert manifest["rows"] == 3 and verify(bucket / "a") == []
    index = export_store(bucket / "a", bucket / "out")
    assert (bucket / "out").names() == ["export.json", *index["files"]]
    assert (bucket / "out.unfinished").names() == []
    with pytest.raises(StoreError, match="exists already"):
        export_store(bucket / "a", bucket / "out")
