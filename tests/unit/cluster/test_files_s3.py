"""The same folder in an object store: a real S3 protocol round trip against moto's server."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from cluster.errors import FileError
from cluster.files import Folder, fetch, filesystem, sha256, store_folder
from cluster.object_store import upload


@pytest.fixture
def folder(s3: Callable[[str], Folder], request: pytest.FixtureRequest) -> Folder:
    return s3(request.node.name.replace("_", "-")[:60]) / "job"


def test_round_trip(folder: Folder) -> None:
    data = bytes(range(256)) * 50_000  # more than one part of a multipart upload
    assert not folder.exists("big") and folder.names() == []
    folder.write("big", data)
    folder.write_json("small.json", {"b": 1, "a": 2})
    (folder / "sub").write("inner", b"12")
    assert folder.read("big") == data and folder.size("big") == len(data)
    assert folder.names() == ["big", "small.json"] and folder.names(".json") == ["small.json"]
    assert folder.read_json("small.json") == {"a": 2, "b": 1}
    assert folder.exists("sub/inner") and len(sha256(folder, "big")) == 64
    with folder.open("big") as stream:
        stream.seek(1000)
        assert stream.read(5) == data[1000:1005]
    folder.write("big", b"anew")
    assert folder.read("big") == b"anew"
    folder.remove("big")
    folder.remove("big")
    assert not folder.exists("big")
    folder.clear()
    assert not folder.exists("small.json") and not folder.exists("sub/inner")


def test_an_error_while_writing_shows_nothing(folder: Folder) -> None:
    folder.write("x", b"before")
    with pytest.raises(ValueError, match="mine"), folder.create("x") as stream:
        stream.write(b"half")
        raise ValueError("mine")
    assert folder.read("x") == b"before"
    assert folder.names() == ["x"]


def test_a_source_that_breaks_leaves_no_half_object(folder: Folder) -> None:
    class Breaking:
        left = 3

        def seek(self, _: int) -> None:
            pass

        def read(self, size: int) -> bytes:
            self.left -= 1
            if not self.left:
                raise OSError(5, "the disk is ill")
            return bytes(size)

    system, path = filesystem(folder.uri)
    with pytest.raises(OSError, match="the disk is ill"):
        upload(system, f"{path}/half", Breaking())
    assert not folder.exists("half")


def test_no_name_changes_what_is_written(folder: Folder) -> None:
    """Arrow would compress and uncompress by the ends of names."""
    for name in ("x.zst", "x.gz", "x.lz4", "x.bz2"):
        folder.write(name, b"as it is")
        with folder.create(f"streamed-{name}") as stream:
            stream.write(b"as it is")
        assert folder.read(name) == folder.read(f"streamed-{name}") == b"".join(folder.blocks(name)) == b"as it is"


def test_errors_are_one_sentence(folder: Folder) -> None:
    for call in (folder.read, folder.size):
        with pytest.raises(FileError, match="nothing") as caught:
            call("nothing")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="no-such-bucket"):
        Folder("s3://no-such-bucket/x").write("y", b"1")


def test_fetch_and_store(folder: Folder, tmp_path: Path) -> None:
    local = tmp_path / "model"
    (local / "deep").mkdir(parents=True)
    (local / "a").write_bytes(b"1")
    (local / "deep" / "b").write_bytes(b"2")
    store_folder(local, folder / "model")
    assert (folder / "model").read("deep/b") == b"2"
    fetch(folder / "model", tmp_path / "copy")
    assert (tmp_path / "copy" / "a").read_bytes() == b"1" and (tmp_path / "copy" / "deep" / "b").read_bytes() == b"2"
    fetch(folder / "model", tmp_path / "one", only="deep/b")
    assert [p.name for p in (tmp_path / "one").rglob("*") if p.is_file()] == ["b"]


def test_the_endpoint_comes_from_the_environment(folder: Folder) -> None:
    system, path = filesystem(folder.uri)
    assert isinstance(system, fs.S3FileSystem) and path == folder.uri.removeprefix("s3://")
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
