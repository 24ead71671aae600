"""Each soft loss at a tuned T and alpha beside training without a teacher: on a census, on a tenth of it, and on text.

T and alpha are tuned on the validation split by log loss with one seed, the learning rate likewise for the arm without
a teacher, and all losses take that one. Then fresh seeds are trained at what was found best, for the same number of
steps each, and judged on held-out rows that nothing before has seen. Intervals are paired, over rows and seeds.

    python -m distill_jobs.examples.fetch adult lm --into demo
    LOSSES_OUT=build/losses.jsonl pytest -m benchmark tests/benchmarks/test_bench_losses.py -s

One thread each: the census takes minutes, text an hour. With ``LOSSES_OUT`` every student is written to that file, and
a later run of the same sizes goes on from it. Prints a Markdown table for each.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_studies import ACCURACY, LOG_LOSS, Census, Setting, Sizes, Study, Text
from study import Book, from_environment

from distill_jobs.audit.resample import paired_gain
from distill_jobs.losses import LOSSES, SoftLoss, make_loss
from distill_jobs.spec.distill import Loss

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
PLAIN, TUNING_SEED, NO_TEMPERATURE = "no teacher", 100, "mse"
ARMS: dict[str, SoftLoss] = {name: make_loss(Loss.model_validate(name)) for name in LOSSES}
ARMS["forward_kl, standardised"] = make_loss(None, standardise=True)


def tuned(study: Study, book: Book, arm: str, settings: list[Setting]) -> Setting:
    """The setting with the least log loss on the validation split."""
    losses = []
    for setting in settings:
        key = {"study": study.name, "arm": arm, **asdict(setting), "seed": "tuning"}
        found = book.found(**key)
        if found is None:
            started = time.perf_counter()
            model = study.learn(ARMS.get(arm, ARMS["forward_kl"]), setting, TUNING_SEED, True)
            found = {name: float(v.mean()) / study.positions for name, v in study.judge(model, "validation").items()}
            book.add(found, **key)
            print(f"{arm}, {setting}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
        losses.append(found[LOG_LOSS])
    return settings[int(np.argmin(losses))]


def final(study: Study, book: Book, arm: str, setting: Setting, seed: int) -> None:
    """Train at the setting and judge on the test split, unless the book has it."""
    key = {"study": study.name, "arm": arm, **asdict(setting), "seed": seed}
    if book.found(**key) is None:
        started = time.perf_counter()
        found = study.judge(study.learn(ARMS.get(arm, ARMS["forward_kl"]), setting, seed, False), "test")
        book.add({name: np.round(values, 4).tolist() for name, values in found.items()}, **key)
        told = {name: round(float(v.mean()) / study.positions, 4) for name, v in found.items()}
        print(f"{arm}, seed {seed}: {told} ({time.perf_counter() - started:.0f} s)", flush=True)


def grid(study: Study, loss: SoftLoss, learning_rate: float) -> list[Setting]:
    temperatures = (1.0,) if loss.kind.name == NO_TEMPERATURE else study.temperatures
    return [Setting(learning_rate, t, alpha) for t in temperatures for alpha in study.alphas]


def conduct(study: Study, book: Book, seeds: int) -> None:
    """Tune, train and judge every arm; print the table after each seed."""
    plain = tuned(study, book, PLAIN, [Setting(rate) for rate in study.rates])
    settings = {PLAIN: plain}
    for arm, loss in ARMS.items():
        if not (study.sparse and loss.kind.sparse == "refused"):
            settings[arm] = tuned(study, book, arm, grid(study, loss, plain.learning_rate))
    teacher = study.judge(None, "test")
    for seed in range(seeds):
        for arm, setting in settings.items():
            final(study, book, arm, setting, seed)
        print("\n" + table(study, book, settings, seed + 1, teacher), flush=True)


def table(study: Study, book: Book, settings: dict[str, Setting], seeds: int, teacher: dict[str, np.ndarray]) -> str:
    """Means over rows and seeds, and differences from the arm without a teacher."""

    def sums(arm: str, name: str) -> np.ndarray:
        key = {"study": study.name, "arm": arm, **asdict(settings[arm])}
        return np.array([(book.found(**key, seed=seed) or {})[name] for seed in range(seeds)])

    weights = np.full(len(teacher[LOG_LOSS]), study.positions)
    means = {name: values.sum() / weights.sum() for name, values in teacher.items()}
    lines = [
        f"{study.name}: {seeds} seeds, {len(weights):,} held-out rows; learning rate {settings[PLAIN].learning_rate:g}",
        "",
        "| loss | T | alpha | log loss | against no teacher | accuracy | against no teacher |",
        "|---|---:|---:|---:|---|---:|---|",
        f"| (the teacher) | | | {means[LOG_LOSS]:.4f} | | {100 * means[ACCURACY]:.2f} % | |",
    ]
    for arm in (PLAIN, *ARMS):
        if arm not in settings:
            lines.append(f"| {arm} | | | | refused: sparse store | | |")
            continue
        soft = settings[arm].alpha > 0
        warm = soft and arm != NO_TEMPERATURE
        told = [arm, f"{settings[arm].temperature:g}" if warm else "", f"{settings[arm].alpha:g}" if soft else ""]
        for name, digits, unit, scale, better in ((LOG_LOSS, 4, "", 1, -1), (ACCURACY, 2, " %", 100, 1)):
            own = sums(arm, name)
            told.append(f"{scale * own.mean(axis=0).sum() / weights.sum():.{digits}f}{unit}")
            gain = paired_gain(own, sums(PLAIN, name), weights) * scale
            told.append(verdict(gain.value, *gain.interval(), better, digits) if soft else "")
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def verdict(point: float, low: float, high: float, better: int, digits: int) -> str:
    """The difference with its interval, and in words what can be said of it."""
    says = "no difference seen" if low <= 0 <= high else "better" if point * better > 0 else "worse"
    return f"{point:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {says}"


@pytest.fixture
def book_of(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Book]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = Path(os.environ.get("LOSSES_OUT") or tmp_path / "losses.jsonl")
    yield lambda settings: Book(path, settings)
    torch.set_num_threads(threads)


def test_a_classifier(book_of: Callable[[dict[str, Any]], Book]) -> None:
    sizes = from_environment(Sizes, "LOSSES")
    if not Path(sizes.census).exists():
        pytest.skip(f"{sizes.census} is missing: python -m distill_jobs.examples.fetch adult --into demo")
    census = Census(sizes.census)
    # About as many steps with a tenth of the rows.
    for study in (census.cut("census, a tenth of the rows", 0.1, 60), census):
        conduct(study, book_of(sizes.of_census), sizes.seeds)


def test_a_language_model(tmp_path: Path, book_of: Callable[[dict[str, Any]], Book]) -> None:
    sizes = from_environment(Sizes, "LOSSES")
    missing = [path for path in (sizes.teacher, *sizes.text.split(",")) if not Path(path).exists()]
    if missing:
        pytest.skip(f"{missing[0]} is missing: python -m distill_jobs.examples.fetch lm --into demo, or LOSSES_… set")
    conduct(Text(sizes, tmp_path), book_of(sizes.of_text), sizes.seeds)
