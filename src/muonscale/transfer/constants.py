"""The factors of the width in the forward pass of a model.

If the forward pass lacks a factor of the width, or has one that it should not have, the factor is
folded into a parameter next to it. The model and its checkpoints do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from muonscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ForwardConstants:
    """The factors of width and depth in the forward pass of an architecture.

    Weights are assumed to be initialized with a standard deviation that does not depend on their
    shape. Attention modules with an attribute `scaling` are assumed to multiply their scores by it.
    """

    final_norm: str
    """Name of the module before the head, such as `model.norm`."""
    offset_gains: bool = False
    """Norms multiply by 1 + w instead of w."""
    scaled_embedding: bool = False
    """Token embeddings are multiplied by the square root of their width."""
    branch_ends: tuple[str, ...] = ()
    """Globs over the names of the parameters that end a residual branch: its last matrix with its
    bias, or the norm after it."""
    falling_branch_std: bool = False
    """Matrices that end a branch are initialized with a standard deviation of 1/sqrt(layers)."""


_LINEAR_ENDS = ("*.o_proj.*", "*.down_proj.*", "*.experts.down_proj")
_NORM_ENDS = ("*.post_attention_layernorm.weight", "*.post_feedforward_layernorm.weight")
_LLAMA = ForwardConstants(final_norm="model.norm", branch_ends=_LINEAR_ENDS)
_GEMMA2 = ForwardConstants(
    final_norm="model.norm", offset_gains=True, scaled_embedding=True, branch_ends=_NORM_ENDS
)

KNOWN: dict[str, ForwardConstants] = {
    "deepseek_v3": _LLAMA,
    "gemma": ForwardConstants(
        final_norm="model.norm", offset_gains=True, scaled_embedding=True, branch_ends=_LINEAR_ENDS
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": ForwardConstants(
        final_norm="transformer.ln_f", branch_ends=("*.c_proj.*",), falling_branch_std=True
    ),
    "gpt_neox": ForwardConstants(
        final_norm="gpt_neox.final_layer_norm",
        branch_ends=("*.attention.dense.*", "*.dense_4h_to_h.*"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": ForwardConstants(final_norm="model.norm", branch_ends=_NORM_ENDS),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
}
"""Constants by the `model_type` of transformers. Studies of widths also need a row in the `KNOWN` of
muonscale.lab.models.widen."""


def known_constants(model: nn.Module) -> ForwardConstants:
    """Return the constants of a transformers model.

    Raises:
        ConfigError: if the architecture is not in `KNOWN`.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in KNOWN:
        return KNOWN[kind]
    raise ConfigError(
        f"transfer does not know how the forward pass of {kind or type(model).__name__} depends on "
        f"its width; known: {', '.join(sorted(KNOWN))}. For another model, pass "
        "constants=ForwardConstants(...)"
    )
