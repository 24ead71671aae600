"""``select.cpp``, compiled on the machine it runs on: about a second, once a process, where there is a C++ compiler."""

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from distill_jobs.store.tail import NO_TAIL, TAIL_BETAS

OFF = "DISTILL_NO_COMPILER"
"""Set in the environment, has everything done by Torch's own operators."""

STEP = 0.05 * math.log2(math.e)
"""All of ``TAIL_BETAS`` are multiples of 0.05: powers of 2^(STEP·(ℓ - peak)) are all that the sums over a tail need."""

LEAST_SUM = 1e-30
"""Of a tail without any finite logit; its peak of -inf already says that it holds nothing."""

_SOURCE = Path(__file__).with_name("select.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
_SECONDS = 60


@dataclass(frozen=True)
class Rows:
    """What was read off rows of logits; K head entries, M tail nodes, D draws.

    Attributes:
        top: [N, K + 1], the K largest logits and the tail's largest, -inf where there is no tail; NaN first in a row
            that holds one, of which nothing else means anything.
        ids: [N, K or K + 1], their classes.
        sums: [N, M], Σ_tail exp(β·(ℓ - peak)) at every node, with the tail's largest logit as the peak.
        weighted: [N], Σ_tail exp(ℓ - peak)·(ℓ - peak).
        drawn: [N, D].
        ranks: [N], classes likelier than the gold one.
    """

    top: Tensor
    ids: Tensor
    sums: Tensor
    weighted: Tensor
    drawn: Tensor
    ranks: Tensor

    @classmethod
    def joined(cls, pieces: Sequence["Rows"]) -> "Rows":
        """One after another."""
        return cls(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))


def read_rows(logits: Tensor, head: int, draws: int, gold_logit: Tensor, uniforms: Tensor | None) -> Rows:
    """One call into the compiled code, which holds no lock of Python's: threads may share rows out.

    Args:
        logits: [N, V] on the CPU.
        gold_logit: [N].
        uniforms: [N] float64, where there are draws.
    """
    compiled = library()
    assert compiled is not None, "ask library() first"
    logits, gold_logit = logits.float().contiguous(), gold_logit.float().contiguous()
    rows, classes = logits.shape
    chances = torch.empty(0) if uniforms is None else uniforms.double().contiguous()
    found = Rows(
        top=torch.empty(rows, head + 1),
        ids=torch.zeros(rows, head + 1, dtype=torch.int64),
        sums=torch.empty(rows, len(TAIL_BETAS)),
        weighted=torch.empty(rows),
        drawn=torch.zeros(rows, draws, dtype=torch.int64),
        ranks=torch.zeros(rows, dtype=torch.int64),
    )
    sizes = [ctypes.c_int64(size) for size in (rows, classes, head, draws)]
    scales = [ctypes.c_float(STEP), ctypes.c_float(NO_TAIL)]
    outputs = (found.top, found.ids, found.sums, found.weighted, found.drawn, found.ranks)
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, gold_logit, chances, *outputs)]
    compiled.distill_select(places[0], *sizes, *scales, *places[1:])
    found.sums.clamp_(min=LEAST_SUM)
    return found


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None without a compiler that can make it.

    Made anew by every process, in a folder of its own that is gone again at once: nothing that another user or another
    kind of machine has left behind is ever loaded.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None or os.environ.get(OFF):
        return None
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        made = f"{folder}/select.so"
        try:
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", made]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            return ctypes.CDLL(made)
        except (OSError, subprocess.SubprocessError):
            return None
