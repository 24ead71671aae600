"""A table of very many parts: time and memory to note commits, to find what is missing at a restart, and to end it.

``BENCH_COMMITS_PARTS`` sets how many (1,000,000). The parts' files are empty and so are the records that the index
covers, which is the proof that none of them is opened; everything else is what a capture does.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.files import Folder
from distill_jobs.data.commits import Commits
from distill_jobs.data.table import PartRecord, record_name

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]
PARTS = int(os.environ.get("BENCH_COMMITS_PARTS", "1000000"))
LEFT = 5000

# Each in a process of its own, so that its peak of memory is its own.
_MEASURE = """
import os, resource, sys, time
from cluster.files import Folder
from distill_jobs.data.commits import Commits
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
folder, parts, what = Folder(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
before, started = resident(), time.perf_counter()
commits = Commits.open(folder, parts, "x")
missing = len(commits.missing())
if what == "manifest":
    opened, started = time.perf_counter() - started, time.perf_counter()
    commits.manifest(rows_per_batch=1)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(seconds, missing, before, resident(), peak)
"""


def record(part: int) -> PartRecord:
    name = f"part-{part:05d}.{part * 7919 % (1 << 32):08x}.arrow"
    return PartRecord(part, name, 64, 65536, 14_000_000, f"{part:064x}", "x")


def touch(folder: Folder, part: int) -> None:
    for name in (record_name(part), str(record(part).file)):
        os.close(os.open(f"{folder.uri}/{name}", os.O_CREAT | os.O_WRONLY, 0o644))


def measure(folder: Folder, what: str) -> tuple[float, int, float, float]:
    """Seconds, parts missing, and memory in MB: what stayed and the most that was taken, beyond the bare process."""
    command = [sys.executable, "-c", _MEASURE, folder.uri, str(PARTS), what]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    seconds, missing, before, after, peak = (float(value) for value in told)
    return seconds, int(missing), (after - before) / 1e6, (peak - before) / 1e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_commits_of_very_many_parts(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "parts"))
    folder.path().mkdir()
    commits, before, started = Commits.open(folder, PARTS, "x"), resident(), time.perf_counter()
    for part in range(PARTS - LEFT):
        commits.add(record(part))
    noted, memory = time.perf_counter() - started, resident() - before
    pieces = len((folder / "commits").names())
    commits.flush()
    print(
        f"\n{PARTS:,} parts: {(PARTS - LEFT) / noted:,.0f} commits/s noted, index of {pieces} pieces included;", end=" "
    )
    print(f"the driver grew by {memory / 1e6:.0f} MB ({memory / PARTS:.0f} bytes a part)")
    for part in range(PARTS - LEFT):
        touch(folder, part)
    seconds, missing, kept, peak = measure(folder, "open")
    print(f"restart: {seconds:.1f} s to find {missing:,} parts missing, {kept:.0f} MB kept, {peak:.0f} MB peak")
    assert missing == LEFT
    for part in range(PARTS - LEFT, PARTS):
        touch(folder, part)
    again = Commits.open(folder, PARTS, "x")
    assert len(again) == PARTS - LEFT, "empty records are damaged: they were read, and those of the index were not"
    for part in range(PARTS - LEFT, PARTS):
        again.add(record(part))
    again.flush()
    seconds, missing, kept, peak = measure(folder, "manifest")
    size = folder.size("manifest.json")
    print(f"manifest of {size / 1e6:.0f} MB and the sweep: {seconds:.1f} s, {kept:.0f} MB kept, {peak:.0f} MB peak")
    assert missing == 0 and not folder.exists("commits")
