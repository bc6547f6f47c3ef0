"""What two configurations of one architecture may differ in."""

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
"""Fields that say how wide a model is."""
DEPTH = frozenset(
    ["num_hidden_layers", "n_layer", "layer_types", "first_k_dense_replace", "max_window_layers"]
)
"""Fields that say how deep it is."""
_UNSAID = frozenset(
    ["_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"]
)


def check_fields(model: nn.Module, base: nn.Module) -> None:
    """Raise ConfigError if the configurations differ in more than width and depth."""
    fields, others = _fields(model), _fields(base)
    for name in sorted((fields.keys() | others.keys()) - WIDTH - DEPTH - _UNSAID):
        if fields.get(name) != others.get(name):
            raise ConfigError(
                f"{name} is {fields.get(name)!r}, and {others.get(name)!r} at the base width: transfer needs "
                "models that differ in width and depth alone, in the fields "
                f"{', '.join(sorted(WIDTH | DEPTH))}"
            )


def depth_ratio(model: nn.Module, base: nn.Module) -> float:
    """Return how many times the layers of `base` the model has.

    Raises:
        ConfigError: if the models do not say how many they have.
    """
    layers, others = (getattr(_config(m), "num_hidden_layers", None) for m in (model, base))
    if not isinstance(layers, int) or not isinstance(others, int):
        raise ConfigError(
            f"depth=complete_p needs the number of layers as model.config.num_hidden_layers, which is {layers!r}, and "
            f"{others!r} at the base width; give both, or leave depth out"
        )
    return layers / others


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a transformers configuration, none of any other model's."""
    config = _config(model)
    return config.to_dict() if hasattr(config, "to_dict") else {}
