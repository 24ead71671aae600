"""DistillKit's compressed logits, decoded: packed class ids, exact leading values, a polynomial, quantised residuals.

The layout is that of arcee-ai/DistillKit (https://github.com/arcee-ai/DistillKit), ``distillkit/compression``. Of each
position there are two byte strings. ``bytepacked_indices`` holds k class ids of ⌈log2 d⌉ bits, the highest bit first.
``compressed_logprobs`` holds, little-endian and in falling order of probability: ``exact_k`` values as they are; the
coefficients of a curve over t = 0 … k-exact_k-1 for the others; and bins of residuals, each a scale and its packed
integers. Where ``delta_encoding`` is set, each value but the first is the difference from the one before.
The older layout has the columns ``packed_indices``, ``exact_values`` and ``coeffs``.
Shapes: N positions, k entries, B bytes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_jobs.errors import DataError

CONFIG = "compression_config.yaml"

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_MOST_K = 1 << 12
_MOST_BITS = 56


@dataclass(frozen=True)
class Bin:
    """A group of quantised residuals: integers of ``bits`` bits, times one scale a position."""

    scale: str
    bits: int
    count: int

    @property
    def bytes(self) -> int:
        return _BYTES[self.scale] + -(-self.bits * self.count // 8)


@dataclass(frozen=True)
class Coding:
    """How a data set was compressed. ``older`` names the layout of whole 64-bit words and of powers of 1 … n."""

    d: int
    k: int
    exact_k: int
    exact: str = "float32"
    terms: tuple[int | str, ...] = ()
    term: str = "float32"
    bins: tuple[Bin, ...] = field(default=())
    delta: bool = True
    unit_t: bool = False
    older: bool = False

    @classmethod
    def of(cls, values: Any) -> "Coding":
        """From a configuration file's values: the compressor's own, or a whole run's with a teacher in it.

        Raises:
            DataError: it is no such configuration.
        """
        teacher = values.get("teacher", values) if isinstance(values, dict) else None
        for name, make in (("logprob_compressor", cls._newer), ("legacy_logit_compression", cls._older)):
            if isinstance(teacher, dict) and teacher.get(name):
                return make(teacher[name])
        if not isinstance(teacher, dict):
            raise _no_config("it is not a mapping")
        return cls._older(teacher) if "polynomial_degree" in teacher else cls._newer(teacher)

    @property
    def id_bits(self) -> int:
        return max(1, (self.d - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        """B of ``bytepacked_indices``."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """B of ``compressed_logprobs``."""
        curve = len(self.terms) * _BYTES[self.term]
        return self.exact_k * _BYTES[self.exact] + curve + sum(b.bytes for b in self.bins)

    @classmethod
    def _newer(cls, values: Any) -> "Coding":
        try:
            bins = tuple(
                Bin(_float(b["scale_dtype"]), _count(b["element_bits"], 1, _MOST_BITS), _count(b["num_elements"], 1))
                for b in values.get("residual_bins") or ()
            )
            made = cls(
                d=_count(values["d"], 2, 1 << 31),
                k=_count(values["k"], 1),
                exact_k=_count(values["exact_k"], 0),
                exact=_float(values.get("exact_dtype", "float32")),
                terms=tuple(_term(t) for t in values.get("polynomial_terms") or ()),
                term=_float(values.get("term_dtype", "float32")),
                bins=bins,
                delta=bool(values.get("delta_encoding", True)),
                unit_t=bool(values.get("normalize_t", False)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _no_config(f"its {error} is missing or wrong") from None
        if made.exact_k > made.k or sum(b.count for b in bins) > made.k - made.exact_k or made.k > made.d:
            raise _no_config("its k, exact_k, d and residual_bins contradict one another")
        return made

    @classmethod
    def _older(cls, values: Any) -> "Coding":
        try:
            degree, sign = (
                _count(values["polynomial_degree"], 0, 64),
                -1 if values.get("invert_polynomial", True) else 1,
            )
            powers: list[int | str] = [sign * power for power in range(degree + 1)]
            made = cls(
                d=_count(values["vocab_size"], 2, 1 << 31),
                k=_count(values["k"], 1),
                exact_k=_count(values["exact_k"], 0),
                terms=tuple(powers + (["sqrt"] if values.get("with_sqrt_term") else [])),
                delta=False,
                older=True,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _no_config(f"its {error} is missing or wrong") from None
        if made.exact_k > made.k or made.k > made.d:
            raise _no_config("its k, exact_k and vocab_size contradict one another")
        return made


def decode_ids(packed: np.ndarray, coding: Coding) -> np.ndarray:
    """``bytepacked_indices`` [N, B] uint8 to class ids [N, k] int64."""
    return unpack_bits(packed, coding.id_bits, coding.k)


# What overflows or is no number comes out as such, and is refused where values are checked.
@np.errstate(all="ignore")
def decode_values(packed: np.ndarray, coding: Coding) -> np.ndarray:
    """``compressed_logprobs`` [N, B] uint8 to values [N, k] float64 (the curve is evaluated in float64)."""
    at = coding.exact_k * _BYTES[coding.exact]
    exact = floats(packed[:, :at], coding.exact)
    size = len(coding.terms) * _BYTES[coding.term]
    others = np.zeros((len(packed), coding.k - coding.exact_k))
    if coding.terms:
        others += curve(floats(packed[:, at : at + size], coding.term), coding)
    at, first = at + size, 0
    for group in coding.bins:
        scale = floats(packed[:, at : at + _BYTES[group.scale]], group.scale)
        codes = unpack_bits(packed[:, at + _BYTES[group.scale] : at + group.bytes], group.bits, group.count)
        # One bit says plus or minus; more bits count from the least value up.
        signed = codes * 2.0 - 1.0 if group.bits == 1 else codes - float(1 << group.bits - 1)
        others[:, first : first + group.count] += signed * scale
        at, first = at + group.bytes, first + group.count
    values = np.concatenate([exact, others], axis=1)
    return np.cumsum(values, axis=1) if coding.delta else values


@np.errstate(all="ignore")
def decode_older(
    words: np.ndarray, exact: np.ndarray, coefficients: np.ndarray, coding: Coding
) -> tuple[np.ndarray, np.ndarray]:
    """The older layout: ``packed_indices`` [N, ⌈k / ⌊64/bits⌋⌉] uint64, values and coefficients as floats.

    Returns:
        class ids and values, [N, k] each.
    """
    each = 64 // coding.id_bits
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(coding.id_bits)
    mask = np.uint64((1 << coding.id_bits) - 1)
    ids = (words[:, :, None] >> shifts & mask).reshape(len(words), -1)[:, : coding.k]
    others = curve(coefficients, coding) if coding.k > coding.exact_k else np.zeros((len(words), 0))
    return ids.astype(np.int64), np.concatenate([exact.astype(np.float64), others], axis=1)


def curve(coefficients: np.ndarray, coding: Coding) -> np.ndarray:
    """The values [N, k - exact_k] that the coefficients [N, terms] stand for."""
    count = coding.k - coding.exact_k
    t = np.linspace(0.0, 1.0, count) if coding.unit_t else np.arange(count, dtype=np.float64) + coding.older
    special = {"sqrt": np.sqrt, "exp": np.exp}
    basis = [special[term](t) if isinstance(term, str) else t ** float(term) for term in coding.terms]
    values: np.ndarray = coefficients.astype(np.float64) @ np.stack(basis)
    return values


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``count`` integers of ``bits`` ≤ 56 bits, the highest bit first, from bytes [N, ⌈bits · count / 8⌉]: int64."""
    first = np.arange(count) * bits
    reach = (bits + 14) // 8  # bytes that an integer may touch
    wide = np.pad(packed, ((0, 0), (0, reach)))
    found = np.zeros((len(packed), count), dtype=np.uint64)
    for byte in range(reach):
        found = found << np.uint64(8) | wide[:, first // 8 + byte]
    spare = (reach * 8 - first % 8 - bits).astype(np.uint64)
    return (found >> spare & np.uint64((1 << bits) - 1)).astype(np.int64)


def floats(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bytes [N, B] as little-endian floats, in float64 (or float32 for bfloat16, which it holds exactly)."""
    whole = np.ascontiguousarray(raw)
    if kind == "bfloat16":
        return (whole.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return whole.view(f"<f{_BYTES[kind]}").astype(np.float64)


def _count(value: Any, least: int, most: int = _MOST_K) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise TypeError(f"value {value!r}")
    return value


def _float(value: Any) -> str:
    if not isinstance(value, str) or value not in _BYTES:
        raise TypeError(f"data type {value!r}")
    return value


def _term(value: Any) -> int | str:
    if value in ("sqrt", "exp"):
        return str(value)
    return _count(value, 0, 64)


def _no_config(why: str) -> DataError:
    return DataError(
        f"this is no compression configuration of DistillKit: {why}; it needs d, k, exact_k and residual_bins as in "
        f"the {CONFIG} that a capture writes"
    )
