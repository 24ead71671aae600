"""The user's files: found, measured, and cut in ranges of rows that actors can read apart from one another.

A *survey* reads every file once, for its SHA-256, its number of rows, and (for lines) the byte offset of each 1,024th
row, so that a range can be read from its middle. A file whose size and time of change are as an earlier survey
recorded them is not read again.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.errors import FileError
from cluster.faults import pass_on, patiently
from cluster.files import Folder, filesystem
from distill_jobs.errors import DataError
from distill_jobs.spec import Data

SURVEY = "sources.json"
STRIDE = 1024
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One file as surveyed. ``name`` is what people and the split's hash know it by.

    ``offsets[i]`` is the byte at which row ``i × STRIDE`` starts (jsonl and csv); ``rows`` counts a jsonl file's lines.
    """

    uri: str
    name: str
    format: str
    size: int
    changed: float
    sha256: str
    rows: int
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Rows ``first`` … ``stop``-1 of a file; row ``indexed`` starts at byte ``offset`` (jsonl and csv)."""

    uri: str
    name: str
    format: str
    first: int
    stop: int
    indexed: int = 0
    offset: int = 0

    @classmethod
    def of(cls, file: SourceFile, first: int, stop: int) -> "Piece":
        at = first // STRIDE if file.offsets else 0
        offset = file.offsets[at] if file.offsets else 0
        return cls(file.uri, file.name, file.format, first, stop, at * STRIDE, offset)


@dataclass(frozen=True)
class Range:
    """One shard of the preparing: ``number`` names the part that is cut from it in each split."""

    group: str
    number: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.stop - piece.first for piece in self.pieces)

    def __str__(self) -> str:
        first, last = self.pieces[0], self.pieces[-1]
        return f"{self.group} rows {first.name}:{first.first + 1} to {last.name}:{last.stop}"


Survey = dict[str, tuple[SourceFile, ...]]


def survey(data: Data, recorded: Folder | None = None) -> Survey:
    """Find and measure the files of each source group: ``train``, and those splits that have paths of their own.

    Args:
        recorded: where an earlier survey may lie (``sources.json``), to save reading unchanged files.

    Raises:
        DataError: nothing found, unreadable, of unknown format, without rows, or in two groups at once.
    """
    known = _recorded(recorded)
    wanted = {"train": data.train, "validation": data.validation, "test": data.test}
    found = {
        group: [found for path in ([paths] if isinstance(paths, str) else paths) for found in find(path, data.format)]
        for group, paths in wanted.items()
        if not isinstance(paths, float)
    }
    owner: dict[str, str] = {}
    for group, infos in found.items():
        for uri, _, _ in infos:
            if owner.setdefault(uri, group) != group:
                raise DataError(f"{uri} is in both data.{owner[uri]} and data.{group}: each file belongs to one split")
    names = _names(list(owner))
    surveyed: Survey = {}
    for group, infos in found.items():
        files = {uri: _measure(uri, info, kind, names[uri], known) for uri, info, kind in infos}
        if not sum(file.rows for file in files.values()):
            raise DataError(f"the {group} data are empty: no rows in {', '.join(list(files)[:3])}")
        surveyed[group] = tuple(files.values())
    return surveyed


def save_survey(surveyed: Survey, folder: Folder) -> None:
    """Record the survey for the next run's shortcut."""
    folder.write_json(SURVEY, [asdict(file) for files in surveyed.values() for file in files])


def ranges(surveyed: Survey, rows_per_part: int) -> dict[str, list[Range]]:
    """Each group's rows, through all its files in order, cut in ranges of ``rows_per_part``."""
    cut: dict[str, list[Range]] = {}
    for group, files in surveyed.items():
        shards: list[Range] = []
        pieces: list[Piece] = []
        room = rows_per_part
        for file in files:
            first = 0
            while first < file.rows:
                stop = min(file.rows, first + room)
                pieces.append(Piece.of(file, first, stop))
                room -= stop - first
                first = stop
                if not room:
                    shards.append(Range(group, len(shards), tuple(pieces)))
                    pieces, room = [], rows_per_part
        if pieces:
            shards.append(Range(group, len(shards), tuple(pieces)))
        cut[group] = shards
    return cut


def find(path: str, wanted: str = "auto") -> list[tuple[str, fs.FileInfo, str]]:
    """The files that a path, folder or glob stands for, sorted: URI, file info and format of each."""
    wild = re.search(r"[*?\[]", path)
    base = (path[: wild.start()].rpartition("/")[0] or "/") if wild else path
    try:
        # Only what stands before the first wildcard is a URI; a question mark in one would start a query.
        system, root = filesystem(base)
        if wild:
            tail = "/" + path[len(base) :].lstrip("/")
            pattern = re.compile(re.escape(root.rstrip("/")) + _pattern(tail))
            below = fs.FileSelector(root, recursive="/" in tail[1:], allow_not_found=True)
            listed = patiently(path, lambda: system.get_file_info(below))
            infos = [i for i in listed if i.is_file and pattern.fullmatch(i.path)]
            if not infos:
                raise DataError(f"no file matches {path}")
        else:
            info = patiently(path, lambda: system.get_file_info(root))
            if info.type == fs.FileType.NotFound:
                raise DataError(f"the data file {path} does not exist")
            infos = [info]
            if info.type == fs.FileType.Directory:
                infos = _in_folder(system, root, wanted)
                if not infos:
                    raise DataError(f"the folder {path} holds no data files ({', '.join(_FORMATS)})")
    except (FileError, OSError, pa.ArrowException) as error:
        pass_on(path, error)
        raise DataError(f"can't list {path}: {' '.join(str(error).split())}") from None
    scheme = f"{path.partition('://')[0]}://" if "://" in path else ""
    return [(scheme + i.path, i, _format(i.path, wanted)) for i in sorted(infos, key=lambda i: str(i.path))]


def _in_folder(system: fs.FileSystem, root: str, wanted: str) -> list[fs.FileInfo]:
    listed = patiently(root, lambda: system.get_file_info(fs.FileSelector(root, recursive=True)))
    return [i for i in listed if i.is_file and not i.base_name.startswith((".", "_")) and _known_format(i.path, wanted)]


def _known_format(path: str, wanted: str) -> str | None:
    return _FORMATS.get("." + path.rpartition(".")[2].lower()) if wanted == "auto" else wanted


def _format(path: str, wanted: str) -> str:
    kind = _known_format(path, wanted)
    if kind is None:
        known = ", ".join(_FORMATS)
        raise DataError(f"can't tell the format of {path} by its name (known: {known}): set data.format")
    return kind


def _pattern(glob: str) -> str:
    """A glob as a regular expression: ``*`` and ``?`` stay within a folder, ``**`` crosses folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(p) or (p.replace("[!", "[^") if p.startswith("[") and p.endswith("]") else re.escape(p))
        for p in parts
    )


def _names(uris: list[str]) -> dict[str, str]:
    """The shortest ends of the paths that tell the files apart, so that moving a data set changes no split."""
    depth = 1
    while True:
        short = {uri: "/".join(uri.split("/")[-depth:]) for uri in uris}
        if len(set(short.values())) == len(uris):
            return short
        depth += 1


def _recorded(folder: Folder | None) -> dict[tuple[str, str], SourceFile]:
    if folder is None or not folder.exists(SURVEY):
        return {}
    try:
        files = [SourceFile(**{**f, "offsets": tuple(f["offsets"])}) for f in folder.read_json(SURVEY)]
    except (FileError, TypeError, KeyError):
        return {}
    return {(file.uri, file.format): file for file in files}


def _measure(uri: str, info: fs.FileInfo, kind: str, name: str, known: dict[tuple[str, str], SourceFile]) -> SourceFile:
    changed = info.mtime.timestamp() if info.mtime else 0.0
    old = known.get((uri, kind))
    if old is not None and (old.size, old.changed) == (info.size, changed) and changed:
        return SourceFile(**{**vars(old), "name": name})
    digest = hashlib.sha256()
    try:
        if kind in ("jsonl", "csv"):
            rows, offsets = _index(_hashed(uri, digest), kind)
        else:
            for _ in _hashed(uri, digest):
                pass
            rows, offsets = 1 if kind == "text" else parquet(uri).metadata.num_rows, ()
    except (FileError, OSError, pa.ArrowException) as error:
        pass_on(uri, error)
        raise DataError(f"can't read {uri}: {' '.join(str(error).split())}") from None
    return SourceFile(uri, name, kind, info.size, changed, digest.hexdigest(), rows, offsets)


def parquet(uri: str) -> pq.ParquetFile:
    """Open a Parquet file; DataError when it is none."""
    try:
        system, path = filesystem(uri)
        return patiently(uri, lambda: pq.ParquetFile(system.open_input_file(path)))
    except (FileError, OSError, pa.ArrowException) as error:
        pass_on(uri, error)
        raise DataError(f"{uri} is not a readable Parquet file: {' '.join(str(error).split())}") from None


def records(uri: str, kind: str, offset: int = 0) -> Iterator[bytes]:
    """The records of a line-based file from a byte offset on, each with its line end, read block by block."""
    yield from _records(_blocks(uri, offset), kind)


def _blocks(uri: str, offset: int) -> Iterator[bytes]:
    system, path = filesystem(uri)
    with patiently(uri, lambda: system.open_input_file(path)) as file:
        size = patiently(uri, file.size)
        for start in range(offset, size, _BLOCK):
            yield patiently(uri, partial(file.read_at, _BLOCK, start))


def _records(blocks: Iterable[bytes], kind: str) -> Iterator[bytes]:
    """Lines; in a csv, lines are one record as long as a quote is open (RFC 4180)."""
    rest = held = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            held += line + b"\n"
            if kind == "jsonl" or held.count(b'"') % 2 == 0:
                yield held
                held = b""
    if held + rest:
        yield held + rest


def _index(blocks: Iterable[bytes], kind: str) -> tuple[int, tuple[int, ...]]:
    """Rows of a line-based file, and the byte offset of each 1,024th."""
    offsets: list[int] = []
    rows, position = (-1 if kind == "csv" else 0), 0  # a csv's header is no row
    for record in _records(blocks, kind):
        if rows >= 0 and rows % STRIDE == 0:
            offsets.append(position)
        rows += 1
        position += len(record)
    return max(0, rows), tuple(offsets)


def _hashed(uri: str, digest: Any) -> Iterator[bytes]:
    above, _, name = uri.rpartition("/")
    for block in Folder(above or "/").blocks(name):
        digest.update(block)
        yield block
