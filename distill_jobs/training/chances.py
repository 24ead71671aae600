"""The state of every source of random numbers in this process, in plain values: what dropout goes on from."""

import random
from typing import Any

import numpy as np
import torch

Chances = dict[str, Any]


def take_chances(device: str) -> Chances:
    """The states of torch's, NumPy's and Python's generators, and of the GPU's where ``device`` is one."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, spare = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.startswith("cuda") else None,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), spare],
    }


def restore_chances(state: Chances, device: str) -> None:
    """Put the generators where ``take_chances`` found them."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and device.startswith("cuda"):
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
