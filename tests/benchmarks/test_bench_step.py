"""A whole training step from the store against one of plain cross-entropy: the same model, batch, engine and optimizer.

Plain is what one writes first: the model's forward, cross-entropy of its logits, backward, update. From the store it
is the loop's own step: rows and soft labels from the reader, the head with the whole loss in it (hard and soft, draws,
tail bucket), backward, update. Time: by turns in one process, medians, on the clock and of the processor. Memory: each
in a process of its own, its highest resident size above that before its first step, optimizer state included.

Both models have the vocabulary of SmolLM2, as students of it must: its shape cut to 6 layers, and one of 10 million
parameters. bf16 is left out where the processor does not multiply it itself.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_fused import medians, resident
from test_bench_loop import Quiet
from test_bench_reader import CLASSES, make_store

from cluster.engine import Engine, resolve_precision
from cluster.files import Folder
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.spec import Model, Train
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Source, store_source
from distill_jobs.training.task import Arm

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
LENGTH, ROWS, ROUNDS, THREADS, AIM = 256, 8, 5, 2, 1.05
LLAMA = {"model_type": "llama", "vocab_size": CLASSES, "tie_word_embeddings": True, "max_position_embeddings": LENGTH}
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2 cut to 6 layers": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "10 M parameters": {
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
}
PLAIN, WARM, COOL = "plain cross-entropy", "from the store, T = 2", "from the store, T = 1"
KINDS = (PLAIN, WARM, COOL)


@contextmanager
def steps_of(folder: Folder, shape: str, precision: str) -> Iterator[dict[str, Callable[[], None]]]:
    """One model and optimizer, and a step of each kind on it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        train = Train.model_validate({"steps": 10**6, "batch_size": ROWS, "evaluate_every": 10**6})
        model = Model.model_validate({"config": LLAMA | SHAPES[shape]})
        source = store_source(folder / "store", folder / "data", soft=True)
        scorer = build_model(model, source.facts, seed=0)
        head = fused_head(scorer, source.facts)
        assert head is not None
        engine = Engine(scorer, train.engine(10**6, 1, precision), "cpu")
        engine.train()
        loops = []

        def from_store(temperature: float) -> Callable[[], None]:
            arm = Arm("student", 0, folder, model, train, 0.9, temperature, "", {})
            loop = Loop(arm, engine, source, Source(source.facts, 0, lambda _: {}), Quiet(), 10**6, head)
            loops.append(loop)

            def step() -> None:
                if not hasattr(loop, "_reader"):
                    loop._reader = loop._ahead()
                _, trouble = loop._step()
                assert trouble is None

            return step

        batch, _ = source.load(source.order(0).take(0, ROWS), "cpu")

        def plain() -> None:
            logits = engine.forward(**batch.inputs).flatten(0, -2).float()
            engine.backward(torch.nn.functional.cross_entropy(logits, batch.labels.flatten()))
            engine.step()

        yield {PLAIN: plain, WARM: from_store(2.0), COOL: from_store(1.0)}
        for loop in loops:
            if hasattr(loop, "_reader"):
                loop._reader.close()
        engine.close()
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()


def peak_of(folder: str, shape: str, precision: str, kind: str) -> int:
    """Bytes that steps of one kind need on top, measured here: call it in a process that has done nothing else."""
    with steps_of(Folder(folder), shape, precision) as steps:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        for _ in range(2):
            steps[kind]()
        return resident("VmHWM") - before


def times_of(folder: str, shape: str, precision: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step, by the clock and of the processor; the kinds by turns."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with steps_of(Folder(folder), shape, precision) as steps:
        for again in range(ROUNDS + 1):
            for kind in KINDS:
                wall, burnt = time.perf_counter(), time.process_time()
                steps[kind]()
                if again:
                    times[kind].append((time.perf_counter() - wall, time.process_time() - burnt))
    return times


def apart(of: Callable[..., Any], *arguments: str) -> Any:
    """What a function of this file gives in a process of its own: DeepSpeed knows one process group in a life."""
    command = [sys.executable, __file__, json.dumps([of.__name__, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = Folder(str(tmp_path_factory.mktemp("step")))
    make_store(root, 1, 64, LENGTH)
    return root


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_from_the_store_against_a_plain_one(folder: Folder, shape: str, precision: str) -> None:
    if precision == "bf16" and resolve_precision("auto", "cpu") != "bf16":
        pytest.skip("this processor does not multiply bf16 itself")
    peaks = {kind: apart(peak_of, str(folder), shape, precision, kind) / 2**20 for kind in KINDS}
    times = apart(times_of, str(folder), shape, precision)
    base = medians(times[PLAIN])
    print(
        f"\n{shape}, {precision}, steps of {ROWS} × {LENGTH} tokens, {THREADS} threads, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores (aim: {AIM} of the time, no more memory):"
    )
    for kind in KINDS:
        wall, burnt = medians(times[kind])
        print(
            f"  {kind}: {wall:.2f} s ({wall / base[0]:.2f}), processor {burnt:.2f} s ({burnt / base[1]:.2f}), "
            f"{peaks[kind]:,.0f} MiB ({peaks[kind] / peaks[PLAIN]:.2f})"
        )
    assert all(peak > 0 for peak in peaks.values())


if __name__ == "__main__":
    asked, *arguments = json.loads(sys.argv[1])
    print(json.dumps({of.__name__: of for of in (peak_of, times_of)}[asked](*arguments)))
