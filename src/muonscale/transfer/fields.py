"""The fields in which a model and its base may differ."""

from __future__ import annotations

from typing import Any

from torch import nn

from muonscale.errors import ConfigError

WIDTH = frozenset(
    [
        *("hidden_size", "n_embd", "intermediate_size", "n_inner", "moe_intermediate_size"),
        *("num_attention_heads", "n_head", "num_key_value_heads"),
        *("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("query_pre_attn_scalar", "kv_lora_rank", "q_lora_rank"),
    ]
)
"""Fields of the width of a model."""
DEPTH = frozenset(
    ["num_hidden_layers", "n_layer", "layer_types", "first_k_dense_replace", "max_window_layers"]
)
"""Fields of the depth of a model."""
_IGNORED = frozenset(
    ["_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"]
)


def check_fields(model: nn.Module, base: nn.Module) -> None:
    """Raise ConfigError if the configurations differ in more than width and depth."""
    fields, others = _fields(model), _fields(base)
    for name in sorted((fields.keys() | others.keys()) - WIDTH - DEPTH - _IGNORED):
        if fields.get(name) != others.get(name):
            raise ConfigError(
                f"{name} is {fields.get(name)!r}, but {others.get(name)!r} at the base width: the "
                "models may differ only in width and depth, in the fields "
                f"{', '.join(sorted(WIDTH | DEPTH))}"
            )


def depth_ratio(model: nn.Module, base: nn.Module) -> float:
    """Return the number of layers of a model divided by that of `base`.

    Raises:
        ConfigError: if a model has no `config.num_hidden_layers`.
    """
    configs = (getattr(m, "config", None) for m in (model, base))
    layers, others = (getattr(config, "num_hidden_layers", None) for config in configs)
    if not isinstance(layers, int) or not isinstance(others, int):
        raise ConfigError(
            f"depth=complete_p needs model.config.num_hidden_layers, which is {layers!r}, and "
            f"{others!r} at the base width. Set both, or leave depth out"
        )
    return layers / others


def _fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a transformers configuration; none for other models."""
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}
