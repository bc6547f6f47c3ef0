"""The attention heads in the weights of an attention module: how many, how large, and where.

A projection to queries, keys or values computes each head from rows of its own, and the projection
of attention's output reads each head with columns of its own. With `heads="auto"` the block of each
head is a logical matrix: Kimi K3's Per-Head Muon orthogonalizes q, k and v by head (Kimi Team,
arXiv 2607.24653, section 2.5), GLM-5's Muon Split the up-projections of multi-head latent attention
(GLM-5 Team, arXiv 2602.15763).

The size of a head is an attribute of the attention module (`head_dim`, `v_head_dim`, ...), or
follows from the number of heads that the module or its `config` has. What a weight projects to is
its name in this module: no base class tells queries from keys. A weight whose rows do not fit the
sizes is not divided, and the reason is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import MatrixSpec, batch_shape
from muonscale.optim.parameters.module_source import WRAPPED
from muonscale.optim.parameters.module_survey import ParamSite, survey

QUERY = frozenset(
    [
        *("q_proj", "q_b_proj", "q_up_proj", "q_proj_weight", "query", "query_proj", "q", "q_lin"),
        *("q_attn", "q_head", "q_linear", "linear_q", "to_q", "to_query", "project_q", "wq", "Wq"),
        *("wq_b", "query_global", "projection_query", "w2e_query", "e2w_query", "e2e_query"),
    ]
)
"""Names of projections to queries; `..._b` and `wq_b` come from a latent vector."""
KEY = frozenset(
    [
        *("k_proj", "k_proj_weight", "key", "key_proj", "k", "k_lin", "k_head", "k_linear"),
        *("linear_k", "to_k", "to_key", "project_k", "wk", "Wk", "key_global", "k_b_proj"),
        "projection_key",
    ]
)
VALUE = frozenset(
    [
        *("v_proj", "v_proj_weight", "value", "value_proj", "v", "v_lin", "v_head", "v_linear"),
        *("linear_v", "to_v", "to_value", "project_v", "wv", "Wv", "value_global", "v_b_proj"),
        "projection_value",
    ]
)
KEY_VALUE = frozenset(["kv_proj", "to_kv", "wkv", "linear_kv"])
KEY_VALUE_UP = frozenset(["kv_b_proj", "wkv_b", "kv_up_proj"])
"""Projections from the latent vector of multi-head latent attention to keys and values, by head."""
FUSED = frozenset(
    [
        *("qkv", "qkv_proj", "qkv_linear", "to_qkv", "Wqkv", "wqkv", "query_key_value", "c_attn"),
        *("att_proj", "in_proj_weight", "in_proj_qkv", "in_proj_qkvz"),
    ]
)
"""Projections to queries, keys and values at once."""
QUERY_GATE = frozenset(["q_gate_proj"])
"""Projections to queries and gates of the output, by head."""
OUTPUT = frozenset(
    [
        *("o_proj", "o", "out_proj", "out_lin", "output", "output_proj", "to_out", "linear_out"),
        *("linear_o", "dense", "c_proj", "proj", "projection", "projection_layer", "post_proj"),
        *("attention_out", "out", "wo", "Wo"),
    ]
)

_SIZES = (
    *("qk_head_dim", "head_k_dim", "head_dim", "attention_head_size", "head_size"),
    *("key_value_proj_dim", "d_head", "dim_head", "dim_per_head"),
)
"""Attributes that are the size of a head of queries and keys; the first that is there counts."""
_VALUE_SIZES = ("v_head_dim", "head_v_dim", "values_head_dim")
"""Attributes that are the size of a head of values, where it is not that of the keys."""
_NUMBERS = (
    *("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "nhead", "heads"),
)
"""Attributes that are the number of heads of queries."""

NOT_DIVIDED = "heads not found"
"""In the reason of a projection of attention that stays whole though its heads were asked for."""


class HeadsNotFound(LayoutError):
    """The heads of a projection are not known; the message says why."""


@dataclass(frozen=True)
class _HeadSizes:
    """The heads of one attention module."""

    number: int | None
    """Number of heads of queries, where the module or its config says it."""
    query: int | None
    """Rows of a head of queries or keys."""
    value: int | None
    nope: int | None
    """Rows of a head of keys that come from the latent vector of multi-head latent attention."""


@dataclass(frozen=True)
class AttentionProjection:
    """A weight that is divided into heads, and the attention module that it is part of."""

    name: str
    """What the weight is called in the module."""
    attention: nn.Module

    def by_head(self, shape: tuple[int, ...], matrices: MatrixSpec) -> MatrixSpec:
        """Return `matrices` with a matrix for each head.

        Args:
            shape: stored shape of the weight.
            matrices: how its matrices are stored; what has heads already is returned unchanged.

        Raises:
            HeadsNotFound: if the module does not say how large its heads are or how many there are,
                the weight does not fit them, or it is a fused projection whose parts are not known.
        """
        if matrices.heads != 1:
            return matrices
        sizes = _head_sizes(self.attention)
        if sizes.query is None and sizes.number is None:
            raise HeadsNotFound(
                f"{type(self.attention).__name__} has no attribute with the size of a head, such as "
                "head_dim, and none with the number of heads, such as num_heads"
            )
        if self.name in KEY_VALUE_UP:
            return self._latent(shape, matrices, sizes)
        if self.name in OUTPUT:
            return self._output(shape, matrices, sizes)
        return self._rows(shape, matrices, sizes)

    def _rows(self, shape: tuple[int, ...], matrices: MatrixSpec, sizes: _HeadSizes) -> MatrixSpec:
        """Divide the rows of each split by the size of its heads."""
        _, out, _ = batch_shape(shape, matrices)
        splits = matrices.splits or (out,)
        kinds = self._kinds(len(splits), out, sizes)
        heads = []
        for rows, kind in zip(splits, kinds, strict=True):
            size = sizes.value if kind == "v" else sizes.query
            if self.name == "k_b_proj":
                size = sizes.nope or size
            if size is None:
                size = self._size_by_number(
                    kind, rows, dict(zip(kinds, splits, strict=True)), sizes
                )
            if rows % size or rows // matrices.groups % size:
                raise HeadsNotFound(f"{rows} rows are no multiple of a head's {size}")
            count = rows // size
            if kind == "q" and sizes.number is not None and count != sizes.number:
                raise HeadsNotFound(
                    f"{rows} rows are {count} heads of {size}, but the module has {sizes.number} heads"
                )
            heads.append(count)
        return replace(matrices, heads=tuple(heads) if matrices.splits else heads[0])

    def _kinds(self, splits: int, out: int, sizes: _HeadSizes) -> str:
        """Return what each split is: queries (q), keys (k) or values (v, with any gate of them)."""
        if self.name in QUERY:
            return "q" * splits
        if self.name in KEY:
            return "k" * splits
        if self.name in VALUE:
            return "v" * splits
        known = {2: "kv", 3: "qkv", 4: "qkvz"} if self.name in FUSED else {2: "kv"}
        known = {2: "qv"} if self.name in QUERY_GATE else known
        if splits in known:
            linear = hasattr(
                self.attention, "head_k_dim"
            )  # a delta net has more values than queries
            kinds = known[splits].replace("z", "v")
            return kinds.replace("q", "k") if linear else kinds
        if self.name in KEY_VALUE and out == sizes.query:
            return "k"  # one head, which is key and value
        raise HeadsNotFound(
            f"how its {out} rows hold several projections is not known: give them with `matrices`, as in "
            '{"splits": [...], "heads": "auto"}'
        )

    def _size_by_number(self, kind: str, rows: int, own: dict[str, int], sizes: _HeadSizes) -> int:
        """Return the size of a head where the module says only the number of heads.

        There are as many heads of values as of keys, and these have the size of the queries.
        """
        assert sizes.number is not None
        size = self._share(own.get("q") or self._width(QUERY), sizes.number, "queries")
        if kind != "v":
            return size
        keys = self._share(own.get("k") or self._width(KEY), size, "keys")
        return self._share(rows, keys, "values")

    def _width(self, names: frozenset[str]) -> int:
        """Return the outputs of the projection beside this one that has one of `names`, or 0."""
        held = (getattr(self.attention, name, None) for name in sorted(names))
        found = [size for module in held if (size := _first(module, ("out_features", "nf")))]
        return found[0] if len(found) == 1 else 0

    def _share(self, width: int, number: int, what: str) -> int:
        if width == 0 or width % number:
            raise HeadsNotFound(
                f"{type(self.attention).__name__} does not say the size of a head, and {number} does not "
                f"divide the {width or 'unknown'} rows of {what}: give it head_dim"
            )
        return width // number

    def _output(
        self, shape: tuple[int, ...], matrices: MatrixSpec, sizes: _HeadSizes
    ) -> MatrixSpec:
        _, _, columns = batch_shape(shape, matrices)
        number = sizes.number
        if number is None:
            assert sizes.value is not None
            number = columns // sizes.value
        if sizes.value is not None and columns != number * sizes.value:
            raise HeadsNotFound(f"{columns} columns are not {number} heads of {sizes.value}")
        if number == 0 or columns % number:
            raise HeadsNotFound(f"{number} heads do not divide {columns} columns")
        return replace(matrices, heads=number, by_columns=number > 1)

    def _latent(
        self, shape: tuple[int, ...], matrices: MatrixSpec, sizes: _HeadSizes
    ) -> MatrixSpec:
        """Return the keys and the values of each head, which alternate by head, as matrices."""
        _, rows, _ = batch_shape(shape, matrices)
        if sizes.nope is None or sizes.value is None:
            raise HeadsNotFound(
                f"{type(self.attention).__name__} does not say how many rows of a head are keys "
                "(qk_nope_head_dim) and how many are values (v_head_dim)"
            )
        size = sizes.nope + sizes.value
        number = rows // size
        if rows % size or sizes.number not in (None, number):
            raise HeadsNotFound(
                f"{rows} rows are not heads of {sizes.nope} rows of keys and {sizes.value} of values"
            )
        splits = number * sizes.nope, number * sizes.value
        if matrices.splits not in ((), splits) or matrices.groups not in (1, number):
            raise HeadsNotFound(
                f"its matrices were given as {matrices}, and do not fit {number} heads"
            )
        return replace(matrices, splits=splits, groups=number, heads=number)


def attention_projections(model: nn.Module) -> dict[Tensor, AttentionProjection]:
    """Return the weights of `model` that hold attention heads.

    A module is attention if it has projections to queries and to values, or a fused one. The module
    beside it that has only its output projection, as in BERT, belongs to it. Projections to a
    latent vector, gates and biases have no heads here. Indexers of sparse attention stay whole, as
    in GLM-5 (deepspeedai/DeepSpeed, pull request 8436).
    """
    found = {}
    for parameter, owners in survey(model).owners.items():
        if parameter.ndim > 1 and (projection := _projection(owners[0])) is not None:
            found[parameter] = projection
    return found


def _projection(site: ParamSite) -> AttentionProjection | None:
    around = [m for m in site.ancestors if not WRAPPED & m._modules.keys()]
    *path, attribute = site.name.split(".")
    if attribute != "weight":
        path, around = [*path, attribute], [site.module, *around]
    if len(path) > 1 and len(around) > 1 and not _is_attention(around[0]):
        holds_it_alone = sum(isinstance(child, nn.Linear) for child in around[0].children()) == 1
        if holds_it_alone and path[-2] in _HEADED:  # `to_out.0`, or a linear with something around
            path, around = path[:-1], around[1:]
        elif not holds_it_alone:
            around = around[:1]
    if not path or path[-1] not in _HEADED or not around:
        return None
    if _is_attention(around[0]):
        return AttentionProjection(path[-1], around[0])
    for module in around[:2] if path[-1] in OUTPUT else ():
        beside = [child for child in module.children() if _is_attention(child)]
        if type(module).__name__.endswith("Attention") and len(beside) == 1:
            return AttentionProjection(path[-1], beside[0])
    return None


_HEADED = QUERY | KEY | VALUE | KEY_VALUE | KEY_VALUE_UP | FUSED | QUERY_GATE | OUTPUT


def _is_attention(module: nn.Module) -> bool:
    if any("Indexer" in cls.__name__ for cls in type(module).__mro__):
        return False
    names = {*module._modules, *module._parameters}
    # Layers that share the keys and values of another one have queries and an output alone.
    beside_queries = VALUE | KEY_VALUE | {"o_proj", "out_proj"}
    return bool((names & QUERY and names & beside_queries) or names & (FUSED | KEY_VALUE_UP))


def _head_sizes(attention: nn.Module) -> _HeadSizes:
    query = _first(attention, _SIZES)
    nope, rope = _first(attention, ("qk_nope_head_dim",)), _first(attention, ("qk_rope_head_dim",))
    if nope is not None and rope is not None:
        query = _first(attention, ("qk_head_dim",)) or nope + rope
    number = _first(attention, _NUMBERS)
    if query is None and number is None:
        number = _first(getattr(attention, "config", None), _NUMBERS)
    return _HeadSizes(
        number=number, query=query, value=_first(attention, _VALUE_SIZES) or query, nope=nope
    )


def _first(holder: Any, names: tuple[str, ...]) -> int | None:
    """Return the first of some attributes that is a number above 0."""
    for name in names:
        try:
            value = getattr(holder, name, None)
        except Exception:  # a config may refuse what differs between layers, with any error
            continue
        if type(value) is int and value > 0:
            return value
    return None
