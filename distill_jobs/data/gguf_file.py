"""GGUF files: is one whole, and reading it without the wait.

Layout (little endian): magic, version, number of tensors, number of keys; the keys with their values; the tensors'
names, shapes, types and offsets; then, aligned, the tensors' bytes.
"""

import functools
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from distill_jobs.errors import ModelError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


class _CutShort(Exception):
    pass


class _Walker:
    """Steps through the bytes and never past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0

    def skip(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise _CutShort
        return start

    def number(self, form: str) -> int:
        return int(struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(form)))[0])

    def text(self) -> bytes:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length]

    def value(self, kind: int) -> int | None:
        """Step over one value; the value itself if it is a 32-bit unsigned number."""
        if kind == 4:
            return self.number("I")
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._array()
        else:
            raise ValueError(f"a value of unknown type {kind}")
        return None

    def _array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.skip(_SCALARS[kind] * count)
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of unknown type {kind}")


def check_gguf(path: str | Path) -> None:
    """See that the file is a GGUF file and that all its tensors lie within it. Reads the header only.

    Raises:
        ModelError: the file is missing, is no GGUF file, is damaged, or is cut short.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(_Walker(data))
    except OSError as error:
        raise ModelError(f"can't read the GGUF file {path}: {error.strerror or error}") from None
    except _CutShort:
        raise ModelError(
            f"the GGUF file {path} is cut short ({Path(path).stat().st_size} bytes): get it again"
        ) from None
    except ValueError as error:
        if not Path(path).stat().st_size:
            raise ModelError(f"the GGUF file {path} is empty: get it again") from None
        raise ModelError(f"{path} is not a GGUF file that can be read: {error}") from None


def _walk(walker: _Walker) -> None:
    from gguf import GGML_QUANT_SIZES

    if walker.data[:4] != b"GGUF":
        if b"GGUF".startswith(walker.data[:4]):
            raise _CutShort
        raise ValueError("it doesn't begin with GGUF")
    walker.skip(4)
    version = walker.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; versions 2 and 3 are known")
    tensors, keys = walker.number("Q"), walker.number("Q")
    alignment = _ALIGNMENT
    for _ in range(keys):
        key = walker.text()
        found = walker.value(walker.number("I"))
        if key == b"general.alignment" and found:
            alignment = found
    ends = []
    for _ in range(tensors):
        walker.text()
        shape = [walker.number("Q") for _ in range(walker.number("I"))]
        kind, offset = walker.number("I"), walker.number("Q")
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"a tensor of unknown type {kind}")
        block, width = GGML_QUANT_SIZES[kind]
        ends.append(offset + prod(shape) // block * width)
    if not ends:
        raise ValueError("it holds no tensors")
    if -(-walker.at // alignment) * alignment + max(ends) > walker.size:
        raise _CutShort


@contextmanager
def quick_gguf_reading() -> Iterator[None]:
    """Within the block, transformers reads GGUF files several times faster, with the same result.

    For most architectures it parses the whole file two or three times, element by element through slices of a NumPy
    memory map (each a costly object), and builds the table of tensor names anew for every submodule. Here the reader
    slices a plain array and is kept for the second time, and so is the table. For SmolLM2-135M: 17 s become 3 s.
    """
    import gguf
    import numpy as np

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainArrayReader(reader):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = mapped.view(np.ndarray)

    gguf.GGUFReader = functools.lru_cache(maxsize=2)(PlainArrayReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=2)(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
