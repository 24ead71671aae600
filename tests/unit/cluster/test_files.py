"""Folders on disk: a file that exists is whole, whatever happens to its writer."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FileError
from cluster.files import Folder, digest, fetch, sha256, store_folder

_WRITER = """
import sys
from cluster.files import Folder
folder, old = Folder(sys.argv[1]), sys.argv[2] == "old"
if old:
    folder.write("part", b"before" * 10)
with folder.create("part") as stream:
    for block in range(10_000):
        stream.write(b"x" * 65536)
        if block == 3:
            print("half way", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "deep" / "er"))


@settings(max_examples=40, deadline=None)
@given(first=st.binary(max_size=5000), second=st.binary(max_size=5000), fails_at=st.integers(0, 3))
def test_an_error_while_writing_leaves_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes, fails_at: int
) -> None:
    folder = Folder(str(tmp_path_factory.mktemp("files")))
    folder.write("name", first)
    pieces = [second[i::3] for i in range(3)]
    try:
        with folder.create("name") as stream:
            for at, piece in enumerate(pieces):
                if at == fails_at:
                    raise ValueError("the writer's own error")
                stream.write(piece)
    except ValueError as error:
        assert fails_at < 3 and str(error) == "the writer's own error"
    assert folder.read("name") == (b"".join(pieces) if fails_at == 3 else first)
    assert os.listdir(folder.uri) == ["name"]


@pytest.mark.parametrize("old", ["old", "new"])
def test_a_killed_writer_leaves_no_half_file(folder: Folder, old: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, folder.uri, old], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half way\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    if old == "old":
        assert folder.read("part") == b"before" * 10
    else:
        assert not folder.exists("part")
    assert folder.names() == (["part"] if old == "old" else [])
    folder.write("part", b"again")
    assert folder.read("part") == b"again"


def test_readers_see_the_old_or_the_new_file(folder: Folder) -> None:
    """Read over and over while another process replaces the file."""
    code = (
        "import sys; from cluster.files import Folder; f = Folder(sys.argv[1]);"
        "[f.write('v', bytes([i % 251]) * 200_000) for i in range(60)]"
    )
    folder.write("v", bytes([0]) * 200_000)
    writer = subprocess.Popen([sys.executable, "-c", code, folder.uri])
    seen = set()
    while writer.poll() is None:
        data = folder.read("v")
        assert len(data) == 200_000 and len(set(data)) == 1
        seen.add(data[0])
        time.sleep(0.001)
    assert writer.returncode == 0 and len(seen) > 1


def test_names_sizes_and_removal(folder: Folder) -> None:
    assert folder.names() == [] and not folder.exists("a.json")
    folder.write_json("b.json", {"z": 1, "a": [1.5, None]})
    (folder / "sub").write("inner.txt", b"12345")
    folder.write("a.txt", b"")
    assert folder.names() == ["a.txt", "b.json"] and folder.names(".json") == ["b.json"]
    assert folder.read("b.json") == b'{\n "a": [\n  1.5,\n  null\n ],\n "z": 1\n}\n'
    assert folder.read_json("b.json") == {"z": 1, "a": [1.5, None]}
    assert (folder / "sub").size("inner.txt") == 5 and folder.exists("sub/inner.txt")
    assert oct(folder.path("a.txt").stat().st_mode)[-3:] == "644"
    folder.remove("a.txt")
    folder.remove("a.txt")
    assert folder.names() == ["b.json"]
    folder.clear()
    folder.clear()
    assert not folder.exists("b.json") and not folder.exists("sub/inner.txt")


def test_errors_are_one_sentence(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"/nothing( is missing|:.*[Nn]o such file)"):
        folder.read("nothing")
    with pytest.raises(FileError, match="is missing"):
        folder.size("nothing")
    folder.write("bad.json", b"{'a'")
    with pytest.raises(FileError, match=r"bad\.json is not valid JSON"):
        folder.read_json("bad.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("nan.json", float("nan"))
    assert not folder.exists("nan.json")
    (tmp_path / "file").touch()
    with pytest.raises(FileError):
        (Folder(str(tmp_path / "file")) / "below").write("x", b"")
    with pytest.raises(FileError, match="can't open nosuch://"):
        Folder("nosuch://bucket").exists("x")


def test_a_file_uri_is_local(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/there")
    folder.write("x", b"1")
    assert folder.is_local and folder.path("x") == tmp_path / "there" / "x" and folder.read("x") == b"1"
    assert not Folder("s3://bucket/x").is_local
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_digests(folder: Folder) -> None:
    folder.write("x", b"abc" * 1_000_000)
    assert sha256(folder, "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert digest({"a": 1, "b": [2, "x"]}) == digest({"b": [2, "x"], "a": 1}) != digest({"a": 1, "b": [2, "y"]})


def test_fetch_and_store_local(folder: Folder, tmp_path: Path) -> None:
    folder.write("x", b"1")
    (folder / "sub").write("y", b"2")
    fetch(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "x").read_bytes() == b"1" and (tmp_path / "copy" / "sub" / "y").exists()
    store_folder(folder.path(), Folder(str(tmp_path / "target")))
    assert (tmp_path / "target" / "sub" / "y").read_bytes() == b"2"
