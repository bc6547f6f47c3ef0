"""The modeling code of the installed transformers: its classes, and what they are made of."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

LINEARS = {"Linear", "Conv1D", "LinearNormal", "KernelLinear"}
"""Constructors of layers that map the last axis; classes that inherit from `nn.Linear` are too."""


BUILDS = re.compile(r"init|build|setup|make|create|add|register|resize")
"""Names of methods that assign modules."""


@dataclass(frozen=True)
class Part:
    """What an attribute of a module is, as its constructor shows."""

    kind: str
    """"linear", "parameter", "sequence", "list", "class" (one of the file) or "other"."""
    name: str = ""
    """The constructor that is called."""
    parts: tuple[Part, ...] = ()
    """Of a sequence or a list."""
    line: int = 0
    source: str = ""


OTHER = Part("other")


@dataclass(eq=False)
class ModuleClass:
    """A class of a modeling file, with what it takes over from its bases there."""

    name: str
    node: ast.ClassDef
    file: ModelingFile
    bases: list[ModuleClass] = field(default_factory=list)
    """Method resolution order without the class itself, as far as the file defines it."""

    @property
    def lineage(self) -> list[ModuleClass]:
        return [self, *self.bases]

    @cached_property
    def base_names(self) -> set[str]:
        return {last_name(base) for cls in self.lineage for base in cls.node.bases}

    @cached_property
    def own_methods(self) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in self.node.body if isinstance(node, ast.FunctionDef)}

    @cached_property
    def methods(self) -> dict[str, tuple[ModuleClass, ast.FunctionDef]]:
        return {
            name: (cls, node)
            for cls in reversed(self.lineage)
            for name, node in cls.own_methods.items()
        }

    @cached_property
    def own_parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for name, method in self.own_methods.items():
            if BUILDS.search(name):
                parts |= _assigned(method, self.file)
        return parts

    @cached_property
    def parts(self) -> dict[str, tuple[ModuleClass, Part]]:
        found: dict[str, tuple[ModuleClass, Part]] = {}
        for cls in reversed(self.lineage):
            found |= {name: (cls, part) for name, part in cls.own_parts.items()}
        if "Linear" in self.base_names:
            found.setdefault("weight", (self, Part("parameter", "Linear")))
        return found


@dataclass
class ModelingFile:
    path: Path
    tree: ast.Module
    lines: list[str]
    classes: dict[str, ModuleClass] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)

    @property
    def short(self) -> str:
        return "/".join(self.path.parts[-2:])


def modeling_files() -> Iterator[ModelingFile]:
    """Yield every modeling file of the installed transformers, parsed."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        yield parse(path, path.read_text(encoding="utf-8"))


def parse(path: Path, text: str) -> ModelingFile:
    file = ModelingFile(path, ast.parse(text), text.split("\n"))
    for node in _top_level(file.tree.body):
        if isinstance(node, ast.FunctionDef):
            file.functions[node.name] = node
        if isinstance(node, ast.ClassDef):
            file.classes[node.name] = ModuleClass(node.name, node, file)
    for cls in file.classes.values():
        cls.bases = _bases(cls, file)
    return file


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under its conditions included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _top_level([*node.body, *(s for h in node.handlers for s in h.body)])
        else:
            yield node


def _bases(cls: ModuleClass, file: ModelingFile) -> list[ModuleClass]:
    found: list[ModuleClass] = []
    for base in cls.node.bases:
        known = file.classes.get(last_name(base))
        if known is not None and known is not cls:
            found += [c for c in (known, *_bases(known, file)) if c not in found]
    return found


def last_name(node: ast.AST) -> str:
    """Return `c` of `a.b.c`, and of a call of it."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def self_attribute(node: ast.AST) -> str:
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if named and node.value.id == "self" else ""  # type: ignore[union-attr]


def _assigned(method: ast.FunctionDef, file: ModelingFile) -> dict[str, Part]:
    """Return the attributes that `method` assigns modules and parameters to."""
    names: dict[str, Part] = {}
    parts: dict[str, Part] = {}
    for node in _statements(method):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            part = _part(node.value, names, file)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    names[target.id] = part
                attribute = self_attribute(target)
                if attribute and (part.kind != "other" or attribute not in parts):
                    parts[attribute] = part
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            _extend(node.value, names, parts, file)
    return {name: part for name, part in parts.items() if part.kind != "other"}


def _statements(method: ast.FunctionDef) -> list[ast.stmt]:
    found = [node for node in ast.walk(method) if isinstance(node, ast.stmt)]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _extend(
    call: ast.Call, names: dict[str, Part], parts: dict[str, Part], file: ModelingFile
) -> None:
    """Follow `layers.append(...)`, `add_module(...)` and `register_parameter(...)`."""
    if not isinstance(call.func, ast.Attribute) or not call.args:
        return
    method, holder = call.func.attr, call.func.value
    if method == "append":
        part = _part(call.args[0], names, file)
        kept = parts if self_attribute(holder) else names
        key = self_attribute(holder) or last_name(holder)
        old = kept.get(key, OTHER)
        if part.kind != "other":
            kind = old.kind if old.kind in ("sequence", "list") else "list"
            kept[key] = Part(kind, "ModuleList", (*old.parts, part), call.lineno)
    registers = method in ("register_parameter", "add_module", "register_module")
    if registers and len(call.args) > 1 and isinstance(call.args[0], ast.Constant):
        part = _part(call.args[1], names, file)
        if part.kind != "other":
            parts[str(call.args[0].value)] = part


def _part(node: ast.expr, names: dict[str, Part], file: ModelingFile) -> Part:
    if isinstance(node, ast.Name):
        return names.get(node.id, OTHER)
    if isinstance(node, ast.IfExp):
        chosen = _part(node.body, names, file)
        return chosen if chosen.kind != "other" else _part(node.orelse, names, file)
    if isinstance(node, ast.BoolOp):
        return next((p for v in node.values if (p := _part(v, names, file)).kind != "other"), OTHER)
    if isinstance(node, (ast.List, ast.Tuple)):
        return _listed([_part(item, names, file) for item in node.elts], node.lineno)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return _listed([_part(node.elt, names, file)], node.lineno)
    if isinstance(node, ast.DictComp):
        return _listed([_part(node.value, names, file)], node.lineno)
    if isinstance(node, ast.Dict):
        return _listed([_part(item, names, file) for item in node.values], node.lineno)
    if isinstance(node, ast.BinOp):
        return _part(node.left, names, file)
    if isinstance(node, ast.Call):
        return _constructed(node, names, file)
    return OTHER


def _listed(parts: list[Part], line: int) -> Part:
    return Part("list", "list", tuple(parts), line)


def _constructed(call: ast.Call, names: dict[str, Part], file: ModelingFile) -> Part:
    name = last_name(call.func)
    text = file.lines[call.lineno - 1].strip()
    if name in ("Parameter", "UninitializedParameter"):
        return Part("parameter", name, line=call.lineno, source=text)
    if name == "Sequential":
        parts = tuple(
            _part(a.value if isinstance(a, ast.Starred) else a, names, file) for a in call.args
        )
        if len(parts) == 1 and parts[0].kind == "list":
            parts = parts[0].parts
        return Part("sequence", name, parts, call.lineno, text)
    if name in ("ModuleList", "ParameterList", "ModuleDict", "ParameterDict", "reversed", "list"):
        parts = tuple(p for a in call.args for p in _flat(_part(a, names, file)))
        return Part("list", name, parts, call.lineno, text)
    known = file.classes.get(name)
    if name in LINEARS or (known is not None and known.base_names & LINEARS):
        return Part("linear", name, line=call.lineno, source=text)
    if known is not None:
        return Part("class", name, line=call.lineno, source=text)
    if name.endswith("Linear"):  # through a variable, such as a class of a dictionary
        return Part("linear", name, line=call.lineno, source=text)
    if name == "GLU":
        return Part("glu", name, line=call.lineno, source=text)
    if call.args and name in ("weight_norm", "spectral_norm"):
        return _part(call.args[0], names, file)
    return Part("other", name, line=call.lineno)


def _flat(part: Part) -> tuple[Part, ...]:
    return part.parts if part.kind == "list" else (part,)
