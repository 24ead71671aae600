"""Folders on disk or in an object store (pyarrow.fs), with one promise: a file that exists is whole.

On disk a file is written under a temporary name, synced, and renamed. For an object store it is gathered in the
system's temporary folder and uploaded when it is whole; an upload that isn't closed is never visible. Either way, a
process killed at any moment leaves no half-written file under the final name.
"""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cluster import commit, object_store
from cluster.errors import FileError
from cluster.faults import flat, patiently, said

_BLOCK = 1 << 20
_RANGE, _AT_ONCE = 32 << 20, 4
_OURS = ("s3", "gs", "gcs")


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI or local path, and the path inside it.

    The environment names the endpoint of an object store, and holds the credentials (STORAGE.md).
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    object_store.check_address(uri)
    scheme, _, path = uri.partition("://")
    if scheme in _OURS:
        return patiently(uri, lambda: object_store.client(scheme, path.partition("/")[0])), path
    try:
        found, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(f"can't open {uri}: {flat(error)}") from None
    return found, path


@dataclass(frozen=True)
class Folder:
    """A folder that may be local or remote. Cheap, picklable; nothing is touched until it is used."""

    uri: str

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri or self.uri.startswith("file://")

    def path(self, name: str = "") -> Path:
        """The local path of ``name``; only for local folders."""
        assert self.is_local, f"{self.uri} is not on this machine"
        return Path(filesystem(self.uri)[1]) / name

    def exists(self, name: str) -> bool:
        return bool(self._info(name).type != fs.FileType.NotFound)

    def size(self, name: str) -> int:
        """Bytes in the file ``name``."""
        info = self._info(name)
        if info.type != fs.FileType.File:
            raise FileError(f"{self.uri}/{name} is missing")
        return int(info.size)

    def total_bytes(self) -> int:
        """Bytes of all files in the folder and below; 0 where there is none."""
        system, root = filesystem(self.uri)
        below = fs.FileSelector(root, recursive=True, allow_not_found=True)
        found = patiently(self.uri, lambda: system.get_file_info(below))
        return sum(info.size or 0 for info in found if info.type == fs.FileType.File)

    def names(self, suffix: str = "") -> list[str]:
        """The names of the files directly in this folder, sorted; empty when there is no such folder."""
        # What a killed writer left behind was never committed, so it is not there.
        return sorted(name for name in self.scan() if name.endswith(suffix) and not is_temporary(name))

    def scan(self) -> Iterator[str]:
        """The names that ``names`` gives and those of unfinished files, in no order; on disk one at a time."""
        if self.is_local:
            with said(self.uri), suppress(FileNotFoundError), os.scandir(self.path()) as found:
                yield from (entry.name for entry in found if entry.is_file())
            return
        yield from (info.base_name for info in self.infos() if info.is_file)

    def infos(self) -> list[fs.FileInfo]:
        """What Arrow tells of the files and folders directly in this one; empty where there is no such folder."""
        system, root = filesystem(self.uri)
        return patiently(self.uri, lambda: system.get_file_info(fs.FileSelector(root, allow_not_found=True)))

    def read(self, name: str) -> bytes:
        system, root = filesystem(self.uri)

        def whole() -> bytes:
            if isinstance(system, fs.LocalFileSystem):
                return Path(root, name).read_bytes()
            with system.open_input_file(f"{root}/{name}") as stream:
                return bytes(stream.read())

        return patiently(f"{self.uri}/{name}", whole)

    def find(self, name: str) -> bytes | None:
        """What ``read`` gives, or None where there is no such file."""
        try:
            return self.read(name)
        except FileError:
            # Asked afterwards: the file is there most times, and each question costs an object store a request.
            if self.exists(name):
                raise
            return None

    def read_json(self, name: str) -> Any:
        try:
            # Nothing else than UTF-8 is ever written, and guessing would import whichever codec a file hints at.
            return json.loads(self.read(name).decode())
        except (ValueError, UnicodeDecodeError, RecursionError):
            raise FileError(f"{self.uri}/{name} is not valid JSON; it was damaged or edited") from None

    def write(self, name: str, data: bytes) -> None:
        def whole() -> None:
            with self.create(name) as stream:
                stream.write(data)

        if self.is_local:
            patiently(f"{self.uri}/{name}", whole)
        else:
            self._upload(name, pa.BufferReader(data))

    def write_json(self, name: str, value: Any, *, once: bool = False) -> bool:
        """Write ``value`` readable and in a fixed key order, in one commit.

        Args:
            once: leave a file that is there already as it is. Of several that write at the same moment, on disk one
                succeeds; an object store is only looked into before writing, so that two may both write, the later
                one stays, and who must know reads again.

        Returns:
            whether it was written.
        """
        data = json_bytes(value)
        if not once:
            self.write(name, data)
            return True
        if self.exists(name):
            return False
        if self.is_local:
            return patiently(f"{self.uri}/{name}", lambda: commit.write_once(self.path(name), data))
        self.write(name, data)
        return True

    def open(self, name: str) -> pa.NativeFile:
        """Open for reading: memory-mapped on disk, ranged reads from an object store."""
        system, root = filesystem(self.uri)
        if isinstance(system, fs.LocalFileSystem):
            return patiently(f"{self.uri}/{name}", lambda: pa.memory_map(f"{root}/{name}"))
        return patiently(f"{self.uri}/{name}", lambda: system.open_input_file(f"{root}/{name}"))

    def blocks(self, name: str, on_size: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
        """The bytes of a file in order; from an object store several ranges at a time, each of them patiently.

        Args:
            on_size: told how many there are, before the first.
        """
        where = f"{self.uri}/{name}"
        with self.open(name) as source:
            on_size(patiently(where, source.size))
            if self.is_local:
                with said(where):
                    while block := source.read(_BLOCK):
                        yield block
                return

            def read(start: int) -> bytes:
                return patiently(where, lambda: bytes(source.read_at(_RANGE, start)))

            with ThreadPoolExecutor(_AT_ONCE) as pool:
                coming: deque[Future[bytes]] = deque()
                for start in range(0, source.size(), _RANGE):
                    coming.append(pool.submit(read, start))
                    if len(coming) == _AT_ONCE:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()

    @contextmanager
    def create(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to a new file that appears under ``name`` whole when the block ends, and not at all if it raises."""
        if self.is_local:
            with said(f"{self.uri}/{name}"), commit.create(self.path(name)) as stream:
                yield stream
            return
        # Without a name, so that nothing stays behind when this process is killed.
        with tempfile.TemporaryFile() as gathered:
            there = f"/proc/self/fd/{gathered.fileno()}"
            with said(f"{tempfile.gettempdir()} (for {self.uri}/{name})"), pa.OSFile(there, "wb") as stream:
                yield stream
            self.put(Path(there), name)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file that is whole to ``name``."""
        with said(str(path)):
            source = pa.OSFile(str(path))
        with source:
            if not self.is_local:
                self._upload(name, source)
                return
            with self.create(name) as stream:
                while block := source.read(_BLOCK):
                    stream.write(block)

    def _upload(self, name: str, source: pa.NativeFile) -> None:
        system, root = filesystem(self.uri)
        patiently(f"{self.uri}/{name}", lambda: object_store.upload(system, f"{root}/{name}", source))

    def remove(self, name: str) -> None:
        """Delete the file ``name`` if it is there."""
        system, root = filesystem(self.uri)

        def delete() -> None:
            # Not asked for first: that would be one request more, and a lost answer leaves nothing to delete either.
            with suppress(FileNotFoundError):
                system.delete_file(f"{root}/{name}")

        patiently(f"{self.uri}/{name}", delete)

    def clear(self) -> None:
        """Delete this folder and all in it."""
        system, root = filesystem(self.uri)

        def delete() -> None:
            # Where folders are only prefixes of names, a part of one may be gone before it is come to.
            with suppress(FileNotFoundError):
                if system.get_file_info(root).type == fs.FileType.Directory:
                    system.delete_dir(root)

        patiently(self.uri, delete)

    def _info(self, name: str) -> fs.FileInfo:
        system, root = filesystem(self.uri)
        return patiently(f"{self.uri}/{name}", lambda: system.get_file_info(f"{root}/{name}"))


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a writer has not finished; when the writer is dead it never will be."""
    return name.startswith(".") and name.endswith(".tmp")


def fetch(source: Folder, into: Path, only: str | None = None) -> None:
    """Copy a folder's files (all levels) into a local one; or ``only`` the file of that name."""
    system, root = filesystem(source.uri)
    below = fs.FileSelector(root, recursive=True)
    if only is None:
        there = patiently(source.uri, lambda: system.get_file_info(below))
        names = [info.path.removeprefix(f"{root.rstrip('/')}/") for info in there if info.is_file]
    else:
        names = [only]
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        with Folder(str(into)).create(name) as sink:
            for block in source.blocks(name):
                sink.write(block)


def store_folder(local: Path, target: Folder) -> None:
    """Copy the files of a local folder (all levels) into ``target``."""
    paths = sorted(path for path in local.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda path: target.put(path, str(path.relative_to(local))), paths))


def sha256(folder: Folder, name: str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    for block in folder.blocks(name):
        digest.update(block)
    return digest.hexdigest()


def json_bytes(value: Any) -> bytes:
    """``value`` as it is written: readable, keys sorted, one form for one value. Not a number is a ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def digest(value: Any) -> str:
    """A short stable digest of plain values (what ``json`` takes), for the question 'has this changed?'."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
