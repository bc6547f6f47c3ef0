"""How modules that are known store several matrices in one parameter.

Torch's own modules and transformers' expert stacks say it themselves. Fused projections of
transformers' models do not: there the class and the attribute decide, for classes of transformers
alone. What is not in the table counts as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.module_survey import ParamSite, is_conv1d

Known = Callable[[nn.Module, int], MatrixSpec]
"""From the module around a projection, and the projection's rows, to how they are stored."""

GATES: list[tuple[tuple[type[nn.Module], ...], int]] = [
    ((nn.LSTM, nn.LSTMCell), 4),
    ((nn.GRU, nn.GRUCell), 3),
]
"""Matrices stacked in a weight of torch's recurrent modules."""


def stored_matrices(parameter: Tensor, owner: ParamSite) -> tuple[MatrixSpec, str]:
    """Return how a hidden parameter's matrices are stored, and a few words about it."""
    module = owner.module
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
    if owner.ancestors and (known := _known(owner.ancestors[0], owner.place)):
        layout = known(owner.ancestors[0], parameter.shape[0])
        return layout, f" of {len(layout.splits)} matrices" if layout.splits else ""
    return PLAIN, " stack" if parameter.ndim > 2 else ""


def holds_blocks(module: nn.Module) -> bool:
    """Return whether the parameters of `module` hold DBRX's experts, one block of rows each."""
    return "DbrxExpertGLU" in _transformers_classes(module)


def holds_experts(module: nn.Module) -> bool:
    """Return whether `module` has the flags of transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


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


def _known(parent: nn.Module, place: str) -> Known | None:
    names = _transformers_classes(parent)
    return next((FUSED[name, place] for name in names if (name, place) in FUSED), None)


def _transformers_classes(module: nn.Module) -> list[str]:
    """Return the names of the classes that a module has of transformers, its own first."""
    homes = ("transformers", "transformers_modules")
    return [c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] in homes]


def _halves(parent: nn.Module, rows: int) -> MatrixSpec:
    return MatrixSpec(splits=(rows // 2,) * 2)


def _thirds(parent: nn.Module, rows: int) -> MatrixSpec:
    return MatrixSpec(splits=(rows // 3,) * 3)


def _query_key_value(parent: nn.Module, rows: int) -> MatrixSpec:
    """All queries, then all keys, then all values; there may be fewer of these."""
    back = getattr(parent, "o_proj", None) or parent.get_submodule("out_proj")
    queries = int(back.in_features)  # pyrefly: ignore
    others = (rows - queries) // 2
    return MatrixSpec(splits=(queries, others, others))


def _every_head(parent: nn.Module, rows: int) -> MatrixSpec:
    """Query, key and value of the first head, then of the second, ..."""
    size = getattr(parent, "head_dim", None) or parent.head_size
    return MatrixSpec(splits=(rows // 3,) * 3, groups=rows // (3 * int(size)))  # pyrefly: ignore


def _falcon(parent: nn.Module, rows: int) -> MatrixSpec:
    if not parent.new_decoder_architecture and not parent.multi_query:
        return _every_head(parent, rows)
    # Queries that share a key and a value stand before these; one such group for multi-query.
    groups, size = int(parent.num_kv_heads), int(parent.head_dim)  # pyrefly: ignore
    others = groups * size
    return MatrixSpec(splits=(rows - 2 * others, others, others), groups=groups)


def _big_code(parent: nn.Module, rows: int) -> MatrixSpec:
    if not parent.multi_query:
        return _every_head(parent, rows)
    queries, others = int(parent.embed_dim), int(parent.kv_dim)  # pyrefly: ignore
    return MatrixSpec(splits=(queries, others, others))


def _codegen(parent: nn.Module, rows: int) -> MatrixSpec:
    """Four parts, each with its queries, values and keys: it was trained on four TPU cores."""
    return MatrixSpec(splits=(rows // 3,) * 3, groups=4)


def _delta_net(parent: nn.Module, rows: int) -> MatrixSpec:
    keys, values = int(parent.key_dim), int(parent.value_dim)  # pyrefly: ignore
    return MatrixSpec(splits=(keys, keys, values))


def _delta_net_gated(parent: nn.Module, rows: int) -> MatrixSpec:
    keys, values = int(parent.key_dim), int(parent.value_dim)  # pyrefly: ignore
    heads = int(parent.num_k_heads)  # pyrefly: ignore
    return MatrixSpec(splits=(keys, keys, values, values), groups=heads)


def _delta_net_rates(parent: nn.Module, rows: int) -> MatrixSpec:
    heads = int(parent.num_k_heads)  # pyrefly: ignore
    return MatrixSpec(splits=(rows // 2,) * 2, groups=heads)


FUSED: dict[tuple[str, str], Known] = {
    ("Phi3Attention", "qkv_proj"): _query_key_value,
    ("Phi4MultimodalAttention", "qkv_proj"): _query_key_value,
    ("DbrxAttention", "Wqkv"): _query_key_value,
    ("MptAttention", "Wqkv"): _thirds,
    ("ModernBertAttention", "Wqkv"): _thirds,
    ("GPTNeoXAttention", "query_key_value"): _every_head,
    ("GPTNeoXJapaneseAttention", "query_key_value"): _every_head,
    ("BloomAttention", "query_key_value"): _every_head,
    ("PersimmonAttention", "query_key_value"): _every_head,
    ("MiniMaxLightningAttention", "qkv_proj"): _every_head,
    ("FalconAttention", "query_key_value"): _falcon,
    ("GPTBigCodeAttention", "c_attn"): _big_code,
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): _delta_net_gated,
    ("Qwen3NextGatedDeltaNet", "in_proj_ba"): _delta_net_rates,
    ("Qwen3_5GatedDeltaNet", "in_proj_qkv"): _delta_net,
    ("Qwen3_5MoeGatedDeltaNet", "in_proj_qkv"): _delta_net,
    ("Phi3MLP", "gate_up_proj"): _halves,
    ("Phi4MultimodalMLP", "gate_up_proj"): _halves,
    ("GlmMLP", "gate_up_proj"): _halves,
    ("Glm4MLP", "gate_up_proj"): _halves,
    ("MiniMaxM3VLDenseMLP", "gate_up_proj"): _halves,
    ("GraniteMoeHybridMLP", "input_linear"): _halves,
    ("GraniteMoeSharedMLP", "input_linear"): _halves,
    ("GraniteMoeSWAMLP", "input_linear"): _halves,
    ("ModernBertMLP", "Wi"): _halves,
    ("ModernBertDecoderMLP", "Wi"): _halves,
}
"""By the class around the projection and what the projection is called there."""
