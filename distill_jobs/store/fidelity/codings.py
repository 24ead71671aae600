"""What is compared: a way to store a position in so many bytes, be it a codec of ours or a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from distill_jobs.store.codecs import Codec, bytes_per_position
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.fidelity import references
from distill_jobs.store.signal import TeacherSignal

BUDGETS = (64, 72, 112, 224, 448)
"""Bytes a position at which codings are compared."""

_ENTRIES = 255


@dataclass(frozen=True)
class Coding:
    """One way to store a position.

    Attributes:
        family: what the curve joins into one line.
        size: its arguments, in words.
        bytes: of the soft target and its statistics, at one position.
        signal: (logits [N, V], gold [N], uniforms [N] in [0, 1)) -> what a reader gets back.
        own: whether the store itself is written so.
    """

    family: str
    size: str
    bytes: float
    signal: Callable[[Tensor, Tensor, Tensor], TeacherSignal]
    own: bool = False

    @property
    def name(self) -> str:
        """Family and size."""
        return f"{self.family} {self.size}".strip()


def of_codec(codec: Codec, classes: int, own: bool = False) -> Coding:
    """A codec of ours, there and back."""

    def signal(logits: Tensor, gold: Tensor, uniforms: Tensor) -> TeacherSignal:
        return codec.decode(codec.encode(logits, gold, uniforms), logits.shape[1])

    size = "+".join(str(value) for value in codec.arguments().values())
    return Coding(codec.name, size, bytes_per_position(codec, classes), signal, own)


def family(classes: int, budgets: tuple[int, ...] = BUDGETS) -> list[Coding]:
    """Our codecs, each at the largest sizes that the budgets hold; ``dense`` where it is small enough."""
    makers: tuple[Callable[[int], Codec], ...] = (
        lambda n: HybridCodec(head=max(1, n - n // 4), draws=max(1, n // 4)),
        lambda n: TopKCodec(n),
        lambda n: SampledCodec(n),
    )
    found = [of_codec(DenseCodec(), classes)] if bytes_per_position(DenseCodec(), classes) <= 8 * max(budgets) else []
    for make in makers:
        cost = partial(_codec_bytes, make, classes)
        found += [of_codec(make(n), classes) for n in _sizes(cost, budgets, classes)]
    return found


def compared(classes: int, budgets: tuple[int, ...] = BUDGETS) -> list[Coding]:
    """The references at the same budgets."""
    made = []
    for k in _sizes(lambda k: references.renormalised_bytes(k, classes), budgets, classes):
        coded = partial(_without_draws, references.renormalised, k)
        made.append(Coding("top-k renormalised", str(k), references.renormalised_bytes(k, classes), coded))
    for k in _sizes(lambda k: references.polynomial_bytes(k, classes), budgets, classes, least=16):
        coded = partial(_without_draws, references.polynomial, k)
        made.append(Coding("polynomial", f"{k // 8}+{k - k // 8}", references.polynomial_bytes(k, classes), coded))
    for n in _sizes(lambda n: references.random_sampling_bytes(n, classes), budgets, classes):
        coded = partial(_independent, n)
        made.append(Coding("random sampling", str(n), references.random_sampling_bytes(n, classes), coded))
    return made


def _sizes(cost: Callable[[int], float], budgets: tuple[int, ...], classes: int, least: int = 4) -> list[int]:
    """The largest number of entries within each budget, without repeats; none where a budget holds too few."""
    most = {max((n for n in range(least, min(_ENTRIES, classes) + 1) if cost(n) <= b), default=0) for b in budgets}
    return sorted(most - {0})


def _codec_bytes(make: Callable[[int], Codec], classes: int, entries: int) -> float:
    return bytes_per_position(make(entries), classes)


def _without_draws(
    reference: Callable[[Tensor, Tensor, int], TeacherSignal], k: int, logits: Tensor, gold: Tensor, _: Tensor
) -> TeacherSignal:
    return reference(logits, gold, k)


def _independent(draws: int, logits: Tensor, gold: Tensor, uniforms: Tensor) -> TeacherSignal:
    # Another place, other draws: the uniforms tell places apart.
    return references.random_sampling(logits, gold, draws, int(uniforms.sum() * 2**32) % 2**40)
