"""How a module uses a bare `nn.Parameter`, read from its code.

A parameter of a Linear or an Embedding is what its module is. A bare parameter with two axes may be
a matrix, stored as (out, in) or as (in, out), a table of positions or learnt queries, a kernel, or a
gain with one number for each head and channel. Its shape does not tell. The code that uses it does:
`F.linear(x, self.w)`, `x @ self.w`, `F.embedding(index, self.w)`, `x + self.w`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from types import FunctionType
from typing import TypeGuard

from torch import nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.module_source import function_tree, method, methods


class UseKind(StrEnum):
    """What a module does with a bare parameter."""

    MATRIX = "matrix"
    """Activations are multiplied by it as by a matrix."""
    TABLE = "table"
    """Rows are looked up in it, or it is itself a sequence of activations."""
    KERNEL = "kernel"
    """Activations are convolved with it."""
    ELEMENTWISE = "elementwise"
    """It is added or multiplied element by element."""


KNOWN_USES: dict[tuple[str, str], UseKind] = {
    ("MambaMixer", "A_log"): UseKind.ELEMENTWISE,
    ("FalconMambaMixer", "A_log"): UseKind.ELEMENTWISE,
    ("ZambaMambaMixer", "D"): UseKind.ELEMENTWISE,
    ("ZambaMambaMixer", "dt_proj_bias"): UseKind.ELEMENTWISE,
    ("Wav2Vec2ConformerSelfAttention", "pos_bias_u"): UseKind.ELEMENTWISE,
    ("Wav2Vec2ConformerSelfAttention", "pos_bias_v"): UseKind.ELEMENTWISE,
    ("SeamlessM4TConformerSelfAttention", "pos_bias_u"): UseKind.ELEMENTWISE,
    ("SeamlessM4TConformerSelfAttention", "pos_bias_v"): UseKind.ELEMENTWISE,
    ("VitsAttention", "emb_rel_k"): UseKind.TABLE,
    ("VitsAttention", "emb_rel_v"): UseKind.TABLE,
    ("Kimi_K25VisionPositionEmbeddings", "position_embeddings"): UseKind.TABLE,
    ("EdgeTamVideoPerceiverResampler", "latents_1d"): UseKind.TABLE,
    ("Inkling2LoopMessageAttentionResidual", "query"): UseKind.TABLE,
}
"""Uses that the code of transformers' modules does not tell, by class and attribute."""


@dataclass(frozen=True)
class Use:
    """One place in the code at which a parameter is used."""

    kind: UseKind
    code: str
    """The expression, such as `x @ self.w`."""
    matrices: MatrixSpec = PLAIN
    """How its matrix is stored, for `UseKind.MATRIX`."""


def parameter_use(module: nn.Module, attribute: str, ndim: int) -> Use | None:
    """Return how the code of `module` uses its parameter `attribute`, which has `ndim` axes.

    None if the source is not at hand, the parameter is not used in it, its use is not understood
    (it goes through a function of another library, or by way of a view that moves its axes), or
    two uses contradict each other.
    """
    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformers") and (kind.__name__, attribute) in KNOWN_USES:
            return Use(KNOWN_USES[kind.__name__, attribute], f"{attribute} of {kind.__name__}")
    reader = _UseReader(module, attribute, ndim)
    for name, tree in methods(type(module)).items():
        if name not in _SETUP:
            reader.read(tree, {})
    uses = reader.uses
    if not uses or reader.lost:
        return None
    if any(use.kind == UseKind.MATRIX for use in uses):
        agree = len({(use.kind, use.matrices) for use in uses}) == 1
        return uses[0] if agree else None
    order = list(UseKind)
    return min(uses, key=lambda use: order.index(use.kind))


_SETUP = {"__init__", "reset_parameters", "init_weights", "_init_weights", "extra_repr"}
_SAME_AXES = frozenset(
    [
        "to",
        "type",
        "float",
        "half",
        "bfloat16",
        "double",
        "type_as",
        "contiguous",
        "clone",
        "detach",
        "cuda",
        "cpu",
        "to_local",
        "full_tensor",
        "normalize",
    ]
)
_OTHER_AXES = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "unsqueeze",
        "squeeze",
        "repeat",
        "flatten",
        "unflatten",
        "expand_as",
        "view_as",
        "repeat_interleave",
        "tile",
        "permute",
        "movedim",
        "broadcast_to",
    ]
)
_WEIGHT_AT: dict[str, dict[int, bool]] = {
    "linear": {1: False},
    **{name: {0: False, 1: True} for name in ("matmul", "mm", "bmm", "_grouped_mm", "grouped_mm")},
    **{name: {1: False, 2: True} for name in ("addmm", "baddbmm", "addbmm")},
}
"""By function: which argument is the matrix, and whether it is stored as (in, out) there."""
_TABLES = {
    "embedding": 1,
    **dict.fromkeys(["index_select", "gather", "take_along_dim", "interpolate", "grid_sample"], 0),
}
_JOINED = frozenset(["cat", "concat", "stack", "hstack", "vstack"])
_ELEMENTWISE = frozenset(
    [
        "exp",
        "log",
        "sigmoid",
        "tanh",
        "softplus",
        "softmax",
        "log_softmax",
        "square",
        "sqrt",
        "rsqrt",
        "abs",
        "relu",
        "silu",
        "gelu",
        "clamp",
        "sin",
        "cos",
        "where",
        "lerp",
        "mul",
        "add",
        "sub",
        "div",
        "addcmul",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "batch_norm",
        "pow",
    ]
)
_LIBRARIES = frozenset(["torch", "F", "functional", "nn", "np"])


@dataclass(frozen=True)
class _Held:
    """An expression that holds the parameter, whole or in part."""

    transposed: bool = False
    """Whether its last two axes were exchanged."""
    moved: bool = False
    """Whether its axes are no longer those of the parameter."""


class _UseReader(ast.NodeVisitor):
    """Collect the uses of one parameter in the methods of its module."""

    def __init__(self, module: nn.Module, attribute: str, ndim: int) -> None:
        self.module, self.attribute, self.ndim = module, attribute, ndim
        self.uses: list[Use] = []
        self.lost = False
        """Whether the parameter went somewhere the reader cannot follow."""
        self._names: dict[str, _Held] = {}
        self._layers: set[str] = set()
        """Local names of layers."""
        self._following = 0

    def read(self, tree: ast.FunctionDef, names: dict[str, _Held]) -> None:
        """Read one function, in which `names` hold the parameter."""
        outer, self._names = self._names, dict(names)
        for statement in tree.body:
            self.visit(statement)
        self._names = outer

    def visit_For(self, node: ast.For) -> None:
        """Note the names of layers: `for block in self.blocks`."""
        lists = [getattr(self.module, n.attr, None) for n in ast.walk(node.iter) if _of_self(n)]
        if any(isinstance(listed, nn.Module) for listed in lists):
            self._layers |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        if node.value is not None and not self._following and self._held(node.value):
            self._use(UseKind.TABLE, node)  # it is what the module gives out as activations

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and (held := self._held(value)):
                    self._names[name.id] = held

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if self._held(node.value):
            self._use(UseKind.ELEMENTWISE, node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        left, right = self._held(node.left), self._held(node.right)
        if isinstance(node.op, ast.MatMult):
            self._matrix(left, False, node)
            self._matrix(right, True, node)
        elif (left or right) and not self._held(node):
            self._use(UseKind.ELEMENTWISE, node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if self._held(node.value) and self.ndim == 2 and _is_lookup(node.slice):
            self._use(UseKind.TABLE, node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if self._held(node):
            return
        name, arguments = _callee(node)
        held: dict[int | str, _Held] = {}
        held |= {i: h for i, a in enumerate(arguments) if (h := self._held(a))}
        held |= {k.arg: h for k in node.keywords if k.arg and (h := self._held(k.value))}
        if name in _JOINED:
            listed = [a for a in arguments if isinstance(a, (ast.List, ast.Tuple))]
            if held or any(self._held(item) for items in listed for item in items.elts):
                self._use(UseKind.TABLE, node)
        elif name == "einsum":
            self._einsum(node, arguments)
        elif held:
            self._call(name, held, node)

    def _call(self, name: str, held: dict[int | str, _Held], node: ast.Call) -> None:
        if "weight" in held:
            held[1] = held.pop("weight")
        if name in _WEIGHT_AT:
            for place, stored in _WEIGHT_AT[name].items():
                self._matrix(held.get(place), stored, node)
            if name == "linear" and 0 in held:
                self._use(UseKind.TABLE, node)
            elif name.startswith(("add", "badd")) and 0 in held:
                self._use(UseKind.ELEMENTWISE, node)
        elif name in _TABLES:
            if _TABLES[name] in held:
                self._use(UseKind.TABLE, node)
        elif name.startswith("conv"):
            if 1 in held:
                self._use(UseKind.KERNEL, node)
        elif name in _ELEMENTWISE:
            self._use(UseKind.ELEMENTWISE, node)
        elif name in self._layers or isinstance(getattr(self.module, name, None), nn.Module):
            self._use(UseKind.TABLE, node)  # fed to a layer as activations are
        elif name not in _IGNORED:
            self._follow(name, held, node)

    def _follow(self, name: str, held: dict[int | str, _Held], node: ast.Call) -> None:
        """Read the module's own method, or the function of its file, that is given the parameter."""
        if isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            tree = method(type(self.module), name)
            skipped = 0 if tree is None or _is_static(tree) else 1
        else:
            function = type(self.module).forward.__globals__.get(name)
            tree = function_tree(function) if isinstance(function, FunctionType) else None
            skipped = 0
        if tree is None or self._following > 2:
            self.lost = True
            return
        names = [argument.arg for argument in tree.args.args[skipped:]]
        known = {
            names[p] if isinstance(p, int) else p: h
            for p, h in held.items()
            if p in names or p in range(len(names))
        }
        self._following += 1
        self.read(tree, known)
        self._following -= 1

    def _einsum(self, node: ast.Call, arguments: list[ast.expr]) -> None:
        equation, operands = arguments[0], arguments[1:]
        places = [i for i, operand in enumerate(operands) if self._held(operand)]
        if not places:
            return
        text = equation.value if isinstance(equation, ast.Constant) else None
        held = self._held(operands[places[0]])
        if not isinstance(text, str) or "->" not in text or held is None or held.moved:
            self.lost = True
            return
        spec = _einsum_matrices(text.replace(" ", ""), places[0])
        if spec is None:
            self._use(UseKind.ELEMENTWISE, node)
        else:
            self._use(UseKind.MATRIX, node, spec)

    def _matrix(self, held: _Held | None, stored_in_out: bool, node: ast.AST) -> None:
        if held is None:
            return
        if held.moved:
            self.lost = True
            return
        spec = MatrixSpec(transposed=stored_in_out != held.transposed)
        self._use(UseKind.MATRIX, node, spec)

    def _use(self, kind: UseKind, node: ast.AST, matrices: MatrixSpec = PLAIN) -> None:
        self.uses.append(Use(kind, ast.unparse(node), matrices))

    def _held(self, node: ast.expr) -> _Held | None:
        """Return what of the parameter an expression holds, None if nothing."""
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=self.attribute):
                return _Held()
            case ast.Name(id=name):
                return self._names.get(name)
            case ast.Attribute(value=value, attr="T" | "mT"):
                held = self._held(value)
                return held and replace(held, transposed=not held.transposed)
            case ast.Attribute(value=value, attr="data"):
                return self._held(value)
            case ast.UnaryOp(operand=operand):
                return self._held(operand)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
                if _is_scale(right):
                    return self._held(left)
                return self._held(right) if _is_scale(left) else None
            case ast.Subscript(value=value, slice=index):
                held = self._held(value)
                if held is None or (self.ndim == 2 and _is_lookup(index)):
                    return None
                of_stack = self.ndim > 2 and not isinstance(index, (ast.Slice, ast.Tuple))
                return held if of_stack else replace(held, moved=True)
            case ast.Call():
                return self._held_call(node)
        return None

    def _held_call(self, node: ast.Call) -> _Held | None:
        name, arguments = _callee(node)
        held = self._held(arguments[0]) if arguments else None
        if held is None:
            return None
        if name in _SAME_AXES:
            return held
        if name in _OTHER_AXES:
            return replace(held, moved=True)
        if name == "t" or (name == "transpose" and self._last_two(arguments[1:])):
            return replace(held, transposed=not held.transposed)
        return replace(held, moved=True) if name in ("transpose", "swapaxes") else None

    def _last_two(self, axes: list[ast.expr]) -> bool:
        try:
            numbers = {ast.literal_eval(axis) % self.ndim for axis in axes}
        except (ValueError, TypeError):
            return False
        return numbers == {self.ndim - 2, self.ndim - 1}


_IGNORED = frozenset(["len", "size", "dim", "numel", "isinstance", "print", "is_floating_point"])
"""Calls that ask about a tensor and compute nothing with it."""


def _callee(node: ast.Call) -> tuple[str, list[ast.expr]]:
    """Return the name of what is called and its arguments; of a method, the object comes first."""
    if isinstance(node.func, ast.Name):
        return node.func.id, list(node.args)
    if isinstance(node.func, ast.Attribute):
        if _is_method_call(node) and not _is_self(node.func.value):
            return node.func.attr, [node.func.value, *node.args]
        return node.func.attr, list(node.args)
    return "", list(node.args)


def _is_method_call(node: ast.Call) -> bool:
    """Return whether an object's method is called, and not a function of torch."""
    if not isinstance(node.func, ast.Attribute):
        return False
    root = node.func.value
    name = root.attr if isinstance(root, ast.Attribute) else getattr(root, "id", "")
    return name not in _LIBRARIES


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _of_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and _is_self(node.value)


def _is_static(tree: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in tree.decorator_list)


def _is_scale(node: ast.expr) -> bool:
    """Return whether an expression is a number or an attribute of the module itself."""
    if isinstance(node, ast.Constant):
        return True
    return _of_self(node)


def _is_lookup(index: ast.expr) -> bool:
    """Return whether an index picks rows by number: `table[positions]`."""
    if isinstance(index, (ast.Slice, ast.Constant)):
        return False
    if isinstance(index, ast.Tuple):
        return any(_is_lookup(part) for part in index.elts if not _is_ellipsis(part))
    return True


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _einsum_matrices(equation: str, place: int) -> MatrixSpec | None:
    """Return how operand `place` of an einsum is stored as a matrix; None where it is none.

    Axes that the operand shares with the result and with nothing else are its outputs, those that
    are summed over its inputs, those that it shares with both lead (one matrix for each).
    """
    inputs, result = equation.split("->")
    operands = inputs.split(",")
    axes = operands[place]
    others = "".join(operands[:place] + operands[place + 1 :])
    kinds = "".join(
        "B" if a in result and a in others else "O" if a in result else "I" for a in axes
    )
    if kinds.lstrip("B") in ("OI", "IO"):
        return MatrixSpec(transposed=kinds.endswith("IO"))
    if re.fullmatch("OI+|IO+", kinds):  # (out, in, in) or (in, out, out)
        return MatrixSpec(flattened=True, transposed=kinds.startswith("I"))
    return None
