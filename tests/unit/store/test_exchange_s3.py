"""Exports to and imports from an object store: moto's S3 server, spoken to by pyarrow's own client."""

from collections.abc import Iterator
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

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="exchange")
    yield Folder("s3://exchange")
    server.stop()


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
