"""The fused head and loss against plain cross-entropy through the same linear head, forward and backward.

Time: all by turns in one process, medians, on the clock and of the processor. Memory: each in a process of its own, its
highest resident size above that before the call. Where the processor does not multiply bf16 itself, that is left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.engine import resolve_precision
from distill_jobs.losses.fused import fused_loss
from distill_jobs.losses.fused_task import OutputHead
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]
TOKENS, HIDDEN, ROUNDS, THREADS = 4096, 512, 5, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_signal(classes: int) -> TeacherSignal:
    """A teacher of 48 + 16 entries a position; the same few positions again and again, which costs the loss as much."""
    logits, codec = 2 * torch.randn(64, classes), HybridCodec(48, 16)
    codes = codec.encode(logits, logits.argmax(-1), uniforms(0, torch.arange(64), 1))
    few = codec.decode(codes, classes)
    many = {name: value.repeat(TOKENS // 64, *[1] * (value.ndim - 1)) for name, value in tensors_of(few)}
    return TeacherSignal(**{**vars(few), **many})


def tensors_of(signal: TeacherSignal) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(signal).items() if isinstance(value, Tensor)]


def make_works(classes: int, precision: str) -> dict[str, Callable[[], None]]:
    """Plain cross-entropy, and the whole loss (hard and soft, draws, tail bucket) at two temperatures."""
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(classes, HIDDEN)).to(DTYPES[precision]).requires_grad_()
    hidden = torch.randn(TOKENS, HIDDEN).to(DTYPES[precision]).requires_grad_()
    labels, signal = torch.randint(0, classes, (TOKENS,)), make_signal(classes)

    def plain() -> None:
        weight.grad = hidden.grad = None
        torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels).backward()

    def fused(temperature: float) -> None:
        weight.grad = hidden.grad = None
        fused_loss(hidden, OutputHead(weight), labels, signal, 0.5, temperature).total.backward()

    return {"cross-entropy": plain, "fused, T = 1": partial(fused, 1.0), "fused, T = 2": partial(fused, 2.0)}


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10


def peak_of(classes: int, precision: str, name: str) -> int:
    """Bytes that one run needs on top, measured here: call it in a process that has done nothing else."""
    torch.set_num_threads(THREADS)
    work = make_works(classes, precision)[name]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def peak_apart(classes: int, precision: str, name: str) -> int:
    command = [sys.executable, __file__, json.dumps([classes, precision, name])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("classes", [32_000, 128_256])
def test_the_whole_loss_against_plain_cross_entropy(classes: int, precision: str) -> None:
    if precision == "bf16" and resolve_precision("auto", "cpu") != "bf16":
        pytest.skip("this processor does not multiply bf16 itself")
    works = make_works(classes, precision)
    peaks = {name: peak_apart(classes, precision, name) / 2**20 for name in works}
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    try:
        for again in range(ROUNDS + 1):
            for name, work in works.items():
                wall, burnt = time.perf_counter(), time.process_time()
                work()
                if again:
                    times[name].append((time.perf_counter() - wall, time.process_time() - burnt))
    finally:
        torch.set_num_threads(threads)
    base = medians(times["cross-entropy"])
    print(f"\n{precision}, {TOKENS} x {HIDDEN} x {classes}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores:")
    for name, peak in peaks.items():
        wall, burnt = medians(times[name])
        print(
            f"  {name}: {wall:.2f} s ({wall / base[0]:.2f}), processor {burnt:.2f} s ({burnt / base[1]:.2f}), "
            f"{peak:,.0f} MiB"
        )
    assert all(peak > 0 for peak in peaks.values()) and base[0] > 0


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    walls, burnt = (sorted(values) for values in zip(*pairs, strict=True))
    return walls[len(walls) // 2], burnt[len(burnt) // 2]


if __name__ == "__main__":
    arguments: Any = json.loads(sys.argv[1])
    print(peak_of(*arguments))
