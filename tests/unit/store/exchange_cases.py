"""A small encoder of DistillKit's layout, written from its description; and captures as Parquet, made on the spot."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_FORMATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


def encode_float(value: float, kind: str) -> bytes:
    if kind == "bfloat16":
        return struct.pack("<f", value)[2:]
    return struct.pack(_FORMATS[kind], value)


def decode_float(raw: bytes, kind: str) -> float:
    return struct.unpack("<f", b"\0\0" + raw)[0] if kind == "bfloat16" else struct.unpack(_FORMATS[kind], raw)[0]


def pack_bits(values: list[int], bits: int) -> bytes:
    """Each value's highest bit first, behind one another, zeros at the end."""
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def curve(terms: list, coefficients: list[float], count: int, unit_t: bool) -> list[float]:
    points = [i / (count - 1) if unit_t else float(i) for i in range(count)]
    functions = {"sqrt": np.sqrt, "exp": np.exp}
    return [
        sum(c * (functions[t](x) if isinstance(t, str) else x**t) for t, c in zip(terms, coefficients, strict=True))
        for x in points
    ]


def encode_position(ids: list[int], logprobs: list[float], config: dict) -> tuple[bytes, bytes, list[float]]:
    """One position with falling ``logprobs``: its two byte strings, and the values that a decoder has to give."""
    k, exact_k, exact = config["k"], config["exact_k"], config["exact_dtype"]
    values = list(logprobs)
    if config["delta_encoding"]:
        values = [values[0], *np.diff(values).tolist()]
    raw = [encode_float(v, exact) for v in values[:exact_k]]
    decoded = [decode_float(v, exact) for v in raw]
    rest = np.array(values[exact_k:k])
    fit = np.zeros(len(rest))
    terms = config.get("polynomial_terms") or []
    if terms:
        basis = np.array([curve(terms, row, len(rest), config.get("normalize_t", False)) for row in np.eye(len(terms))])
        coefficients = np.linalg.lstsq(basis.T, rest, rcond=None)[0]
        packed = [encode_float(c, config["term_dtype"]) for c in coefficients]
        raw += packed
        kept = [decode_float(c, config["term_dtype"]) for c in packed]
        fit = np.array(curve(terms, kept, len(rest), config.get("normalize_t", False)))
    residual, at = rest - fit, 0
    for group in config["residual_bins"]:
        some, bits = residual[at : at + group["num_elements"]], group["element_bits"]
        scale_raw = encode_float(
            (np.abs(some).max() / (1 if bits == 1 else 2 ** (bits - 1))) or 1.0, group["scale_dtype"]
        )
        scale = decode_float(scale_raw, group["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = np.clip(np.round(some / scale), low, high).astype(int) - low
        raw += [scale_raw, pack_bits(codes.tolist(), bits)]
        fit[at : at + len(some)] += ((codes * 2 - 1) if bits == 1 else (codes + low)) * scale
        at += len(some)
    decoded += fit.tolist()
    if config["delta_encoding"]:
        decoded = np.cumsum(decoded).tolist()
    id_bits = int(np.ceil(np.log2(config["d"])))
    return pack_bits(ids, id_bits), b"".join(raw), decoded


def teacher(rng: np.random.Generator, positions: int, classes: int, sharp: float = 3.0) -> np.ndarray:
    """Random log-probabilities [positions, classes]."""
    logits = sharp * rng.standard_normal((positions, classes))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def top(logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-logprobs, axis=1)[:, :k]
    return order, np.take_along_axis(logprobs, order, axis=1)


def write_topk(
    path: Path, rows: list[list[int]], dense: list[np.ndarray], k: int, names: tuple[str, str] = ("ids", "logprobs")
) -> None:
    """Rows of tokens with the k likeliest entries at each position of ``dense`` (one array a row)."""
    listed = [top(d, k) for d in dense]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "input_ids": pa.array(rows, pa.list_(pa.int64())),
        names[0]: pa.array([i.tolist() for i, _ in listed], pa.list_(pa.list_(pa.int64()))),
        names[1]: pa.array([v.tolist() for _, v in listed], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
