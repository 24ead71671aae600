"""The architectures that can be made narrower: where their channels, neurons and heads are.

A family is a table that says of every parameter which of its dimensions runs along which axis:

    hidden    channels of the residual stream, the same for all layers
    neurons   of the MLP, each layer's own
    heads     query heads, each ``head_dim`` wide, each layer's own
    groups    key-value heads, likewise; query heads share them in groups of equal size
    qkv       queries, keys and values of all heads, one after another
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from distill_jobs.errors import ModelError

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Sizes:
    """The widths of a transformer. ``head_dim`` is the width of one head, which pruning leaves as it is."""

    hidden: int
    neurons: int
    heads: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class Family:
    """One architecture, as several models share it.

    Attributes:
        kinds: ``model_type`` of these models.
        layers, final_norm: where they are within the backbone.
        norms: the norms on the residual stream, within a layer.
        heads_into, neurons_into: the layers that take what all heads, or all neurons, give.
        neurons_key: the configuration's name for the number of neurons.
        grouped: whether several query heads may share keys and values.
        free_heads: whether the heads together may be narrower than the residual stream.
        axes: of each parameter in the backbone, by its name without the layers' numbers.
    """

    kinds: tuple[str, ...]
    layers: str
    final_norm: str
    norms: tuple[str, ...]
    heads_into: str
    neurons_into: str
    neurons_key: str
    grouped: bool
    free_heads: bool
    axes: dict[str, Axes]

    def sizes(self, config: Any) -> Sizes:
        """The widths of a model of this configuration."""
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        groups = int(getattr(config, "num_key_value_heads", None) or heads) if self.grouped else heads
        head_dim = int((getattr(config, "head_dim", None) if self.free_heads else None) or hidden // heads)
        return Sizes(hidden, int(getattr(config, self.neurons_key) or 4 * hidden), heads, groups, head_dim)

    def layers_of(self, core: Any) -> nn.ModuleList:
        """The model's layers."""
        found: nn.ModuleList = core.base_model.get_submodule(self.layers)
        return found

    def final_norm_of(self, core: Any) -> nn.Module:
        """The norm before the output head."""
        found: nn.Module = core.base_model.get_submodule(self.final_norm)
        return found

    def axes_of(self, core: Any, name: str) -> tuple[Axes, int]:
        """Along which axes a parameter of the model runs, and the number of its layer, or -1.

        Raises:
            ModelError: the table does not know it.
        """
        prefix = f"{core.base_model_prefix}."
        inside = name.removeprefix(prefix) if name.startswith(prefix) else name
        known, layer = (self.axes if name.startswith(prefix) else HEADS), -1
        if name.startswith(f"{prefix}{self.layers}."):
            number, rest = inside.removeprefix(f"{self.layers}.").split(".", 1)
            inside, layer = f"{self.layers}.*.{rest}", int(number)
        if inside not in known:
            raise ModelError(f"can't prune a {type(core).__name__}: it is not known how {name} narrows")
        return known[inside], layer


HEADS: dict[str, Axes] = {
    "lm_head.weight": (None, "hidden"),
    "lm_head.bias": (None,),
    "score.weight": (None, "hidden"),
}
"""The output heads of language models and classifiers."""

_LLAMA: dict[str, Axes] = {
    "embed_tokens.weight": (None, "hidden"),
    "layers.*.input_layernorm.weight": ("hidden",),
    "layers.*.self_attn.q_proj.weight": ("heads", "hidden"),
    "layers.*.self_attn.q_proj.bias": ("heads",),
    "layers.*.self_attn.q_norm.weight": (None,),
    "layers.*.self_attn.k_proj.weight": ("groups", "hidden"),
    "layers.*.self_attn.k_proj.bias": ("groups",),
    "layers.*.self_attn.k_norm.weight": (None,),
    "layers.*.self_attn.v_proj.weight": ("groups", "hidden"),
    "layers.*.self_attn.v_proj.bias": ("groups",),
    "layers.*.self_attn.o_proj.weight": ("hidden", "heads"),
    "layers.*.self_attn.o_proj.bias": ("hidden",),
    "layers.*.post_attention_layernorm.weight": ("hidden",),
    "layers.*.mlp.gate_proj.weight": ("neurons", "hidden"),
    "layers.*.mlp.gate_proj.bias": ("neurons",),
    "layers.*.mlp.up_proj.weight": ("neurons", "hidden"),
    "layers.*.mlp.up_proj.bias": ("neurons",),
    "layers.*.mlp.down_proj.weight": ("hidden", "neurons"),
    "layers.*.mlp.down_proj.bias": ("hidden",),
    "norm.weight": ("hidden",),
}
# GPT-2 keeps its linear layers' weights the other way round, [inputs, outputs].
_GPT2: dict[str, Axes] = {
    "wte.weight": (None, "hidden"),
    "wpe.weight": (None, "hidden"),
    "h.*.ln_1.weight": ("hidden",),
    "h.*.ln_1.bias": ("hidden",),
    "h.*.attn.c_attn.weight": ("hidden", "qkv"),
    "h.*.attn.c_attn.bias": ("qkv",),
    "h.*.attn.c_proj.weight": ("heads", "hidden"),
    "h.*.attn.c_proj.bias": ("hidden",),
    "h.*.ln_2.weight": ("hidden",),
    "h.*.ln_2.bias": ("hidden",),
    "h.*.mlp.c_fc.weight": ("hidden", "neurons"),
    "h.*.mlp.c_fc.bias": ("neurons",),
    "h.*.mlp.c_proj.weight": ("neurons", "hidden"),
    "h.*.mlp.c_proj.bias": ("hidden",),
    "ln_f.weight": ("hidden",),
    "ln_f.bias": ("hidden",),
}

FAMILIES: tuple[Family, ...] = (
    Family(
        kinds=("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"),
        layers="layers",
        final_norm="norm",
        norms=("input_layernorm", "post_attention_layernorm"),
        heads_into="self_attn.o_proj",
        neurons_into="mlp.down_proj",
        neurons_key="intermediate_size",
        grouped=True,
        free_heads=True,
        axes=_LLAMA,
    ),
    Family(
        kinds=("gpt2",),
        layers="h",
        final_norm="ln_f",
        norms=("ln_1", "ln_2"),
        heads_into="attn.c_proj",
        neurons_into="mlp.c_proj",
        neurons_key="n_inner",
        grouped=False,
        free_heads=False,
        axes=_GPT2,
    ),
)


def family_of(core: Any) -> Family:
    """The family of a model; ModelError when it is of none."""
    kind = core.config.model_type
    found = next((family for family in FAMILIES if kind in family.kinds), None)
    if found is None:
        known = ", ".join(kind for family in FAMILIES for kind in family.kinds)
        raise ModelError(
            f"prune_teacher can't narrow a {kind} model, only {known}: take init_from_teacher, or a model of its own"
        )
    return found
