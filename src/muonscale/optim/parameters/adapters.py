"""What the parameters of adapters are: LoRA and its kin as the `peft` package makes them.

An adapter's layer wraps a layer of the model (`base_layer`) and holds its own parameters in
containers, which it names in `adapter_layer_names`: `lora_A` is a ModuleDict with a Linear for each
adapter, `lora_embedding_A` a ParameterDict. Classes of `peft` are known by their names and by the
package that they come from; `peft` itself is not imported. Read from peft 0.21.
"""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.module_source import WRAPPED

if TYPE_CHECKING:  # module_survey imports this module
    from muonscale.optim.parameters.module_survey import ParamSite

FACTORS = frozenset(
    [
        *("lora_A", "lora_B", "adamss_A", "adamss_B", "delora_A", "delora_B", "deft_P", "deft_R"),
        *("hira_A", "hira_B", "osf_svd_params", "peanut_A", "peanut_B", "lily_A", "lily_B"),
        *("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    ]
)
"""Containers of matrices (out, in): the factors of a low-rank or Kronecker product."""
STORED_IN_OUT = frozenset(["gralora_A", "gralora_B", "poly_lora_A", "poly_lora_B", "miss_block"])
"""Containers of factors that are stored as (in, out), alone or as a stack."""
TABLES = frozenset(
    [
        *("lora_embedding_A", "lora_embedding_B", "hira_embedding_A", "hira_embedding_B"),
        *("trainable_tokens_delta", "vblora_vector_bank", "poly_router"),
    ]
)
"""Containers of what is looked up by token, by task or by choice."""
NO_MATRICES = frozenset(
    [
        *("lora_E", "lora_magnitude_vector", "ia3_l", "beft_bias", "road_theta", "road_alpha"),
        *("randlora_lambda", "randlora_gamma", "vblora_logits_A", "vblora_logits_B"),
        *("boft_R", "boft_s", "oft_R", "oft_embedding_R", "hra_u", "c3a_kernel"),
    ]
)
"""Containers of gains, biases, logits, and what rotations and circulant matrices are made from."""
PROMPTS = frozenset(
    [
        ("MultitaskPromptEmbedding", "prefix_task_cols"),
        ("MultitaskPromptEmbedding", "prefix_task_rows"),
        ("CartridgeEncoder", "trainable_embedding"),
        ("AdaptedAttention", "adaption_prompt"),
        ("AdaptedAttentionGPT", "adaption_prompt"),
    ]
)
"""Bare parameters that are rows of a prompt: (class, attribute)."""

_COPIES = {"modules_to_save": "original_module", "ln_tuning_layers": "base_layer"}
"""Containers of copies of a layer that are trained in its place, and where the layer itself is."""
_BASES = frozenset([*_COPIES.values(), "token_adapter"])


def adapter_role(parameter: Tensor, site: ParamSite) -> tuple[str, MatrixSpec | None, str] | None:
    """Return the role, the matrices and the reason of an adapter's parameter; None if it is none.

    Each factor of a low-rank update of a linear layer is a matrix, whatever its rank (LoRA's A and
    B, Hu et al., arXiv 2106.09685). Factors on an embedding, prompts and vectors stay on AdamW.
    Factors of convolutions, and containers that are not known, are left to the rules for all
    modules.
    """
    kind = type(site.module).__name__
    if _of_peft(type(site.module)) and (kind, site.attribute) in PROMPTS:
        return "embedding", PLAIN, f"{site.attribute} of {kind}, a table"
    if isinstance(site.module, nn.Embedding) and site.attribute in ("lora_A", "lora_B"):  # loralib
        return "embedding", PLAIN, f"{site.attribute} of {kind}, a table"
    layer, container = _container(site)
    why = f"{container} of {type(layer).__name__}"
    if container in NO_MATRICES:
        return "norm", None, why
    if container in TABLES:
        return "embedding", PLAIN, f"{why}, a table"
    if parameter.ndim < 2 or isinstance(site.module, nn.modules.conv._ConvNd):
        return None
    if container == "lily_router":
        return "router", PLAIN, why
    if container in STORED_IN_OUT:
        return "hidden", MatrixSpec(transposed=True), why
    if container not in FACTORS:
        return None
    if parameter.ndim > 2:  # LoHa and LoKr of a convolution
        return "convolution", MatrixSpec(flattened=True), why
    return "hidden", _factor(layer, container), why


def _factor(layer: nn.Module | None, container: str) -> MatrixSpec:
    """Return how a factor is stored: one matrix, or one for each expert."""
    if container == "lily_B":  # (experts * rank, out), used as hidden @ B
        experts = int(next(iter(layer.num_B.values())))  # pyrefly: ignore
        return MatrixSpec(transposed=True, heads=experts, by_columns=True)
    experts = int(layer.num_experts) if type(layer).__name__ == "ParamWrapper" else 1  # pyrefly: ignore
    if experts == 1:
        return PLAIN
    if container == "lora_A":  # (experts * rank, in)
        return MatrixSpec(heads=experts)
    return MatrixSpec(heads=experts, by_columns=True, interleaved=True)  # (out, rank * experts)


def without_adapters(site: ParamSite) -> ParamSite:
    """Return a site with the place that it would have if no adapter's layer stood around it.

    A wrapped layer and its copies take the place of the wrapper, so that what is known of the
    modules around them holds.
    """
    if not any(_is_layer(module) for module in site.ancestors):
        return site
    modules = [site.module, *site.ancestors]
    keys = [_key_of(child, parent) for child, parent in pairwise(modules)] + [""]
    kept, places = modules[:1], keys[:1]
    skip = False
    for i, module in enumerate(modules[1:], 1):
        around = modules[i + 1] if i + 1 < len(modules) else None
        copies = keys[i] in _COPIES and around is not None and _is_layer(around)
        if skip or copies or (_is_layer(module) and keys[i - 1] in _BASES):
            skip = copies
            places[-1] = keys[i]
        else:
            kept.append(module)
            places.append(keys[i])
    path = [place for place in reversed(places) if place and place not in WRAPPED]
    return dataclasses.replace(
        site,
        name=".".join([*path, site.attribute]),
        ancestors=tuple(kept[1:]),
        place=places[0],
    )


def inner_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layer that an adapter's layer wraps and its copies; `module` itself if it is none."""
    if not _is_layer(module):
        return [module]
    inside = [layer for base in _BASES if (layer := module._modules.get(base)) is not None]
    for container in _COPIES:
        if (copies := module._modules.get(container)) is not None:
            inside += copies.children()
    return [layer for found in inside for layer in inner_layers(found)]


def _container(site: ParamSite) -> tuple[nn.Module | None, str]:
    """Return the adapter's layer around a site and its container there, or None and no name."""
    for child, parent in pairwise((site.module, *site.ancestors)):
        if _is_layer(parent):
            key = _key_of(child, parent)
            return (None, "") if key in _BASES or key in _COPIES else (parent, key)
    return None, ""


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module wraps a layer of the model for adapters of peft."""
    return _wraps(type(module))


@functools.cache
def _wraps(cls: type) -> bool:
    bases = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
    return any(base.__name__ in bases and _of_peft(base) for base in cls.__mro__)


def _of_peft(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "peft"


def _key_of(child: nn.Module, parent: nn.Module) -> str:
    return next(key for key, module in parent._modules.items() if module is child)
