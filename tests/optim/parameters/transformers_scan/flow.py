"""Data flow over modeling code: where outputs of linear layers are cut, how parameters are used.

An abstract interpreter. The value of an expression is the set of layers' outputs and parameters
that it *is*, up to its shape and elementwise functions; what a product or a reduction makes of them
is a new tensor and is not followed. Of an output, the axes that hold the layer's features are
tracked, so that a cut along a sequence is no cut. Calls are followed into methods, into functions
of the same file and into modules of the same file that return an output as it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import replace

from tests.optim.parameters.transformers_scan.findings import Cut, Findings, Use
from tests.optim.parameters.transformers_scan.origins import (
    EMPTY,
    Origin,
    Value,
    axis_of,
    drop,
    flatten,
    integer,
    is_ellipsis,
    is_none,
    outputs_in,
    parameters_in,
    permute,
    swap,
    text_of,
    transpose,
    unflatten,
    unsqueeze,
    unstarred,
    view,
)
from tests.optim.parameters.transformers_scan.source import (
    ModelingFile,
    ModuleClass,
    Part,
    last_name,
    self_attribute,
)

Names = dict[str, Value]

SAME = frozenset(
    """
    to float half bfloat16 double type type_as contiguous clone detach cpu cuda data
    requires_grad_ sigmoid tanh relu silu gelu softplus leaky_relu elu swish mish hardswish
    logsigmoid dropout clamp clamp_ clip masked_fill masked_fill_ nan_to_num abs neg relu_
    sigmoid_ square log_sigmoid normalize l2norm layer_norm rms_norm batch_norm group_norm pow
    sqrt quick_gelu gelu_new alpha_dropout maybe_autocast checkpoint causal_conv1d_fn
    causal_conv1d_update
    """.split()  # noqa: SIM905
)
"""Functions and methods after which features are still where they were."""
NONLINEAR = {"sigmoid", "tanh", "softplus", "relu", "silu", "clamp", "square"}
SAME_MODULE = re.compile(r"act|drop|norm|conv1d|identity|^(SiLU|GELU|ReLU|Sigmoid|Tanh)$", re.I)
ELEMENTWISE = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
NOT_RUN = {
    "__init__",
    "_init_weights",
    "get_output_embeddings",
    "get_input_embeddings",
    "tie_weights",
}
MATMULS = {"matmul", "bmm", "mm", "mv", "dot", "_grouped_mm", "grouped_mm"}


def scan(files: Iterable[ModelingFile]) -> Findings:
    """Return every cut of a layer's output and every use of a bare parameter in `files`."""
    found = Findings()
    for file in files:
        summaries: dict[ModuleClass, Value] = {}
        for cls in file.classes.values():
            if not cls.parts:
                continue
            found.classes += 1
            found.lineage[cls.name] = tuple(base.name for base in cls.lineage)
            if any("use_experts" in text_of(d) for c in cls.lineage for d in c.node.decorator_list):
                found.experts.add(cls.name)
            for attribute, part in cls.own_parts.items():
                found.places.setdefault(part.name, []).append((cls.name, attribute))
                if part.kind == "linear":
                    found.linears.add((cls.name, attribute))
                if part.kind == "parameter":
                    place = (file.short, part.line, part.source)
                    found.parameters[cls.name, attribute] = place
            Interpreter(cls, found, summaries).run()
    found.cuts = list(dict.fromkeys(found.cuts))
    found.uses = list(dict.fromkeys(found.uses))
    return found


class Interpreter:
    """Runs the methods of one class on abstract values."""

    def __init__(
        self, cls: ModuleClass, found: Findings, summaries: dict[ModuleClass, Value]
    ) -> None:
        self.cls = cls
        self.file = cls.file
        self.found = found
        self.summaries = summaries
        """What modules of a class return, of those that were asked for."""
        self.called: set[str] = set()
        self.counts = True
        """Whether cuts are recorded."""
        self.stack: list[ast.AST] = []
        self.where: ModuleClass = cls
        """Class that defines the method that runs."""

    def run(self) -> None:
        # A method that another one calls is run there, with what it is given.
        for name, (owner, node) in self.cls.methods.items():
            if name not in NOT_RUN and name not in self.called:
                self._method(owner, node, {})

    def _method(self, owner: ModuleClass, node: ast.FunctionDef, names: Names) -> Value:
        before, self.where = self.where, owner
        try:
            return self._function(node, dict(names))
        finally:
            self.where = before

    def _function(self, node: ast.FunctionDef, names: Names) -> Value:
        if node in self.stack or len(self.stack) > 6:
            return EMPTY
        self.stack.append(node)
        try:
            return self._block(node.body, names)
        finally:
            self.stack.pop()

    # Statements

    def _block(self, body: list[ast.stmt], names: Names) -> Value:
        returned = EMPTY
        for statement in body:
            returned |= self._statement(statement, names)
        return returned

    def _statement(self, node: ast.stmt, names: Names) -> Value:
        if isinstance(node, ast.Assign):
            value = self.value(node.value, names)
            for target in node.targets:
                pair = isinstance(target, ast.Tuple) and value.items is None
                if pair and isinstance(node.value, ast.Call) and self_attribute(node.value.func):
                    # A module that returns several things: its output is the first.
                    rest = (EMPTY,) * (len(target.elts) - 1)
                    self._assign(target, Value(items=(value, *rest)), names, node)
                else:
                    self._assign(target, value, names, node)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self.value(node.value, names), names, node)
        elif isinstance(node, ast.AugAssign):
            both = self._binary(node.op, node.target, node.value, names, node)
            self._assign(node.target, both, names, node)
        elif isinstance(node, ast.Return):
            return self.value(node.value, names) if node.value is not None else EMPTY
        elif isinstance(node, ast.Expr):
            self._append(node.value, names)
        elif isinstance(node, ast.If):
            self.value(node.test, names)
            return self._branches([node.body, node.orelse], names)
        elif isinstance(node, ast.For):
            self._loop_target(node.target, node.iter, names, node)
            return self._branches([node.body, []], names)
        elif isinstance(node, ast.While):
            return self._branches([node.body, []], names)
        elif isinstance(node, ast.With):
            return self._block(node.body, names)
        elif isinstance(node, ast.Try):
            returned = self._block(node.body, names)
            for handler in node.handlers:
                returned |= self._block(handler.body, names)
            return returned
        return EMPTY

    def _append(self, node: ast.expr, names: Names) -> None:
        """Follow `pieces.append(output)`: a list of outputs is what a loop makes of them."""
        func = node.func if isinstance(node, ast.Call) else None
        if not isinstance(func, ast.Attribute) or func.attr != "append":
            self.value(node, names)
        elif node.args:
            name = last_name(func.value)
            old, value = names.get(name, EMPTY), self.value(node.args[0], names)
            names[name] = Value(old.origins | value.origins, module=(*old.module, *value.module))

    def _branches(self, bodies: list[list[ast.stmt]], names: Names) -> Value:
        returned = EMPTY
        outcomes = []
        for body in bodies:
            branch = dict(names)
            returned |= self._block(body, branch)
            leaves = bool(body) and isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue))
            if not leaves:
                outcomes.append(branch)
        for branch in outcomes:
            for name, value in branch.items():
                others = [other.get(name, EMPTY) for other in outcomes if other is not branch]
                for other in others:
                    if other is not value:
                        value = value | other
                names[name] = value
        return returned

    def _assign(self, target: ast.expr, value: Value, names: Names, at: ast.AST) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            if value.items is not None and len(value.items) == len(target.elts):
                items: Iterable[Value] = value.items
            else:
                items = [self._take(value, 0, f"unpacked into {len(target.elts)}", at)] * len(
                    target.elts
                )
            for inner, item in zip(target.elts, items, strict=True):
                self._assign(
                    inner.value if isinstance(inner, ast.Starred) else inner, item, names, at
                )
        elif isinstance(target, ast.Subscript):
            self.value(target.value, names)

    def _loop_target(self, target: ast.expr, over: ast.expr, names: Names, at: ast.AST) -> None:
        name = last_name(over.func) if isinstance(over, ast.Call) else ""
        if isinstance(over, ast.Call) and name in ("zip", "enumerate"):
            items = [self._element(self.value(argument, names), at) for argument in over.args]
            if name == "enumerate":
                items = [EMPTY, *items[:1]]
            self._assign(target, Value(items=tuple(items)), names, at)
        else:
            self._assign(target, self._element(self.value(over, names), at), names, at)

    def _element(self, value: Value, at: ast.AST) -> Value:
        if value.items:
            joined = EMPTY
            for item in value.items:
                joined |= item
            return joined
        if value.module:
            return Value(module=_elements(value.module))
        return self._take(value, 0, "iterated", at)

    # Expressions

    def value(self, node: ast.expr, names: Names) -> Value:
        if isinstance(node, ast.Name):
            if node.id == "self" and "self" not in names:
                return Value(module=(("", Part("class", self.cls.name)),))
            return names.get(node.id, EMPTY)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, names)
        if isinstance(node, ast.Call):
            return self._call(node, names)
        if isinstance(node, ast.BinOp):
            return self._binary(node.op, node.left, node.right, names, node)
        if isinstance(node, ast.UnaryOp):
            inner = self.value(node.operand, names)
            self._use(inner, "function", node)
            return Value(outputs_in(inner))
        if isinstance(node, ast.Subscript):
            return self._subscript(node, names)
        if isinstance(node, (ast.Tuple, ast.List)):
            items = [e.value if isinstance(e, ast.Starred) else e for e in node.elts]
            values = tuple(self.value(item, names) for item in items)
            starred = any(isinstance(e, ast.Starred) for e in node.elts)
            return Value(items=None if starred else values, sizes=tuple(node.elts))
        if isinstance(node, ast.IfExp):
            return self.value(node.body, names) | self.value(node.orelse, names)
        if isinstance(node, ast.BoolOp):
            joined = EMPTY
            for inner_node in node.values:
                joined |= self.value(inner_node, names)
            return joined
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            inner_names = dict(names)
            for generator in node.generators:
                self._loop_target(generator.target, generator.iter, inner_names, node)
            return Value(items=None, origins=self.value(node.elt, inner_names).all_origins())
        if isinstance(node, ast.NamedExpr):
            value = self.value(node.value, names)
            self._assign(node.target, value, names, node)
            return value
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child, names)
        return EMPTY

    def _attribute(self, node: ast.Attribute, names: Names) -> Value:
        own = self_attribute(node)
        if own:
            if own in self.cls.parts:
                definer, part = self.cls.parts[own]
                if part.kind == "parameter":
                    return Value(frozenset({Origin(self._owner(definer), own, "parameter")}))
                return Value(module=((own, part),))
            return EMPTY
        inner = self.value(node.value, names)
        if inner.module and node.attr == "weight":
            origins = {
                Origin(self._owner_of(path), path, "parameter", form="weight")
                for path, part in inner.module
                if part.kind == "linear"
            }
            return Value(frozenset(origins))
        if inner.module:
            return self._inside(inner.module, node.attr)
        if node.attr in ("T", "mT"):
            return Value(frozenset(swap(o) for o in inner.origins))
        return inner if node.attr in ("data", "real") else EMPTY

    def _inside(self, modules: tuple[tuple[str, Part], ...], attribute: str) -> Value:
        """Return what `attribute` of a module of this file is."""
        joined = EMPTY
        for path, part in modules:
            known = self.file.classes.get(part.name) if part.kind == "class" else None
            if known is not None and attribute in known.parts:
                definer, inner = known.parts[attribute]
                if inner.kind == "parameter":
                    origin = Origin(definer.name, attribute, "parameter")
                    joined |= Value(frozenset({origin}))
                else:
                    joined |= Value(module=((f"{path}.{attribute}".lstrip("."), inner),))
        return joined

    def _owner(self, definer: ModuleClass) -> str:
        """Return the class to report: the more derived of the attribute's and the method's."""
        order = self.cls.lineage
        if self.where in order and order.index(self.where) < order.index(definer):
            return self.where.name
        return definer.name

    def _owner_of(self, path: str) -> str:
        definer, _ = self.cls.parts.get(path.split(".")[0], (self.cls, None))
        return self._owner(definer)

    def _binary(
        self, op: ast.operator, left: ast.expr, right: ast.expr, names: Names, at: ast.AST
    ) -> Value:
        a, b = self.value(left, names), self.value(right, names)
        if isinstance(op, ast.MatMult):
            return self._product(a, b, at)
        if isinstance(op, ELEMENTWISE):
            self._use(a, "elementwise", at)
            self._use(b, "elementwise", at)
        if isinstance(op, ast.Add) and (a.sizes or b.sizes):
            whole = [ast.Starred(side, ast.Load()) for side in (left, right)]
            return Value(sizes=(*(a.sizes or (whole[0],)), *(b.sizes or (whole[1],))))
        return Value(outputs_in(a) | outputs_in(b))

    def _product(self, a: Value, b: Value, at: ast.AST) -> Value:
        """Return a @ b."""
        self._use(a, "matrix_left", at)
        self._use(b, "matrix_right", at)
        right = {Origin(o.cls, o.attribute, "output") for o in parameters_in(b)}
        left = {Origin(o.cls, o.attribute, "output", (-2,)) for o in parameters_in(a)}
        return Value(frozenset(right | left))

    def _call(self, node: ast.Call, names: Names) -> Value:
        name = last_name(node.func)
        arguments = [self.value(unstarred(a), names) for a in node.args]
        keywords = {k.arg: self.value(k.value, names) for k in node.keywords}
        own = self_attribute(node.func)
        if own and own in self.cls.methods:
            return self._own_call(own, node, arguments, keywords)
        base, callee = self._callee(node.func, names)
        if callee.module:
            return self._module_call(callee.module, node, [*arguments, *keywords.values()])
        if isinstance(node.func, ast.Attribute):
            if base.origins or base.items is not None:
                return self._tensor_method(name, base, node.args, arguments, node, names)
            text = text_of(node.func.value)
            if text in ("torch", "F", "nn.functional", "torch.nn.functional", "functional"):
                return self._torch_function(name, node, arguments, keywords, names)
            if own and SAME_MODULE.search(own):
                return arguments[0] if arguments else EMPTY
        if isinstance(node.func, ast.Name):
            function = self.file.functions.get(node.func.id)
            given = [*arguments, *keywords.values()]
            if function is not None and any(v.all_origins() or v.module for v in given):
                return self._followed(function, _bound(function, arguments, keywords))
            if name in ("linear", "glu", "softplus"):
                return self._torch_function(name, node, arguments, keywords, names)
        return self._unknown_call(name, node, arguments, keywords)

    def _callee(self, func: ast.expr, names: Names) -> tuple[Value, Value]:
        """Return what a method is called on, and what is called if that is a module."""
        if isinstance(func, ast.Attribute) and not self_attribute(func):
            base = self.value(func.value, names)
            return base, self._inside(base.module, func.attr)
        return EMPTY, self.value(func, names)

    def _followed(self, function: ast.FunctionDef, names: Names) -> Value:
        """Run a function of the file. It cuts heads for rotary angles, so its cuts do not count."""
        before, self.counts = self.counts, False
        try:
            return self._function(function, names)
        finally:
            self.counts = before

    def _unknown_call(
        self, name: str, node: ast.Call, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        everything = [*arguments, *keywords.values()]
        if name in ("tuple", "list", "map", "reversed", "sorted"):
            return arguments[-1] if arguments else EMPTY
        if name in ("len", "print", "isinstance", "getattr", "hasattr", "range", "size", "dim"):
            return EMPTY
        for argument in everything:
            self._use(argument, "kernel" if "conv" in name else "call", node)
        if name in SAME or (SAME_MODULE.search(name) and arguments):
            return Value(outputs_in(arguments[0])) if arguments else EMPTY
        return EMPTY

    def _own_call(
        self, name: str, node: ast.Call, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        owner, method = self.cls.methods[name]
        static = any(last_name(d) == "staticmethod" for d in method.decorator_list)
        bound = _bound(method, arguments if static else [EMPTY, *arguments], keywords)
        self.called.add(name)
        return self._method(owner, method, bound)

    def _module_call(
        self, modules: tuple[tuple[str, Part], ...], node: ast.Call, arguments: list[Value]
    ) -> Value:
        joined = EMPTY
        for path, part in modules:
            for argument in arguments:
                self._use(argument, "call", node)
            joined |= self._output(path, part, arguments[0] if arguments else EMPTY, node)
        return joined

    def _output(self, path: str, part: Part, given: Value, at: ast.AST) -> Value:
        """Return what a module makes of what it is given."""
        if part.kind == "linear":
            return Value(frozenset({Origin(self._owner_of(path), path, "output")}))
        if part.kind == "glu":
            return self._take(given, -1, "GLU", at, keep=True)
        if part.kind == "sequence":
            for index, inner in enumerate(part.parts):
                given = self._output(f"{path}.{index}", inner, given, at)
            return given
        if part.kind == "list":
            joined = EMPTY
            for index, inner in enumerate(part.parts):
                joined |= self._output(f"{path}.{index}", inner, given, at)
            return joined
        if part.kind == "class":
            return self._summary(path, part)
        return Value(outputs_in(given)) if SAME_MODULE.search(part.name or path) else EMPTY

    def _summary(self, path: str, part: Part) -> Value:
        """Return the outputs that a module of this file returns as they are."""
        known = self.file.classes.get(part.name)
        if known is None or "forward" not in known.methods or not known.parts:
            return EMPTY
        if known not in self.summaries:
            self.summaries[known] = EMPTY  # while it runs: a module may hold one of its own class
            inner = Interpreter(known, Findings(), self.summaries)
            owner, method = known.methods["forward"]
            self.summaries[known] = inner._method(owner, method, {})
        return _under(self.summaries[known], self._owner_of(path), path)

    # Tensors

    def _tensor_method(
        self,
        name: str,
        base: Value,
        nodes: list[ast.expr],
        arguments: list[Value],
        at: ast.Call,
        names: Names,
    ) -> Value:
        keywords = {k.arg: k.value for k in at.keywords if k.arg}
        if base.items is not None and not base.origins:
            return EMPTY
        if name in ("matmul", "bmm", "mm", "__matmul__"):
            return self._product(base, arguments[0] if arguments else EMPTY, at)
        if name in ("mul", "add", "sub", "div", "mul_", "add_", "pow", "addcmul", "exp", "where"):
            kind = "function" if name == "exp" else "elementwise"
            for value in (base, *arguments):
                self._use(value, kind, at)
            return Value(outputs_in(base) | frozenset(o for a in arguments for o in outputs_in(a)))
        if name in ("chunk", "split", "tensor_split", "unbind", "narrow", "split_with_sizes"):
            return self._divided(name, base, nodes, keywords, at, names)
        if name in ("index_select", "gather", "take_along_dim"):
            dim = integer(nodes[0]) if nodes else 0
            self._use(base, "lookup", at)
            return self._take(base, dim, name, at, keep=True)
        return self._shape_method(name, base, nodes, keywords, at, names)

    def _shape_method(
        self,
        name: str,
        base: Value,
        nodes: list[ast.expr],
        keywords: dict[str, ast.expr],
        at: ast.Call,
        names: Names,
    ) -> Value:
        if name in ("view", "reshape", "view_as", "reshape_as"):
            sizes = self._sizes(nodes, names)
            return Value(frozenset(view(o, sizes) for o in base.origins))
        if name == "unflatten":
            dims = [integer(nodes[0] if nodes else keywords.get("dim"))]
            sizes = (
                self._sizes(nodes[1:] or [keywords["sizes"]], names)
                if len(nodes) > 1 or "sizes" in keywords
                else []
            )
            return Value(frozenset(unflatten(o, dims[0], sizes) for o in base.origins))
        if name == "flatten":
            start = integer(nodes[0] if nodes else keywords.get("start_dim"), 0)
            end = integer(nodes[1] if len(nodes) > 1 else keywords.get("end_dim"), -1)
            return Value(frozenset(flatten(o, start, end) for o in base.origins))
        if name in ("transpose", "swapaxes", "transpose_"):
            listed = [*nodes, *keywords.values()]
            a, b = integer(listed[0], 0), integer(listed[1], 1) if len(listed) > 1 else 1
            return Value(frozenset(transpose(o, a, b) for o in base.origins))
        if name == "t":
            return Value(frozenset(swap(o) for o in base.origins))
        if name == "permute":
            order = [integer(n, None) for n in self._sizes(nodes, names)]
            return Value(frozenset(permute(o, order) for o in base.origins))
        if name == "movedim":
            return base
        if name == "unsqueeze":
            dim = integer(nodes[0] if nodes else keywords.get("dim"), 0)
            return Value(frozenset(unsqueeze(o, dim) for o in base.origins))
        if name == "squeeze":
            if not nodes:
                return base
            dim = integer(nodes[0], 0)
            return Value(frozenset(drop(o, dim) for o in base.origins))
        if name in ("expand", "expand_as", "repeat", "broadcast_to", "tile", "repeat_interleave"):
            self._use(base, "table", at)
            return base
        if name in ("mean", "sum", "amax", "max", "min"):
            self._use(base, "function", at)
            dim = integer(nodes[0] if nodes else keywords.get("dim"), None)
            if dim is None:
                return EMPTY
            kept = [o for o in outputs_in(base) if axis_of(o, dim) not in o.axes or len(o.axes) > 1]
            if "keepdim" not in keywords and "keepdims" not in keywords:
                kept = [drop(o, dim) for o in kept]
            return Value(frozenset(kept))
        if name in SAME:
            if name in NONLINEAR:
                self._use(base, "function", at)
                return Value(outputs_in(base))
            return base
        if name in ("softmax", "log", "cos", "sin", "norm", "cumsum"):
            self._use(base, "function", at)
        return EMPTY

    def _torch_function(
        self,
        name: str,
        node: ast.Call,
        arguments: list[Value],
        keywords: dict[str | None, Value],
        names: Names,
    ) -> Value:
        everything = [*arguments, *keywords.values()]
        if name == "linear":
            weight = keywords.get("weight", arguments[1] if len(arguments) > 1 else EMPTY)
            self._use(weight, "linear", node)
            if len(arguments) > 2:
                self._use(arguments[2], "elementwise", node)
            return Value(
                frozenset(Origin(o.cls, o.attribute, "output") for o in parameters_in(weight))
            )
        if name == "embedding" or name == "grid_sample":
            for value in everything:
                self._use(value, "lookup", node)
            return EMPTY
        if name == "einsum":
            return self._einsum(node, arguments[1:])
        if name in ("addmm", "baddbmm") and len(arguments) > 2:
            self._use(arguments[0], "elementwise", node)
            return self._product(arguments[1], arguments[2], node)
        if name in MATMULS and len(arguments) > 1:
            return self._product(arguments[0], arguments[1], node)
        if name.startswith("conv") and len(everything) > 1:
            weight = keywords.get("weight", arguments[1] if len(arguments) > 1 else EMPTY)
            self._use(weight, "kernel", node)
            return Value(outputs_in(arguments[0])) if "1d" in name and arguments else EMPTY
        if name == "glu":
            dim = next((k.value for k in node.keywords if k.arg == "dim"), None)
            given = node.args[1] if len(node.args) > 1 else dim
            return self._take(arguments[0], integer(given, -1), "glu", node, keep=True)
        if name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack"):
            return self._joined(node, arguments, keywords)
        if name in ("where", "maximum", "minimum", "add", "mul", "sub", "addcmul", "lerp"):
            for value in everything:
                self._use(value, "elementwise", node)
            return Value(frozenset(o for v in everything for o in outputs_in(v)))
        if name in ("pad", "interpolate", "roll", "flip"):
            return arguments[0] if arguments else EMPTY
        if arguments and (arguments[0].origins):
            return self._tensor_method(
                name, arguments[0], node.args[1:], arguments[1:], node, names
            )
        if name in ("zeros_like", "empty_like", "ones_like"):
            return EMPTY
        for value in everything:
            self._use(value, "call", node)
        return EMPTY

    def _joined(
        self, node: ast.Call, arguments: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        """Follow a concatenation: parameters alone are a parameter, with activations a table."""
        listed = [*arguments, *keywords.values()]
        origins = frozenset(o for v in listed for o in v.all_origins())
        parameters = frozenset(o for o in origins if o.kind == "parameter")
        several = listed[0].items if listed else None
        mixed = several is None or any(not parameters_in(item) for item in several)
        if mixed:
            self._use(Value(parameters), "table", node)
        dims = [k.value for k in node.keywords if k.arg in ("dim", "axis")]
        dim = integer(node.args[1] if len(node.args) > 1 else dims[0] if dims else None, 0)
        stacked = last_name(node.func) == "stack"
        along = {
            o for o in outputs_in(Value(origins)) if axis_of(o, dim) not in o.axes and not stacked
        }
        return Value(frozenset(along) | (frozenset() if mixed else parameters))

    def _einsum(self, node: ast.Call, operands: list[Value]) -> Value:
        text = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
        if not isinstance(text, str) or "->" not in text:
            for value in operands:
                self._use(value, "call", node)
            return EMPTY
        inputs, output = text.replace(" ", "").replace("...", "").split("->")
        terms = inputs.split(",")
        results: set[Origin] = set()
        for index, (term, value) in enumerate(zip(terms, operands, strict=False)):
            others = set("".join(t for i, t in enumerate(terms) if i != index))
            summed = "".join(c for c in term if c not in output and c in others)
            for origin in parameters_in(value):
                kind = "einsum" if summed else "elementwise"
                self._record_use(
                    origin, kind, f"{term}, sums over {summed or 'nothing'}: {text_of(node)}", node
                )
                kept = [c for c in output if c in term and c not in others]
                axes = tuple(output.index(c) - len(output) for c in kept)
                if axes:
                    new = Origin(origin.cls, origin.attribute, "output", axes, len(output))
                    results.add(new)
        return Value(frozenset(results))

    def _divided(
        self,
        name: str,
        base: Value,
        nodes: list[ast.expr],
        keywords: dict[str, ast.expr],
        at: ast.Call,
        names: Names,
    ) -> Value:
        position = {"unbind": 0, "narrow": 0}.get(name, 1)
        if name == "chunk" and all(o.rank == 3 and o.axes == (-1,) for o in base.origins):
            base = Value(frozenset(replace(o, unsure=True) for o in base.origins))
        given = (
            nodes[position] if len(nodes) > position else keywords.get("dim", keywords.get("axis"))
        )
        dim = integer(given, 0)
        count = self._pieces(name, nodes, keywords, names)
        piece = self._take(
            base, dim, f"{name}({count})" if count else name, at, keep=name != "unbind"
        )
        number = int(count) if count.isdigit() else 0
        if name == "narrow":
            return piece
        return Value(items=(piece,) * number) if number else Value(piece.origins)

    def _pieces(
        self, name: str, nodes: list[ast.expr], keywords: dict[str, ast.expr], names: Names
    ) -> str:
        """Return what says into how many pieces a tensor is divided."""
        given = (
            nodes[0] if nodes else keywords.get("chunks", keywords.get("split_size_or_sections"))
        )
        given = given if given is not None else keywords.get("split_size")
        if name in ("unbind", "narrow") or given is None:
            return ""
        if name in ("split", "split_with_sizes", "tensor_split"):
            value = self.value(given, names)
            if value.sizes and len(value.sizes) > 1:
                return str(len(value.sizes))
            return text_of(given) if not isinstance(given, ast.Constant) else f"by {given.value}"
        return text_of(given)

    def _take(self, value: Value, dim: int, how: str, at: ast.AST, keep: bool = False) -> Value:
        """Return a piece of `value` along `dim`, and record it where the axis holds features."""
        pieces = set()
        for origin in value.origins:
            axis = axis_of(origin, dim)
            if origin.kind == "parameter":
                pieces.add(replace(origin, form=f"{origin.form} {how}".strip()))
                continue
            taken = axis in origin.axes or (origin.unsure and dim == 1)
            taken = taken and self.counts
            if taken:
                self._record_cut(origin, axis, how, at)
            piece = replace(origin, part=origin.part or taken, unsure=False)
            pieces.add(piece if keep else drop(piece, dim))
        return Value(frozenset(pieces))

    def _subscript(self, node: ast.Subscript, names: Names) -> Value:
        base = self.value(node.value, names)
        if base.module:
            return Value(module=_elements(base.module))
        if (
            base.items is not None
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, int)
        ):
            if -len(base.items) <= node.slice.value < len(base.items):
                return base.items[node.slice.value]
            return EMPTY
        if base.sizes and not base.origins:
            return EMPTY
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for index in indices:
            if not isinstance(index, (ast.Slice, ast.Constant)):
                self.value(index, names)
        joined = set()
        for origin in base.origins:
            joined.add(self._indexed(origin, indices, node))
        return Value(frozenset(joined))

    def _indexed(self, origin: Origin, indices: list[ast.expr], node: ast.Subscript) -> Origin:
        after_ellipsis = False
        real = [i for i in indices if not is_none(i) and not is_ellipsis(i)]
        if origin.kind == "output" and len(real) > origin.rank:
            origin = replace(origin, rank=len(real))  # of a layer that is given more axes
        seen = 0
        result = origin
        dropped: list[int] = []
        for index in indices:
            if is_ellipsis(index):
                after_ellipsis = True
                continue
            if is_none(index):
                continue
            axis = seen - len(real) if after_ellipsis else seen - origin.rank
            seen += 1
            if isinstance(index, ast.Slice) and not (index.lower or index.upper or index.step):
                continue
            if origin.kind == "parameter":
                how = "sliced" if isinstance(index, ast.Slice) else "looked up"
                result = replace(result, form=f"{result.form} {how}".strip())
                continue
            if axis in origin.axes and self.counts:
                self._record_cut(origin, axis, f"[{text_of(node.slice)}]", node)
                result = replace(result, part=True)
            if not isinstance(index, ast.Slice):
                dropped.append(axis)
        if origin.kind == "output" and not after_ellipsis:
            added = sum(map(is_none, indices))
            result = replace(result, rank=result.rank + added)
        for axis in sorted(dropped):
            result = drop(result, axis)
        return result

    def _sizes(self, nodes: list[ast.expr], names: Names) -> list[ast.expr]:
        """Return the expressions of the sizes that a call is given, tuples in names resolved."""
        listed: list[ast.expr] = []
        for node in nodes:
            inner = unstarred(node)
            value = self.value(inner, names)
            if value.sizes is not None:
                listed += self._sizes(list(value.sizes), names)
            else:
                listed.append(node)
        return listed

    # Records

    def _use(self, value: Value, kind: str, at: ast.AST) -> None:
        for origin in value.all_origins():
            if origin.kind == "parameter":
                self._record_use(origin, kind, text_of(at), at)

    def _record_use(self, origin: Origin, kind: str, how: str, at: ast.AST) -> None:
        product = kind in ("linear", "matrix_right", "matrix_left", "einsum")
        if product and "viewed" in origin.form and self._is_linear(origin):
            self.found.cuts.append(
                Cut(
                    origin.cls,
                    origin.attribute,
                    origin.form,
                    getattr(at, "lineno", 0),
                    self.file.short,
                )
            )
        form = (
            f"[{origin.form}{' swapped' if origin.swapped else ''}] "
            if origin.form or origin.swapped
            else ""
        )
        line = getattr(at, "lineno", 0)
        self.found.uses.append(
            Use(origin.cls, origin.attribute, kind, f"{form}{how[:160]}", line, self.file.short)
        )

    def _is_linear(self, origin: Origin) -> bool:
        """Return whether a parameter is the weight of a linear layer."""
        _, part = self.cls.parts.get(origin.attribute.split(".")[0], (None, None))
        return part is not None and (part.kind == "linear" or part.name == "Linear")

    def _record_cut(self, origin: Origin, axis: int, how: str, at: ast.AST) -> None:
        place = ""
        if len(origin.axes) > 1:
            place = f" of axis {sorted(origin.axes).index(axis)} of ({origin.form})"
        line = getattr(at, "lineno", 0)
        self.found.cuts.append(
            Cut(origin.cls, origin.attribute, how + place, line, self.file.short, origin.part)
        )


def _under(value: Value, cls: str, path: str) -> Value:
    """Return the outputs of a module as those of the module that holds it at `path`."""
    origins = set()
    for origin in value.origins:
        if origin.kind == "parameter":
            origins.add(origin)
        elif not origin.part:
            inner = "" if origin.attribute == "weight" else f".{origin.attribute}"
            origins.add(replace(origin, cls=cls, attribute=f"{path}{inner}"))
    items = None if value.items is None else tuple(_under(item, cls, path) for item in value.items)
    return Value(frozenset(origins), items)


def _elements(modules: tuple[tuple[str, Part], ...]) -> tuple[tuple[str, Part], ...]:
    found: list[tuple[str, Part]] = []
    for path, part in modules:
        if part.kind in ("list", "sequence"):
            found += [(path, inner) for inner in part.parts]
    return tuple(found)


def _bound(
    function: ast.FunctionDef, arguments: list[Value], keywords: dict[str | None, Value]
) -> Names:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    bound = dict(zip(names, arguments, strict=False))
    bound |= {key: value for key, value in keywords.items() if key}
    return bound
