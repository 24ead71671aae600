"""What this machine has: packages, processors, memory, disks, limits."""

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import psutil
from packaging.specifiers import SpecifierSet

from cluster.checkup.findings import Finding, ok, problem, warning
from cluster.files import Folder
from cluster.node_cache import place as node_cache_place
from cluster.preflight import unmet

GB = 1e9
_CGROUP = Path("/sys/fs/cgroup")
_FEW_FILES, _LITTLE_MEMORY, _LITTLE_DISK = 4096, 2 * GB, 5 * GB
_SHARED = 0.3  # of the memory: what Ray takes for its object store
_FULL = 0.95  # of a disk: from here on Ray puts nothing on it


def packages(distribution: str) -> Iterator[Finding]:
    """Python and every package against the bounds that the installed distribution itself declares."""
    name = "packages"
    try:
        about = metadata.metadata(distribution)
        wanted = [each for each in metadata.requires(distribution) or () if "extra ==" not in each]
    except metadata.PackageNotFoundError:
        yield problem(name, f"{distribution} is not installed here", "install it: `make setup`")
        return
    here, bounds = platform.python_version(), about["Requires-Python"]
    if not SpecifierSet(bounds).contains(here, prereleases=True):
        yield problem(name, f"Python is {here}, and {distribution} needs {bounds}", "use an environment with that")
    bad = unmet(wanted, ".".join(here.split(".")[:2]))
    for sentence in bad:
        text, _, remedy = sentence.partition(": ")
        yield problem(name, text, remedy)
    if not bad:
        yield ok(name, f"Python {here} and {len(wanted)} packages are within the bounds of {distribution}")


def processors() -> Iterator[Finding]:
    """How many cores this process may use, and whether Ray will think so."""
    seen, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = cpu_quota()
    usable = min(allowed, quota if quota is not None else allowed)
    if usable < seen:
        yield warning(
            "processors",
            f"{seen} cores are visible, and this process may use {usable:g} of them",
            f"set cluster.cpus (or `ray start --num-cpus`) to {max(1, int(usable))}: Ray counts what is visible",
        )
    else:
        yield ok("processors", f"{seen} cores")


def memory() -> Iterator[Finding]:
    """Memory as the machine and its cgroup have it, and where Ray's object store will lie."""
    name, now = "memory", psutil.virtual_memory()
    limit = memory_limit()
    total = min(now.total, limit) if limit else now.total
    free = min(now.available, total)
    told = f"{free / GB:.1f} of {total / GB:.1f} GB free" + (", by the cgroup's limit" if total < now.total else "")
    if free < _LITTLE_MEMORY:
        yield warning(name, told, "end what else runs here, or take a larger machine: Ray kills tasks at 95 % full")
    else:
        yield ok(name, told)
    try:
        shared = shutil.disk_usage("/dev/shm")
    except OSError:
        yield warning("/dev/shm", "there is none", "mount one: without it Ray's object store lies on disk, and is slow")
        return
    wanted = _SHARED * total
    if shared.total < wanted * 0.99:
        yield warning(
            "/dev/shm",
            f"{shared.total / GB:.2f} GB, less than the {wanted / GB:.1f} GB that Ray's object store would take",
            "enlarge it (docker run --shm-size, or an emptyDir of medium Memory): on disk the store is slow",
        )
    else:
        yield ok("/dev/shm", f"{shared.free / GB:.1f} of {shared.total / GB:.1f} GB free")


def disks(workdir: Folder | None, needed: float | None = None) -> Iterator[Finding]:
    """Room where things are written: the workdir if it is local, temporary files, Ray's own, the node's cache.

    Args:
        needed: bytes that the job is predicted to leave in the workdir.
    """
    places = {"temporary files": Path(tempfile.gettempdir()), "node cache": node_cache_place()}
    if workdir is not None and workdir.is_local:
        places = {"workdir": workdir.path(), **places}
    for what, place in places.items():
        yield _disk(what, place, needed if what == "workdir" else None)


def limits() -> Iterator[Finding]:
    """How many files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES and soft != resource.RLIM_INFINITY:
        most = "65536" if hard == resource.RLIM_INFINITY else str(hard)
        yield warning("open files", f"{soft} at most", f"`ulimit -n {most}`: Ray opens several for each worker")
    else:
        yield ok("open files", f"{soft:,} at most" if soft != resource.RLIM_INFINITY else "as many as one likes")


def compiler(candidates: Sequence[str]) -> Iterator[Finding]:
    """A C++ compiler, for what is compiled on the machine it runs on."""
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        yield warning(
            "C++ compiler",
            f"none of {', '.join(candidates)} is there",
            "apt-get install g++ (or set CXX): without it the logit store is encoded by slower code",
        )
    else:
        yield ok("C++ compiler", found)


def cpu_quota(root: Path = _CGROUP) -> float | None:
    """Cores that the cgroup allows; None for any number."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        micros = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return micros / int((root / "cpu/cpu.cfs_period_us").read_text()) if micros > 0 else None
    except (OSError, ValueError):
        return None


def memory_limit(root: Path = _CGROUP) -> int | None:
    """Bytes that the cgroup allows; None for any number."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
            return int(text) if text != "max" and int(text) < 1 << 60 else None
        except (OSError, ValueError):
            continue
    return None


def _disk(what: str, place: Path, needed: float | None) -> Finding:
    there = next(each for each in (place, *place.parents) if each.exists())
    usage = shutil.disk_usage(there)
    name, told = f"disk: {what}", f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free at {place}"
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return problem(name, f"{there} is not a folder that this user may write to", "give another, or its permissions")
    if needed is not None and usage.free < needed:
        remedy = "free some space, or give another workdir"
        return problem(name, f"{told}, and the plan predicts {needed / GB:.1f} GB", remedy)
    if usage.used / max(1, usage.used + usage.free) > _FULL:
        return warning(name, f"{told}: over {_FULL:.0%} full", "free some space: Ray stops spilling objects there")
    if usage.free < _LITTLE_DISK:
        return warning(name, told, "free some space")
    return ok(name, told)
