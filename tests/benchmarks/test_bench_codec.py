"""What encoding costs beside the teacher, against the fp32 product with the output matrix alone; and the coders alone.

All run by turns in the same process, so that whatever else the machine does slows all.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from distill_jobs.losses import forward_kl
from distill_jobs.store.codecs import bytes_per_position
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.select import _passes, select
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms

pytestmark = pytest.mark.benchmark
HIDDEN, ROWS, ROUNDS = 512, 128, 7


def interleaved(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each piece of work, run by turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds)[ROUNDS // 2] for name, seconds in times.items()}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch for the test. More of them than free cores cost the many small passes most."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("classes", [32000, 49152, 128256])
def test_encoding_beside_the_head_matmul(classes: int, threads: int) -> None:
    torch.manual_seed(0)
    hidden, matrix = torch.randn(ROWS, HIDDEN), torch.randn(classes, HIDDEN)
    logits = 3 * torch.randn(ROWS, classes)
    gold = logits.topk(20).indices[:, 19].contiguous()
    gold_logit = logits.gather(1, gold[:, None])
    codec, chances = HybridCodec(48, 16), uniforms(0, torch.arange(ROWS), 1)
    seconds = interleaved(
        {
            "matmul": lambda: hidden @ matrix.T,
            "encode": lambda: codec.encode(logits, gold, chances),
            "whole rows by Torch's operators alone": lambda: _passes(logits, 48, 16, gold_logit, chances),
            "encode topk 64": lambda: TopKCodec(64).encode(logits, gold),
            "logsumexp of whole rows": lambda: torch.logsumexp(logits, dim=-1),
        }
    )
    ratio = seconds["encode"] / seconds["matmul"]
    print(
        f"\nV = {classes}, {threads} threads: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()),
        end="",
    )
    print(
        f"; encode / matmul = {ratio:.2f}; {ROWS / seconds['encode']:,.0f} positions/s; "
        f"{bytes_per_position(codec, classes)} bytes a position"
    )
    assert ratio > 0


@pytest.mark.parametrize("classes", [49152, 151_669])
def test_the_coder_alone(classes: int, threads: int) -> None:
    """Rounding a selection to bytes, and reading it back to a signal that a loss can use."""
    torch.manual_seed(0)
    few = 3 * torch.randn(2048, classes) if classes < 100_000 else 3 * torch.randn(512, classes)
    gold = few.topk(20).indices[:, 19].contiguous()
    chosen = select(few, gold, 48, 16, uniforms(0, torch.arange(len(few)), 1))
    repeats = 16384 // len(few)
    many = {n: v.repeat(repeats, *[1] * (v.ndim - 1)) for n, v in vars(chosen).items() if isinstance(v, torch.Tensor)}
    codec, signal = HybridCodec(48, 16), replace(chosen, **many)
    columns = codec.pack(signal)
    seconds = interleaved({"pack": lambda: codec.pack(signal), "decode": lambda: codec.decode(columns, classes)})
    rates = {name: len(signal) / s for name, s in seconds.items()}
    decoded = codec.decode(columns, classes)
    exact, kept = chosen.head_logprob.double(), decoded.head_logprob[: len(few)].double()
    exact, kept = (torch.log_softmax(head, dim=-1) for head in (exact, kept))
    error = float((exact.exp() * (exact - kept)).sum(dim=-1).mean())
    print(
        f"\nhybrid 48 + 16, V = {classes}, {threads} threads: pack {rates['pack']:,.0f} positions/s, decode "
        f"{rates['decode']:,.0f} positions/s; KL of the rounded head {error:.1e} nats"
    )
    assert error < 1e-4


@pytest.mark.usefixtures("threads")
def test_decoding_and_the_loss() -> None:
    torch.manual_seed(0)
    classes = 49152
    logits = 3 * torch.randn(ROWS, classes)
    student = torch.randn(ROWS, classes, requires_grad=True)
    gold = logits.argmax(-1)
    codec = HybridCodec(48, 16)
    encoded = codec.encode(logits, gold, uniforms(0, torch.arange(ROWS), 1))
    dense = DenseCodec().decode(DenseCodec().encode(logits, gold), classes)
    signal = codec.decode(encoded, classes)
    seconds = interleaved(
        {
            "decode": lambda: codec.decode(encoded, classes).at(2.0),
            "sparse KL and gradient": lambda: forward_kl(student, signal, 2.0).sum().backward(),
            "dense KL and gradient": lambda: forward_kl(student, dense, 2.0).sum().backward(),
            "cross-entropy and gradient": lambda: torch.nn.functional.cross_entropy(student, gold).backward(),
        }
    )
    print("\n" + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()))
    print(f"decoding: {ROWS / seconds['decode']:,.0f} positions/s")
