"""One way to ask any model for logits.

A ``Scorer`` wraps a model of any origin and takes what ``data.batch.make_batch`` gives:

    tabular    features [B, D]                             → logits [B, C]
    image      pixels [B, channels, height, width]         → logits [B, C]
    text       input_ids [B, L], attention_mask [B, L]     → logits [B, C]
    documents  input_ids [B, L], segments [B, L]           → logits [B, L, V]

``segments`` numbers the documents of a packed row from 1; 0 is padding, at the row's end.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError, VocabularyError


class Scorer(nn.Module):
    """A model that gives logits.

    Attributes:
        core: the model itself.
        origin: how to build ``core`` again, in plain values; ``origin["kind"]`` is hf, mlp, cnn or factory.
        outputs: width of the logits, which may be padded beyond the real vocabulary.
        autocast: the precision in which matrices are multiplied where that is not the weights' own, or None.
        compiled: whether its calls go through ``torch.compile``.
    """

    def __init__(self, core: nn.Module, origin: dict[str, Any], features: str, packing: str | None) -> None:
        super().__init__()
        self.core = core
        self.origin = origin
        self.features = features
        self.packing = packing
        self.outputs = 0
        self.autocast: torch.dtype | None = None
        self.compiled = False
        self._hugging_face = origin["kind"] == "hf"
        self._takes = None if self._hugging_face else _keywords(core.forward)

    def forward(
        self,
        features: Tensor | None = None,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # noqa: ARG002
        segments: Tensor | None = None,
    ) -> Tensor:
        """The logits of one batch, in the model's own precision.

        A batch's ``position_ids`` are taken but not needed: ``segments`` say the same, and say where padding is.
        """
        with self.casting(), self._compiling():
            if self.features == "documents":
                assert input_ids is not None
                return self._documents(input_ids, torch.ones_like(input_ids) if segments is None else segments)
            if self.features == "text":
                found = self.core(input_ids=input_ids, **self._taken(attention_mask=attention_mask))
            else:
                values = features if features is not None else pixels
                assert values is not None
                values = values.to(self._dtype(values.dtype))
                image = self._hugging_face and self.features == "image"
                found = self.core(pixel_values=values) if image else self.core(values)
            return _logits(found)

    def casting(self) -> AbstractContextManager[Any]:
        """The precision in which the model multiplies: ``autocast``, where that is set.

        Entered around several calls, it converts each weight once instead of once a call.
        """
        if self.autocast is None:
            return nullcontext()
        device = next((p.device.type for p in self.core.parameters()), "cpu")
        return torch.autocast(device, dtype=self.autocast)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """``torch.compile`` compiles at the first call, so what it can't do shows here."""
        try:
            yield
        except Exception as error:
            if not self.compiled or not any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
                raise
            said = str(error).split("\n", 1)[0]
            raise ModelError(
                f"torch.compile can't compile {name_of(self)} on this machine: {said}; set capture.compile to false"
            ) from None

    def _documents(self, ids_BL: Tensor, segments_BL: Tensor) -> Tensor:
        if self._hugging_face:
            # transformers reads the documents' borders off positions that start again, and builds the mask that
            # fits each layer (sliding windows too); rows of one document take the faster unmasked causal path.
            packed = {} if self.packing == "naive" else {"position_ids": document_positions(segments_BL)}
            return _logits(self.core(input_ids=ids_BL, use_cache=False, **packed))
        extra = self._taken(
            attention_mask=lambda: document_mask(segments_BL), position_ids=lambda: document_positions(segments_BL)
        )
        return _logits(self.core(input_ids=ids_BL, **extra))

    def _taken(self, **values: Any) -> dict[str, Any]:
        wanted = {k: v for k, v in values.items() if self._takes is None or k in self._takes}
        return {k: v() if callable(v) else v for k, v in wanted.items()}

    def _dtype(self, fallback: torch.dtype) -> torch.dtype:
        return next((p.dtype for p in self.core.parameters() if p.is_floating_point()), fallback)


def document_positions(segments_BL: Tensor) -> Tensor:
    """The place of every token within its own document, [B, L] int64.

    Padding counts on from the last document, so that a row of one document and padding looks like one document:
    causal attention keeps padding behind it from being seen anyway, and no row of the mask is ever empty.
    """
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    before_BL = torch.nn.functional.pad(segments_BL, (1, 0))[:, :-1]
    starts_BL = (segments_BL != before_BL) & (segments_BL != 0)
    return place_L - torch.where(starts_BL, place_L, 0).cummax(dim=1).values


def document_mask(segments_BL: Tensor) -> Tensor:
    """Which earlier token each token may look at, bool [B, 1, L, L]: those of its own document, itself included."""
    start_BL = torch.arange(segments_BL.shape[1], device=segments_BL.device) - document_positions(segments_BL)
    causal_LL = torch.ones(segments_BL.shape[1], segments_BL.shape[1], dtype=torch.bool, device=start_BL.device).tril()
    return ((start_BL[:, :, None] == start_BL[:, None, :]) & causal_LL)[:, None]


def sample_inputs(facts: DataFacts, rows: int = 2, length: int | None = None) -> dict[str, Tensor]:
    """Made-up inputs of the shapes that ``facts`` promise, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    if facts.features == "tabular":
        return {"features": torch.randn(rows, int(facts.feature_width or 0), generator=generator)}
    if facts.features == "image":
        return {"pixels": torch.rand(rows, *(facts.image_shape or ()), generator=generator)}
    size = (rows, length or int(facts.sequence_length or 0))
    input_ids = torch.randint(0, int(facts.vocabulary or 1), size, generator=generator)
    other = "attention_mask" if facts.features == "text" else "segments"
    return {"input_ids": input_ids, other: torch.ones_like(input_ids)}


def few_inputs(scorer: Scorer, facts: DataFacts) -> dict[str, Tensor]:
    """Made-up inputs that are just enough to show the shapes of what a model gives."""
    # A factory may build for the full length only; others need no more than a few tokens to show their shape.
    full = scorer.origin["kind"] == "factory" or facts.features != "documents"
    return sample_inputs(facts, length=None if full else min(8, int(facts.sequence_length or 8)))


def settle(scorer: Scorer, facts: DataFacts) -> Scorer:
    """Run two made-up rows through the model, check the logits' shape, and set ``outputs``.

    Raises:
        ModelError: the model fails on such inputs, or its logits have another shape.
        VocabularyError: it gives fewer logits than there are tokens, or not one for each class.
    """
    inputs = few_inputs(scorer, facts)
    training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            logits = scorer(**inputs)
    except (ModelError, VocabularyError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ModelError(f"{name_of(scorer)} fails on a made-up batch of this data ({shapes}): {flat(error)}") from None
    finally:
        scorer.train(training)
    expected = [2, inputs["input_ids"].shape[1]] if facts.features == "documents" else [2]
    if list(logits.shape[:-1]) != expected or not logits.is_floating_point():
        wanted = [*expected, facts.targets]
        raise ModelError(f"{name_of(scorer)} gives logits of shape {list(logits.shape)}; this data needs {wanted}")
    scorer.outputs = logits.shape[-1]
    _check_width(scorer, facts)
    return scorer


def _check_width(scorer: Scorer, facts: DataFacts) -> None:
    if facts.features == "documents" and scorer.outputs < facts.targets:
        raise VocabularyError(
            f"{name_of(scorer)} knows {scorer.outputs} tokens, but the data's tokenizer has {facts.targets}: "
            f"give the model the tokenizer's vocabulary, or the data the model's tokenizer"
        )
    if facts.features != "documents" and scorer.outputs != facts.targets:
        raise VocabularyError(
            f"{name_of(scorer)} tells {scorer.outputs} classes apart, but the data has {facts.targets} "
            f"({', '.join(facts.classes[:5])}{', …' if len(facts.classes) > 5 else ''})"
        )


def name_of(scorer: Scorer) -> str:
    """The model, named for a message."""
    origin = scorer.origin
    return f"the {origin['kind']} model" + (f" {origin['target']}" if "target" in origin else "")


def flat(error: BaseException, limit: int = 300) -> str:
    """An exception of somebody else's in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _logits(found: Any) -> Tensor:
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise ModelError(f"a model must return a tensor or an object with .logits, not {type(found).__name__}")
    return logits


def _keywords(function: Any) -> set[str] | None:
    """The keywords that a function takes, or None when it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
