"""How a file comes to be on disk: written under a temporary name, synced, then put under its own in one step."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def create(final: Path, publish: Callable[[str, Path], None] = os.replace) -> Iterator[pa.NativeFile]:
    """A stream to a new file that is ``final`` when the block ends; an error leaves no trace of it.

    Args:
        publish: puts the finished file under its name: ``os.replace``, or ``link_once``.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as raw, pa.PythonFile(raw, mode="w") as stream:
            yield stream
            stream.flush()
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(temporary, 0o644)
        publish(temporary, final)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(final.parent)


def write_once(final: Path, data: bytes) -> bool:
    """Write a file unless its name is taken; whether it was written."""
    try:
        with create(final, publish=link_once) as stream:
            stream.write(data)
    except FileExistsError:
        return False
    return True


def link_once(temporary: str, final: Path) -> None:
    """Put a file under its name if that is free; of several processes that try at once, one succeeds.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        # Over a network the link may have been made although the answer to it was lost: then it is asked for again.
        if os.stat(temporary).st_nlink < 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: here two that look at the same moment both write, and the later one stays.
        if final.exists():
            raise FileExistsError(errno.EEXIST, "the name is taken", str(final)) from None
        os.replace(temporary, final)
        return
    os.unlink(temporary)


def sync_folder(path: Path) -> None:
    """Have the names in a folder outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Hashing:
    """A file object that passes what is written on, and works out its SHA-256 and length meanwhile."""

    closed = False

    def __init__(self, sink: pa.NativeFile) -> None:
        self._sink, self._digest, self.bytes = sink, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._sink.write(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        """Nothing is held back here; who made the sink closes it."""

    close = flush

    @property
    def sha256(self) -> str:
        """Of all that has been written, in hex."""
        return self._digest.hexdigest()


@contextmanager
def hashed(sink: pa.NativeFile) -> Iterator[tuple[pa.NativeFile, Hashing]]:
    """A stream for Arrow to write to, and the ``Hashing`` between it and ``sink``."""
    between = Hashing(sink)
    with pa.PythonFile(between, mode="w") as stream:
        yield stream, between
