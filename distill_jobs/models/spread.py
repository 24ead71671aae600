"""A Hugging Face model larger than one device: its layers go over several, each read straight onto its own."""

import bisect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.errors import ModelError
from distill_jobs.models.scorer import Scorer

# Of a device's free memory; the rest is for activations and for the chunks of the output head.
_FOR_WEIGHTS = 0.85


def spread_for(gpus: float) -> int:
    """Over how many devices an actor that holds so many GPUs spreads its model; 1 for a share of one, or for none."""
    return int(gpus) if gpus >= 2 and torch.cuda.is_available() else 1


def is_spread(scorer: Scorer) -> bool:
    """Whether the model's layers lie on several devices, between which hooks carry what they compute."""
    placed: dict[str, Any] = getattr(scorer.core, "hf_device_map", None) or {}
    return len(set(placed.values())) > 1


def gpus(count: int) -> dict[str, int]:
    """This process's first ``count`` GPUs with their free bytes. Raises ModelError when there are not so many."""
    there = torch.cuda.device_count()
    if there < count:
        raise ModelError(f"can't spread the model over {count} GPUs: this process sees {there}; lower gpus_per_actor")
    return {f"cuda:{number}": torch.cuda.mem_get_info(number)[0] for number in range(count)}


def layer_map(auto: Any, path: Path, dtype: torch.dtype, free: Mapping[str, int]) -> dict[str, str]:
    """Which device each part of the model in ``path`` goes to: in the order of the layers, in shares as of the room.

    The output head goes to the first device, where batches come in and targets are encoded: moving hidden states
    there costs little, moving logits much. Nothing is read but the configuration.

    Args:
        auto: the auto class of the model.
        free: the devices, two or more, with their free bytes.

    Raises:
        ModelError: its layers can't be told apart, or the weights don't fit.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        core = auto.from_config(config, dtype=dtype)
    core.tie_weights()
    blocks = set(core._no_split_modules or ())
    parts = dict(_parts(core, "", blocks))
    if not blocks or len(parts) < len(free):
        raise ModelError(f"can't spread a {type(core).__name__} over several GPUs: its layers can't be told apart")
    head = core.get_output_embeddings()
    first = [name for name, part in parts.items() if part is head]
    order = [*first, *(name for name in parts if name not in first)]
    sizes = _sizes({name: parts[name] for name in order})
    return _shares(sizes, {device: int(size * _FOR_WEIGHTS) for device, size in free.items()})


def _parts(module: nn.Module, name: str, blocks: set[str]) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """The parts that go to one device each: whole layers, and whatever stands beside them; in the model's order."""
    inside = any(type(part).__name__ in blocks for part in module.modules())
    if type(module).__name__ in blocks or not inside:
        yield name, module
        return
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    yield from ((f"{name}.{key}".lstrip("."), tensor) for key, tensor in own)
    for key, child in module.named_children():
        yield from _parts(child, f"{name}.{key}".lstrip("."), blocks)


def _sizes(parts: Mapping[str, nn.Module | Tensor]) -> dict[str, int]:
    """Bytes of each part; a tied weight counts where it comes first."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        tensors = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
        fresh = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors if id(tensor) not in seen}
        seen |= fresh.keys()
        sizes[name] = sum(fresh.values())
    return sizes


def _shares(sizes: Mapping[str, int], room: Mapping[str, int]) -> dict[str, str]:
    whole, devices = sum(sizes.values()), list(room)
    # Where each device's share ends, in bytes from the model's start; a part goes where its middle lies.
    ends = [whole * end / max(1, sum(room.values())) for end in itertools.accumulate(room.values())]
    found: dict[str, str] = {}
    used = dict.fromkeys(devices, 0)
    start = 0
    for name, size in sizes.items():
        device = devices[min(bisect.bisect_right(ends, start + size / 2), len(devices) - 1)]
        found[name] = device
        used[device] += size
        start += size
    if any(used[device] > room[device] for device in devices):
        raise ModelError(
            f"the model's {whole / 2**30:.2f} GiB of weights don't fit: {len(room)} GPUs have room for "
            f"{sum(room.values()) / 2**30:.2f} GiB ({_FOR_WEIGHTS:.0%} of what is free); raise gpus_per_actor"
        )
    return found
