"""Images as numbers: encoded bytes (PNG, JPEG, …) or lists of numbers, to float32 pixels in one shape."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image as Pillow

from distill_jobs.data.rows import Column, Rows, row_error
from distill_jobs.spec.parts import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def pixels(rows: Rows, spec: Image) -> np.ndarray:
    """The image column, divided by ``spec.scale``: [n, C·H·W] float32.

    A value is encoded bytes, a struct with ``bytes`` (as Hugging Face data sets have it), or numbers: nested lists in
    the shape (C, H, W), (H, W) where C is 1, or one flat list of C·H·W.

    Raises:
        DataError: names the first row whose image can't be decoded, is not finite, or has another shape.
    """
    scale = np.float32(1.0 / spec.scale)
    fast = _regular(rows.columns[spec.column], spec.shape)
    if fast is None:
        pairs = zip(rows.values(spec.column), rows.sources, strict=True)
        images = [_image(value, spec, source) for value, source in pairs]
        fast = np.stack(images).reshape(len(rows), -1) if images else np.zeros((0, int(np.prod(spec.shape))))
    out = np.asarray(fast, dtype=np.float32) * scale
    if not np.isfinite(out).all():
        at = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
        raise row_error(rows.sources[at], f"image {spec.column} holds NaN or infinite numbers")
    return out


def _regular(column: Column, shape: tuple[int, int, int]) -> np.ndarray | None:
    """A column of Arrow lists that all have the right shape, without a detour over Python objects; else None."""
    if isinstance(column, list) or column.null_count or not _is_list(column.type) or not len(column):
        return None
    rows, sizes = len(column), []
    while _is_list(column.type):
        lengths = column.value_lengths() if not pa.types.is_fixed_size_list(column.type) else None
        if lengths is not None and len(set(lengths.to_pylist())) != 1:
            return None
        sizes.append(lengths[0].as_py() if lengths is not None else column.type.list_size)
        column = column.flatten()
        if column.null_count:
            return None
    if not _fits(tuple(sizes), shape) or not _is_number(column.type):
        return None
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(rows, -1)


def _image(value: Any, spec: Image, source: str) -> np.ndarray:
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise row_error(source, f"image {spec.column} holds only a path; store the encoded bytes with it")
    if value is None:
        raise row_error(source, f"image {spec.column} is missing")
    if isinstance(value, bytes):
        return _decoded(value, spec, source)
    try:
        numbers = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise row_error(source, f"image {spec.column} is neither encoded bytes nor even lists of numbers") from None
    if not _fits(numbers.shape, spec.shape):
        raise _wrong_shape(numbers.shape, spec, source)
    return numbers.reshape(-1)


def _decoded(data: bytes, spec: Image, source: str) -> np.ndarray:
    channels, height, width = spec.shape
    try:
        with Pillow.open(io.BytesIO(data)) as image:
            # The size is in the header: a picture of another size is refused before it is unpacked.
            if (image.width, image.height) != (width, height) or channels not in _MODES:
                raise _wrong_shape((len(image.getbands()), image.height, image.width), spec, source)
            deep = image.mode.startswith("I") and channels == 1
            decoded = np.asarray(image if deep else image.convert(_MODES[channels]), dtype=np.float32)
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        why = " ".join(str(error).split())
        raise row_error(source, f"image {spec.column} can't be decoded ({why})") from None
    return decoded.reshape(-1) if channels == 1 else np.moveaxis(decoded, -1, 0).reshape(-1)


def _fits(found: tuple[int, ...], shape: tuple[int, int, int]) -> bool:
    channels, height, width = shape
    return found in (shape, (channels * height * width,)) or (channels == 1 and found == (height, width))


def _wrong_shape(found: tuple[int, ...], spec: Image, source: str) -> Exception:
    return row_error(source, f"image {spec.column} has the shape {found}, not {spec.shape} (channels, height, width)")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
