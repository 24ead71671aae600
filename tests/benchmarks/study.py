"""What the studies of trained students share: settings from the environment, the book of results, text, and the loop.

A study trains many students in plain loops in this process and judges each on held-out rows.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.tokenizer import convert, open_tokenizer
from distill_jobs.models.huggingface import load_gguf, load_pretrained
from distill_jobs.store.signal import TeacherSignal

GGUF = "demo/lm/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = "demo/lm/kjv.parquet,demo/lm/news.parquet"
Settings = TypeVar("Settings")


def from_environment(kind: type[Settings], prefix: str) -> Settings:
    """A dataclass with defaults, each field of which the environment may set as ``<prefix>_<FIELD>``."""
    names = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    given = {name: os.environ[f"{prefix}_{name.upper()}"] for name in names if f"{prefix}_{name.upper()}" in os.environ}
    return kind(**{name: type(names[name].default)(value) for name, value in given.items()})


class Book:
    """Results that were found, one a line of a file: what is there needs not be found again.

    Args:
        settings: what results have to agree in to stand in one table.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.entries = [entry for entry in known if entry["settings"] == settings]

    def found(self, **key: Any) -> dict[str, Any] | None:
        """What was found for ``key``, plain values; None where nothing was."""
        return next((entry["found"] for entry in self.entries if entry["key"] == key), None)

    def add(self, found: dict[str, Any], **key: Any) -> None:
        entry = {"key": key, "settings": self.settings, "found": found}
        self.entries.append(entry)
        with self.path.open("a") as out:
            out.write(json.dumps(entry) + "\n")


@dataclass
class Texts:
    """Rows of token ids [R, L + 1] by split and corpus."""

    splits: dict[str, dict[str, Tensor]]
    classes: int

    def rows(self, split: str) -> Tensor:
        """Those of all corpora."""
        return torch.cat(list(self.splits[split].values()))


def read_texts(
    teacher: str, paths: Sequence[str], length: int, tokens: dict[str, int], scratch: Path
) -> tuple[Texts, nn.Module]:
    """The splits, each of so many tokens from all corpora together, and the teacher, a GGUF file or a folder.

    Documents come in a random order, the same each time; none stands in two splits.
    """
    facts = convert(teacher, Folder(str(scratch)))
    tokenizer = open_tokenizer(Folder(str(scratch)))
    splits: dict[str, dict[str, Tensor]] = {name: {} for name in tokens}
    for path in paths:
        documents = [str(text) for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
        order = iter(torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist())
        for name, wanted in tokens.items():
            rows: list[list[int]] = []
            held: list[int] = []
            while len(rows) < wanted // len(paths) // length:
                number = next(order, None)
                assert number is not None, f"{path} is too short for {wanted:,} tokens of {name}: ask for fewer"
                held += [*tokenizer.encode(documents[number], add_special_tokens=False).ids, facts.end_id or 0]
                while len(held) > length and len(rows) < wanted // len(paths) // length:
                    rows.append(held[: length + 1])
                    held = held[length:]
            splits[name][Path(path).stem] = torch.tensor(rows)
    described = DataFacts("causal_lm", "documents", "benchmark", length, vocabulary=facts.vocabulary)
    whole = teacher.endswith(".gguf")
    model = load_gguf(teacher, described) if whole else load_pretrained(teacher, described, trained_further=False)
    return Texts(splits, facts.vocabulary), model.eval()


def logits_of(model: nn.Module, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """[rows · L, V] logits and [rows · L] next tokens."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1)[:, :classes], rows[:, 1:].flatten()


def joined(signals: Sequence[TeacherSignal]) -> TeacherSignal:
    """One signal of the positions of several."""
    first = vars(signals[0])
    lists = {
        key: [getattr(signal, key) for signal in signals] for key, value in first.items() if torch.is_tensor(value)
    }
    return TeacherSignal(**{**first, **{key: torch.cat(values) for key, values in lists.items()}})


def chosen(signal: TeacherSignal, positions: Tensor) -> TeacherSignal:
    """The signal at some of its positions [n]."""
    return TeacherSignal(**{k: v[positions] if isinstance(v, Tensor) else v for k, v in vars(signal).items()})


def positions_of(rows: Tensor, length: int) -> Tensor:
    """[n · L], where the positions of rows [n] stand."""
    return (rows[:, None] * length + torch.arange(length)).flatten()


def steps_of(rows: int, batch: int, epochs: int, seed: int) -> list[Tensor]:
    """Numbers of the rows of each step; every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [step for _ in range(epochs) for step in torch.randperm(rows, generator=generator).split(batch)]


def train(
    student: nn.Module, steps: Sequence[Tensor], loss_of: Callable[[Tensor], Tensor], learning_rate: float
) -> None:
    """AdamW with a warm-up of a tenth and then a straight way down to 0."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, len(steps) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (len(steps) - i) / max(1, len(steps) - warmup))
    )
    student.train()
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    student.eval()
