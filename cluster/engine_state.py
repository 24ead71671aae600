"""The training state behind an engine: copied in one go, written, and taken up again by another engine.

DeepSpeed's own checkpoints, the universal one too, are pickles, which this project never reads. Here every rank writes
the pieces that ZeRO has it hold, as safetensors, and beside them in JSON which piece of which parameter each is. Any
number of ranks, at any ZeRO stage, then finds its own pieces in those files, and reads nothing else.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.engine_shards import MASTER, Shards
from cluster.errors import CheckpointError

_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """One rank's training state, copied to the host's memory: whoever holds it may write it in a thread of its own."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    def write(self, folder: Path) -> list[str]:
        """Write this rank's two files into ``folder``; returns their names. No other rank writes the same ones."""
        stem = f"engine-{self.facts['rank']:05d}"
        save_file(self.tensors, folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(self.facts), encoding="utf-8")
        return [f"{stem}.safetensors", f"{stem}.json"]


def take_snapshot(shards: Shards, module: nn.Module, steps: int, scaler: dict[str, float]) -> Snapshot:
    """Copy what this rank holds: nothing is sent between ranks. At stage 0 rank i keeps every so-many-th parameter."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = [name for i, name in enumerate(shards.parameters) if shards.stage or i % world == rank]
    mine = [name for name in mine if name in shards.pieces]
    tensors = {f"{key}:{name}": shards.read(name, key).to("cpu", copy=True) for name in mine for key in shards.keys}
    tensors |= {f"buffer:{name}": b.detach().to("cpu", copy=True) for name, b in _buffers(module).items()}
    facts = {
        "format": _FORMAT,
        "rank": rank,
        "world": world,
        "steps": steps,
        "keys": list(shards.keys),
        "shapes": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in shards.parameters.items()},
        "pieces": {name: [shards.pieces[name].start, shards.pieces[name].length] for name in mine},
        "counts": {name: shards.count(name) for name in mine},
        "scaler": scaler,
    }
    return Snapshot(facts, tensors)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def load_snapshot(folder: Path, shards: Shards, module: nn.Module) -> dict[str, Any]:
    """Fill ``shards`` and the module's buffers from the files of all ranks that wrote ``folder``.

    Returns:
        The facts of one of them, for what is the same on all.

    Raises:
        CheckpointError: files are missing or damaged, or belong to another model.
    """
    try:
        saved = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("engine-*.json"))]
        _check(folder, saved, shards)
        with ExitStack() as stack:
            files = [stack.enter_context(_open(folder, facts["rank"])) for facts in saved]
            _fill(shards, saved, files)
            own = files[torch.distributed.get_rank() % len(files)]
            for name, buffer in _buffers(module).items():
                buffer.copy_(own.get_tensor(f"buffer:{name}"))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the training state in {folder} is damaged: {error}; remove it") from None
    shards.publish()
    return dict(saved[0])


def _open(folder: Path, rank: int) -> Any:
    return safe_open(folder / f"engine-{rank:05d}.safetensors", "pt")


def _check(folder: Path, saved: list[dict[str, Any]], shards: Shards) -> None:
    if not saved or [facts["rank"] for facts in saved] != list(range(saved[0]["world"])):
        ranks = saved[0]["world"] if saved else "all"
        raise CheckpointError(f"the training state in {folder} is incomplete: {len(saved)} of {ranks} ranks wrote it")
    first = saved[0]
    if first["format"] != _FORMAT or any(facts["steps"] != first["steps"] for facts in saved):
        raise CheckpointError(f"the training state in {folder} was written by another version, or in several steps")
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in shards.parameters.items()}
    if first["shapes"] != shapes:
        odd = sorted(name for name in {**shapes, **first["shapes"]} if shapes.get(name) != first["shapes"].get(name))
        raise CheckpointError(f"the training state in {folder} is of another model: {odd[0]} differs")


def _fill(shards: Shards, saved: list[dict[str, Any]], files: list[Any]) -> None:
    held: dict[str, list[tuple[int, int, Any]]] = {}
    for facts, file in zip(saved, files, strict=True):
        for name, (start, length) in facts["pieces"].items():
            held.setdefault(name, []).append((start, length, file))
    for name, piece in shards.pieces.items():
        for key in shards.keys:
            # A run that keeps an average from now on begins it where the masters stand.
            source = key if key in saved[0]["keys"] else MASTER
            values = torch.empty(piece.length)
            filled = 0
            for start, length, file in held[name]:
                low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
                if low < high:
                    part = file.get_slice(f"{source}:{name}")[low - start : high - start]
                    values[low - piece.start : high - piece.start] = part
                    filled += high - low
            if filled != piece.length:
                raise ValueError(f"{filled} of {piece.length} values of {name} are there")
            shards.write(name, key, values)
    shards.count_as({name: count for facts in saved for name, count in facts["counts"].items()})
