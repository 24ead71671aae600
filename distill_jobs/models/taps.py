"""What single layers of a model give, taken by hooks while the model's own forward runs.

Shapes: B rows, L tokens of a row, H the layer's width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError, SpecError
from distill_jobs.models.scorer import Scorer, few_inputs, name_of
from distill_jobs.spec.features import known

Take = Callable[[str, Tensor], Any]


class Taps:
    """Listens to layers of a model, one forward pass at a time.

    A language model's layer gives [B·L, H], one row a position. A classifier's gives [B, H]: the mean over the
    positions of a sequence that are no padding, or over the places of a picture, where it has any.
    """

    def __init__(self, scorer: Scorer, layers: Sequence[str], where: str) -> None:
        """Find the layers by their names in ``scorer.core``.

        Args:
            where: what names them, for a message.

        Raises:
            SpecError: there is no such layer, or it is the output head.
        """
        named = {name: module for name, module in scorer.core.named_modules() if name}
        for name in layers:
            if name not in named:
                raise SpecError(f"{where} names {name}, but {name_of(scorer)} {known(name, named)}")
        self._said, self._documents = name_of(scorer), scorer.features == "documents"
        self._layers = {name: named[name] for name in layers}
        head = _head(scorer.core)
        for name, layer in self._layers.items():
            if layer is head:
                raise SpecError(f"{where} names {name}, but that gives the logits, of which the codec knows already")

    @contextmanager
    def listening(self, inputs: dict[str, Tensor], take: Take | None = None) -> Iterator[dict[str, Any]]:
        """What the layers give, by their names, once the model has run inside on ``inputs`` and the block is left.

        The hooks are there only meanwhile, behind those of others: a layer that is computed again in the backward pass
        is not heard, and what DeepSpeed puts around a layer's output is kept.

        Args:
            take: makes of a layer's rows what is kept of them, at once, so that no layer is held for longer. Not while
                a gradient is asked for: what a hook computes, a layer that is computed again would lack.

        Raises:
            ModelError: a layer is not called once, or gives something else than rows.
        """
        heard: dict[str, Any] = {}

        def hear(name: str, _: nn.Module, __: Any, output: Any) -> None:
            if name in heard:
                raise ModelError(f"{self._said} calls its layer {name} more than once a forward pass: choose another")
            heard[name] = output if take is None else take(name, self._rows(name, output, inputs))

        handles = [layer.register_forward_hook(partial(hear, name)) for name, layer in self._layers.items()]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name in self._layers if name not in heard]
        if silent:
            raise ModelError(f"{self._said} doesn't call its layer {silent[0]} in its forward pass: choose another")
        if take is None:
            heard |= {name: self._rows(name, output, inputs) for name, output in heard.items()}

    def _rows(self, name: str, output: Any, inputs: dict[str, Tensor]) -> Tensor:
        output = getattr(output, "last_hidden_state", output)
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        ids = inputs.get("input_ids")
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if self._documents and ids is not None and isinstance(output, Tensor):
            if output.ndim == 3 and output.shape[:2] == ids.shape:
                return output.flatten(0, 1)
        elif isinstance(output, Tensor) and output.is_floating_point() and 2 <= output.ndim <= 4:
            return _pooled(output, inputs.get("attention_mask"))
        wanted = "[rows, tokens, width]" if self._documents else "[rows, width]"
        raise ModelError(f"{self._said}: its layer {name} gives {shape}, and features need {wanted}: choose another")


def _pooled(output: Tensor, mask: Tensor | None) -> Tensor:
    if output.ndim == 4:
        return output.mean(dim=(2, 3))
    if output.ndim == 2:
        return output
    if mask is None or mask.shape != output.shape[:2]:
        return output.mean(dim=1)
    weights = mask.to(output)[..., None]
    return (output * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def _head(core: Any) -> Any:
    find = getattr(core, "get_output_embeddings", None)
    return find() if find is not None else None


def widths(scorer: Scorer, taps: Taps, facts: DataFacts) -> dict[str, int]:
    """The width of each layer, as a few made-up rows show it."""
    device = next(scorer.parameters()).device
    inputs = {name: values.to(device) for name, values in few_inputs(scorer, facts).items()}
    training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad(), taps.listening(inputs, lambda _, rows: rows.shape[1]) as found:
            scorer(**inputs)
    finally:
        scorer.train(training)
    return {name: int(width) for name, width in found.items()}
