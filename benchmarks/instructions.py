"""Write a few thousand short conversations about the Python standard library of this machine.

    python benchmarks/instructions.py FOLDER

`FOLDER/chat.jsonl` has one conversation per line, `{"messages": [{"role", "content"}, ...]}`: what a
function takes, what it does, which module defines it, and exercises on strings. All follow from
the sources of the library, so the same Python writes the same file. Train on it with
`data.path=FOLDER/chat.jsonl data.format=chat`.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST = 200
"""Characters of a docstring's first sentence, beyond which it is left out."""
EXERCISES = 1000
"""Names that the exercises on strings are about."""
SYSTEM = "You answer questions about Python in one line."

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Definition:
    """A public function or class of a module, or a public method of such a class."""

    module: str
    name: str
    """With the class before it, for a method."""
    arguments: str | None
    """As they are written; None for a class."""
    summary: str | None
    """First sentence of its docstring."""


def definitions(folder: Path) -> Iterator[Definition]:
    """Yield the public definitions of the modules in a folder, by name of the module."""
    paths = sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")])
    for path in paths:
        module = path.parent.name if path.name == "__init__.py" else path.stem
        if module.startswith("_") or "-" in module:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template that comes with the library
            continue
        for node in tree.body:
            yield from _defined(module, node, "")


def _defined(module: str, node: ast.stmt, before: str) -> Iterator[Definition]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    if node.name.startswith("_"):
        return
    name, arguments = before + node.name, None
    if isinstance(node, ast.ClassDef):
        for child in node.body if not before else ():
            yield from _defined(module, child, f"{name}.")
    else:
        arguments = _arguments(node.args, method=bool(before))
    yield Definition(module, name, arguments, _summary(ast.get_docstring(node)))


def _arguments(arguments: ast.arguments, *, method: bool) -> str:
    written = ast.unparse(arguments)
    first, _, rest = written.partition(", ")
    return rest if method and first in ("self", "cls") else written


def _summary(docstring: str | None) -> str | None:
    """Return the first sentence in one line, None if there is none of a handy length."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".")
    return f"{sentence}." if 10 <= len(sentence) <= LONGEST else None


def about(definition: Definition, modules: set[str]) -> Iterator[Chat]:
    """Yield the conversations about a definition.

    Args:
        definition: what they are about.
        modules: all that define something of this name.
    """
    full = f"{definition.module}.{definition.name}"
    takes = f"What are the arguments of {full}?"
    does = f"What does {full} do?"
    if definition.arguments is not None:
        signature = f"{full}({definition.arguments})"
        yield _chat(takes, signature)
        if definition.summary is not None:
            yield _chat(does, definition.summary, takes.replace(full, "it"), signature)
    elif definition.summary is not None:
        yield _chat(does, definition.summary)
    if len(modules) == 1 and "." not in definition.name and not hasattr(builtins, definition.name):
        yield _chat(f"Which module defines {definition.name}?", f"{definition.module}.")


def exercises(names: list[str]) -> Iterator[Chat]:
    """Yield questions about the letters of names, of which every name gets one."""
    for number, name in enumerate(names):
        kind = number % 4
        if kind == 0:
            yield _chat(f"Write {name} backwards.", name[::-1])
        elif kind == 1:
            yield _chat(f"How many characters has {name}?", f"{len(name)}.")
        elif kind == 2:
            yield _chat(f"Write {name} in capitals.", name.upper())
        else:
            yield _chat(f"What is the last character of {name}?", name[-1])


def _chat(*said: str) -> Chat:
    """Return what user and assistant have said in turn; a third of the chats have a system message."""
    turns = [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(said)
    ]
    system = {"role": "system", "content": SYSTEM}
    return [system, *turns] if len(said[0]) % 3 == 0 else turns


def conversations(folder: Path) -> list[Chat]:
    """Return all conversations about the library in a folder, each first question once."""
    found = list(definitions(folder))
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for definition in found:
        modules[definition.name].add(definition.module)
    chats = [chat for each in found for chat in about(each, modules[each.name])]
    names = sorted({definition.name.rpartition(".")[2] for definition in found})
    chats += exercises(names[:: max(1, len(names) // EXERCISES)])
    seen: dict[str, Chat] = {}
    for chat in chats:
        seen.setdefault(json.dumps(chat[:-1]), chat)
    return list(seen.values())


def main(arguments: list[str]) -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where chat.jsonl is written")
    folder: Path = parser.parse_args(arguments).folder
    chats = conversations(Path(sysconfig.get_path("stdlib")))
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    turns = [message for chat in chats for message in chat]
    answers = sum(len(m["content"]) for m in turns if m["role"] == "assistant")
    print(
        f"{len(chats):,} conversations of {len(turns):,} messages, {len(lines.encode()):,} bytes; "
        f"{answers:,} characters of answers"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
