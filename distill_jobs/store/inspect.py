"""What is in a logit store, for a person: totals, how sure the teacher was, and a few positions as text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.tokenizer import open_tokenizer
from distill_jobs.errors import DistillError
from distill_jobs.store.codecs import bytes_per_position
from distill_jobs.store.plan import StorePlan, workdir_of
from distill_jobs.store.quarantine import QUARANTINE, few_of
from distill_jobs.store.reader import LogitStore, open_parts, read_manifest
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.verify import labels_of
from distill_jobs.store.writer import PREFIX

_ROWS = 256
_POSITIONS = 20_000
_SHOWN = 4
_REASONS = 5


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
    table = open_parts(folder, plan, manifest)
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
        "quarantined": manifest["quarantined"],
        "quarantine": few_of(folder, table.part_quarantined, _REASONS),
        "tokens": manifest["tokens"],
        "bytes": manifest["bytes"],
        "codec": plan.codec,
        "seed": plan.seed,
        "bytes_per_position": plan.bytes_per_position,
        "codec_bytes": bytes_per_position(plan.make_codec(), plan.classes),
    }
    if not table.rows:
        return page
    rows = max(1, min(_ROWS, _POSITIONS // plan.positions_per_row))
    columns = table.take(np.unique(np.linspace(0, table.rows - 1, rows).astype(np.int64)))
    page["disk"] = _on_disk(page, plan.positions_per_row, columns)
    keep = labels_of(columns, store.facts) != -100
    page["features"] = store.features_told(columns)
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
        "draws": _draws(signal),
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
        *_quarantine_lines(page),
        f"classes       {page['classes']:,} (teacher's logits padded to {page['padded']:,})",
        f"codec         {page['codec']['name']}{f' ({codec})' if codec else ''}: {page['codec_bytes']:,} bytes "
        f"a position; seed {page['seed']}",
    ]
    lines += [f"{'features' if n == 0 else '':<14}{told}" for n, told in enumerate(page.get("features", ()))]
    if "disk" in page:
        disk, whole = page["disk"], max(1, page["bytes"])
        lines.append(f"on disk       {page['bytes']:,} bytes:")
        for what, told in _ON_DISK.items():
            lines.append(f"  {told:<22}  {disk[what]:,} ({disk[what] / whole:.1%})")
    if "entropy" in page:
        lines += [
            f"over {page['sampled_positions']:,} positions:",
            f"  mass in the head        {page['head_mass']:.4f}",
            *_draw_lines(page["draws"]),
            f"  mean entropy            {page['entropy']:.3f} nats",
            f"  mean p(right class)     {page['gold_probability']:.3f}",
            f"  teacher's top-1 wrong   {page['teacher_wrong']:.1%}",
        ]
        lines += [line for sample in page["samples"] for line in _sample_lines(sample)]
    return "\n".join(lines)


def _quarantine_lines(page: dict[str, Any]) -> list[str]:
    if not page["quarantined"]:
        return []
    share = page["quarantined"] / (page["rows"] + page["quarantined"])
    first = [f"  sample {row.sample_id} ({row.source}): {row.reason}" for row in page["quarantine"]]
    more = page["quarantined"] - len(first)
    return [
        f"quarantine    {page['quarantined']:,} rows that the teacher could not score ({share:.2%} of the data's):",
        *first,
        *([f"  and {more:,} more, in {page['folder']}/{QUARANTINE}"] if more else []),
    ]


_ON_DISK = {"target": "soft target, features", "data": "input ids, other data", "framing": "Arrow's framing"}


def _on_disk(page: dict[str, Any], positions: int, columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Where the bytes go. Text is estimated from the rows looked at; all else is exact."""
    target = page["rows"] * positions * page["bytes_per_position"]
    looked_at = len(columns["sample_id"])
    data = 0
    for name, values in columns.items():
        if values.dtype == object:
            data += sum(len(text.encode()) + 4 for text in values) * page["rows"] // looked_at
        elif not name.startswith(PREFIX):
            data += values.nbytes // looked_at * page["rows"]
    return {"target": target, "data": data, "framing": page["bytes"] - target - data}


def _draws(signal: TeacherSignal) -> dict[str, float] | None:
    """The mass that draws stand for, and how many different classes they are on average; None without draws."""
    if signal.draw_ids is None:
        return None
    used = torch.ones_like(signal.draw_ids, dtype=torch.bool)
    if signal.draw_counts is not None:
        used = signal.draw_counts > 0
    ids = torch.where(used, signal.draw_ids, -1).sort(dim=-1).values
    first = (ids[:, 1:] != ids[:, :-1]).sum(dim=-1) + (ids[:, 0] >= 0)
    mass = signal.tail_at(1.0).exp() if signal.tail_nodes is not None else torch.zeros(len(signal))
    return {"mass": float(mass.mean()), "classes": float(first.float().mean())}


def _draw_lines(draws: dict[str, float] | None) -> list[str]:
    if draws is None:
        return []
    return [f"  mass left to the draws  {draws['mass']:.4f}, {draws['classes']:.1f} different classes a position"]


def _likely(signal: TeacherSignal) -> tuple[Tensor, Tensor]:
    """The likeliest classes that are stored, head or drawn, and their log-probabilities at T = 1: [N, ≤ 4] each."""
    ids, logprob = signal.head_ids, signal.head_logprob
    if ids is None:
        ids = torch.arange(signal.classes).expand(len(signal), -1)
    if signal.draw_ids is not None and signal.draw_logprob is not None:
        # Of a class that was drawn several times only the first counts here.
        order = signal.draw_ids.argsort(dim=-1, stable=True)
        drawn, said = signal.draw_ids.gather(1, order), signal.draw_logprob.gather(1, order).clone()
        said[:, 1:] = said[:, 1:].masked_fill(drawn[:, 1:] == drawn[:, :-1], -torch.inf)
        if signal.draw_counts is not None:
            said = said.masked_fill(signal.draw_counts.gather(1, order) == 0, -torch.inf)
        ids, logprob = torch.cat([ids, drawn], dim=1), torch.cat([logprob, said], dim=1)
    best = logprob.topk(min(_SHOWN, logprob.shape[1]), dim=-1)
    return ids.gather(1, best.indices), best.values


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
    ids, logprob = _likely(signal)
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
                    for c, p in zip(ids[number], logprob[number].exp(), strict=True)
                    if p > 0
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
    beside = workdir_of(folder) / "data"
    # An imported store has no data beside it, and brings its tokenizer itself.
    own = folder if (folder / "tokenizer").exists("tokenizer.json") else beside
    try:
        return _Names((), open_tokenizer(data or own))
    except (DistillError, OSError, ValueError):
        # The numbers still say much; a tokenizer that has gone is no fault of the store.
        return _Names((), None)
