"""Parts of a table in an object store, fetched whole into a local folder of bounded size.

The folder is shared: every process of a machine that reads the same parts finds what another has fetched, and waits
for it instead of fetching it again. A file stands there under its name only when it is whole. Whoever has one mapped
holds a shared lock on it, which ends with the map or the process; when room is needed the files used longest ago go
among those that nobody holds. ``DISTILL_PART_CACHE`` and ``DISTILL_PART_CACHE_GB`` say for a machine where the folder
is and how large, whatever a job says.
"""

import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError, FileError
from cluster.faults import fault
from cluster.files import Folder
from distill_jobs.data.flat import Damage
from distill_jobs.data.part_file import map_file

_LOCKS = 64
_UNFINISHED = ".tmp"
_LOOK_SECONDS = 0.2
DEFAULT_BYTES = 16 << 30


@dataclass(frozen=True)
class Wanted:
    """A part's file: where it is, and the SHA-256 that it must have."""

    folder: Folder
    name: str
    sha256: str

    @property
    def cached(self) -> str:
        """Its name in the cache: another file, or the same name with other content, has another."""
        return hashlib.sha256(f"{self.folder}/{self.name}/{self.sha256}".encode()).hexdigest()[:40] + ".part"


@dataclass
class Tally:
    """What a cache's readers met: parts mapped, those of them that were not there yet, and seconds waited for them."""

    mapped: int = 0
    missed: int = 0
    waited: float = 0.0


class PartCache:
    """A local folder that holds at most ``limit`` bytes of remote parts, and beyond that only what is in use at once.

    Attributes:
        arrived: names of the parts that this object has fetched, and so has compared with their SHA-256.
        tally: how it served.
    """

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_BYTES) -> None:
        named = os.environ.get("DISTILL_PART_CACHE")
        self.folder = Path(named) if named else folder or Path(tempfile.gettempdir()) / f"distill-parts-{os.getuid()}"
        self.limit = limit_of(limit)
        self.arrived: set[str] = set()
        self.tally = Tally()
        self._ahead = _Ahead(self)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to somebody else")
        except OSError as error:
            raise FileError(f"can't use {self.folder} as a cache ({error}); set reading.cache_dir") from None

    def map(self, wanted: Wanted) -> mmap.mmap:
        """Map a part, fetching it first when it isn't there.

        Raises:
            FileError: it can't be read, or doesn't fit into the cache.
            Damage: what was fetched is not what was written.
        """
        self.tally.mapped += 1
        for _ in range(3):
            started = time.perf_counter()
            missed = not self.has(wanted)
            path = self.fetch(wanted)
            if missed:
                self.tally.missed += 1
                self.tally.waited += time.perf_counter() - started
            # Between fetching and mapping another process may have needed the room.
            with suppress(FileNotFoundError):
                os.utime(path)
                return map_file(path, hold=True)
        raise FileError(f"{self.folder} has no room for what is read at once; raise reading.cache_gb")

    def has(self, wanted: Wanted) -> bool:
        return (self.folder / wanted.cached).exists()

    def drop(self, wanted: Wanted) -> None:
        """Forget a part, for example because it turned out to be damaged: the next reader fetches it anew."""
        self.arrived.discard(wanted.cached)
        (self.folder / wanted.cached).unlink(missing_ok=True)

    def fetch(self, wanted: Wanted, spare: frozenset[str] = frozenset()) -> Path:
        """The local path of a part, fetched when it isn't there. Files named in ``spare`` aren't given up for it."""
        final = self.folder / wanted.cached
        with self._lock(wanted.cached):
            if not final.exists():
                self._copy(wanted, final, lambda size: self._make_room(size, spare))
        return final

    def prefetch(self, wanted: list[Wanted], spare: list[Wanted], reader: str = "") -> None:
        """Fetch parts behind the caller's back, in this order, as far as there is room beside what is spared.

        Args:
            spare: parts that are being read. They stay, and so does what other readers spare.
            reader: who asks; what it asked for before is forgotten.
        """
        self._ahead.ask(reader, wanted, frozenset(w.cached for w in [*spare, *wanted]))

    def _copy(self, wanted: Wanted, final: Path, make_room: Callable[[int], None]) -> None:
        # Under the lock nobody else writes it: what is there was left by one that was killed.
        temporary = final.with_suffix(_UNFINISHED)
        try:
            digest = hashlib.sha256()
            with temporary.open("wb") as sink:
                for block in wanted.folder.blocks(wanted.name, make_room):
                    digest.update(block)
                    sink.write(block)
            if digest.hexdigest() != wanted.sha256:
                raise Damage("its SHA-256 is not the one in the manifest")
            os.replace(temporary, final)
            self.arrived.add(wanted.cached)
        except OSError as error:
            raise fault(f"can't fetch {wanted.folder}/{wanted.name} into {self.folder}", error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int, spare: frozenset[str]) -> None:
        if size > self.limit:
            raise FileError(
                f"a part of {size:,} bytes doesn't fit into a cache of {self.limit:,}; raise reading.cache_gb"
            )
        held = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith((".part", _UNFINISHED)) and not self._abandoned(entry.name):
                    held.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.name))
        total = sum(bytes_ for _, bytes_, _ in held) + size
        # A disk that others fill as well may have less room than was granted.
        limit = min(self.limit, total - size + shutil.disk_usage(self.folder).free)
        for _, bytes_, name in sorted(held):
            if total <= limit:
                return
            if name.endswith(".part") and name not in spare and _removed(self.folder / name):
                total -= bytes_
        if total > limit and spare:
            raise _NoRoomError("no room to read ahead")
        if size > (free := shutil.disk_usage(self.folder).free):
            raise FileError(
                f"{self.folder} has {free:,} bytes free, and a part of {size:,} is to be read while all that is there "
                "is in use: free some space, or set reading.cache_dir"
            )

    def _abandoned(self, name: str) -> bool:
        """Whether a file was left unfinished by a process that was killed; it is removed then."""
        if not name.endswith(_UNFINISHED):
            return False
        with self._stripe(name).open("w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.folder / name).unlink(missing_ok=True)
            return True
        return False

    def _stripe(self, name: str) -> Path:
        return self.folder / f"{int(name[:4], 16) % _LOCKS:02d}.lock"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._stripe(name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _NoRoomError(FileError):
    """There is no room for what isn't needed yet."""


def limit_of(asked: int) -> int:
    """Bytes that a cache may hold on this machine, where a job asks for so many.

    Raises:
        FileError: the environment names no size.
    """
    told = os.environ.get("DISTILL_PART_CACHE_GB")
    try:
        size = float(told) * 1e9 if told else asked
        return int(size) if size > 0 else int("none")
    except (ValueError, OverflowError):
        raise FileError(f"DISTILL_PART_CACHE_GB is {told!r}; set it to a number of gigabytes above 0") from None


def _removed(path: Path) -> bool:
    """Remove a part unless somebody has it mapped; whether it was removed."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


class _Ahead:
    """One thread that fetches what will be needed next; a reader's newer wish replaces its older one."""

    def __init__(self, cache: PartCache) -> None:
        self._cache, self._wake = cache, threading.Condition()
        self._left: dict[str, deque[Wanted]] = {}
        self._spare: dict[str, frozenset[str]] = {}
        self._thread: threading.Thread | None = None

    def ask(self, reader: str, wanted: list[Wanted], spare: frozenset[str]) -> None:
        with self._wake:
            self._left[reader], self._spare[reader] = deque(wanted), spare
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not any(self._left.values()):
                    self._wake.wait()
                # Whoever has most left to fetch comes first.
                left = max(self._left.values(), key=len)
                wanted = left.popleft()
                spare = frozenset().union(*self._spare.values())
            try:
                self._cache.fetch(wanted, spare)
            except _NoRoomError:
                # Until a reader lets go of what it has read; a newer wish makes this one void.
                with self._wake:
                    left.appendleft(wanted)
                    self._wake.wait(_LOOK_SECONDS)
            except (ClusterError, Damage, OSError):
                # Whoever needs the part meets the same error, and tells it.
                continue
