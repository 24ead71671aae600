"""Storage that fails, is slow, full or forbidden: waited out where that helps, else one sentence with its remedy."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy

from cluster import faults, object_store
from cluster.errors import ClusterError, FileError, TransientFileError
from cluster.faults import fault, pass_on, patiently
from cluster.files import Folder, fetch, sha256
from cluster.standing import STANDING

PASSING = [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"), "cut", "lose", "refuse"]


@pytest.fixture
def proxy(s3: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    with suppress(OSError):
        s3("bucket")
    proxy = FaultProxy(address[0], int(address[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("DISTILL_STORAGE_PATIENCE", "20")
    # The client's own retries off, but for the test that is about them: they would be most of the time.
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    monkeypatch.setattr(faults, "_FIRST_PAUSE", 0.02)
    yield proxy
    proxy.stop()


@pytest.fixture
def folder(proxy: FaultProxy, request: pytest.FixtureRequest) -> Folder:
    folder = Folder("s3://bucket") / request.node.name.replace("[", "-").replace("]", "").replace(" ", "")
    folder.write("there", b"before")
    proxy.clear()
    return folder


def operations(folder: Folder) -> dict[str, Callable[[], Any]]:
    def stream() -> None:
        with folder.create("streamed") as sink:
            sink.write(b"abc")

    return {
        "read": lambda: folder.read("there"),
        "find": lambda: folder.find("nothing"),
        "exists": lambda: folder.exists("there"),
        "names": folder.names,
        "write": lambda: folder.write("new", b"1"),
        "once": lambda: folder.write_json("once.json", 1, once=True),
        "sha256": lambda: sha256(folder, "there"),
        "create": stream,
        "remove": lambda: folder.remove("there"),
    }


def test_faults_that_pass_are_waited_out(folder: Folder, proxy: FaultProxy) -> None:
    """Reading, asking, and small writes are tried again as a whole."""
    before = STANDING.faults().get("storage_faults", 0)
    for at, (name, operation) in enumerate(operations(folder).items()):
        what = PASSING[at % len(PASSING)]
        proxy.faults = [what] * 3
        operation()
        # An answer without a body can't be cut; and what was done without an answer is not done again.
        assert what in ("cut", "lose") or not proxy.faults, name
        proxy.clear()
    assert sorted(folder.scan()) == ["new", "once.json", "streamed"] and folder.read("streamed") == b"abc"
    assert STANDING.faults()["storage_faults"] - before >= 4


def test_the_client_gets_over_single_failing_requests(
    folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a part of many megabytes need not be made again for one of them."""
    monkeypatch.setattr(object_store, "_ATTEMPTS", 3)
    monkeypatch.setenv("DISTILL_STORAGE_PATIENCE", "21")
    proxy.faults = [(500, "InternalError"), "refuse"]
    with folder.create("streamed") as sink:
        sink.write(b"abc")
    assert not proxy.faults and folder.read("streamed") == b"abc"


def test_a_write_whose_answer_was_lost_is_there_once(folder: Folder, proxy: FaultProxy) -> None:
    """An upload in parts was ended, but nobody heard of it; a small file was written, but nobody heard of it."""
    for size, request in ((25_000_000, "POST /bucket/"), (100_000, "PUT /bucket/")):
        data = os.urandom(size)
        proxy.only, proxy.faults = request, [None, "lose"] if size > 10_000_000 else ["lose"]
        with folder.create("streamed") as sink:
            sink.write(data)
        assert not proxy.faults
        proxy.clear()
        assert folder.read("streamed") == data and sorted(folder.scan()) == ["streamed", "there"]


def test_a_store_that_fails_for_longer_than_a_request_is_asked(folder: Folder, proxy: FaultProxy) -> None:
    """What is streamed is kept until it is there, so that nothing has to be computed again for it."""
    data = os.urandom(25_000_000)
    with folder.create("streamed") as sink:
        sink.write(data)
        proxy.only, proxy.faults = "?partNumber=2", [(500, "InternalError"), "refuse", "lose", (503, "SlowDown")]
    assert not proxy.faults and folder.read("streamed") == data


def test_an_interrupted_write_leaves_what_was_there(folder: Folder) -> None:
    """Arrow's client would make an object, an empty one even, of a stream that is closed on the way out."""
    code = (
        "import sys, signal, _thread\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "from cluster.files import Folder; f = Folder(sys.argv[1]); n = 0\n"
        "try:\n"
        "    while True:\n"
        "        n += 1; f.write('there', b'x' * 1000)\n"
        "        if n == 5: print('going', flush=True)\n"
        "except KeyboardInterrupt: pass"
    )
    for wait in (0.002, 0.007):
        writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"going\n"
        time.sleep(wait)
        writer.terminate()
        assert writer.wait(30) == 0 and folder.read("there") == b"x" * 1000


def test_patience_ends(folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_STORAGE_PATIENCE", "0.5")
    proxy.always = 30
    started = time.monotonic()
    with pytest.raises(TransientFileError, match="there: the object store fails or is too slow") as caught:
        folder.read("there")
    assert time.monotonic() - started < 20 and "\n" not in str(caught.value)
    assert not isinstance(caught.value, FileError) and str(pickle.loads(pickle.dumps(caught.value)))
    proxy.clear()
    assert folder.read("there") == b"before"
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    with pytest.raises(TransientFileError, match="connect"):
        folder.read("there")


def test_a_slow_store_is_no_fault(folder: Folder, proxy: FaultProxy) -> None:
    proxy.faults = [1.5]
    started = time.monotonic()
    assert folder.read("there") == b"before" and time.monotonic() - started > 1.4


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ((403, "AccessDenied"), "denied access; check the credentials"),
        ((403, "InvalidAccessKeyId"), "does not accept the credentials"),
        ((400, "ExpiredToken"), "does not accept the credentials"),
        ((404, "NoSuchBucket"), "no such bucket; create it"),
        ((507, "InsufficientStorage"), "no space is left there; free some space and run the same command again"),
        ((403, "QuotaExceeded"), "the quota is used up"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_time_does_not_heal_is_told_at_once(folder: Folder, proxy: FaultProxy, what: Any, words: str) -> None:
    proxy.always = what
    started = time.monotonic()
    with pytest.raises(FileError, match=words) as caught:
        folder.write("new", b"1")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert time.monotonic() - started < 5
    proxy.clear()
    # What was there has stayed.
    assert folder.names() == ["there"]


def test_fetching_gets_over_faults_in_the_middle(folder: Folder, proxy: FaultProxy, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    folder.write("deep/big", data)
    proxy.only, proxy.faults = "GET", ["cut", (503, "SlowDown"), None, "cut", "cut", (500, "InternalError"), "cut"]
    fetch(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "deep" / "big").read_bytes() == data
    assert not proxy.faults


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET])
def test_local_faults_that_may_pass(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_FIRST_PAUSE", 0.01)
    left = [OSError(number, os.strerror(number))] * 4

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently("here", call) == "done"
    told = fault("here", OSError(number, os.strerror(number)))
    assert isinstance(told, TransientFileError) and str(told).startswith("here: ")
    with pytest.raises(TransientFileError):
        pass_on("here", OSError(number, "x"))


def test_local_faults_that_stay() -> None:
    asked = []

    def call() -> None:
        asked.append(1)
        raise OSError(errno.EDQUOT, "over quota")

    with pytest.raises(FileError, match="here: the disk quota is used up; raise it or free some space"):
        patiently("here", call)
    assert len(asked) == 1
    pass_on("here", OSError(errno.ENOSPC, "x"))
    pass_on("here", pa.ArrowInvalid("not an Arrow file"))
    pass_on("here", ValueError("anything"))
    assert isinstance(fault("here", OSError(errno.EROFS, "x")), FileError)
    assert "read-only" in str(fault("here", OSError(errno.EROFS, "x")))


def test_a_full_disk_ends_in_one_sentence_and_spoils_nothing(tmp_path: Path) -> None:
    """A real limit of the operating system on the size of files, met by a real writer."""
    folder = Folder(str(tmp_path))
    folder.write("there", b"before")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "from cluster.files import Folder; from cluster.errors import ClusterError; f = Folder(sys.argv[1])\n"
        "for name in ('there', 'new'):\n"
        "    try: f.write(name, b'x' * (1 << 20))\n"
        "    except ClusterError as error: print(type(error).__name__, error)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    lines = told.splitlines()
    assert len(lines) == 2 and all(line.startswith("FileError ") for line in lines)
    assert "limit (ulimit -f) allows; raise it and run the same command again; what was committed" in lines[0]
    assert folder.read("there") == b"before" and list(folder.scan()) == ["there"]


def test_a_device_without_space(tmp_path: Path) -> None:
    full = Folder("/dev")
    with pytest.raises(OSError) as caught, open(full.path("full"), "wb", buffering=0) as device:
        device.write(b"x")
    told = fault(f"{tmp_path}/part", caught.value)
    assert str(told) == (
        f"{tmp_path}/part: no space is left there; free some space and run the same command again; "
        "what was committed stays valid"
    )


def test_a_missing_permission(tmp_path: Path) -> None:
    """As another user where this one may do everything."""
    folder = Folder(str(tmp_path))
    folder.write("there", b"before")
    tmp_path.chmod(0o555)
    code = (
        "import os, sys\n"
        "from cluster.files import Folder; from cluster.errors import FileError; f = Folder(sys.argv[1])\n"
        "os.getuid() == 0 and os.setresuid(65534, 65534, 65534)\n"
        "try: f.write('new', b'1')\n"
        "except FileError as error: print(error)"
    )
    for above in tmp_path.parents:
        if above.owner() == Path(tmp_path).owner() and above != Path("/") and above.stat().st_mode & 0o005 != 0o005:
            above.chmod(above.stat().st_mode | 0o005)
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    tmp_path.chmod(0o755)
    assert "new: permission is missing; allow this user to read and write there and run the same" in run.stdout
    assert folder.names() == ["there"]


def test_every_fault_is_one_of_ours() -> None:
    for number in errno.errorcode:
        told = fault("here", OSError(number, os.strerror(number)))
        assert isinstance(told, ClusterError) and "\n" not in str(told) and str(told).startswith("here")


def test_rivals_wait_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who meet the same fault at once don't all come back at once."""
    pauses: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", pauses.append)

    def rival() -> None:
        left = [OSError(errno.EIO, "x")] * 3
        patiently("here", lambda: left and (_ for _ in ()).throw(left.pop()))

    threads = [threading.Thread(target=rival) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pauses) == 12 == len(set(pauses)) and max(pauses) < 1.3
