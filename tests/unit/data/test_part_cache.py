"""The local cache of remote parts: its limit, who holds what, and what a killed process or a full disk leave."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.data.cache import PartCache, Wanted

SIZE = 100_000

_READER = """
import sys
from pathlib import Path
from cluster.files import Folder
from distill_jobs.data.cache import PartCache, Wanted
cache = PartCache(Path(sys.argv[1]), int(sys.argv[2]))
mapped = [cache.map(Wanted(Folder(sys.argv[3]), *each.split(":"))) for each in sys.argv[4:]]
print(cache.tally.missed, flush=True)
sys.stdin.readline()
print(all(bytes(each[:1]) for each in mapped), flush=True)
"""


@pytest.fixture
def parts(tmp_path: Path) -> list[Wanted]:
    """Six parts of the same size; a local folder serves as well as a bucket."""
    folder, found = Folder(str(tmp_path / "far")), []
    for number in range(6):
        content = bytes([number + 1]) * SIZE
        folder.write(f"part-{number}", content)
        found.append(Wanted(folder, f"part-{number}", hashlib.sha256(content).hexdigest()))
    return found


def reader(cache: Path, limit: int, parts: list[Wanted]) -> subprocess.Popen[str]:
    told = [f"{part.name}:{part.sha256}" for part in parts]
    command = [sys.executable, "-c", _READER, str(cache), str(limit), parts[0].folder.uri, *told]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_another_process_reads_is_not_given_up(parts: list[Wanted], tmp_path: Path) -> None:
    limit = 3 * SIZE
    other = reader(tmp_path / "cache", limit, parts[:2])
    assert line(other) == "2"
    cache = PartCache(tmp_path / "cache", limit)
    for part in parts[2:]:
        assert bytes(cache.map(part)[:1]) == bytes([int(part.name[-1]) + 1])
        assert cache.has(parts[0]) and cache.has(parts[1])
        assert len(list((tmp_path / "cache").glob("*.part"))) <= 3
    # Nothing that only may be needed takes more room than there is.
    cache.prefetch([parts[2], parts[3], parts[4]], [parts[2], parts[3]])
    time.sleep(0.5)
    assert len(list((tmp_path / "cache").glob("*.part"))) <= 3
    assert other.communicate("go\n")[0].strip() == "True"
    end = time.monotonic() + 20
    while not all(map(cache.has, parts[2:5])) and time.monotonic() < end:
        time.sleep(0.02)
    # Its holder has ended: there is room again, and what was asked for ahead has come.
    assert all(map(cache.has, parts[2:5])) and not cache.has(parts[0])


def test_what_is_in_use_at_once_may_exceed_the_limit(parts: list[Wanted], tmp_path: Path) -> None:
    cache = PartCache(tmp_path / "cache", 2 * SIZE)
    mapped = [cache.map(part) for part in parts]
    assert all(map(cache.has, parts)) and cache.tally.missed == len(parts)
    del mapped
    cache.drop(parts[5])
    cache.map(parts[5])
    assert sum(map(cache.has, parts)) == 2


def test_processes_of_a_machine_share_what_one_has_fetched(parts: list[Wanted], tmp_path: Path) -> None:
    readers = [reader(tmp_path / "cache", 10 * SIZE, parts) for _ in range(3)]
    assert all(line(each).isdigit() for each in readers)
    late = reader(tmp_path / "cache", 10 * SIZE, parts)
    assert line(late) == "0"
    assert all(each.communicate("go\n")[0].strip() == "True" for each in [*readers, late])


def test_a_killed_fetcher_leaves_nothing_that_looks_whole(parts: list[Wanted], tmp_path: Path) -> None:
    slow = Wanted(parts[0].folder, "slow", parts[0].sha256)
    cache = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from cluster.files import Folder\n"
        "from distill_jobs.data import cache\n"
        "def endless(folder, name, on_size):\n"
        "    on_size(100_000)\n"
        "    yield b'x' * 50_000\n"
        "    print('half way', flush=True); sys.stdin.readline()\n"
        "Folder.blocks = endless\n"
        "cache.PartCache(Path(sys.argv[1])).fetch(cache.Wanted(Folder(sys.argv[2]), sys.argv[3], sys.argv[4]))"
    )
    for part in (slow, parts[3]):
        command = [sys.executable, "-c", code, str(cache), part.folder.uri, part.name, part.sha256]
        killed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert line(killed) == "half way"
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    # What the first has left, and nobody wants any more, went when the second looked for room.
    assert len(list(cache.glob("*.tmp"))) == 1 and not list(cache.glob("*.part"))
    assert bytes(PartCache(cache).map(parts[3])[:1]) == b"\x04"
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [parts[3].cached]


def test_a_part_is_compared_with_its_sha256_when_it_arrives(parts: list[Wanted], tmp_path: Path) -> None:
    cache = PartCache(tmp_path / "cache")
    cache.map(parts[0])
    assert cache.arrived == {parts[0].cached}
    other = PartCache(tmp_path / "cache")
    other.map(parts[0])
    # Another process's word is not taken for it: the disk may have changed it since.
    assert other.arrived == set() and other.tally.missed == 0
    cache.drop(parts[0])
    assert cache.arrived == set()


def test_a_machine_says_where_its_cache_is_and_how_large(
    parts: list[Wanted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_PART_CACHE", str(tmp_path / "scratch"))
    monkeypatch.setenv("DISTILL_PART_CACHE_GB", str(2 * SIZE / 1e9))
    cache = PartCache(tmp_path / "elsewhere")
    for part in parts:
        cache.map(part)
    assert len(list((tmp_path / "scratch").glob("*.part"))) == 2 and not (tmp_path / "elsewhere").exists()
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("DISTILL_PART_CACHE_GB", wrong)
        with pytest.raises(FileError, match="set it to a number of gigabytes above 0"):
            PartCache()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two parts and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={256 << 10}", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(parts: list[Wanted], small_disk: Path) -> None:
    """Files that nobody uses make room before the limit is reached; where all is in use, one sentence says so."""
    cache = PartCache(small_disk / "cache", 100 * SIZE)
    for part in parts:
        assert bytes(cache.map(part)[:1]) == bytes([int(part.name[-1]) + 1])
    held = [cache.map(part) for part in parts[:2]]
    with pytest.raises(FileError, match="all that is there is in use: free some space"):
        cache.map(parts[2])
    assert not list((small_disk / "cache").glob("*.tmp")) and all(map(cache.has, parts[:2]))
    del held
    cache.map(parts[2])


def test_many_threads_and_a_small_cache(parts: list[Wanted], tmp_path: Path) -> None:
    cache, wrong = PartCache(tmp_path / "cache", 2 * SIZE), []

    def work(seed: int) -> None:
        for turn in range(40):
            part = parts[(seed * 7 + turn * 5) % len(parts)]
            mapped = cache.map(part)
            if bytes(mapped[:]) != bytes([int(part.name[-1]) + 1]) * SIZE:
                wrong.append(part.name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.tally.mapped == 160
