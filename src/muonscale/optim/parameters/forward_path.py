"""The output layers of a model: the last layers of its forward path.

An output layer is a layer whose output the model returns and no other layer reads. The source of
`forward` says which one it is; it is parsed, never run. A layer whose output is added to what it
was computed from ends the residual stream and is not an output layer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from muonscale.optim.parameters.module_source import PARALLEL, WRAPPED, Method, method, methods

Layer = nn.Module | nn.Parameter
Sources = frozenset[Layer | str]
"""The layers, and the names of the arguments, that an expression is computed from."""

_NOTHING: Sources = frozenset()
_LISTS = (nn.ModuleList, nn.ModuleDict)
# Against recursion: modules inside each other, and methods that call each other.
_DEEPEST_MODULE, _DEEPEST_CALL = 8, 6


@dataclass(frozen=True)
class OutputLayers:
    """What the code of a model says of its output layers."""

    layers: tuple[Layer, ...]
    """Layers without children, and bare parameters, whose outputs the model returns. Empty for a
    lone layer, and for a model that ends in a norm or in the residual stream.
    """
    followed: bool
    """Whether the code is at hand and what it returns comes from a layer."""


def output_layers(model: nn.Module) -> OutputLayers:
    """Return the output layers of `model`."""
    model = _unwrapped(model)
    children = _with_parameters(model.children())
    if not children or (_is_of_torch(model) and not isinstance(model, nn.Sequential)):
        return OutputLayers((), followed=True)
    last = list(dict.fromkeys(_last(model, 0)))
    without_code = isinstance(model, nn.Sequential) or type(model).forward is nn.Module.forward
    return OutputLayers(tuple(last), bool(last) or without_code or _returns_a_layer(model))


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers: compiled, checkpointed, replicated, or without a forward."""
    while True:
        inside = [m for name, m in module._modules.items() if name in WRAPPED and m is not None]
        children = _with_parameters(module.children())
        if isinstance(module, PARALLEL) or (len(children) == 1 and _is_wrapper(module)):
            inside = children
        if not inside:
            return module
        module = inside[0]


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module with one child has no parameters and no code of its own."""
    own = any(method(type(module), name) for name in ("training_step", "forward"))
    return not (own or isinstance(module, (*_LISTS, nn.Sequential)) or [*module.parameters(False)])


def _entries(module: nn.Module) -> list[Method]:
    """Return the methods that a trainer calls: `training_step`, `forward`, or without these all."""
    kind = type(module)
    for name in ("training_step", "forward"):
        if found := method(kind, name):
            return [found]
    return [found for name, found in methods(kind).items() if not name.startswith("_")]


def _returns_a_layer(module: nn.Module) -> bool:
    return any(not isinstance(source, str) for source in _ForwardPath(module).follow())


def _last(module: nn.Module, depth: int) -> Iterator[Layer]:
    module = _unwrapped(module)
    children = _with_parameters(module.children())
    if isinstance(module, nn.Sequential):
        if children:
            yield from _last(children[-1], depth)
    elif isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
        yield from (m for m in module.modules() if isinstance(m, nn.Linear))
    elif isinstance(module, nn.Linear) or (not children and _is_of_torch(module)):
        yield module
    elif depth <= _DEEPEST_MODULE:
        path = _ForwardPath(module)
        for layer in path.outputs(path.follow()):
            yield from _inside(layer, path, depth + 1)


def _inside(layer: Layer, path: _ForwardPath, depth: int) -> Iterator[Layer]:
    """Yield the last layers of one that a path ends with."""
    if isinstance(layer, nn.Parameter):
        yield layer
    elif isinstance(layer, _LISTS):
        items = _with_parameters(layer.values() if isinstance(layer, nn.ModuleDict) else layer)
        for item in items[-1:] if layer in path.chained else items:
            yield from _last(item, depth)
    else:
        yield from _last(layer, depth)


def _with_parameters(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that have parameters, without the dict of a layer's parametrizations."""
    found = [m for m in modules if next(m.parameters(), None) is not None]
    return [m for m in found if not any(isinstance(c, ParametrizationList) for c in m.children())]


def _is_of_torch(module: nn.Module) -> bool:
    """Return whether `forward` is torch's own: its code says nothing of a model's path."""
    owner = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    return owner is not nn.Module and owner.__module__.startswith("torch.nn.modules")


_Function = ast.FunctionDef | ast.Lambda


@dataclass
class _ForwardPath:
    """What the code of one module says of the order of its children.

    Statements are read in order, both branches of an `if`, and the body of a loop twice, so that a
    list of layers that feeds itself is noticed.
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
    _names: dict[str, Sources] = field(default_factory=dict)
    _layers: dict[str, tuple[Layer, ...]] = field(default_factory=dict)
    """Local names of layers and parameters: `for block in self.blocks`."""
    _functions: dict[str, _Function] = field(default_factory=dict)
    """Functions that are defined inside the method that is read."""
    _returned: Sources = _NOTHING
    _owner: type | None = None
    """The class whose method is read: `super()` begins after it."""
    _depth: int = 0

    def follow(self) -> Sources:
        """Read what a trainer calls; return what its results are computed from."""
        results = [self._method(found, [], {}) for found in _entries(self.module)]
        return _NOTHING.union(*results)

    def outputs(self, returned: Sources) -> list[Layer]:
        """Return the layers of `returned` that no other layer reads, in their order in the module."""
        layers = [x for x in returned if not isinstance(x, str)]
        layers = [x for x in layers if x not in self.read and x not in self.summed]
        order = {m: i for i, m in enumerate([*self.module.modules(), *self.module.parameters()])}
        return sorted(layers, key=lambda layer: order.get(layer, len(order)))

    def _method(
        self, found: Method, arguments: list[Sources], keywords: dict[str, Sources]
    ) -> Sources:
        owner, self._owner = self._owner, found.owner
        names = {"self": _NOTHING} if not found.is_static else {}
        result = self._body(found.tree, found.arguments, arguments, keywords, names)
        self._owner = owner
        return result

    def _body(
        self,
        function: _Function,
        arguments: list[str],
        given: list[Sources],
        keywords: dict[str, Sources],
        names: dict[str, Sources],
    ) -> Sources:
        """Read a function with its own names; return what its result is computed from."""
        if self._depth > _DEEPEST_CALL:
            return _NOTHING.union(*given, *keywords.values())
        outer = self._names, self._layers, self._functions, self._returned
        extra = [a.arg for a in function.args.kwonlyargs]
        extra += [a.arg for a in (function.args.vararg, function.args.kwarg) if a is not None]
        self._names = names | {name: frozenset([name]) for name in [*arguments, *extra]}
        self._names |= dict(zip(arguments, given, strict=False))
        self._names |= {name: value for name, value in keywords.items() if name in self._names}
        self._returned = _NOTHING
        if isinstance(function, ast.FunctionDef):
            # A function inside a method sees the method's layers and functions.
            self._layers, self._functions = dict(self._layers), dict(self._functions)
        self._depth += 1
        if isinstance(function, ast.Lambda):
            self._returned = self._of(function.body)
        else:
            self._block(function.body)
        self._depth -= 1
        result = self._returned
        self._names, self._layers, self._functions, self._returned = outer
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
                left, right = self._of(target), self._of(value)
                if isinstance(op, ast.Add):
                    self._add(left, right)
                self._bind(target, left | right)
            case ast.Return(value=ast.expr() as value):
                self._returned |= self._of(value)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self._for(target, iterable, body)
                self._block(orelse)
            case ast.If(test=test, body=body, orelse=orelse):
                self._of(test)
                self._branches([body, orelse])
            case ast.Match(subject=subject, cases=cases):
                self._of(subject)
                self._branches([case.body for case in cases])
            case ast.While(test=test, body=body):
                for _ in range(2):
                    self._of(test)
                    self._block(body)
            case ast.With(body=body):
                self._block(body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=last):
                self._branches([body + orelse, *(handler.body for handler in handlers)])
                self._block(last)
            case ast.Expr(value=ast.Yield(value=value)):
                self._returned |= self._of(value)
            case ast.Expr(value=value):
                self._of(value)
            case ast.FunctionDef(name=name):
                self._functions[name] = node

    def _branches(self, bodies: list[list[ast.stmt]]) -> None:
        """Read bodies of which one is run, each from the same names."""
        before, after = self._names, [dict[str, Sources]()]
        for body in bodies:
            self._names = dict(before)
            self._block(body)
            after.append(self._names)
        names = {name for names in after for name in names}
        self._names = {
            n: _NOTHING.union(*(names.get(n, _NOTHING) for names in after)) for n in names
        }

    def _for(self, target: ast.expr, iterable: ast.expr, body: list[ast.stmt]) -> None:
        layers = self._found(iterable)
        if len(layers) > 1 and isinstance(target, ast.Name):
            for layer in layers:  # a list of layers written out
                self._layers[target.id] = (layer,)
                self._block(body)
            return
        for _ in range(2):
            self._loop(target, iterable)
            self._block(body)

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        """Bind the names of a loop or a comprehension, to layers if it runs over layers."""
        lists = [x for n in ast.walk(iterable) for x in self._found(n)]
        lists = [x for x in lists if isinstance(x, (*_LISTS, nn.Sequential))]
        self._bind(target, self._of(iterable))
        if lists:
            # The index of enumerate gets the same entry, which does no harm: it is never called.
            names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
            self._layers |= dict.fromkeys(names, (lists[0],))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=False):
                self._bind(name, self._of(part))
            return
        if isinstance(target, ast.Name):
            if isinstance(value, ast.Lambda):
                self._functions[target.id] = value
            weight = self._weight(value)
            layers = self._found(value) or (() if weight is None else (weight,))
            if layers:
                self._layers[target.id] = layers
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

    def _found(self, node: ast.AST) -> tuple[Layer, ...]:
        """Return the layers or the parameter that an expression names."""
        match node:
            case ast.Name(id="self"):
                return (self.module,)
            case ast.Name(id=name):
                return self._layers.get(name, ())
            case ast.Attribute(value=value, attr="forward" | "__call__"):
                return self._found(value)
            case ast.Attribute(value=value, attr=name):
                return _attributes(self._found(value), name)
            case ast.Subscript(value=value, slice=index):
                return _items(self._found(value), index)
            case ast.IfExp(body=body, orelse=orelse):
                return self._found(body) + self._found(orelse)
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return tuple(layer for part in parts for layer in self._found(part))
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, name, *_]):
                return _attributes(self._found(owner), self._text(name))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="children"), args=[]):
                return tuple(_with_parameters(self.module.children()))
            case ast.Call(func=func, args=[first, *_]) if _called(func) == "partial":
                return self._found(first)
        return ()

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
            case ast.NamedExpr(target=target, value=value):
                self._assign(target, value)
                return self._of(target)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, op, left, right)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                for generator in node.generators:
                    self._loop(generator.target, generator.iter)
                return self._of(node.value if isinstance(node, ast.DictComp) else node.elt)
            case ast.Compare():
                self._parts(node)
                return _NOTHING
        return self._parts(node)

    def _parts(self, node: ast.AST) -> Sources:
        return _NOTHING.union(*(self._of(child) for child in ast.iter_child_nodes(node)))

    def _binary(
        self, node: ast.BinOp, op: ast.operator, left: ast.expr, right: ast.expr
    ) -> Sources:
        sides = self._of(left), self._of(right)
        if isinstance(op, ast.MatMult):
            weights = [w for side in (left, right) if (w := self._weight(side)) is not None]
            if len(weights) == 1:
                return self._applied(weights[0], sides[0] | sides[1])
        # `(logits,) + hidden` joins tuples: it is no residual.
        joins = any(isinstance(side, (ast.Tuple, ast.List)) for side in (left, right))
        if isinstance(op, ast.Add) and not joins:
            self._add(*sides)
        return sides[0] | sides[1]

    def _add(self, left: Sources, right: Sources) -> None:
        self.summed |= self._after(left, right) | self._after(right, left)

    def _after(self, layers: Sources, sources: Sources) -> set[Layer]:
        """Return those of `layers` that were computed from something in `sources`."""
        return {x for x in layers if not isinstance(x, str) and self.before[x] & sources}

    def _call(self, node: ast.Call) -> Sources:
        arguments = [self._of(a) for a in node.args]
        keywords = {k.arg or "": self._of(k.value) for k in node.keywords}
        given = _NOTHING.union(*arguments, *keywords.values())
        layers = [x for x in self._found(node.func) if isinstance(x, nn.Module)]
        if self.module in layers:  # self(x)
            own = method(type(self.module), "forward")
            return given if own is None else self._method(own, arguments, keywords)
        if not layers:  # checkpoint(self.block, x)
            passed = [*node.args, *(k.value for k in node.keywords)]
            layers = [x for a in passed for x in self._found(a) if isinstance(x, nn.Module)]
            layers = [x for x in layers if x is not self.module]
        if layers:
            return _NOTHING.union(*(self._applied(layer, given) for layer in layers))
        name = _called(node.func)
        if name in _PRODUCTS:
            weights = [w for a in node.args if (w := self._weight(a)) is not None]
            if len(weights) == 1:
                return self._applied(weights[0], given | self._of(node.func))
        if own := self._own(node.func):
            return self._method(own, arguments, keywords)
        if isinstance(node.func, ast.Name) and node.func.id in self._functions:
            function = self._functions[node.func.id]
            own_names = [a.arg for a in function.args.args]
            return self._body(function, own_names, arguments, keywords, dict(self._names))
        if isinstance(node.func, ast.Attribute):
            base = node.func.value
            if name in _MUTATORS and isinstance(base, ast.Name) and base.id in self._names:
                self._bind(node.func, given)
            given |= self._of(node.func.value)
        if name == "add" and len(arguments) == 2:
            self._add(*arguments)
        return given

    def _own(self, func: ast.expr) -> Method | None:
        """Return the module's own method that is called, by `self` or by `super()`."""
        match func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return method(type(self.module), name)
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return method(type(self.module), name, self._owner)
        return None

    def _weight(self, node: ast.AST) -> nn.Parameter | None:
        """Return the parameter that an expression refers to, through an index or a method call."""
        while isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
            for layer in self._found(node):
                if isinstance(layer, nn.Parameter) and layer.ndim > 1:
                    return layer
            if isinstance(node, ast.Name):
                return None
            if isinstance(node, ast.Call):
                # F.normalize(self.weight), self.weight.t()
                inner = next((w for a in node.args if (w := self._weight(a)) is not None), None)
                if inner is not None:
                    return inner
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
_MUTATORS = frozenset(["append", "extend", "insert", "update", "setdefault", "add"])
"""Methods that put their arguments into the object."""


def _called(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def _attributes(owners: tuple[Layer, ...], name: str) -> tuple[Layer, ...]:
    """Return the children or parameters of modules that have a name."""
    found: list[Layer] = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            inside = owner._modules.get(name)
            inside = owner._parameters.get(name) if inside is None else inside
            found += [] if inside is None else [inside]
    return tuple(found)


def _items(owners: tuple[Layer, ...], index: ast.expr) -> tuple[Layer, ...]:
    """Return the layer at a constant index of a list of layers, or the list for any other index."""
    found: list[Layer] = []
    for owner in owners:
        if not isinstance(owner, (*_LISTS, nn.Sequential)):
            continue
        try:
            item = owner[ast.literal_eval(index)]
        except (ValueError, TypeError, KeyError, IndexError, SyntaxError):
            item = owner
        found.append(item)
    return tuple(found)
