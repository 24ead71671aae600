"""The proof that matters: students trained from each codec, and from the teacher's whole distribution, side by side.

A language model teaches a copy of itself with few layers, on real text, in plain loops in this process. Every arm
has the same start, rows, order and steps; only what stands for the teacher differs. ``dense`` asks the teacher itself
at every step, so that nothing is stored or rounded; ``hard labels`` has no teacher. Seeds differ in the order of rows.

    STUDENTS_TEACHER=demo/lm/SmolLM2-135M-Instruct.Q4_1.gguf STUDENTS_TEXT=demo/lm/kjv.parquet,demo/lm/news.parquet \\
        pytest -m benchmark tests/benchmarks/test_bench_students.py -s

Prints a Markdown table. With ``STUDENTS_OUT`` every finished arm is appended to that file, and a later run of the same
sizes goes on from it.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from study import (
    GGUF,
    TEXTS,
    Book,
    Texts,
    chosen,
    from_environment,
    joined,
    logits_of,
    positions_of,
    read_texts,
    steps_of,
    train,
)
from torch import Tensor, nn

from distill_jobs.losses import distillation_loss
from distill_jobs.models.layers import cut_layers
from distill_jobs.store.codecs import HybridCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.fidelity.codings import Coding, compared, family, of_codec
from distill_jobs.store.signal import TeacherSignal

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
HARD, DENSE = "hard labels", "dense"
BINS = 15


@dataclass(frozen=True)
class Sizes:
    """What the environment may set, as ``STUDENTS_<NAME>``: ``tokens`` and ``test_tokens`` are of all texts."""

    teacher: str = GGUF
    text: str = TEXTS
    tokens: int = 65_536
    test_tokens: int = 8_192
    length: int = 128
    batch: int = 4
    epochs: int = 1
    layers: str = "0,29"
    learning_rate: float = 5e-4
    temperature: float = 1.0
    alpha: float = 1.0
    seeds: int = 3
    arms: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What results have to agree in to stand in one table."""
        return {name: value for name, value in asdict(self).items() if name not in ("seeds", "arms")}


class Shelf:
    """What each coding keeps of the teacher: one pass of the teacher for all of them."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, rows: Tensor, classes: int, codings: list[Coding], batch: int) -> None:
        self.length = rows.shape[1] - 1
        made: dict[str, list[TeacherSignal]] = {coding.name: [] for coding in codings}
        for numbers in torch.arange(len(rows)).split(batch):
            logits, gold = logits_of(teacher, rows[numbers], classes)
            chances = uniforms(0, numbers, self.length)
            for coding in codings:
                made[coding.name].append(coding.signal(logits, gold, chances))
        self.signals = {name: joined(signals) for name, signals in made.items()}

    def take(self, name: str, rows: Tensor) -> TeacherSignal:
        return chosen(self.signals[name], positions_of(rows, self.length))


@torch.no_grad()
def live(teacher: nn.Module, rows: Tensor, classes: int) -> TeacherSignal:
    logits, _ = logits_of(teacher, rows, classes)
    unused = torch.zeros(len(logits))
    return TeacherSignal(None, torch.log_softmax(logits, -1), None, unused, unused.long(), unused, classes)


@torch.inference_mode()
def judged(model: nn.Module, texts: Texts, believed: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity of each corpus and of all, expected calibration error in 15 bins, and KL from the teacher.

    Args:
        believed: the teacher's log-probabilities by corpus, [rows · L, V] fp16; empty to leave the KL out.
    """
    found, nlls, sure, right, apart = {}, [], [], [], []
    for corpus, rows in texts.splits["test"].items():
        of_corpus = []
        for i in range(len(rows)):
            logits, gold = logits_of(model, rows[i : i + 1], texts.classes)
            logprob = torch.log_softmax(logits, dim=-1)
            best = logprob.max(dim=-1)
            of_corpus.append(-logprob.gather(1, gold[:, None])[:, 0])
            sure.append(best.values.exp())
            right.append((best.indices == gold).float())
            if believed:
                teacher = believed[corpus][i * len(gold) : (i + 1) * len(gold)].float()
                apart.append((teacher.exp() * (teacher - logprob)).sum(dim=-1))
        nlls += of_corpus
        found[f"perplexity {corpus}"] = float(torch.cat(of_corpus).mean().exp())
    found["perplexity"] = float(torch.cat(nlls).mean().exp())
    found["ECE"] = _calibration_error(torch.cat(sure), torch.cat(right))
    if apart:
        found["KL from the teacher"] = float(torch.cat(apart).mean())
    return found


def _calibration_error(sure: Tensor, right: Tensor) -> float:
    bins = (sure * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, sure - right)
    return float(gaps.abs().sum() / len(sure))


@torch.inference_mode()
def beliefs(teacher: nn.Module, texts: Texts) -> dict[str, Tensor]:
    return {
        corpus: torch.cat([torch.log_softmax(logits_of(teacher, r[None], texts.classes)[0], -1).half() for r in rows])
        for corpus, rows in texts.splits["test"].items()
    }


def codings_of(sizes: Sizes, classes: int) -> list[Coding]:
    """The wanted ones; by default 48 + 16, all kinds at 224 bytes, and the better ones at 72."""
    every = [of_codec(HybridCodec(48, 16), classes), *family(classes), *compared(classes)]
    by_name = {coding.name: coding for coding in every}
    if sizes.arms:
        wanted = [name.strip() for name in sizes.arms.split(",")]
        unknown = set(wanted) - by_name.keys() - {HARD, DENSE}
        assert not unknown, f"no such arms: {unknown}; there are {HARD}, {DENSE}, {', '.join(by_name)}"
        return [by_name[name] for name in wanted if name in by_name]
    at_224 = [c for c in [*family(classes, (224,)), *compared(classes, (224,))] if c.family != "hybrid"]
    at_72 = [
        c for c in [*family(classes, (72,)), *compared(classes, (72,))] if c.family in ("hybrid", "top-k renormalised")
    ]
    return [by_name["hybrid 48+16"], *at_224, *at_72]


def table(results: list[dict[str, Any]], bytes_of: dict[str, float], teacher: dict[str, float]) -> str:
    """Means over seeds, and what a single seed departs from its mean (standard deviation)."""
    columns = list(teacher)
    lines = [
        f"| trained from | bytes a token | seeds | {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    lines.append("| (the teacher itself) | | | " + " | ".join(f"{value:.4g}" for value in teacher.values()) + " |")
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result["found"] for result in results if result["arm"] == arm]
        told = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            told.append(f"{mean(values):.4g}{spread}" if values else "")
        size = f"{bytes_of[arm]:.0f}" if arm in bytes_of else ""
        lines.append(f"| {arm} | {size} | {len(runs)} | {' | '.join(told)} |")
    return "\n".join(lines)


def test_students_from_every_codec(tmp_path: Path) -> None:
    sizes = from_environment(Sizes, "STUDENTS")
    paths = sizes.text.split(",")
    missing = [path for path in (sizes.teacher, *paths) if not Path(path).exists()]
    if missing:
        pytest.skip(f"{missing[0]} is missing: python -m distill_jobs.examples.fetch lm --into demo, or STUDENTS_… set")
    tokens = {"test": sizes.test_tokens, "train": sizes.tokens}
    texts, teacher = read_texts(sizes.teacher, paths, sizes.length, tokens, tmp_path)
    rows, codings = texts.rows("train"), codings_of(sizes, texts.classes)
    names = [
        name for name in (DENSE, *(c.name for c in codings), HARD) if not sizes.arms or name in sizes.arms.split(",")
    ]
    book = Book(Path(os.environ.get("STUDENTS_OUT") or tmp_path / "students.jsonl"), sizes.settings)
    print(f"\n{len(rows):,} rows of {sizes.length} tokens; arms: {', '.join(names)}", flush=True)

    started = time.perf_counter()
    believed = beliefs(teacher, texts)
    of_teacher = judged(teacher, texts, believed)
    todo = [c for c in codings if any(book.found(arm=c.name, seed=seed) is None for seed in range(sizes.seeds))]
    shelf = Shelf(teacher, rows, texts.classes, todo, sizes.batch)
    print(f"the teacher's pass took {time.perf_counter() - started:.0f} s", flush=True)
    layers = [int(layer) for layer in sizes.layers.split(",")]
    for seed in range(sizes.seeds):
        for name in names:
            if book.found(arm=name, seed=seed) is not None:
                continue
            started = time.perf_counter()
            student, alpha = cut_layers(teacher, layers), 0.0 if name == HARD else sizes.alpha

            def loss_of(step: Tensor, name: str = name, alpha: float = alpha, student: nn.Module = student) -> Tensor:
                logits, gold = logits_of(student, rows[step], texts.classes)
                signal = None
                if name != HARD:
                    signal = live(teacher, rows[step], texts.classes) if name == DENSE else shelf.take(name, step)
                return distillation_loss(logits, gold, signal, alpha, sizes.temperature, classes=texts.classes).total

            train(student, steps_of(len(rows), sizes.batch, sizes.epochs, seed), loss_of, sizes.learning_rate)
            found = judged(student, texts, believed)
            book.add(found, arm=name, seed=seed)
            told = ", ".join(f"{what} {value:.4g}" for what, value in found.items())
            print(f"seed {seed}, {name}: {told} ({time.perf_counter() - started:.0f} s)", flush=True)
        results = [{**entry["key"], "found": entry["found"]} for entry in book.entries if entry["key"]["arm"] in names]
        print("\n" + table(results, {c.name: c.bytes for c in codings}, of_teacher), flush=True)
    assert book.entries
