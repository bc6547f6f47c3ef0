"""The output layers of a model: the last layers of its forward path.

A head is found by its place, not by its name or its number of rows: it is the layer whose output
the model returns, and that no other layer of the model reads. The code of `forward` tells; it is
read, never run. A layer whose output is added to the residual stream is not an output layer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from muonscale.optim.parameters.adapters import inner_layers
from muonscale.optim.parameters.module_source import method

Layer = nn.Module | nn.Parameter
Sources = frozenset[Layer | str]
"""The layers, and the names of the arguments, that an expression is computed from."""

_NOTHING: Sources = frozenset()


def output_layers(model: nn.Module) -> list[Layer]:
    """Return the layers without children, and bare parameters, whose outputs `model` returns.

    Empty for a lone layer, for a model that ends in a norm or in the residual stream, and where the
    source of `forward` is not at hand.
    """
    while len(inner := _with_parameters(model.children())) == 1 and not list(
        model.parameters(False)
    ):
        model = inner[0]
    return list(dict.fromkeys(_last(model, 0))) if inner else []


def _last(module: nn.Module, depth: int) -> Iterator[Layer]:
    if (inner := inner_layers(module)) != [module]:
        for layer in inner:
            yield from _last(layer, depth)
        return
    children = _with_parameters(module.children())
    if isinstance(module, nn.Sequential):
        if children:
            yield from _last(children[-1], depth)
        return
    if not children and _is_layer(module):
        yield module
        return
    if depth > _DEEPEST:
        return
    path = _ForwardPath(module)
    path.call("forward", [])
    for layer in path.outputs():
        if isinstance(layer, nn.Parameter):
            yield layer
        elif isinstance(layer, nn.ModuleList):
            inside = _with_parameters(layer)
            for item in inside[-1:] if layer in path.chained else inside:
                yield from _last(item, depth + 1)
        elif isinstance(layer, nn.ModuleDict):
            for item in _with_parameters(layer.values()):
                yield from _last(item, depth + 1)
        else:
            yield from _last(layer, depth + 1)


_DEEPEST = 8


def _with_parameters(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [m for m in modules if next(m.parameters(), None) is not None]


def _is_layer(module: nn.Module) -> bool:
    """Return whether torch defines the module: its code says nothing of a model's path."""
    return type(module).forward.__module__.startswith("torch.nn.modules")


@dataclass
class _ForwardPath:
    """What the forward code of one module says of the order of its children.

    Statements are followed in order, branches one after the other and loops twice, so that a list
    of layers is seen to feed itself.
    """

    module: nn.Module
    read: set[Layer] = field(default_factory=set)
    """Layers whose output another layer reads."""
    summed: set[Layer] = field(default_factory=set)
    """Layers whose output is added to something they read, as to the residual stream."""
    before: dict[Layer, set[Layer | str]] = field(default_factory=dict)
    """By layer: all that it was computed from, through other layers too."""
    chained: set[Layer] = field(default_factory=set)
    """Lists of layers that are applied one after the other."""
    returned: Sources = _NOTHING
    _names: dict[str, Sources] = field(default_factory=dict)
    _layers: dict[str, Layer] = field(default_factory=dict)
    """Local names of layers and parameters: `for block in self.blocks`."""
    _calls: int = 0

    def outputs(self) -> list[Layer]:
        """Return the children whose output is returned and read by no other child, in their order."""
        inner = [x for x in self.returned if not isinstance(x, str)]
        inner = [x for x in inner if x not in self.read and x not in self.summed]
        order = {m: i for i, m in enumerate([*self.module.modules(), *self.module.parameters()])}
        return sorted(inner, key=order.__getitem__)

    def call(self, name: str, arguments: list[Sources]) -> Sources:
        """Follow the module's own method `name` and return what its result is computed from."""
        tree = method(type(self.module), name)
        if tree is None or self._calls > 5:
            return frozenset().union(*arguments)
        outer = self._names, self._layers, self.returned
        names = [a.arg for a in [*tree.args.args, *tree.args.kwonlyargs]]
        self._names = {argument: frozenset([argument]) for argument in names}
        self._names |= dict(zip(names[1:], arguments, strict=False)) | {"self": _NOTHING}
        self._layers, self.returned = dict[str, Layer](), _NOTHING
        self._calls += 1
        self._block(tree.body)
        self._calls -= 1
        result = self.returned
        self._names, self._layers, self.returned = outer
        if self._calls == 0:
            self.returned = result
        return result

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value)
            case ast.AugAssign(target=target, op=op, value=value):
                self._bind(target, self._binary(op, self._of(target), self._of(value)))
            case ast.Return(value=ast.expr() as value):
                self.returned |= self._of(value)
            case ast.For(target=target, iter=iterable, body=body):
                for _ in range(2):
                    self._loop(target, iterable)
                    self._block(body)
            case ast.If(test=test, body=body, orelse=orelse):
                self._of(test)
                before = dict(self._names)
                self._block(body)
                after, self._names = self._names, before
                self._block(orelse)
                for name, sources in after.items():
                    self._names[name] = self._names.get(name, _NOTHING) | sources
            case ast.While(body=body) | ast.With(body=body) | ast.Try(body=body):
                self._block(body)
            case ast.Expr(value=value):
                self._of(value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=False):
                self._bind(name, self._of(part))
            return
        layer = self._layer(value)
        layer = self._weight(value) if layer is None else layer
        if layer is not None and isinstance(target, ast.Name):
            self._layers[target.id] = layer
        self._bind(target, self._of(value))

    def _bind(self, target: ast.expr, sources: Sources) -> None:
        match target:
            case ast.Name(id=name):
                self._names[name] = sources
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._bind(part, sources)
            case ast.Starred(value=value):
                self._bind(value, sources)
            case ast.Attribute(value=ast.Name(id=name)) | ast.Subscript(value=ast.Name(id=name)):
                self._names[name] = self._names.get(name, _NOTHING) | sources

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        """Bind the names of a loop, or of a comprehension: to layers where it runs over layers."""
        layers = [self._layer(n) for n in ast.walk(iterable)]
        lists = [x for x in layers if isinstance(x, (nn.ModuleList, nn.ModuleDict, nn.Sequential))]
        self._bind(target, self._of(iterable))
        names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        if lists:
            # Which of the names is the layer does not matter: numbers are never called.
            self._layers |= dict.fromkeys(names, lists[0])

    def _layer(self, node: ast.AST | None) -> Layer | None:
        """Return the child or the parameter that an expression names."""
        match node:
            case ast.Name(id="self"):
                return self.module
            case ast.Name(id=name):
                return self._layers.get(name)
            case ast.Attribute(value=value, attr="forward" | "__call__"):
                return self._layer(value)
            case ast.Attribute(value=value, attr=name):
                return _attribute(self._layer(value), name)
            case ast.Subscript(value=value):
                inside = self._layer(value)
                return inside if isinstance(inside, (nn.ModuleList, nn.ModuleDict)) else None
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, name, *_]):
                inside = self._layer(owner)
                return _attribute(inside, self._text(name)) if inside is not None else None
        return None

    def _text(self, node: ast.expr) -> str:
        """Return the string that an expression is, such as `self.base_model_prefix`."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(self.module, node.attr, "") if node.value.id == "self" else ""
        else:
            value = node.value if isinstance(node, ast.Constant) else ""
        return value if isinstance(value, str) else ""

    def _of(self, node: ast.AST | None) -> Sources:
        """Return what an expression is computed from, and note what reads what."""
        match node:
            case None | ast.Constant() | ast.Lambda():
                return _NOTHING
            case ast.Name(id=name):
                return self._names.get(name, _NOTHING)
            case ast.Call():
                return self._call(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(op, self._of(left), self._of(right), left, right)
            case ast.ListComp() | ast.GeneratorExp():
                for generator in node.generators:
                    self._loop(generator.target, generator.iter)
                return self._of(node.elt)
            case ast.Compare() | ast.BoolOp() if not isinstance(node, ast.BoolOp):
                return _NOTHING
        parts = [
            self._of(child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.expr, ast.keyword))
        ]
        return frozenset().union(*parts)

    def _binary(
        self,
        op: ast.operator,
        left: Sources,
        right: Sources,
        *operands: ast.expr,
    ) -> Sources:
        joins = any(isinstance(operand, (ast.Tuple, ast.List)) for operand in operands)
        if isinstance(op, ast.Add) and not joins:
            self.summed |= self._after(left, right) | self._after(right, left)
        if isinstance(op, ast.MatMult) and operands:
            weights = [w for o in operands if (w := self._weight(o)) is not None]
            if len(weights) == 1:
                return self._applied(weights[0], left | right)
        return left | right

    def _after(self, layers: Sources, sources: Sources) -> set[Layer]:
        """Return those of `layers` that were computed from something in `sources`."""
        return {x for x in layers if not isinstance(x, str) and self.before[x] & sources}

    def _call(self, node: ast.Call) -> Sources:
        arguments = [self._of(a) for a in node.args]
        keywords = {k.arg or "": self._of(k.value) for k in node.keywords}
        given = frozenset().union(*arguments, *keywords.values())
        layer = self._layer(node.func)
        if isinstance(layer, nn.Module) and layer is not self.module:
            return self._applied(layer, given)
        for argument in [*node.args, *(k.value for k in node.keywords)]:
            if isinstance(inner := self._layer(argument), nn.Module) and inner is not self.module:
                return self._applied(inner, given)  # checkpoint(self.block, x)
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if name in _PRODUCTS:
            weights = [w for a in node.args if (w := self._weight(a)) is not None]
            if len(weights) == 1:
                return self._applied(weights[0], given | self._of(node.func))
        if isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
                return self.call(name, arguments) | frozenset().union(*keywords.values())
            given |= self._of(node.func.value)
        if name == "add" and len(arguments) == 2:
            return self._binary(ast.Add(), arguments[0], arguments[1])
        return given

    def _weight(self, node: ast.AST) -> nn.Parameter | None:
        """Return the matrix that an expression is: `self.out.weight`, `self.table.T`, `self.heads[i]`."""
        while isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
            layer = self._layer(node)
            if isinstance(layer, nn.Parameter) and layer.ndim > 1:
                return layer
            if isinstance(node, ast.Name):
                return None
            node = node.func if isinstance(node, ast.Call) else node.value
        return None

    def _applied(self, layer: Layer, given: Sources) -> Sources:
        if isinstance(layer, nn.Module) and next(layer.parameters(), None) is None:
            return given
        if layer in given:
            self.chained.add(layer)
        read = {x for x in given if not isinstance(x, str) and x is not layer}
        self.read |= read
        earlier = self.before.setdefault(layer, set())
        earlier |= {x for x in given if x is not layer}.union(*(self.before[x] for x in read))
        return frozenset([layer])


_PRODUCTS = frozenset(["linear", "matmul", "mm", "bmm", "einsum", "baddbmm", "addmm"])


def _attribute(owner: Layer | None, name: str) -> Layer | None:
    """Return a child or a parameter of a module by its name, None for anything else."""
    if not isinstance(owner, nn.Module):
        return None
    inside = owner._modules.get(name)
    return inside if inside is not None else owner._parameters.get(name)
