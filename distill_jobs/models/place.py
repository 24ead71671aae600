"""Put a model where it will score, in the precision that the spec asks for."""

from typing import Any

import torch

from cluster.engine import resolve_precision
from cluster.files import Folder
from distill_jobs.errors import ModelError
from distill_jobs.models.files import load_model
from distill_jobs.models.scorer import Scorer, name_of
from distill_jobs.models.spread import is_spread

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_for(gpus: float) -> str:
    """``cuda`` for an actor that holds a GPU or a share of one, else ``cpu``."""
    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def load_placed(
    folder: Folder, device: str, precision: str, *, autocast: bool = False, compile: bool = False, spread: int = 1
) -> Scorer:
    """Load a saved model straight in the precision in which it will score, and place it; see ``place``.

    Args:
        spread: over how many devices its layers go.

    Raises:
        ModelError: it is not there or not whole, or can't be spread or compiled.
    """
    dtype = weights_dtype(device, precision, autocast=autocast)
    scorer = load_model(folder, dtype=dtype, device=device, spread=spread)
    return place(scorer, device, precision, autocast=autocast, compile=compile)


def weights_dtype(device: str, precision: str, *, autocast: bool = False) -> torch.dtype:
    """The precision of the weights on such a device: fp32 under autocast, which casts while it runs."""
    return torch.float32 if autocast else _DTYPES[resolve_precision(precision, device)]


def place(scorer: Scorer, device: str, precision: str, *, autocast: bool = False, compile: bool = False) -> Scorer:
    """Move a model to its device and precision (``auto``, fp32, bf16, fp16), in eval mode; returns it.

    Buffers that a model computes rather than saves keep their own precision: rotary frequencies rounded to bf16 would
    turn far tokens by wrong angles. A model that was loaded in this precision keeps what its authors hold in fp32.

    Args:
        autocast: keep the weights in fp32 and multiply in ``precision``: sums, norms and softmax stay exact.
        compile: compile all but the output head with ``torch.compile``, at the first call and for batches of any size.

    Raises:
        ModelError: it can't be compiled; what the compiler itself refuses is said at the first call.
    """
    multiplied = _DTYPES[resolve_precision(precision, device)]
    scorer.autocast = multiplied if autocast and multiplied != torch.float32 else None
    scorer.eval()
    if not is_spread(scorer):
        _move(scorer, device, weights_dtype(device, precision, autocast=autocast))
    if compile:
        _compile(scorer)
    return scorer


def _move(scorer: Scorer, device: str, dtype: torch.dtype) -> None:
    if scorer.origin["kind"] == "hf" and any(parameter.dtype == dtype for parameter in scorer.parameters()):
        scorer.to(device)
        return
    computed = {
        (module, name): buffer
        for module in scorer.modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None
    }
    scorer.to(device, dtype)
    for (module, name), buffer in computed.items():
        module._buffers[name] = buffer.to(device)


def _compile(scorer: Scorer) -> None:
    core: Any = scorer.core
    if is_spread(scorer):
        raise ModelError(
            f"{name_of(scorer)} is spread over several devices, which torch.compile can't follow: "
            f"set capture.compile to false"
        )
    # The output head stays outside: it is applied apart, and swapped while hidden states are taken.
    backbone = core.base_model if scorer.origin["kind"] == "hf" else core
    # With sizes as symbols one compilation serves all batches. With the sizes of each batch as constants, every new
    # length would be compiled anew, until torch gives up after eight and silently stops compiling.
    backbone.compile(dynamic=True)
    scorer.compiled = True
