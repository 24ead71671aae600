"""The model that a spec asks for."""

import importlib

import torch

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.models import MODEL_LOADERS
from distill_jobs.models.loaders import Loader, Wanted
from distill_jobs.models.scorer import Scorer, settle


def build_model(
    model: spec.Model,
    facts: DataFacts,
    *,
    seed: int,
    teacher: Folder | None = None,
    trained_further: bool = True,
    data: Folder | None = None,
    device: str = "cpu",
    lora: spec.Lora | None = None,
) -> Scorer:
    """Build or load a model in fp32, on the CPU, in eval mode; the same weights for the same ``seed``.

    Args:
        teacher: the folder of the saved teacher, for ``init_from_teacher`` and ``prune_teacher``.
        trained_further: False for a teacher that is brought, whose weights must all be there.
        data: the prepared data, by whose training rows ``prune_teacher`` sees what matters; without them it keeps what
            comes first, which is a model of the right size and good for nothing else.
        device: where it sees that.
        lora: adapters to put on the model; then they alone are to be trained, see ``lora.add_adapters``.

    Raises:
        ModelError: it can't be loaded or built, or does not take such data.
        VocabularyError: its logits don't fit the data's vocabulary or classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core, origin = _loader(model.kind)(model.chosen, Wanted(facts, teacher, trained_further, data, device))
        scorer = settle(Scorer(core, origin, facts.features, facts.packing).eval(), facts)
        if lora is not None:
            # peft takes a second to import, and most models have no adapters.
            from distill_jobs.models.lora import add_adapters

            add_adapters(scorer.core, lora)
            scorer.eval()
        return scorer


def _loader(kind: str) -> Loader:
    module, _, name = MODEL_LOADERS[kind].partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    return loader
