"""The loop's own share of a step: waiting for the reader, and all else that isn't the model, its loss and its update.

A small language model learns from a ``hybrid`` store on one rank: by turns in one process with the reader as it is,
and with one that reads when it is asked.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import pytest
import torch
from test_bench_reader import CLASSES, make_store

from cluster.engine import Engine
from cluster.files import Folder
from cluster.gang import Rank
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.spec import Model, Train
from distill_jobs.training.ahead import Ahead, Portion
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Source, store_source
from distill_jobs.training.task import Arm

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
LENGTH, ROWS, STEPS, ROUNDS = 128, 4, 8, 4
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": CLASSES,
}


class Quiet(Rank):
    """One rank without a driver."""

    def __init__(self) -> None:
        super().__init__(0, 1, "cpu", cast(Any, None))

    def report(self, values: dict[str, Any]) -> None:
        pass


class Asked(Ahead):
    """Reads a step when it is asked for one, as a loop without a thread would."""

    def __init__(self, *args: Any) -> None:
        *most, consumed, _, omitted = args
        super().__init__(*most, consumed, 0, omitted)
        self.consumed = consumed

    def take(self) -> Portion:
        started = time.perf_counter()
        portion = self._portion(self.consumed)
        self.consumed = portion.end
        self.waited += time.perf_counter() - started
        return portion


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only rank, on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    root = Folder(str(tmp_path))
    store = make_store(root, 2, 64, LENGTH)
    with alone():
        yield store_source(store, root / "data", soft=True)


def test_what_the_loop_adds_to_a_step(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Train.model_validate({"steps": STEPS, "batch_size": ROWS, "precision": "fp32", "evaluate_every": 10**6})
    model = Model.model_validate({"config": CONFIG})
    arm = Arm("student", 0, Folder(str(tmp_path)), model, train, 0.5, 2.0, "digest", {})
    scorer = build_model(model, source.facts, seed=0)
    head = fused_head(scorer, source.facts)
    engine = Engine(scorer, train.engine(10**6, 1, "fp32"), "cpu")
    needed = [0.0]  # seconds that the model, its loss and its update took

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            made = work(*args, **options)
            needed[0] += time.perf_counter() - started
            return made

        return call

    for name in ("backward", "step"):
        monkeypatch.setattr(engine, name, timed(getattr(engine, name)))
    seen: dict[str, list[list[float]]] = {"ahead": [], "when asked": []}
    for number in range(ROUNDS + 1):
        for name, reader in (("ahead", Ahead), ("when asked", Asked)):
            monkeypatch.setattr("distill_jobs.training.loop.Ahead", reader)
            loop = Loop(arm, engine, source, Source(source.facts, 0, lambda _: {}), Quiet(), STEPS, head)
            loop.log_every, loop.score = STEPS, timed(loop.score)  # type: ignore[assignment]
            step, past = loop._step, list[list[float]]()

            def one(step: Any = step, loop: Loop = loop, past: list[list[float]] = past) -> Any:
                needed[0], waited, started = 0.0, loop._reader.waited, time.perf_counter()
                made = step()
                past.append([time.perf_counter() - started, needed[0], loop._reader.waited - waited])
                return made

            loop._step = one  # type: ignore[method-assign]
            loop.run()
            if number:
                seen[name] += past[1:]  # the first step of a run has to wait
    engine.close()
    print(f"\nsteps of {ROWS} × {LENGTH} tokens, {CLASSES:,} classes, one thread; medians of {len(seen['ahead'])}")
    for name, found in seen.items():
        seconds, waiting = median(each[0] for each in found), sum(w for *_, w in found) / sum(s for s, *_ in found)
        rest = median(whole - model - reader for whole, model, reader in found)
        print(
            f"reading {name}: {seconds * 1e3:.0f} ms a step, of which {100 * waiting:.3f} % waiting for the reader and "
            f"{rest * 1e3:.2f} ms ({100 * rest / seconds:.2f} %) the loop's own"
        )
