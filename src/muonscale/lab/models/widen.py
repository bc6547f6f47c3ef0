"""Change the width of a Hugging Face configuration.

A *factor* is the new width over the old one. Depth, vocabulary and the number of experts do not
change, as `muonscale.transfer` requires.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError, nearest

GrowT = Literal["heads", "head_dim"]
"""How attention grows in a wider model: by the number of heads or by their size."""


@dataclass(frozen=True, kw_only=True)
class WidthFields:
    """The fields of an architecture that depend on its width, by their stored names."""

    width: str = "hidden_size"
    sizes: tuple[str, ...] = ("intermediate_size",)
    """Sizes that are proportional to the width."""
    heads: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")
    """Numbers of heads, the queries' first."""
    head_sizes: tuple[str, ...] = ("head_dim",)
    """Sizes of heads; if there is none, a head has `width / heads`."""
    rotary: tuple[str, ...] = ("head_dim",)
    """Sizes with rotary positions, which must be even."""
    scores: tuple[str, ...] = ()
    """Squared divisor of the scores: proportional to the size of a head, and not always an
    integer."""


_LLAMA = WidthFields()
_GEMMA2 = WidthFields(scores=("query_pre_attn_scalar",))

KNOWN: dict[str, WidthFields] = {
    "deepseek_v3": WidthFields(
        sizes=("intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"),
        head_sizes=("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        rotary=("qk_rope_head_dim",),
    ),
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": WidthFields(
        width="n_embd", sizes=("n_inner",), heads=("n_head",), head_sizes=(), rotary=()
    ),
    "gpt_neox": WidthFields(heads=("num_attention_heads",), head_sizes=()),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": WidthFields(sizes=("intermediate_size", "moe_intermediate_size")),
}
"""Fields by the `model_type` of transformers. muP transfer also needs a row in
`muonscale.transfer.constants.KNOWN`."""


def width_of(config: PreTrainedConfig) -> int:
    """Return the width of a model, the size of its residual stream.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`.
    """
    return getattr(config, _fields_of(config).width)


def width_step(config: PreTrainedConfig, grow: GrowT = "heads") -> int:
    """Return the smallest possible width of a model. All other possible widths are multiples of it.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`.
    """
    return _step(config, _growing(config, grow), width_of(config))


def widened_fields(
    config: PreTrainedConfig, factor: Fraction | float, grow: GrowT = "heads"
) -> dict[str, Any]:
    """Return the fields that depend on the width, for a model `factor` times as wide.

    They are overrides for `model.fields` and for `transfer.base`.

    Args:
        config: configuration of a model of a known architecture.
        factor: new width over old width, above 0.
        grow: "heads" multiplies the number of heads, "head_dim" their size.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`, or a factor at which a field is not
            an integer; it lists the possible widths.

    Examples:
        >>> from transformers import LlamaConfig
        >>> narrow = LlamaConfig(hidden_size=64, num_attention_heads=2, intermediate_size=160)
        >>> widened_fields(narrow, 2)["intermediate_size"], widened_fields(narrow, 2)["hidden_size"]
        (320, 128)
    """
    factor = Fraction(factor).limit_denominator(10**6)
    growing, width = _growing(config, grow), width_of(config)
    step = _step(config, growing, width)
    if factor <= 0 or (factor * width) % step:
        bad = next((name for name, v in growing.items() if (factor * v).denominator > 1), None)
        is_now = f": {bad} would be {float(factor * growing[bad]):g}" if bad else ""
        raise ConfigError(
            f"{config.model_type} of width {width} cannot have the width {float(factor * width):g} "
            f"with {_HOW[grow]}{is_now}; accepted: multiples of {step}"
        )
    fields: dict[str, Any] = {name: int(factor * value) for name, value in growing.items()}
    if grow == "head_dim":
        for name in _fields_of(config).scores:
            value = factor * Fraction(getattr(config, name))
            fields[name] = int(value) if value.denominator == 1 else float(value)
    return fields


def fields_at(config: PreTrainedConfig, width: int, grow: GrowT = "heads") -> dict[str, Any]:
    """Return `widened_fields` for a width instead of a factor."""
    return widened_fields(config, Fraction(width, width_of(config)), grow)


_HOW: dict[GrowT, str] = {
    "heads": "more or fewer heads of the same size",
    "head_dim": "larger or smaller heads",
}


def _fields_of(config: PreTrainedConfig) -> WidthFields:
    kind = config.model_type
    if kind not in KNOWN:
        raise ConfigError(
            f"the fields of model_type {kind!r} that depend on its width are not known; accepted: "
            f"{', '.join(sorted(KNOWN))}"
        )
    return KNOWN[kind]


def _growing(config: PreTrainedConfig, grow: GrowT) -> dict[str, int]:
    """Return the fields that are multiplied, with their values."""
    if grow not in get_args(GrowT):
        raise ConfigError(f"grow is {grow!r}: {nearest(grow, get_args(GrowT))}")
    known = _fields_of(config)
    names = known.heads if grow == "heads" else known.head_sizes
    values = {name: getattr(config, name, None) for name in (known.width, *known.sizes, *names)}
    return {name: value for name, value in values.items() if value is not None}


def _step(config: PreTrainedConfig, growing: dict[str, int], width: int) -> int:
    """Return the smallest possible width.

    A factor f is possible if f*v is an integer for every field v, and even for rotary sizes. This
    is so if f is a multiple of 2/g, where g is the greatest common divisor of 2*v over the plain
    fields and v over the rotary ones.
    """
    known = _fields_of(config)
    terms = [value if name in known.rotary else 2 * value for name, value in growing.items()]
    if not growing.keys() & {*known.heads, *known.head_sizes}:  # a head is width / heads
        size = width // getattr(config, known.heads[0])
        terms.append(size if "head_dim" in known.rotary else 2 * size)
    return width * 2 // math.gcd(*terms)
