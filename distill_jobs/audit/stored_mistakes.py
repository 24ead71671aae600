"""Where the teacher is confidently wrong in what it will teach: counted in the logit store, before a student is
trained.

Of each position only the statistics are read that every codec keeps: the right class's log-probability and rank, and
the entropy (of a classifier also its first choice's probability). A classifier is confidently wrong where another
class than the right one has at least the probability ``audit.confident``; a language model where its entropy is at
most ``audit.low_entropy`` and the token that came has at most the probability ``audit.tiny_gold`` and is not its
first choice: one text is only one sample of what could have come, so that a mere miss says nothing.
"""

import math
from typing import Any

import numpy as np
import torch

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.audit.measures import JOINED
from distill_jobs.spec.audit import Audit
from distill_jobs.store.reader import LogitStore

NEGATIVE = "negative.json"
_VERSION = 1
_MOST_POSITIONS = 50_000_000
_POSITIONS_AT_ONCE = 65_536


def stored_mistakes(store: Folder, data: Folder, spec: Audit) -> dict[str, Any]:
    """The rate of the teacher's confident mistakes in a store, over all and by slice; ``negative.json`` holds it.

    What was counted before from the same store by the same thresholds is read from there. A store of more than 50
    million positions is sampled by whole parts, evenly spread; ``positions_of`` then says of how many.

    Returns:
        ``positions`` and ``rows`` that were looked at, ``wrong`` (positions where the first choice is wrong),
        ``mistakes`` (those where it is so confidently), their ``rate``, ``thresholds``, and ``slices``: by column and
        value the same counts and ``small``, whether there are fewer rows than ``audit.min_slice_rows``.

    Raises:
        StoreError: the store is incomplete or damaged.
    """
    opened = LogitStore.open(store, data, verify=False)
    language = opened.facts.task == "causal_lm"
    asked = {
        "schema_version": _VERSION,
        "plan": opened.plan.digest,
        "table": opened.manifest["table_sha256"],
        "thresholds": thresholds_of(spec, language),
        "intersections": [list(names) for names in spec.intersections],
        "min_slice_rows": spec.min_slice_rows,
    }
    known = _known(store)
    if all(known.get(name) == value for name, value in asked.items()):
        return known
    found = {**asked, **_count(opened, spec)}
    store.write_json(NEGATIVE, found)
    return found


def thresholds_of(spec: Audit, language: bool) -> dict[str, float]:
    """What makes a mistake a confident one."""
    if language:
        return {"low_entropy": spec.low_entropy, "tiny_gold": spec.tiny_gold}
    return {"confident": spec.confident}


def _known(store: Folder) -> dict[str, Any]:
    try:
        found = store.read_json(NEGATIVE) if store.exists(NEGATIVE) else {}
    except FileError:  # Damaged: it is counted again.
        return {}
    return found if isinstance(found, dict) else {}


class _Tally:
    """Counts of one group of rows."""

    def __init__(self) -> None:
        self.counts = np.zeros(4, dtype=np.int64)

    def as_dict(self) -> dict[str, Any]:
        rows, positions, wrong, mistakes = self.counts.tolist()
        rate = mistakes / positions if positions else None
        return {"rows": rows, "positions": positions, "wrong": wrong, "mistakes": mistakes, "rate": rate}


def _count(store: LogitStore, spec: Audit) -> dict[str, Any]:
    whole = _Tally()
    groups: dict[str, dict[str, _Tally]] = {}
    per_row = store.plan.positions_per_row
    at_once = max(1, _POSITIONS_AT_ONCE // per_row)
    for part in _parts(store.table.part_rows, per_row):
        rows = np.asarray(store.table.part_range(part), dtype=np.int64)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            # [n, 4]: each row itself, its scored positions, those where the teacher is wrong, and confidently so.
            counts = np.column_stack([np.ones(len(some), dtype=np.int64), *_judge(store, some, spec)])
            whole.counts += counts.sum(axis=0)
            for column, values in _columns(store, some, spec).items():
                by = groups.setdefault(column, {})
                for value in np.unique(values):
                    by.setdefault(str(value), _Tally()).counts += counts[values == value].sum(axis=0)
    slices = {
        column: {
            value: {**tally.as_dict(), "small": int(tally.counts[0]) < spec.min_slice_rows}
            for value, tally in sorted(by.items())
        }
        for column, by in groups.items()
    }
    total = int(store.manifest["tokens"])
    return {**whole.as_dict(), "positions_of": max(total, int(whole.counts[1])), "slices": slices}


def _parts(part_rows: np.ndarray, per_row: int) -> list[int]:
    """The parts to look at: all that have rows, or as many of them, evenly spread, as hold the most positions."""
    filled = np.flatnonzero(part_rows)
    wanted = max(1, math.floor(len(filled) * min(1.0, _MOST_POSITIONS / max(1, int(part_rows.sum()) * per_row))))
    chosen = np.unique(np.linspace(0, len(filled) - 1, wanted).astype(np.int64)) if len(filled) else filled
    return [int(part) for part in filled[chosen]]


def _judge(store: LogitStore, rows: np.ndarray, spec: Audit) -> list[np.ndarray]:
    """Scored positions, wrong ones and confidently wrong ones of each row, [n] each."""
    if store.facts.task == "causal_lm":
        said = store.statistics(rows)
        rank, sure = said["gold_rank"], said["entropy"] <= spec.low_entropy
        sure &= said["gold_logprob"].exp() <= spec.tiny_gold
    else:
        signal = store.signal(store.take(rows, columns=[]), "cpu")
        best = signal.head_logprob.max(dim=-1).values if signal.top1_logprob is None else signal.top1_logprob
        rank, sure = signal.gold_rank, best.exp() >= spec.confident
    wrong = rank > 0
    return [_by_row(flags, len(rows)) for flags in (rank >= 0, wrong, wrong & sure)]


def _by_row(flags: torch.Tensor, rows: int) -> np.ndarray:
    return np.asarray(flags.view(rows, -1).sum(dim=1).numpy())


def _columns(store: LogitStore, rows: np.ndarray, spec: Audit) -> dict[str, np.ndarray]:
    """The slice columns and intersections of rows, [n] of text each."""
    names = store.facts.slices
    if not names:
        return {}
    taken = store.table.take(rows, [f"slice.{name}" for name in names])
    found = {name: taken[f"slice.{name}"].astype(str) for name in names}
    for joined in spec.intersections:
        each = zip(*(found[name].tolist() for name in joined), strict=True)
        found[JOINED.join(joined)] = np.array([JOINED.join(values) for values in each])
    return found
