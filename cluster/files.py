"""Folders on disk or in an object store (pyarrow.fs), with one promise: a file that exists is whole.

On disk a file is written under a temporary name, synced, and renamed. An object store shows an object only when its
upload has been closed. Either way, a process killed at any moment leaves no half-written file under the final name.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cluster import commit
from cluster.errors import FileError

_BLOCK = 1 << 20
_S3_SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI or local path, and the path inside it.

    ``AWS_ENDPOINT_URL`` names the endpoint of any S3-compatible store; credentials come from the environment only.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if uri.startswith("s3://") and endpoint:
        return _s3(endpoint, tuple(os.environ.get(name) for name in _S3_SETTINGS)), uri.removeprefix("s3://")
    try:
        found, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(f"can't open {uri}: {_flat(error)}") from None
    return found, path


@lru_cache(maxsize=8)
def _s3(endpoint: str, settings: tuple[str | None, ...]) -> fs.S3FileSystem:  # noqa: ARG001
    """One client for the same endpoint and settings: making it takes longer than most requests."""
    scheme, _, host = endpoint.partition("://")
    return fs.S3FileSystem(endpoint_override=host, scheme=scheme)


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

    def names(self, suffix: str = "") -> list[str]:
        """The names of the files directly in this folder, sorted; empty when there is no such folder."""
        # What a killed writer left behind was never committed, so it is not there.
        return sorted(name for name in self.scan() if name.endswith(suffix) and not is_temporary(name))

    def scan(self) -> Iterator[str]:
        """The names that ``names`` gives and those of unfinished files, in no order; on disk one at a time."""
        system, root = filesystem(self.uri)
        with _said(self.uri):
            if isinstance(system, fs.LocalFileSystem):
                with suppress(FileNotFoundError), os.scandir(root) as found:
                    yield from (entry.name for entry in found if entry.is_file())
            else:
                there = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
                yield from (info.base_name for info in there if info.is_file)

    def read(self, name: str) -> bytes:
        with _said(f"{self.uri}/{name}"):
            if self.is_local:
                return self.path(name).read_bytes()
            with self.open(name) as stream:
                return bytes(stream.read())

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
        with self.create(name) as stream:
            stream.write(data)

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
        if not self.is_local:
            self.write(name, data)
            return True
        with _said(f"{self.uri}/{name}"):
            try:
                with commit.create(self.path(name), publish=commit.link_once) as stream:
                    stream.write(data)
            except FileExistsError:
                return False
        return True

    def open(self, name: str) -> pa.NativeFile:
        """Open for reading: memory-mapped on disk, ranged reads from an object store."""
        system, root = filesystem(self.uri)
        with _said(f"{self.uri}/{name}"):
            if isinstance(system, fs.LocalFileSystem):
                return pa.memory_map(f"{root}/{name}")
            return system.open_input_file(f"{root}/{name}")

    @contextmanager
    def create(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to a new file that appears under ``name`` whole when the block ends, and not at all if it raises."""
        system, root = filesystem(self.uri)
        with _said(f"{self.uri}/{name}"):
            if isinstance(system, fs.LocalFileSystem):
                with commit.create(Path(root) / name) as stream:
                    yield stream
            else:
                # An upload that is never closed is never visible; on an error it is closed under a name nobody reads.
                aside = f"{root}/.{uuid.uuid4().hex}.tmp"
                try:
                    with system.open_output_stream(aside) as stream:
                        yield stream
                except BaseException:
                    with suppress(OSError):
                        system.delete_file(aside)
                    raise
                system.move(aside, f"{root}/{name}")

    def remove(self, name: str) -> None:
        """Delete the file ``name`` if it is there."""
        system, root = filesystem(self.uri)
        with _said(f"{self.uri}/{name}"):
            if self.exists(name):
                system.delete_file(f"{root}/{name}")

    def clear(self) -> None:
        """Delete this folder and all in it."""
        system, root = filesystem(self.uri)
        with _said(self.uri):
            if system.get_file_info(root).type == fs.FileType.Directory:
                system.delete_dir(root)

    def _info(self, name: str) -> fs.FileInfo:
        system, root = filesystem(self.uri)
        with _said(f"{self.uri}/{name}"):
            return system.get_file_info(f"{root}/{name}")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a writer has not finished; when the writer is dead it never will be."""
    return name.startswith(".") and name.endswith(".tmp")


def fetch(source: Folder, into: Path) -> Path:
    """Copy a remote folder's files (all levels) into a local one, once; a local folder is returned as it is."""
    if source.is_local:
        return source.path()
    system, root = filesystem(source.uri)
    done = into / ".fetched"
    if not done.exists():
        into.mkdir(parents=True, exist_ok=True)
        with _said(source.uri):
            fs.copy_files(root, str(into), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
        done.touch()
    return into


def store_folder(local: Path, target: Folder) -> None:
    """Copy the files of a local folder into ``target``."""
    system, root = filesystem(target.uri)
    with _said(target.uri):
        system.create_dir(root, recursive=True)
        fs.copy_files(str(local), root, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)


def sha256(folder: Folder, name: str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with folder.open(name) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(value: Any) -> bytes:
    """``value`` as it is written: readable, keys sorted, one form for one value. Not a number is a ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def digest(value: Any) -> str:
    """A short stable digest of plain values (what ``json`` takes), for the question 'has this changed?'."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def _said(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FileError(f"{where} is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{where}: {_flat(error)}") from None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
