"""Others' captures as a logit store: their rows packed into sequences, their listed entries under the codec ``topk``.

The store is complete and stands alone: it carries its own facts of the data and its tokenizer. Each part is made from a
run of rows of one file, so that an import that was stopped goes on where it was, and one whose source has grown adds
what is new.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.files import Folder, digest, sha256
from distill_jobs.data import tokenizer
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.exchange.filling import Layout, Run, Work, write_rows
from distill_jobs.store.exchange.lists import Documents
from distill_jobs.store.exchange.source import Source, find, read_coding
from distill_jobs.store.plan import PLAN, StorePlan
from distill_jobs.store.writer import finish, start

ORIGIN = "import"
FORMATS = ("topk", "distillkit")

# Raised when the same source would give another store: everything imported by older code is then made again.
_VERSION = 1
_TOKENS_PER_PART = 1 << 18
Progress = Callable[[int, int], None]


def import_store(
    place: str,
    into: Folder,
    tokenizer_source: str,
    layout: Layout,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Make a store in ``into`` of the Parquet files at ``place``.

    Args:
        tokenizer_source: the teacher's tokenizer: a Hugging Face folder or id, a GGUF file, or ``bytes``.
        on_progress: told the parts done and their number.

    Returns:
        the store's manifest.

    Raises:
        DataError: the source or the tokenizer is not what it should be.
        StoreError: ``into`` holds a store that was not imported.
    """
    _refuse_captured(into)
    folder, names = find(place)
    coding = read_coding(folder, layout.config) if layout.form == "distillkit" else None
    source = Source(folder, names, layout.tokens, layout.ids, layout.values, coding)
    known = tokenizer.convert(tokenizer_source, into)
    runs = survey(source, known)
    longest = max(int(run.lengths.max()) for run in runs)
    layout = replace(layout, length=layout.length or longest, k=layout.k or source.width())
    work = Work(source, layout, known)
    inputs = [digest([_VERSION, work.rules, run.identity]) for run in runs]
    plan = StorePlan.make(
        facts=_facts(work, runs, digest(inputs)),
        codec=TopKCodec(min(work.k, known.vocabulary)),
        teacher=f"{ORIGIN}:{layout.teacher}",
        outputs=work.padded,
    )
    commits = start(into, plan, inputs)
    for part, run in enumerate(runs):
        if part not in commits:
            commits.add(write_rows(work, into, plan, part, run, inputs[part]))
        on_progress(part + 1, len(runs))
    return finish(into, plan, commits)


def survey(source: Source, known: tokenizer.TokenizerFacts) -> list[Run]:
    """Look at all rows' tokens once: the runs of rows that make the parts.

    Raises:
        DataError: a file can't be read, there are no rows, or token ids don't fit the tokenizer.
    """
    # A padding token that also ends documents is left alone: its first is a document's end.
    pad = known.pad_id if known.pad_id != known.end_id else None
    runs: list[Run] = []
    for name in source.names:
        documents, largest = source.documents(name, pad)
        if largest >= known.vocabulary:
            raise DataError(
                f"{source.folder}/{name} holds token {largest}, but the tokenizer has {known.vocabulary} tokens; "
                "name the teacher's own tokenizer"
            )
        checksum = sha256(source.folder, name)
        runs += [Run(name, checksum, start, stop, documents.within(start, stop)) for start, stop in _cuts(documents)]
    runs = [run for run in runs if len(run.lengths) and run.lengths.max() > 1]
    if not runs:
        raise DataError(f"{source.folder} holds no rows of more than one token")
    return runs


def _facts(work: Work, runs: list[Run], fingerprint: str) -> DataFacts:
    packed = [work.sequences(run) for run in runs]
    tokens = sum(sequence.tokens for some in packed for sequence in some)
    return DataFacts(
        task="causal_lm",
        features="documents",
        fingerprint=fingerprint,
        sequence_length=work.length,
        vocabulary=work.classes,
        tokenizer_sha=work.tokenizer.sha,
        pad_id=work.tokenizer.pad_id,
        packing="documents",
        splits={"train": {"rows": sum(map(len, packed)), "tokens": tokens, "parts": len(runs)}},
        dropped={"single_token": int(sum(run.lengths.sum() for run in runs)) - tokens},
        reads={"origin": ORIGIN, "format": work.layout.form, "values": work.layout.kind, "tail": "even"},
    )


def _refuse_captured(into: Folder) -> None:
    if not into.exists(PLAN):
        return
    reads = StorePlan.load(into).facts.get("reads")
    if not isinstance(reads, dict) or reads.get("origin") != ORIGIN:
        raise StoreError(f"{into} holds a store that was captured; import into a new folder")


def _cuts(documents: Documents) -> list[tuple[int, int]]:
    """Runs of whole rows of about ``_TOKENS_PER_PART`` tokens each: the first row and the one behind the last."""
    if not len(documents.rows):
        return []
    part_of = np.cumsum(np.bincount(documents.rows, weights=documents.lengths)) // _TOKENS_PER_PART
    bounds = [0, *(np.flatnonzero(np.diff(part_of)) + 1).tolist(), len(part_of)]
    return list(itertools.pairwise(bounds))
