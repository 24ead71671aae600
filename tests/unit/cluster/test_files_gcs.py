"""The same folder in Google Cloud Storage: its protocol, spoken by pyarrow's own client to an emulator's server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from object_server import gcs
from pyarrow import fs

from cluster.errors import ClusterError, FileError, TransientFileError
from cluster.faults import fault
from cluster.files import Folder, fetch, filesystem, sha256, store_folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with gcs() as endpoint:
        yield endpoint


@pytest.fixture
def folder(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Folder:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
    filesystem("gs://bucket/x")[0].create_dir("bucket")
    return Folder(f"gs://bucket/{request.node.name}")


def test_round_trip(folder: Folder, tmp_path: Path) -> None:
    data = bytes(range(256)) * 35_000  # more than one piece of an upload
    assert not folder.exists("big") and folder.names() == [] and folder.find("big") is None
    folder.write("big", data)
    with folder.create("streamed") as stream:
        stream.write(data)
    assert folder.write_json("once.json", 1, once=True) and not folder.write_json("once.json", 2, once=True)
    (folder / "sub").write("inner", b"12")
    assert folder.read("big") == folder.read("streamed") == data and folder.size("big") == len(data)
    assert folder.names() == ["big", "once.json", "streamed"] and folder.read_json("once.json") == 1
    assert sha256(folder, "big") == sha256(folder, "streamed") and folder.total_bytes() > 2 * len(data)
    with folder.open("big") as opened:
        assert opened.read_at(5, 1000) == data[1000:1005]
    fetch(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "inner").read_bytes() == b"12"
    store_folder(tmp_path / "copy", folder / "again")
    assert (folder / "again" / "sub").read("inner") == b"12"
    folder.remove("big")
    folder.remove("big")
    assert not folder.exists("big")
    (folder / "again").clear()
    assert (folder / "again").names() == [] and folder.exists("streamed")
    with pytest.raises(FileError, match="nothing is missing"):
        folder.read("nothing")


def test_an_error_while_writing_shows_nothing(folder: Folder) -> None:
    folder.write("x", b"before")
    with pytest.raises(ValueError, match="mine"), folder.create("x") as stream:
        stream.write(b"half")
        raise ValueError("mine")
    assert folder.read("x") == b"before" and folder.names() == ["x"]


@pytest.mark.slow
def test_faults_that_pass_are_told_from_those_that_stay(
    folder: Folder, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("there", b"before")
    host, port = server.removeprefix("http://").split(":")
    proxy = FaultProxy(host, int(port))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
    monkeypatch.setenv("DISTILL_STORAGE_PATIENCE", "2")
    for passing in ((503, "busy"), (429, "too many"), "cut", "lose", "refuse"):
        proxy.faults = [passing]
        assert folder.exists("there"), passing
    proxy.always = (500, "internal")
    started = time.monotonic()
    with pytest.raises(TransientFileError, match="there: the object store fails or is too slow") as caught:
        folder.exists("there")
    assert time.monotonic() - started < 20 and "\n" not in str(caught.value)
    for lasting in ((403, "denied"), (401, "who")):
        proxy.always = lasting
        for call in (lambda: folder.exists("there"), lambda: folder.write("new", b"1")):
            with pytest.raises(FileError, match="does not accept the credentials; set GOOGLE_APPLICATION_CREDENTIALS"):
                call()
    proxy.stop()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    assert folder.names() == ["there"]


def test_the_endpoint_may_have_no_scheme(folder: Folder, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("x", b"1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.removeprefix("http://"))
    assert folder.read("x") == b"1" and isinstance(filesystem(folder.uri)[0], fs.GcsFileSystem)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/x",
        "gs://token@bucket/x",
        "s3://bucket/x?endpoint_override=localhost",
        "s3://bucket/x?access_key=a&secret_key=secret",
        "abfs://:secret@account.dfs.core.windows.net/x",
    ],
)
def test_an_address_says_only_where(uri: str) -> None:
    """It would be written into specs, manifests and logs."""
    with pytest.raises(FileError, match="environment") as caught:
        Folder(uri).exists("y")
    assert "secret" not in str(caught.value)


def test_azures_faults() -> None:
    """As Arrow words them; no server was at hand."""
    for told, kind in (
        ("GetProperties failed. Azure Error: [ServerBusy] 503 Server Busy", TransientFileError),
        ("Azure Error: [] 500 Internal", TransientFileError),
        ("Azure Error: [AuthorizationFailure] 403 This request is not authorized", FileError),
    ):
        error: ClusterError = fault("abfs://x", OSError(told))
        assert type(error) is kind, told
