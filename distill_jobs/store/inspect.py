"""What is in a logit store, for a person: totals, how sure the teacher was, and a few positions as text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.reader import TableReader
from distill_jobs.data.tokenizer import open_tokenizer
from distill_jobs.errors import DistillError, StoreError
from distill_jobs.store.codecs import bytes_per_position
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.reader import LogitStore, read_manifest
from distill_jobs.store.verify import labels_of

_ROWS = 256
_POSITIONS = 20_000
_SHOWN = 4


def describe(folder: Folder, samples: int = 3, data: Folder | None = None) -> dict[str, Any]:
    """Totals from the manifest, and statistics over up to 256 rows spread evenly through the store.

    Args:
        samples: decoded positions to show.
        data: the prepared data, for their tokenizer; by default the folder ``data`` beside the store.

    Raises:
        StoreError: the store is incomplete or damaged.
    """
    plan = StorePlan.load(folder)
    manifest = read_manifest(folder, plan)
    table = TableReader(folder / PARTS, error=StoreError)
    store = LogitStore(plan, manifest, table, None)
    page: dict[str, Any] = {
        "folder": str(folder),
        "teacher": plan.teacher,
        "data": plan.data_fingerprint,
        "task": store.facts.task,
        "classes": plan.classes,
        "padded": plan.vocabulary["padded"],
        "parts": plan.parts,
        "rows": table.rows,
        "tokens": manifest["tokens"],
        "bytes": manifest["bytes"],
        "codec": plan.codec,
        "bytes_per_position": bytes_per_position(plan.make_codec(), plan.classes),
    }
    if not table.rows:
        return page
    rows = max(1, min(_ROWS, _POSITIONS // plan.positions_per_row))
    columns = table.take(np.unique(np.linspace(0, table.rows - 1, rows).astype(np.int64)))
    keep = labels_of(columns, store.facts) != -100
    signal = store.signal(columns, "cpu", keep)
    if not len(signal):
        return page
    tail = signal.tail_at(1.0).exp() if signal.tail_nodes is not None else torch.zeros(len(signal))
    page |= {
        "sampled_positions": len(signal),
        "head_mass": float((1 - tail).mean()),
        "entropy": float(signal.entropy.mean()),
        "gold_probability": float(signal.gold_logprob.exp().mean()),
        "teacher_wrong": float((signal.gold_rank > 0).float().mean()),
        "samples": _samples(store, columns, keep, samples, _names(store, folder, data)),
    }
    return page


def render(page: dict[str, Any]) -> str:
    """The page as plain text."""
    codec = ", ".join(f"{k} {v}" for k, v in page["codec"].items() if k != "name")
    lines = [
        f"logit store   {page['folder']}",
        f"teacher       {page['teacher']}",
        f"data          {page['data']} ({page['task']})",
        f"rows          {page['rows']:,} in {page['parts']:,} parts, {page['tokens']:,} tokens",
        f"classes       {page['classes']:,} (teacher's logits padded to {page['padded']:,})",
        f"codec         {page['codec']['name']}{f' ({codec})' if codec else ''}: {page['bytes_per_position']:,} bytes "
        f"a position, {page['bytes']:,} bytes in all",
    ]
    if "entropy" in page:
        lines += [
            f"over {page['sampled_positions']:,} positions:",
            f"  mass in the head        {page['head_mass']:.4f}",
            f"  mean entropy            {page['entropy']:.3f} nats",
            f"  mean p(right class)     {page['gold_probability']:.3f}",
            f"  teacher's top-1 wrong   {page['teacher_wrong']:.1%}",
        ]
        lines += [line for sample in page["samples"] for line in _sample_lines(sample)]
    return "\n".join(lines)


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    likely = "  ".join(f"{name!r} {probability:.3f}" for name, probability in sample["likely"])
    where = f"{sample['source']}, position {sample['position']}"
    before = f": ...{sample['context']!r}" if sample["context"] is not None else ""
    return [f"{where}{before}", f"  right {sample['gold']!r} ({sample['gold_probability']:.3f});  teacher {likely}"]


def _samples(
    store: LogitStore, columns: dict[str, np.ndarray], keep: Tensor, count: int, names: "_Names"
) -> list[dict[str, Any]]:
    flat = keep.reshape(-1).nonzero().flatten()
    chosen = flat[torch.linspace(0, len(flat) - 1, min(count, len(flat)) + 2).long()[1:-1]]
    chosen = torch.unique(chosen)
    few = torch.zeros(keep.numel(), dtype=torch.bool)
    few[chosen] = True
    signal = store.signal(columns, "cpu", few.reshape(keep.shape))
    head, _ = signal.at(1.0)
    order = head.argsort(dim=-1, descending=True)[:, :_SHOWN]
    ids = order if signal.head_ids is None else signal.head_ids.gather(1, order)
    labels = labels_of(columns, store.facts).reshape(-1)
    found = []
    for number, where in enumerate(chosen.tolist()):
        row, position = divmod(where, store.plan.positions_per_row)
        found.append(
            {
                "source": str(columns["source"][row]) if "source" in columns else f"row {row}",
                "position": position,
                "context": names.context(columns, row, position),
                "gold": names.of(int(labels[where])),
                "gold_probability": float(signal.gold_logprob[number].exp()),
                "likely": [
                    (names.of(int(c)), float(p))
                    for c, p in zip(ids[number], head[number, order[number]].exp(), strict=True)
                ],
            }
        )
    return found


class _Names:
    """Class numbers as text: tokens where there is a tokenizer, else the classes' names."""

    def __init__(self, classes: tuple[str, ...], tokenizer: Any) -> None:
        self._classes, self._tokenizer = classes, tokenizer

    def of(self, number: int) -> str:
        if self._classes:
            return self._classes[number]
        return str(self._tokenizer.decode([number], skip_special_tokens=False)) if self._tokenizer else str(number)

    def context(self, columns: dict[str, np.ndarray], row: int, position: int) -> str | None:
        """The few tokens up to and with the position, of its own document."""
        if self._classes or self._tokenizer is None:
            return None
        segments, ids = columns["segments"][row], columns["input_ids"][row]
        start = max(0, position - 11)
        mine = [
            int(t)
            for t, s in zip(ids[start : position + 1], segments[start : position + 1], strict=True)
            if s == segments[position]
        ]
        return str(self._tokenizer.decode(mine, skip_special_tokens=False))


def _names(store: LogitStore, folder: Folder, data: Folder | None) -> _Names:
    if store.facts.classes:
        return _Names(store.facts.classes, None)
    beside = Folder(folder.uri.rstrip("/").rpartition("/")[0]) / "data"
    # An imported store has no data beside it, and brings its tokenizer itself.
    own = folder if (folder / "tokenizer").exists("tokenizer.json") else beside
    try:
        return _Names((), open_tokenizer(data or own))
    except (DistillError, OSError, ValueError):
        # The numbers still say much; a tokenizer that has gone is no fault of the store.
        return _Names((), None)
