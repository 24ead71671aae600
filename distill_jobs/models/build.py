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
    model: spec.Model, facts: DataFacts, *, seed: int, teacher: Folder | None = None, trained_further: bool = True
) -> Scorer:
    """Build or load a model in fp32, on the CPU, in eval mode; the same weights for the same ``seed``.

    Args:
        teacher: the folder of the saved teacher, for ``init_from_teacher``.
        trained_further: False for a teacher that is brought, whose weights must all be there.

    Raises:
        ModelError: it can't be loaded or built, or does not take such data.
        VocabularyError: its logits don't fit the data's vocabulary or classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core, origin = _loader(model.kind)(model.chosen, Wanted(facts, teacher, trained_further))
        return settle(Scorer(core, origin, facts.features, facts.packing).eval(), facts)


def _loader(kind: str) -> Loader:
    module, _, name = MODEL_LOADERS[kind].partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    return loader
