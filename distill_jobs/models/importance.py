"""How much each part of a transformer matters to it, read off its activations on real rows.

After Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"), with the
aggregation that they found best: over a row's tokens the mean, over rows the L2 norm. One pass without gradients
measures all axes at once. Shapes: B rows of a batch, L tokens of a row, N layers, and of one layer H hidden channels,
I neurons of its MLP, A attention heads; C stands for any of these three.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import FileError
from cluster.files import Folder, digest
from distill_jobs.data.batch import batch_columns, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import ModelError
from distill_jobs.models.families import Family, family_of
from distill_jobs.models.head import split_head
from distill_jobs.models.huggingface import said
from distill_jobs.models.place import place
from distill_jobs.models.scorer import Scorer, name_of

_TOKENS_AT_ONCE = 4096
_PARTS = 32


@dataclass(frozen=True)
class Importance:
    """Scores, float64 on the CPU; the higher, the more it matters.

    Attributes:
        hidden: [N + 1, H] of the residual stream's channels: what each layer's norms make of them, summed, and last
            what the final norm does.
        neurons: [N, I] of what the MLP's neurons give to its output projection.
        heads: [N, A] of the L2 norms of what the heads give to the attention's output projection.
        layers: [N] how far a layer turns what it gets: 1 - the cosine of its output to its input, mean over tokens
            (Men et al. 2024, "ShortGPT").
    """

    hidden: Tensor
    neurons: Tensor
    heads: Tensor
    layers: Tensor

    @classmethod
    def unknown(cls, core: Any) -> Self:
        """Everything matters alike: pruning then keeps what comes first."""
        sizes = family_of(core).sizes(core.config)
        count = int(core.config.num_hidden_layers)
        shapes = ((count + 1, sizes.hidden), (count, sizes.neurons), (count, sizes.heads), (count,))
        hidden, neurons, heads, layers = (torch.ones(*shape, dtype=torch.float64) for shape in shapes)
        return cls(hidden, neurons, heads, layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def of(cls, values: Any, core: Any) -> Self:
        """From what ``as_dict`` gave; raises ValueError or KeyError when they are not such a model's."""
        like = cls.unknown(core)
        found = cls(**{name: torch.tensor(values[name], dtype=torch.float64) for name in vars(like)})
        if any(value.shape != getattr(like, name).shape for name, value in vars(found).items()):
            raise ValueError("of another shape")
        return found


def known_importance(scorer: Scorer, key: str, notes: Folder, data: Folder, rows: int, device: str) -> Importance:
    """What ``measure`` gives on a data folder's training rows, measured once and kept in ``notes``.

    All ranks of a gang and all arms prune by the same notes, so that they train the same model whatever their machines
    make of the last digit.

    Args:
        key: a digest of the model's weights.
        device: where to measure; the model stays there.
    """
    facts = DataFacts.load(data)
    name = digest({"model": key, "data": facts.fingerprint, "rows": rows}) + ".json"
    found = _noted(notes, name, scorer.core)
    if found is not None:
        return found
    notes.remove(name)  # where it is there, it is damaged
    made = measure(scorer, TableReader(data / "train"), facts, rows, device)
    notes.write_json(name, made.as_dict(), once=True)
    # Whoever was first has decided for all.
    return _noted(notes, name, scorer.core) or made


def _noted(notes: Folder, name: str, core: nn.Module) -> Importance | None:
    if not notes.exists(name):
        return None
    try:
        return Importance.of(notes.read_json(name), core)
    except (FileError, ValueError, KeyError, TypeError):
        return None


def measure(scorer: Scorer, table: TableReader, facts: DataFacts, rows: int, device: str = "cpu") -> Importance:
    """Run ``rows`` rows through a model, spread over a table, and score its parts.

    In fp32 on a CPU, and on a GPU with matrices multiplied in its fastest precision.

    Raises:
        ModelError: its architecture is not one that can be pruned, it fails, or its activations are not finite.
    """
    family = family_of(scorer.core)
    if not table.rows:
        raise ModelError("prune_teacher needs training rows to see what matters to the teacher, and there are none")
    numbers = _rows_of(table, rows)
    with said(f"can't calibrate {name_of(scorer)}"):
        place(scorer, device, "fp32" if device == "cpu" else "auto", autocast=True)
        run = _without_head(scorer, facts)
        at_once = max(1, _TOKENS_AT_ONCE // int(facts.sequence_length or 1))
        with torch.no_grad(), _Watch(scorer.core, family).watching() as watch:
            for some in np.array_split(numbers, -(-len(numbers) // at_once)):
                batch = make_batch(table.take(some, columns=batch_columns(facts)), facts).to(device)
                watch.see(batch.inputs)
                run(batch.inputs)
            return watch.importance()


def _rows_of(table: TableReader, wanted: int) -> np.ndarray:
    """Row numbers evenly spread over a table, or over some of its parts: one in an object store is fetched whole."""
    filled = np.flatnonzero(table.part_rows)
    parts = filled[_spread(len(filled), _PARTS)].tolist()
    held = np.concatenate([np.arange(rows.start, rows.stop) for rows in map(table.part_range, parts)])
    found: np.ndarray = held[_spread(len(held), wanted)]
    return found


def _spread(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))


def _without_head(scorer: Scorer, facts: DataFacts) -> Callable[[dict[str, Tensor]], Any]:
    """The model's forward, without the logits of a language model where they can be left out."""
    try:
        split = split_head(scorer, facts)
    except ModelError:
        split = None
    return split.hidden if split is not None else lambda inputs: scorer(**inputs)


class _Watch:
    """Hooks on a model that add up, of each part, the squares of its mean activation in every row."""

    def __init__(self, core: nn.Module, family: Family) -> None:
        self.core, self.family = core, family
        self.layers = family.layers_of(core)
        sizes = family.sizes(core.config)  # type: ignore[arg-type]
        device = next(core.parameters()).device
        count = len(self.layers)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        # One line for each norm: their scores are summed only when the squares are rooted.
        self.norms = zeros(count, len(family.norms), sizes.hidden)
        self.final = zeros(sizes.hidden)
        self.neurons, self.heads = zeros(count, sizes.neurons), zeros(count, sizes.heads)
        self.turned = zeros(count)
        self.rows = 0
        self._share_BL = torch.empty(0)
        self._entered: Tensor | None = None

    def see(self, inputs: dict[str, Tensor]) -> None:
        """Say what comes next: each token's share in the mean of its row; padding has none."""
        real_BL = (inputs["segments"] if "segments" in inputs else inputs["attention_mask"]) != 0
        self._share_BL = real_BL / real_BL.sum(dim=1, keepdim=True).clamp(min=1)
        self.rows += len(real_BL)

    def importance(self) -> Importance:
        """The scores of all rows so far."""
        hidden = torch.cat([self.norms.sqrt().sum(dim=1), self.final.sqrt()[None]])
        found = Importance(
            *(t.cpu() for t in (hidden, self.neurons.sqrt(), self.heads.sqrt(), self.turned / self.rows))
        )
        if not all(bool(value.isfinite().all()) for value in vars(found).values()):
            raise ModelError(
                "the teacher's activations are not finite on the training rows: it can't be pruned by them"
            )
        return found

    @contextmanager
    def watching(self) -> Iterator[Self]:
        """The hooks, for as long as the block runs."""
        family = self.family
        hooks = [family.final_norm_of(self.core).register_forward_hook(self._adds(self.final))]
        for i, layer in enumerate(self.layers):
            hooks += [layer.register_forward_pre_hook(self._enters, with_kwargs=True)]
            hooks += [layer.register_forward_hook(self._leaves(i))]
            for j, name in enumerate(family.norms):
                hooks += [layer.get_submodule(name).register_forward_hook(self._adds(self.norms[i, j]))]
            gives = layer.get_submodule(family.neurons_into)
            hooks += [gives.register_forward_pre_hook(self._given(self.neurons[i]))]
            gives = layer.get_submodule(family.heads_into)
            hooks += [gives.register_forward_pre_hook(self._given(self.heads[i]))]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, total_C: Tensor, found_BLX: Tensor) -> None:
        """Into ``total`` [C] the squares of each row's mean; what is wider than C is C vectors, of which the norm."""
        size_BLC = found_BLX.float().reshape(*found_BLX.shape[:-1], len(total_C), -1).norm(dim=-1)
        total_C += torch.einsum("blc,bl->bc", size_BLC, self._share_BL).double().square().sum(dim=0)

    def _adds(self, total_C: Tensor) -> Callable[..., None]:
        return lambda _, inputs, output: self._add(total_C, output)  # noqa: ARG005

    def _given(self, total_C: Tensor) -> Callable[..., None]:
        return lambda _, inputs: self._add(total_C, inputs[0])

    def _enters(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._entered = inputs[0] if inputs else named["hidden_states"]

    def _leaves(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            assert self._entered is not None
            left = output if isinstance(output, Tensor) else output[0]
            cosine_BL = nn.functional.cosine_similarity(self._entered.float(), left.float(), dim=-1)
            self.turned[index] += ((1 - cosine_BL) * self._share_BL).sum()

        return hook
