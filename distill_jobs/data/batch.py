"""Columns of table rows become the tensors that a model takes.

Shapes: B rows, L tokens of a row, D features, C×H×W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill_jobs.data.facts import DataFacts

IGNORED = -100


@dataclass
class Batch:
    """What one forward pass takes and is scored on.

    Attributes:
        inputs: keyword arguments of the model's forward. documents: ``input_ids``, ``position_ids``, ``segments``
            [B, L]; text: ``input_ids``, ``attention_mask`` [B, L]; tabular: ``features`` [B, D]; image: ``pixels``
            [B, C, H, W].
        labels: [B, L] (documents: the next token of the same document) or [B]; -100 where nothing is scored.
        sample_ids: [B].
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor

    @property
    def rows(self) -> int:
        return len(self.sample_ids)

    @property
    def keep(self) -> Tensor:
        """Which positions are scored: [B, P] of bool, with P = L for documents and 1 otherwise."""
        return (self.labels != IGNORED).reshape(self.rows, -1)

    @property
    def positions(self) -> int:
        """Number of scored positions."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "Batch":
        """The same on another device; ``non_blocking`` copies from page-locked memory beside what runs there."""
        inputs = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=non_blocking)
        return Batch(inputs, labels, self.sample_ids.to(device, non_blocking=non_blocking))


def batch_columns(facts: DataFacts) -> list[str]:
    """The columns that ``make_batch`` needs of data described by ``facts``."""
    inputs = {
        "documents": ["input_ids", "segments"],
        "text": ["input_ids", "tokens", "label"],
        "image": ["pixels", "label"],
        "tabular": ["features", "label"],
    }
    return ["sample_id", *inputs[facts.features]]


def make_batch(columns: dict[str, np.ndarray], facts: DataFacts) -> Batch:
    """Tensors for the rows in ``columns`` (see ``TableReader.take``) of data described by ``facts``."""
    sample_ids = _long(columns["sample_id"])
    if facts.features == "documents":
        ids, segments = _long(columns["input_ids"]), np.asarray(columns["segments"], dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "position_ids": torch.from_numpy(positions_in_segments(segments)),
            "segments": torch.from_numpy(segments.copy()),
        }
        return Batch(inputs, next_tokens(ids, inputs["segments"]), sample_ids)
    labels = _long(columns["label"])
    if facts.features == "text":
        ids = _long(columns["input_ids"])
        mask = torch.arange(ids.shape[1])[None, :] < _long(columns["tokens"])[:, None]
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, labels, sample_ids)
    if facts.features == "image":
        assert facts.image_shape is not None
        pixels = _float(columns["pixels"]).reshape(-1, *facts.image_shape)
        return Batch({"pixels": pixels}, labels, sample_ids)
    return Batch({"features": _float(columns["features"])}, labels, sample_ids)


def next_tokens(ids: Tensor, segments: Tensor) -> Tensor:
    """The token that each position has to foretell, [B, L]; -100 at a document's last token and in padding."""
    labels = torch.full_like(ids, IGNORED)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    labels[:, :-1] = torch.where(same, ids[:, 1:], labels[:, :-1])
    return labels


def positions_in_segments(segments: np.ndarray) -> np.ndarray:
    """Position of each token counted from 0 within its segment, [B, L] int64."""
    index = np.arange(segments.shape[1], dtype=np.int64)[None, :]
    starts = np.ones(segments.shape, dtype=bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions: np.ndarray = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return positions


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
