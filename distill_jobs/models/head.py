"""A language model in two parts: everything up to the output head, and the head, applied to chosen positions only.

The logits of a batch are by far the largest tensor of a forward pass, and most users keep little of them. So the head
is asked for apart, in as small pieces as somebody likes. Shapes: B rows, L tokens of a row, H hidden width, N any
number of positions, V logits of a position.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.scorer import Scorer, flat, name_of, sample_inputs

# What an architecture does with its head's output, read in its code: the setting, and whether it multiplies (1) or
# divides (-1). The first key that a ``model_type`` begins with holds. Whatever is missing here fails the check.
SCALES: dict[str, tuple[str, int]] = {
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "cohere": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
    "muse_": ("output_multiplier", 1),
}
# Each of these c, where it is set, makes c · tanh(logits / c) of the scaled logits.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Allowed differences, of a logit and of the logits' spread: in bf16 and fp16 both sides have been rounded to 8 and 11
# bits more than once (after the head, the scale and the cap), and may have been summed up in another order.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_CHECKED_ROWS, _CHECKED_TOKENS = 2, 64


class SplitHead:
    """A Hugging Face language model whose output head is applied apart from the rest.

    Gradients flow through both parts. One user at a time: calls of ``hidden`` wait for each other.

    Attributes:
        scale: what the head's output is multiplied with.
        softcap: the bound c of ``c · tanh(x / c)`` that the scaled output goes through, or None.
    """

    def __init__(self, scorer: Scorer, head: nn.Linear, scale: float, softcap: float | None) -> None:
        self.scorer, self.head, self.scale, self.softcap = scorer, head, scale, softcap
        self._one_user = threading.Lock()

    @property
    def weight(self) -> Tensor:
        """[V, H], perhaps the very tensor of the embedding."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        return self.head.bias

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the head would get, [B, L, H], from the model's own forward; no logits are made.

        Args:
            inputs: what the scorer takes (``Batch.inputs``).

        Raises:
            ModelError: the model does not call its head once with such a tensor.
        """
        found: list[Tensor] = []
        with self._one_user, self._replaced(lambda hidden_BLH: _narrow(hidden_BLH, found)):
            self.scorer(**inputs)
        shape = [*inputs["input_ids"].shape, self.weight.shape[1]]
        if len(found) != 1 or list(found[0].shape) != shape:
            got = " and ".join(str(list(tensor.shape)) for tensor in found) or "nothing"
            raise ModelError(f"{_said(self.scorer)} gives its output head {got}, not once {shape}; {_REMEDY}")
        return found[0]

    def logits(self, hidden_NH: Tensor, targets: int | None = None) -> Tensor:
        """The model's own logits of some positions, scaled and capped as in its own forward, [N, V].

        Args:
            targets: make only the first so many columns (the real vocabulary of a padded one).
        """
        width = targets or self.scorer.outputs or len(self.weight)
        bias = None if self.bias is None else self.bias[:width]
        with self.scorer.casting():
            # A teacher that is spread over devices gives its hidden states where its last layer is.
            raw_NV = nn.functional.linear(hidden_NH.to(self.weight.device), self.weight[:width], bias)
        return self.finish(raw_NV)

    def finish(self, raw_NV: Tensor) -> Tensor:
        """What the model does with its head's output: scale, then soft cap; the same shape."""
        scaled = raw_NV if self.scale == 1 else raw_NV * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    @contextmanager
    def _replaced(self, forward: Any) -> Iterator[None]:
        """Let the head do something else for a while; the module stays in its place, and so its weights and hooks."""
        attributes = vars(self.head)
        before = {name: attributes[name] for name in ("forward",) if name in attributes}
        attributes["forward"] = forward
        try:
            yield
        finally:
            del attributes["forward"]
            attributes.update(before)


def split_head(scorer: Scorer, facts: DataFacts, inputs: dict[str, Tensor] | None = None) -> SplitHead | None:
    """Split a language model at its output head, and prove that both parts give what the model itself gives.

    Args:
        scorer: the model where it will run: device, precision and compilation as they will stay.
        inputs: a real batch, of which a few tokens are used; None takes made-up ones.

    Returns:
        None where there is no head to split off: classifiers, factories, and models without a linear output layer.

    Raises:
        ModelError: the split's logits differ from the model's own.
    """
    core: Any = scorer.core
    if facts.features != "documents" or scorer.origin["kind"] != "hf":
        return None
    head = core.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    config = core.config.get_text_config()
    caps = [float(value) for name in SOFT_CAPS if (value := getattr(config, name, None))]
    split = SplitHead(scorer, head, _scale(config), caps[0] if caps else None)
    some = sample_inputs(facts, length=min(_CHECKED_TOKENS, int(facts.sequence_length or 8)))
    # As capture calls the model: torch.compile compiles anew for each mode.
    with torch.inference_mode():
        _check(split, some if inputs is None else inputs)
    return split


def _scale(config: Any) -> float:
    for start, (name, power) in SCALES.items():
        if str(config.model_type).startswith(start):
            return float(getattr(config, name, None) or 1.0) ** power
    return 1.0


def _check(split: SplitHead, inputs: dict[str, Tensor]) -> None:
    device = next(split.scorer.parameters()).device
    some = {name: tensor[:_CHECKED_ROWS, :_CHECKED_TOKENS].to(device) for name, tensor in inputs.items()}
    _check_finish(split, some)
    own = split.scorer(**some).flatten(0, -2)
    ours = split.logits(split.hidden(some).flatten(0, -2), own.shape[-1])
    # A row that the teacher itself makes nothing of is no fault of the split.
    usable = own.isfinite().all(dim=-1)
    own, ours = own[usable].float(), ours[usable].float().to(own.device)
    if own.shape != ours.shape or _apart(ours, own, _tolerance(split.scorer)):
        far = float((ours - own).abs().max()) if own.shape == ours.shape else math.inf
        raise ModelError(
            f"{_said(split.scorer)} gives other logits when its output head is applied apart (by up to {far:.3g}, of "
            f"{float(own.std()):.3g} that they spread); {_REMEDY}"
        )


def _check_finish(split: SplitHead, inputs: dict[str, Tensor]) -> None:
    """What the model makes of known outputs of its head, from -100 to 100: a real batch may not reach a soft cap."""
    rows, length = inputs["input_ids"].shape
    ramp_BL1: list[Tensor] = []

    def ramp(hidden_BLH: Tensor) -> Tensor:
        values = torch.linspace(-100, 100, rows * length, device=hidden_BLH.device, dtype=split.weight.dtype)
        ramp_BL1.append(values.reshape(rows, length, 1))
        return ramp_BL1[0].clone()

    try:
        with split._replaced(ramp):
            own = split.scorer(**inputs).float()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{_said(split.scorer)} fails without its output head ({flat(error)}); {_REMEDY}") from None
    ours = split.finish(ramp_BL1[0]).float().to(own.device) if ramp_BL1 else own[..., :0]
    if own.shape != ours.shape or _apart(ours, own, _tolerance(split.scorer)):
        raise ModelError(
            f"{_said(split.scorer)} does something to its logits that is not known here, beside a scale of "
            f"{split.scale:g} and a soft cap of {split.softcap or 'none'}; {_REMEDY}"
        )


def _apart(ours: Tensor, own: Tensor, tolerance: float) -> bool:
    spread = own.std() if own.numel() > 1 else own.abs().sum()
    # Written so that a NaN counts as apart.
    return not bool(((ours - own).abs() <= tolerance * (own.abs() + spread)).all())


def _tolerance(scorer: Scorer) -> float:
    dtype = scorer.autocast or next(p.dtype for p in scorer.parameters() if p.is_floating_point())
    return _TOLERANCES.get(dtype, max(_TOLERANCES.values()))


def _narrow(hidden_BLH: Tensor, found: list[Tensor]) -> Tensor:
    found.append(hidden_BLH)
    # One column of zeros goes through whatever the model does with its logits.
    return hidden_BLH.new_zeros(*hidden_BLH.shape[:-1], 1)


def _said(scorer: Scorer) -> str:
    core: Any = scorer.core
    return f"{name_of(scorer)} ({core.config.model_type})"


_REMEDY = "set capture.chunk_positions to 0 to run its own forward"
