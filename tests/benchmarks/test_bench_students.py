"""The proof that matters: students trained from each codec, and from the teacher's whole distribution, side by side.

A language model teaches a copy of itself with few layers, on real text, in plain loops in this process. Every arm
has the same start, rows, order and steps; only what stands for the teacher differs. ``dense`` asks the teacher itself
at every step, so that nothing is stored or rounded; ``hard labels`` has no teacher. Seeds differ in the order of rows.

    STUDENTS_TEACHER=demo/lm/SmolLM2-135M-Instruct.Q4_1.gguf STUDENTS_TEXT=demo/lm/kjv.parquet,demo/lm/news.parquet \\
        pytest -m benchmark tests/benchmarks/test_bench_students.py -s

Prints a Markdown table. With ``STUDENTS_OUT`` every finished arm is appended to that file, and a later run of the same
sizes goes on from it.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.tokenizer import convert, open_tokenizer
from distill_jobs.losses import distillation_loss
from distill_jobs.models.huggingface import load_gguf, load_pretrained
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

    teacher: str = "demo/lm/SmolLM2-135M-Instruct.Q4_1.gguf"
    text: str = "demo/lm/kjv.parquet,demo/lm/news.parquet"
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

    @classmethod
    def read(cls) -> "Sizes":
        given = {f.name: os.environ.get(f"STUDENTS_{f.name.upper()}") for f in fields(cls)}
        return cls(**{f.name: type(f.default)(given[f.name]) for f in fields(cls) if given[f.name] is not None})

    @property
    def settings(self) -> dict[str, Any]:
        """What results have to agree in to stand in one table."""
        return {name: value for name, value in asdict(self).items() if name not in ("seeds", "arms")}


@dataclass
class Texts:
    """Token ids [R, L + 1] to learn from, and as many again a corpus to be judged by."""

    train: Tensor
    test: dict[str, Tensor]
    classes: int


def read_texts(sizes: Sizes, scratch: Path) -> tuple[Texts, nn.Module]:
    facts = convert(sizes.teacher, Folder(str(scratch)))
    tokenizer, paths = open_tokenizer(Folder(str(scratch))), sizes.text.split(",")
    train, test = [], {}
    for path in paths:
        documents = [str(text) for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        wanted = [n // sizes.length for n in (sizes.test_tokens // len(paths), sizes.tokens // len(paths))]
        made: list[list[list[int]]] = [[], []]
        held: list[int] = []
        place = 0
        for number in order:
            held += [*tokenizer.encode(documents[number], add_special_tokens=False).ids, facts.end_id or 0]
            while len(held) > sizes.length and len(made[place]) < wanted[place]:
                made[place].append(held[: sizes.length + 1])
                held = held[sizes.length :]
            if len(made[place]) == wanted[place]:
                # No document stands on both sides: what is left of this one is dropped.
                place, held = place + 1, []
                if place == 2:
                    break
        assert len(made[1]) == wanted[1], (
            f"{path} is too short for {wanted[1]} rows of {sizes.length}: set STUDENTS_TOKENS"
        )
        test[Path(path).stem] = torch.tensor(made[0])
        train.append(torch.tensor(made[1]))
    described = DataFacts("causal_lm", "documents", "benchmark", sizes.length, vocabulary=facts.vocabulary)
    load = load_gguf if sizes.teacher.endswith(".gguf") else _load_folder
    return Texts(torch.cat(train), test, facts.vocabulary), load(sizes.teacher, described).eval()


def _load_folder(path: str, facts: DataFacts) -> nn.Module:
    return load_pretrained(path, facts, trained_further=False)


def logits_of(model: nn.Module, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """[rows · L, V] logits and [rows · L] next tokens."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1)[:, :classes], rows[:, 1:].flatten()


class Shelf:
    """What each coding keeps of the teacher, row by row: one pass of the teacher for all of them."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, texts: Texts, codings: list[Coding], batch: int) -> None:
        self.rows: dict[str, list[TeacherSignal]] = {coding.name: [] for coding in codings}
        length = texts.train.shape[1] - 1
        for start in range(0, len(texts.train), batch):
            rows = texts.train[start : start + batch]
            logits, gold = logits_of(teacher, rows, texts.classes)
            chances = uniforms(0, torch.arange(start, start + len(rows)), length)
            for coding in codings:
                whole = coding.signal(logits, gold, chances)
                self.rows[coding.name] += [_slice(whole, i * length, (i + 1) * length) for i in range(len(rows))]

    def take(self, name: str, rows: list[int]) -> TeacherSignal:
        signals = [self.rows[name][row] for row in rows]
        joined = {
            key: torch.cat([getattr(signal, key) for signal in signals]) if isinstance(value, Tensor) else value
            for key, value in vars(signals[0]).items()
        }
        return TeacherSignal(**joined)


def _slice(signal: TeacherSignal, start: int, stop: int) -> TeacherSignal:
    # Copies, so that a row doesn't keep its whole batch alive.
    cut = {k: v[start:stop].clone() if isinstance(v, Tensor) else v for k, v in vars(signal).items()}
    return TeacherSignal(**cut)


@torch.no_grad()
def live(teacher: nn.Module, rows: Tensor, classes: int) -> TeacherSignal:
    logits, _ = logits_of(teacher, rows, classes)
    unused = torch.zeros(len(logits))
    return TeacherSignal(None, torch.log_softmax(logits, -1), None, unused, unused.long(), unused, classes)


def train(
    student: nn.Module, texts: Texts, sizes: Sizes, alpha: float, seed: int, ask: Callable[[list[int]], Any]
) -> None:
    """AdamW with a warm-up of a tenth and then a straight way down to 0; ``ask(rows)`` gives the teacher's signal."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(texts.train), generator=generator) for _ in range(sizes.epochs)]
    steps = [list(batch) for order in orders for batch in order.split(sizes.batch)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=sizes.learning_rate, weight_decay=0.01)
    warmup = max(1, len(steps) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (len(steps) - i) / max(1, len(steps) - warmup))
    )
    student.train()
    for step in steps:
        chosen = [int(row) for row in step]
        logits, gold = logits_of(student, texts.train[chosen], texts.classes)
        loss = distillation_loss(logits, gold, ask(chosen), alpha, sizes.temperature, classes=texts.classes)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    student.eval()


@torch.inference_mode()
def judged(model: nn.Module, texts: Texts, believed: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity of each corpus and of all, expected calibration error in 15 bins, and KL from the teacher.

    Args:
        believed: the teacher's log-probabilities by corpus, [rows · L, V] fp16; empty to leave the KL out.
    """
    found, nlls, sure, right, apart = {}, [], [], [], []
    for corpus, rows in texts.test.items():
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
        for corpus, rows in texts.test.items()
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
    sizes = Sizes.read()
    missing = [path for path in (sizes.teacher, *sizes.text.split(",")) if not Path(path).exists()]
    if missing:
        pytest.skip(f"{missing[0]} is missing: python -m distill_jobs.examples.fetch lm --into demo, or STUDENTS_… set")
    texts, teacher = read_texts(sizes, tmp_path)
    codings = codings_of(sizes, texts.classes)
    names = [
        name for name in (DENSE, *(c.name for c in codings), HARD) if not sizes.arms or name in sizes.arms.split(",")
    ]
    book = Path(os.environ.get("STUDENTS_OUT") or tmp_path / "students.jsonl")
    known = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    results = [entry for entry in known if entry["settings"] == sizes.settings and entry["arm"] in names]
    done = {(entry["arm"], entry["seed"]) for entry in results}
    print(f"\n{len(texts.train):,} rows of {sizes.length} tokens; arms: {', '.join(names)}", flush=True)

    started = time.perf_counter()
    believed = beliefs(teacher, texts)
    of_teacher = judged(teacher, texts, believed)
    todo = [c for c in codings if any((c.name, seed) not in done for seed in range(sizes.seeds))]
    shelf = Shelf(teacher, texts, todo, sizes.batch)
    print(f"the teacher's pass took {time.perf_counter() - started:.0f} s", flush=True)
    layers = [int(layer) for layer in sizes.layers.split(",")]
    for seed in range(sizes.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            started = time.perf_counter()
            student = cut_layers(teacher, layers)

            def ask(rows: list[int], name: str = name) -> TeacherSignal | None:
                if name == HARD:
                    return None
                return live(teacher, texts.train[rows], texts.classes) if name == DENSE else shelf.take(name, rows)

            train(student, texts, sizes, 0.0 if name == HARD else sizes.alpha, seed, ask)
            entry = {"arm": name, "seed": seed, "settings": sizes.settings, "found": judged(student, texts, believed)}
            results.append(entry)
            with book.open("a") as out:
                out.write(json.dumps(entry) + "\n")
            told = ", ".join(f"{what} {value:.4g}" for what, value in entry["found"].items())
            print(f"seed {seed}, {name}: {told} ({time.perf_counter() - started:.0f} s)", flush=True)
        print("\n" + table(results, {c.name: c.bytes for c in codings}, of_teacher), flush=True)
    assert results
