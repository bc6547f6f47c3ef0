"""The same architecture at another width: which fields of a Hugging Face configuration grow with it.

A *factor* is the new width over the old one. Depth, vocabulary and the number of experts stay as
they are, so that a model and its wide twin are what `muonscale.transfer` takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError, nearest

GrowT = Literal["heads", "head_dim"]
"""What becomes of attention in a wider model: more heads of the same size, or as many larger ones."""


@dataclass(frozen=True, kw_only=True)
class WidthFields:
    """The fields of one architecture that have to do with its width, as the configuration stores them."""

    width: str = "hidden_size"
    sizes: tuple[str, ...] = ("intermediate_size",)
    """They grow with the width."""
    heads: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")
    """Numbers of heads, the queries' first."""
    head_sizes: tuple[str, ...] = ("head_dim",)
    """Where it is not given, a head has `width / heads`."""
    rotary: tuple[str, ...] = ("head_dim",)
    """Sizes of heads that are turned in pairs, and so have to be even."""
    scores: tuple[str, ...] = ()
    """What scores are divided by the root of: it grows with the size of a head, but need not be whole."""


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
"""By the `model_type` of transformers."""


def width_of(config: PreTrainedConfig) -> int:
    """Return the width of a model: the size of its residual stream.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`.
    """
    return getattr(config, _fields_of(config).width)


def width_step(config: PreTrainedConfig, grow: GrowT = "heads") -> int:
    """Return the smallest width at which every size of the model is whole; the others are multiples.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`.
    """
    return _step(config, _growing(config, grow), width_of(config))


def widened_fields(
    config: PreTrainedConfig, factor: Fraction | float, grow: GrowT = "heads"
) -> dict[str, Any]:
    """Return the fields of the same model `factor` times as wide: all that have to do with its width.

    They are overrides for `model.fields`, and for `transfer.base`.

    Args:
        config: of a model of a known architecture.
        factor: above 0; below 1 for a narrower model.
        grow: "heads" keeps the size of a head and multiplies their number; "head_dim" the reverse.

    Raises:
        ConfigError: for an architecture that is not in `KNOWN`, or a factor at which a field is not
            whole; says which widths are possible.

    Example:
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
            f"{config.model_type} of width {width} cannot have the width {float(factor * width):g} with "
            f"{_HOW[grow]}{is_now}; possible are the multiples of {step}"
        )
    fields: dict[str, Any] = {name: int(factor * value) for name, value in growing.items()}
    if grow == "head_dim":
        for name in _fields_of(config).scores:
            fields[name] = _plain(factor * Fraction(getattr(config, name)))
    return fields


def fields_at(config: PreTrainedConfig, width: int, grow: GrowT = "heads") -> dict[str, Any]:
    """Return `widened_fields` for a width instead of a factor."""
    return widened_fields(config, Fraction(width, width_of(config)), grow)


def widened(config: PreTrainedConfig, width: int, grow: GrowT = "heads") -> PreTrainedConfig:
    """Return the configuration of the same model at another width; errors as `widened_fields`."""
    tree = config.to_dict()
    if grow == "head_dim" and "qk_rope_head_dim" in tree:  # these two follow from others
        tree = {k: v for k, v in tree.items() if k not in ("head_dim", "qk_head_dim")}
    return type(config).from_dict(tree | fields_at(config, width, grow))


_HOW: dict[GrowT, str] = {
    "heads": "more or fewer heads of the same size",
    "head_dim": "larger or smaller heads",
}


def _fields_of(config: PreTrainedConfig) -> WidthFields:
    kind = config.model_type
    if kind not in KNOWN:
        raise ConfigError(
            f"it is not known which fields of model_type {kind!r} grow with its width; accepted: "
            f"{', '.join(sorted(KNOWN))}"
        )
    return KNOWN[kind]


def _growing(config: PreTrainedConfig, grow: GrowT) -> dict[str, int]:
    """Return the fields that are multiplied, with their values."""
    if grow not in get_args(GrowT):
        raise ConfigError(f"grow is {grow!r}: {nearest(grow, get_args(GrowT))}")
    known = _fields_of(config)
    names = known.heads if grow == "heads" else known.head_sizes
    found = {name: getattr(config, name, None) for name in (known.width, *known.sizes, *names)}
    return {name: value for name, value in found.items() if value is not None}


def _step(config: PreTrainedConfig, growing: dict[str, int], width: int) -> int:
    """Return the smallest possible width.

    A factor f is possible if f*v is whole for every v, and even for those that come in pairs: if
    f is a multiple of 2/g, g being the greatest common divisor of all 2*v, and v of the even ones.
    """
    known = _fields_of(config)
    terms = [value if name in known.rotary else 2 * value for name, value in growing.items()]
    if not growing.keys() & {*known.heads, *known.head_sizes}:  # a head is width / heads
        size = width // getattr(config, known.heads[0])
        terms.append(size if "head_dim" in known.rotary else 2 * size)
    return width * 2 // math.gcd(*terms)


def _plain(value: Fraction) -> float | int:
    return int(value) if value.denominator == 1 else float(value)
