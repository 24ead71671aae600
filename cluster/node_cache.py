"""Remote folders, fetched once for all processes of a node: a teacher's weights don't cross the network once an actor.

The cache is a private folder in the system's temporary one, or ``DISTILL_NODE_CACHE``. A copy stands there under its
name only when it is whole; while one process fetches, the others wait. Who uses a copy holds a shared lock on it until
the process ends, so that copies which nobody holds can be told, and go when another folder is fetched.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from cluster.commit import sync_folder
from cluster.errors import FileError
from cluster.faults import said
from cluster.files import Folder, fetch

_PAUSE_SECONDS = 0.1
_held: dict[Path, IO[bytes]] = {}


def node_copy(folder: Folder, key: str, only: str | None = None) -> Path:
    """A local path with the files of ``folder``; a local folder is its own copy.

    Args:
        key: tells contents apart, a digest of them for example: of another key the folder is fetched anew.
        only: the one file that is needed of it.

    Raises:
        FileError: the cache can't be used, or the folder can't be read.
    """
    if folder.is_local:
        return folder.path()
    cache = _cache()
    name = hashlib.sha256("\n".join([str(folder), key, only or ""]).encode()).hexdigest()[:32]
    final = cache / name
    with said(str(cache)):
        while (lock := _hold(cache, final, lambda into: fetch(folder, into, only))) is None:
            time.sleep(_PAUSE_SECONDS)
    if (before := _held.pop(final, None)) is not None:
        before.close()
    _held[final] = lock
    return final


def _hold(cache: Path, final: Path, fill: Callable[[Path], None]) -> IO[bytes] | None:
    """The shared lock on a copy, which is fetched when it isn't there; None when another process was just ahead."""
    path = final.with_suffix(".lock")
    lock = path.open("a+b")
    try:
        # Waits while another process fetches.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not final.exists():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not final.exists() and _is_at(lock, path):
                _evict(cache)
                _fetch(final, fill)
            fcntl.flock(lock, fcntl.LOCK_SH)
        # Between two locks of this process, another may have found that nobody held the copy, and removed it.
        if final.exists() and _is_at(lock, path):
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def place() -> Path:
    """Where the cache lies, or would."""
    return Path(os.environ.get("DISTILL_NODE_CACHE") or Path(tempfile.gettempdir()) / f"distill-node-{os.getuid()}")


def _cache() -> Path:
    cache = place()
    with said(f"{cache} as a cache of fetched folders (DISTILL_NODE_CACHE)"):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        # In a folder that all may write to, somebody else could have put it there, with weights of their own.
        if cache.is_symlink() or cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022:
            raise FileError(
                f"{cache} is not this user's alone, so that others could change what is loaded from it; remove it or "
                "set DISTILL_NODE_CACHE"
            )
    return cache


def _fetch(final: Path, fill: Callable[[Path], None]) -> None:
    # Under the lock nobody else is fetching it: what is there was left by one that was killed.
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        fill(unfinished)
        os.rename(unfinished, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _evict(cache: Path) -> None:
    """Remove the copies that no process holds."""
    for path in cache.glob("*.lock"):
        # Not waited for: a lock that is held means a copy in use, or one being fetched.
        with suppress(OSError), path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in ("", ".tmp"):
                shutil.rmtree(path.with_suffix(suffix), ignore_errors=True)
            path.unlink()


def _is_at(lock: IO[bytes], path: Path) -> bool:
    """Whether an open lock file is still the one at ``path``; else others would not meet it there."""
    try:
        return os.fstat(lock.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
