"""How many floating-point operations a model takes for a token, by closed formulas, and no measurement.

Attention's own products are left out, what is computed twice to save memory, and embeddings, which are looked up.
"""

from torch import nn

from distill_jobs.data.facts import DataFacts


def training_flops(module: nn.Module, facts: DataFacts) -> float | None:
    """Of training on a token (or a row of features): 6 for each parameter that is multiplied with.

    Two in the forward pass and two for the gradient of the layer's input, and two more where the parameter is trained
    (Kaplan et al. 2020, "Scaling Laws for Neural Language Models"). None for images, where parameters are used more
    than once.
    """
    if facts.features == "image":
        return None
    return float(sum(_size(p) * (6 if p.requires_grad else 4) for p in _multiplied(module)))


def forward_flops(module: nn.Module, facts: DataFacts) -> float | None:
    """Of a forward pass over a token (or a row of features): 2 for each parameter that is multiplied with."""
    if facts.features == "image":
        return None
    return float(sum(2 * _size(p) for p in _multiplied(module)))


def _multiplied(module: nn.Module) -> list[nn.Parameter]:
    used = {
        id(parameter): parameter
        for layer in module.modules()
        if not isinstance(layer, nn.Embedding)
        for parameter in layer.parameters(recurse=False)
    }
    return list(used.values())


def _size(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is empty here, and its size with DeepSpeed.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
