"""Where transformers' attention modules have the weights of queries and keys, for QK-clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.attention import attention_modules
from muonscale.optim.diagnostics.qk_clip import Masters, Outputs, clip_grouped_, clip_latent_

Clip = Callable[[Tensor, float, Masters | None], None]
"""Scales the heads of one attention module by gamma `[H]`, with alpha."""


def _linear(module: nn.Module) -> Outputs:
    return Outputs(tuple(module.parameters(recurse=False)))


@dataclass(frozen=True)
class _Separate:
    """`q_proj` and `k_proj`, head after head; fewer heads of keys or as many."""

    module: Any

    def __call__(self, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
        query, key, size = self.module.q_proj, self.module.k_proj, self.module.head_dim
        clip_grouped_(
            _linear(query),
            _linear(key),
            gamma_H,
            key_heads=key.weight.shape[0] // size,
            head_size=size,
            alpha=alpha,
            masters=masters,
        )


@dataclass(frozen=True)
class _Fused:
    """GPT-2's `c_attn`, a Conv1D: queries, keys, values."""

    module: Any

    def __call__(self, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
        tensors, heads = tuple(self.module.c_attn.parameters(recurse=False)), len(gamma_H)
        width = self.module.c_attn.weight.shape[1] // 3
        clip_grouped_(
            Outputs(tensors, axis=-1),
            Outputs(tensors, axis=-1, first=width),
            gamma_H,
            key_heads=heads,
            head_size=width // heads,
            alpha=alpha,
            masters=masters,
        )


@dataclass(frozen=True)
class _Latent:
    """DeepSeek's multi-head latent attention, with a low-rank query or without."""

    module: Any

    def __call__(self, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
        module = self.module
        query = getattr(module, "q_proj", None) or module.q_b_proj
        clip_latent_(
            _linear(query),
            _linear(module.kv_b_proj),
            gamma_H,
            sizes=(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim),
            alpha=alpha,
            masters=masters,
        )


CLIPS: dict[str, Callable[[Any], Clip]] = {
    "DeepseekV3Attention": _Latent,
    "GPT2Attention": _Fused,
    "LlamaAttention": _Separate,
    "MistralAttention": _Separate,
    "MixtralAttention": _Separate,
    "Qwen2Attention": _Separate,
    "Qwen2MoeAttention": _Separate,
}
"""Attention modules of transformers whose queries and keys are known, by class."""


def query_key_clips(model: PreTrainedModel) -> list[Clip]:
    """Return what scales the heads of every attention module, in the order of `attention_modules`.

    Raises:
        ConfigError: for a model that normalises queries or keys, or that is not known.
    """
    kind = model.config.model_type
    clips = []
    for name, module in attention_modules(model).items():
        cls = type(module)
        if normed := _norms_of_heads(module):
            raise ConfigError(
                f"optimizer.qk_clip: model_type {kind!r} normalises queries or keys after their "
                f"projections ({name}.{normed}), so that scaling these changes no logit; accepted: null"
            )
        if not cls.__module__.startswith("transformers.") or cls.__name__ not in CLIPS:
            raise ConfigError(
                f"optimizer.qk_clip: {cls.__name__} of model_type {kind!r} is not understood; "
                f"accepted: null, or attention of {', '.join(CLIPS)}"
            )
        clips.append(CLIPS[cls.__name__](module))
    return clips


def _norms_of_heads(module: nn.Module) -> str:
    """Return what an attention module calls a norm of its queries or keys, empty if it has none."""
    names = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
    return next((name for name in names if getattr(module, name, None) is not None), "")
