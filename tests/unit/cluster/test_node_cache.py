"""A remote folder is fetched once for all processes of a node, whoever is killed meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from cluster import node_cache
from cluster.errors import FileError
from cluster.files import Folder
from cluster.node_cache import node_copy

_LOADER = """
import sys
from cluster.files import Folder
from cluster.node_cache import node_copy
path = node_copy(Folder(sys.argv[1]), sys.argv[2])
print(path, flush=True)
sys.stdin.readline()
print(sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name[0] != "."), flush=True)
"""


@pytest.fixture
def proxy(s3: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    with suppress(OSError):
        s3("models")
    proxy = FaultProxy(host, int(port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "cache"))
    yield proxy
    proxy.stop()
    for lock in node_cache._held.values():
        lock.close()
    node_cache._held.clear()


@pytest.fixture
def model(proxy: FaultProxy) -> Folder:
    folder = Folder("s3://models/teacher")
    folder.write("weights", b"w" * 100_000)
    folder.write("deep/config", b"{}")
    proxy.clear()
    return folder


def loader(folder: Folder, key: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _LOADER, folder.uri, key]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> str:
    return process.communicate("go\n")[0].strip()


def gets(proxy: FaultProxy) -> list[str]:
    return [request for request in proxy.seen if request.startswith("GET /models/teacher/")]


def test_a_local_folder_is_its_own_copy(tmp_path: Path) -> None:
    assert node_copy(Folder(str(tmp_path)), "any") == tmp_path


def test_processes_at_once_fetch_once(model: Folder, proxy: FaultProxy, tmp_path: Path) -> None:
    loaders = [loader(model, "a") for _ in range(3)]
    paths = {told(process) for process in loaders}
    assert len(paths) == 1 and len(gets(proxy)) == 2
    assert all(end(process) == "['deep/config', 'weights']" for process in loaders)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    # Again, later, and in this process: nothing is fetched.
    assert (node_copy(model, "a") / "weights").read_bytes() == b"w" * 100_000
    assert node_copy(model, "a") == node_copy(model, "a") and len(gets(proxy)) == 2


def test_copies_that_nobody_holds_go(model: Folder, tmp_path: Path) -> None:
    holder = loader(model, "held")
    held = Path(told(holder))
    passer_by = loader(model, "left")
    left = Path(told(passer_by))
    end(passer_by)
    assert held.exists() and left.exists()
    model.write("weights", b"new")
    mine = node_copy(model, "new")
    assert (mine / "weights").read_bytes() == b"new"
    assert held.exists() and not left.exists()
    assert end(holder) == "['deep/config', 'weights']"
    node_copy(model, "newer")
    assert not held.exists() and mine.exists()
    assert len(list((tmp_path / "cache").iterdir())) == 4  # two copies and their locks


def test_a_killed_fetcher_leaves_no_half_copy(model: Folder, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.only, proxy.always = "GET /models/teacher/weights", 30
    killed = loader(model, "a")
    while not any(request.startswith(proxy.only) for request in proxy.seen):
        time.sleep(0.01)
    waiting = loader(model, "a")
    proxy.always = None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert told(waiting).startswith(str(tmp_path / "cache"))
    assert end(waiting) == "['deep/config', 'weights']"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_others_may_write_to_is_refused(
    model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "open"))
    with pytest.raises(FileError, match="is not this user's alone"):
        node_copy(model, "a")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"file .*DISTILL_NODE_CACHE"):
        node_copy(model, "a")


def test_a_folder_that_can_not_be_fetched_leaves_nothing(model: Folder, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.only, proxy.always = "weights", (403, "AccessDenied")
    with pytest.raises(FileError, match="denied access"):
        node_copy(model, "a")
    proxy.clear()
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(FileError, match="is missing"):
        node_copy(Folder("s3://models/nothing"), "a")
    assert (node_copy(model, "a") / "weights").exists()
    shutil.rmtree(tmp_path / "cache")
    assert (node_copy(model, "a") / "weights").exists()
