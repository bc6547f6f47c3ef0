"""How a module uses a bare `nn.Parameter`, read from its code.

A parameter of a Linear or an Embedding is what its module is. A bare parameter with two axes may be
a matrix, stored as (out, in) or as (in, out), a table of positions or learnt queries, a kernel, or
a gain with one number for each head and channel. Its shape does not tell. The code that uses it
does: `F.linear(x, self.w)`, `x @ self.w`, `F.embedding(index, self.w)`, `x + self.w`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeGuard

from torch import Tensor, nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.module_source import (
    function_beside,
    method,
    methods,
    names_in_transformers,
)


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
    of_weight: bool = False
    """Whether the result is a weight still, as in `self.w * self.mask`, and no activation."""


def parameter_use(
    module: nn.Module, attribute: str, ndim: int, *, listed: bool = False
) -> Use | None:
    """Return how the code of `module` uses its parameter `attribute`, which has `ndim` axes.

    With `listed`, the attribute is an `nn.ParameterList` or an `nn.ParameterDict`, and the uses are
    those of its parameters.

    None if the source is not at hand, the parameter is not used in it, its use is not understood
    (it goes through a function of another library, or by way of a view that moves its axes), or
    two uses contradict each other.
    """
    for name in names_in_transformers(type(module)):
        if (name, attribute) in KNOWN_USES:
            return Use(KNOWN_USES[name, attribute], f"{attribute} of {name}")
    reader = _UseReader(module, attribute, ndim, listed)
    for name, found in methods(type(module)).items():
        if not name.startswith(_SETUP):
            reader.read(found.tree, {}, name)
    uses = reader.uses
    if not uses or reader.lost:
        return None
    if matrices := [use for use in uses if use.kind == UseKind.MATRIX]:
        others = [use for use in uses if use.kind != UseKind.MATRIX and not use.of_weight]
        agree = len({use.matrices for use in matrices}) == 1 and not others
        return matrices[0] if agree else None
    order = list(UseKind)
    return min(uses, key=lambda use: order.index(use.kind))


_SETUP = ("__init__", "init", "_init", "reset", "_reset", "extra_repr", "__repr__")
"""How methods begin that only set values."""
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
    derived: bool = False
    """Whether it was computed from the parameter element by element."""


class _UseReader(ast.NodeVisitor):
    """Collect the uses of one parameter in the methods of its module."""

    def __init__(self, module: nn.Module, attribute: str, ndim: int, listed: bool) -> None:
        self.module, self.attribute, self.ndim, self.listed = module, attribute, ndim, listed
        self.uses: list[Use] = []
        self.lost = False
        """Whether the parameter went somewhere the reader cannot follow."""
        self._names: dict[str, _Held] = {}
        self._layers: set[str] = set()
        """Local names of layers."""
        self._method = ""
        self._following = 0

    def read(self, tree: ast.FunctionDef, names: dict[str, _Held], name: str = "") -> None:
        """Read one function, in which `names` hold the parameter."""
        outer = self._names, self._layers, self._method
        self._names, self._layers, self._method = dict(names), set(), name
        for statement in tree.body:
            self.visit(statement)
        self._names, self._layers, self._method = outer

    def visit_For(self, node: ast.For) -> None:
        """Note the names of layers, `for block in self.blocks`, and of listed parameters."""
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        attributes = [n.attr for n in ast.walk(iterable) if _of_self(n)]
        if self.listed and self.attribute in attributes:
            self._names |= dict.fromkeys(names, _Held())
        elif any(isinstance(getattr(self.module, a, None), nn.Module) for a in attributes):
            self._layers |= names

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        given_out = self._method == "forward" and not self._following
        if given_out and node.value is not None and self._held(node.value):
            self._use(UseKind.TABLE, node)  # it is what the module gives out as activations

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._assign(node.target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=False):
                self._assign(name, part)
        elif isinstance(target, ast.Name):
            if held := self._held(value):
                self._names[target.id] = held
            else:
                self._names.pop(target.id, None)

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
        elif (left or right) and not _is_number(node.left) and not _is_number(node.right):
            other = node.right if left else node.left
            self._use(UseKind.ELEMENTWISE, node, of_weight=self._is_weight(other))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if self._held(node.value) and self.ndim == 2 and _is_lookup(node.slice):
            self._use(UseKind.TABLE, node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
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
        elif held and name in _ELEMENTWISE:
            one = len(arguments) == 1 or all(_is_number(a) for a in arguments[1:])
            self._use(UseKind.ELEMENTWISE, node, of_weight=one)
        elif held and not self._held(node):
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
        elif name in self._layers or isinstance(getattr(self.module, name, None), nn.Module):
            self._use(UseKind.TABLE, node)  # fed to a layer as activations are
        elif name not in _IGNORED and not name.endswith("_"):
            self._follow(name, held, node)

    def _follow(self, name: str, held: dict[int | str, _Held], node: ast.Call) -> None:
        """Read the module's own method, or the function of its file, that is given the parameter."""
        if isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            found = method(type(self.module), name)
            tree, names = (found.tree, found.arguments) if found else (None, [])
        else:
            tree = function_beside(type(self.module), name)
            names = [argument.arg for argument in tree.args.args] if tree else []
        if tree is None or self._following > 2:
            self.lost = self.lost or not all(value.derived for value in held.values())
            return
        given = {
            names[p] if isinstance(p, int) else p: h
            for p, h in held.items()
            if p in range(len(names)) or p in names
        }
        self._following += 1
        self.read(tree, given, name)
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
        kinds = _einsum_axes(text, places[0])
        if "I" not in kinds:
            self._use(UseKind.ELEMENTWISE, node)
        elif spec := _einsum_matrices(kinds):
            self._use(UseKind.MATRIX, node, spec)
        else:
            self.lost = True

    def _matrix(self, held: _Held | None, stored_in_out: bool, node: ast.AST) -> None:
        if held is None:
            return
        if held.moved:
            self.lost = True
            return
        spec = MatrixSpec(transposed=stored_in_out != held.transposed)
        self._use(UseKind.MATRIX, node, spec)

    def _use(
        self,
        kind: UseKind,
        node: ast.AST,
        matrices: MatrixSpec = PLAIN,
        *,
        of_weight: bool = False,
    ) -> None:
        self.uses.append(Use(kind, ast.unparse(node), matrices, of_weight))

    def _is_weight(self, node: ast.expr) -> bool:
        """Return whether an expression is of the module's own tensors alone, and no activation."""
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return bool(names) and names <= {"self", *_LIBRARIES, *self._names}

    def _held(self, node: ast.expr) -> _Held | None:
        """Return what of the parameter an expression holds, None if nothing."""
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=self.attribute):
                return None if self.listed else _Held()
            case ast.Subscript(
                value=ast.Attribute(value=ast.Name(id="self"), attr=self.attribute)
            ) if self.listed:
                return _Held()
            case ast.Name(id=name):
                return self._names.get(name)
            case ast.NamedExpr(value=value):
                return self._held(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self._held(body) or self._held(orelse)
            case ast.Attribute(value=value, attr="T" | "mT"):
                held = self._held(value)
                return held and replace(held, transposed=not held.transposed)
            case ast.Attribute(value=value, attr="data"):
                return self._held(value)
            case ast.UnaryOp(operand=operand):
                return self._held(operand)
            case ast.BinOp(
                left=left, op=ast.Mult() | ast.Div() | ast.Add() | ast.Sub(), right=right
            ):
                for own, other in ((left, right), (right, left)):
                    if held := self._held(own):
                        if self._is_scale(other):
                            return held
                        return replace(held, derived=True) if self._is_weight(other) else None
                return None
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
        if name in _ELEMENTWISE and all(map(_is_number, arguments[1:])):
            return replace(held, derived=True)
        if name in _OTHER_AXES:
            return replace(held, moved=True)
        if name == "t" or (name == "transpose" and self._last_two(arguments[1:])):
            return replace(held, transposed=not held.transposed)
        return replace(held, moved=True) if name in ("transpose", "swapaxes") else None

    def _is_scale(self, node: ast.expr) -> bool:
        """Return whether an expression is one number: a constant, or an attribute that is one."""
        if _of_self(node):
            value = getattr(self.module, node.attr, None)
            return not isinstance(value, Tensor) or value.numel() == 1
        return _is_number(node)

    def _last_two(self, axes: list[ast.expr]) -> bool:
        try:
            numbers = {ast.literal_eval(axis) % self.ndim for axis in axes}
        except (ValueError, TypeError):
            return False
        return numbers == {self.ndim - 2, self.ndim - 1}


_IGNORED = frozenset(
    [
        "len",
        "size",
        "dim",
        "numel",
        "isinstance",
        "print",
        "is_floating_point",
        "norm",
        "sum",
        "mean",
        "std",
        "var",
        "max",
        "min",
        "item",
        "requires_grad_",
        "register_hook",
    ]
)
"""Calls that ask about a tensor and compute no activation with it."""


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


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def _is_lookup(index: ast.expr) -> bool:
    """Return whether an index picks rows by number: `table[positions]`."""
    if isinstance(index, (ast.Slice, ast.Constant)):
        return False
    if isinstance(index, ast.Tuple):
        return any(_is_lookup(part) for part in index.elts if not _is_ellipsis(part))
    return True


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _einsum_axes(equation: str, place: int) -> str:
    """Return what each axis of operand `place` of an einsum is.

    O: an output, which the operand shares with the result alone. I: an input, which is summed with
    another operand. B: shared by all, one matrix for each. S: summed on its own. The axes that an
    ellipsis stands for are the activations'.
    """
    inputs, result = equation.replace(" ", "").replace("...", "").split("->")
    operands = inputs.split(",")
    others = "".join(operands[:place] + operands[place + 1 :])
    letters = {(True, True): "B", (True, False): "O", (False, True): "I", (False, False): "S"}
    return "".join(letters[axis in result, axis in others] for axis in operands[place])


def _einsum_matrices(kinds: str) -> MatrixSpec | None:
    """Return how an operand whose axes are of these kinds is stored as matrices, None if unclear.

    One axis before the last two stands for a stack, such as heads or experts, unless two outputs or
    two inputs end the shape after the one other axis: (in, heads, head size) is one matrix.
    """
    if re.fullmatch("OI+|IO+", kinds):
        flattened = len(kinds) > 2
        return MatrixSpec(flattened=flattened, transposed=kinds.startswith("I"))
    if re.fullmatch("[BOI]*(OI|IO)", kinds):
        return MatrixSpec(transposed=kinds.endswith("IO"))
    return None
