"""Put a model where it will score, in the precision that the spec asks for."""

import torch

from cluster.engine import resolve_precision
from distill_jobs.models.scorer import Scorer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_for(gpus: float) -> str:
    """``cuda`` for an actor that holds a GPU, else ``cpu``."""
    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def place(scorer: Scorer, device: str, precision: str) -> Scorer:
    """Move a model to its device and precision (``auto``, fp32, bf16, fp16), in eval mode; returns it.

    Buffers that a model computes rather than saves keep their own precision: rotary frequencies rounded to bf16 would
    turn far tokens by wrong angles.
    """
    dtype = _DTYPES[resolve_precision(precision, device)]
    computed = {
        (module, name): buffer
        for module in scorer.modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None
    }
    scorer.eval().to(device, dtype)
    for (module, name), buffer in computed.items():
        module._buffers[name] = buffer.to(device)
    return scorer
