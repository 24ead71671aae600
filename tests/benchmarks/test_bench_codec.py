"""What encoding costs beside the teacher: ``topk`` against the fp32 product with the output matrix alone.

Both run by turns in the same process, so that whatever else the machine does slows both.
"""

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from distill_jobs.losses import forward_kl
from distill_jobs.store.codecs import bytes_per_position
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.topk import TopKCodec

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
    codec = TopKCodec(64)
    seconds = interleaved(
        {
            "matmul": lambda: hidden @ matrix.T,
            "encode": lambda: codec.encode(logits, gold),
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


@pytest.mark.usefixtures("threads")
def test_decoding_and_the_loss() -> None:
    torch.manual_seed(0)
    classes = 49152
    logits = 3 * torch.randn(ROWS, classes)
    student = torch.randn(ROWS, classes, requires_grad=True)
    gold = logits.argmax(-1)
    codec = TopKCodec(64)
    encoded = codec.encode(logits, gold)
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
