"""Which matrices a hidden parameter holds, fused weights included.

Torch's own modules and transformers' expert stacks say it themselves. Fused projections of
transformers' models do not: there the class and the attribute decide
(`muonscale.optim.parameters.fused_table`), for classes of transformers alone. What is not known
counts as one matrix, and `looks_fused` says when that is doubtful.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.fused_table import BARE_MATRICES, FUSED, ONE, Known
from muonscale.optim.parameters.module_source import WRAPPED, names_in_transformers
from muonscale.optim.parameters.module_survey import ParamSite, is_conv1d, is_linear

GATES: list[tuple[tuple[type[nn.Module], ...], int]] = [
    ((nn.LSTM, nn.LSTMCell), 4),
    ((nn.GRU, nn.GRUCell), 3),
]
"""Matrices stacked in a weight of torch's recurrent modules."""

FUSED_NAME_HINTS = (
    "qkv", "kqv", "qkvz", "qkvo", "wqkv", "query_key_value", "queries_keys_values", "keys_values",
    "qk", "kv", "wkv", "c_attn", "in_proj", "w_pack", "packed", "fused", "gate_up", "gate_and_up",
    "up_gate", "gateup", "Wi", "w12", "w13", "w1w3", "w1_w3", "adaln", "ada_ln", "modulation",
    "zxbcdt", "xbc",
)  # fmt: skip
"""Names that usually stand for several matrices: whole words of a module's name.

Case does not matter but for `Wi`, which is gate and up in ModernBERT: T5's `wi` is one matrix.
"""
_LATENT = ("kv_a", "kv_b", "wkv_a", "wkv_b", "kv_down", "kv_up")
"""Words of the latent projections of multi-head latent attention; each counts as one matrix."""

_EXPERTS_WITHOUT_FLAGS = ("Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts")


def stored_matrices(parameter: Tensor, owner: ParamSite) -> tuple[MatrixSpec, str]:
    """Return how a hidden parameter's matrices are stored, and a few words about it."""
    module = owner.module
    if found := _known(owner):
        known, around = found
        words = "" if known.holds == ONE.holds else f" of {known.holds}"
        return known.spec(around, parameter.shape), words
    if is_conv1d(module):
        return _conv1d(parameter, owner)
    if holds_experts(module) and parameter.ndim == 3:
        return _experts(parameter, owner), " stack"
    if holds_blocks(module):
        return _blocks(owner), " of experts"
    if isinstance(module, nn.MultiheadAttention) and owner.attribute == "in_proj_weight":
        return MatrixSpec(splits=(module.embed_dim,) * 3), " of q, k, v"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(parameter, owner)
    return PLAIN, " stack" if parameter.ndim > 2 else ""


def looks_fused(parameter: Tensor, owner: ParamSite) -> str:
    """Return why a linear layer's weight may hold several matrices, or "" if nothing says so.

    A module that states how its weight is stored, or that is in the table, is no guess. For others
    two signs count:

    - the name of the layer, or of the module around a layer that has only a number, as in
      `adaLN_modulation.1`: it has one of the words `FUSED_NAME_HINTS`;
    - outside transformers, 3 or 6 times as many rows as columns, as q, k and v or the six parts of
      an adaptive norm have. An MLP has such a shape too, and its widths are 2 to 4 times the
      model's; but then a layer beside it takes as many inputs as it has outputs, and the sign does
      not count. Twice as many rows are no sign, since plain MLPs have them, and neither is the
      shape of LoRA's factors, whose rows and columns have nothing to do with each other.
    """
    module, parts = owner.module, owner.path
    if (
        not is_linear(module)
        or owner.attribute != "weight"
        or parameter.ndim != 2
        or _states(owner)
    ):
        return ""
    name = next((part for part in reversed(parts) if not part.isdecimal()), "")
    if word := fused_name_hint(name):
        return f"its name contains {word}, so it may hold several"
    rows, columns = parameter.shape if not is_conv1d(module) else reversed(parameter.shape)
    around = owner.ancestors[0] if owner.ancestors else module
    outside = not any(type(a).__module__.startswith("transformers.") for a in owner.ancestors[:2])
    if not outside or rows not in (3 * columns, 6 * columns) or "lora" in owner.name.lower():
        return ""
    if any(
        isinstance(other, nn.Linear) and other.in_features == rows for other in around.children()
    ):
        return ""
    return f"its {rows} rows are {rows // columns} times its columns, so it may hold several"


def fused_name_hint(name: str) -> str:
    """Return the first of the words `FUSED_NAME_HINTS` in the name of a layer, or ""."""
    spellings = f"_{name}_", f"_{name.lower()}_"
    if any(f"_{word}_" in spellings[1] for word in _LATENT):
        return ""
    return next((word for word in FUSED_NAME_HINTS if any(f"_{word}_" in s for s in spellings)), "")


def is_known_bare(owner: ParamSite) -> bool:
    """Return whether it is known which matrices a parameter holds that no linear layer owns."""
    names = names_in_transformers(type(owner.module))
    return any((name, owner.attribute) in BARE_MATRICES for name in names)


def holds_blocks(module: nn.Module) -> bool:
    """Return whether the parameters of `module` hold DBRX's experts, one block of rows each."""
    return "DbrxExpertGLU" in names_in_transformers(type(module))


def holds_experts(module: nn.Module) -> bool:
    """Return whether `module` is a stack of experts.

    It has the flags of transformers' experts interface, or its class is known.
    """
    if hasattr(module, "is_transposed") and hasattr(module, "is_concatenated"):
        return True
    return any(name in _EXPERTS_WITHOUT_FLAGS for name in names_in_transformers(type(module)))


def _states(owner: ParamSite) -> bool:
    """Return whether the table or the module itself says how a linear layer's weight is stored."""
    if is_conv1d(owner.module) and owner.ancestors and hasattr(owner.ancestors[0], "split_size"):
        return True
    return _known(owner) is not None


def _conv1d(parameter: Tensor, owner: ParamSite) -> tuple[MatrixSpec, str]:
    """GPT-2's attention says how its output is cut: `split_size`."""
    block = getattr(owner.ancestors[0], "split_size", None) if owner.ancestors else None
    out = parameter.shape[1]
    if isinstance(block, int) and 0 < block < out and out % block == 0:
        count = out // block
        return MatrixSpec(transposed=True, splits=(block,) * count), f" of {count} matrices"
    return MatrixSpec(transposed=True), ""


def _experts(parameter: Tensor, owner: ParamSite) -> MatrixSpec:
    """Read the flags of transformers' experts interface: transposed, gate and up, interleaved."""
    transposed = bool(getattr(owner.module, "is_transposed", False))
    if owner.attribute != "gate_up_proj" or not getattr(owner.module, "has_gate", True):
        return MatrixSpec(transposed=transposed)
    half = parameter.shape[2 if transposed else 1] // 2
    groups = 1 if getattr(owner.module, "is_concatenated", True) else half
    return MatrixSpec(transposed=transposed, splits=(half, half), groups=groups)


def _blocks(owner: ParamSite) -> MatrixSpec:
    """Return one matrix for each expert; the down projection is stored transposed."""
    experts = int(owner.module.moe_num_experts)  # pyrefly: ignore
    if owner.attribute == "w2":
        return MatrixSpec(transposed=True, heads=experts, by_columns=True)
    return MatrixSpec(heads=experts)


def _recurrent(parameter: Tensor, owner: ParamSite) -> tuple[MatrixSpec, str]:
    gates = next((n for kinds, n in GATES if isinstance(owner.module, kinds)), 1)
    if gates == 1 or not owner.attribute.startswith(("weight_ih", "weight_hh")):
        return PLAIN, ""  # weight_hr is the projection of an LSTM's output
    return MatrixSpec(splits=(parameter.shape[0] // gates,) * gates), f" of {gates} gates"


def _known(owner: ParamSite) -> tuple[Known, nn.Module] | None:
    """Return the entry of a parameter in the table, and the module that it is about."""
    for name in names_in_transformers(type(owner.module)):
        if known := BARE_MATRICES.get((name, owner.attribute)):
            return known, owner.module
    if owner.attribute != "weight":
        return None
    for around, place in _places(owner):
        numberless = ".".join("*" if part.isdecimal() else part for part in place.split("."))
        for name in names_in_transformers(type(around)):
            if known := FUSED.get((name, place)) or FUSED.get((name, numberless)):
                return known, around
    return None


def _places(owner: ParamSite) -> Iterator[tuple[nn.Module, str]]:
    """Yield the three modules around a layer, innermost first, with what it is called in them."""
    parts = owner.path
    around = [module for module in owner.ancestors if not WRAPPED & module._modules.keys()]
    for depth, module in enumerate(around[:3], start=1):
        yield module, ".".join(parts[-depth:])
