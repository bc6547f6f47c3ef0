"""Parameter groups: roles, known architectures, and the matrices in fused parameters."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from docs.blocks.architectures import FUSED_IN
from docs.blocks.markdown import code, size, table
from muonscale import grouping_report, parameter_groups
from muonscale.lab.config.keys import read_docstrings
from muonscale.lab.targets import inspect as inspect_model
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.fused_table import BARE_MATRICES, FUSED, Known
from muonscale.optim.parameters.groups import MATRIX_ROLES
from muonscale.optim.parameters.parameter_use import KNOWN_USES
from muonscale.optim.parameters.report import GroupingRow
from muonscale.optim.parameters.roles import Role, assign_roles


def roles() -> str:
    """Return the roles with their rules, and the order in which they are decided."""
    docs = read_docstrings(Role)
    rows = [
        [code(role), docs[role.name][1].rstrip("."), "Muon" if role in MATRIX_ROLES else "AdamW"]
        for role in Role
    ]
    steps = inspect.cleandoc(assign_roles.__doc__ or "").partition("decides:\n")[2]
    listed = steps.partition("\n\nA Linear")[0].strip("\n")
    return (
        table(["role", "what it is", "default rule"], rows)
        + "\n\nThe first rule that applies decides:\n\n"
        + inspect.cleandoc(listed)
    )


def architecture(preset: str) -> str:
    """Return the parameters of a preset, layers as one line."""
    found = inspect_model(preset)
    rows = [(row.name, _facts(row)) for row in found.groups.rows]
    lines = collapse(rows)
    return (
        f"`{preset}`, of the architecture `{found.model_type}` "
        f"(`muonscale inspect {preset}`):\n\n"
        + table(
            ["parameter", "times", "shape", "role", "rule", "matrices", "why"],
            [[code(line.name), str(line.count), *line.facts] for line in lines],
        )
    )


def _facts(row: GroupingRow) -> tuple[str, ...]:
    return size(row.shape) or "scalar", row.role, row.rule, _holds(row) or "-", row.why


def _holds(row: GroupingRow) -> str:
    if row.holds == ((1, *row.shape),):
        return "1"
    counts: dict[str, int] = {}
    for number, *shape in row.holds:
        counts[size(shape)] = counts.get(size(shape), 0) + number
    return " + ".join(f"{number} of {shape}" for shape, number in counts.items())


def fused_parameters() -> str:
    """Return the matrices of parameters that hold several, or a transposed one, with their sizes."""
    cells = [
        [f"`{name}`", code(parameter), size(shape), _sum(shape, layout), _order(layout)]
        for name, parameter, shape, layout in _fused_rows()
    ]
    titles = ["configuration", "parameter", "shape", "matrices", "stored"]
    return table(titles, cells)


@cache
def _fused_rows() -> list[tuple[str, str, tuple[int, ...], MatrixSpec]]:
    rows: list[tuple[str, str, tuple[int, ...], MatrixSpec]] = []
    for name, (auto, config, fields) in FUSED_IN.items():
        model = _on_meta(auto, config, fields)
        for group in parameter_groups(model, lr=1.0):
            for place, parameter in zip(group["param_names"], group["params"], strict=True):
                layout = group["matrices"].get(place, PLAIN)
                kept = parameter.ndim > 2 or layout != PLAIN
                if group["rule"] == "muon" and kept and not _seen(rows, name, place):
                    rows.append((name, place, tuple(parameter.shape), layout))
    return rows


def _seen(rows: list[Any], name: str, place: str) -> bool:
    """Return whether another layer of the same model has the parameter already."""
    plain = ".".join(part for part in place.split(".") if not part.isdecimal())
    return any(
        row[0] == name and ".".join(p for p in row[1].split(".") if not p.isdecimal()) == plain
        for row in rows
    )


def known_matrices() -> str:
    """Return what the parameters of known classes hold, by architecture."""
    entries = {**FUSED, **BARE_MATRICES}
    rows = [
        [code(architecture), code(cls), code(place), known.holds, _stored(known)]
        for (cls, place), known in entries.items()
        for architecture in _architectures_with(cls, place)
    ]
    return table(["architecture", "class", "parameter", "holds", "stored"], sorted(rows))


def _stored(known: Known) -> str:
    axes = ["flattened"] if known.stored.flattened else []
    axes += ["transposed"] if known.stored.transposed else []
    return ", ".join([*axes, *([known.order] if known.order else [])]) or "-"


@cache
def _classes() -> list[tuple[str, str, str]]:
    """Return (architecture, class, text) of the classes in transformers' modeling files."""
    import transformers

    found = []
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = re.split(r"^ *class (\w+)\(", path.read_text("utf-8"), flags=re.M)
        pairs = zip(text[1::2], text[2::2], strict=True)
        found += [(path.parent.name, cls, body) for cls, body in pairs]
    return found


def _architectures_with(cls: str, place: str) -> list[str]:
    """Return the architectures whose class of that name has something at that place."""
    sets = f"self.{place.partition('.')[0]} = "
    found = [home for home, name, text in _classes() if name == cls and sets in text]
    if not found:
        raise LookupError(f"{cls}.{place} is in fused_table.py, but not in transformers")
    return found


def _on_meta(auto: str, config: str, fields: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto).from_config(getattr(transformers, config)(**fields))


def _sum(shape: tuple[int, ...], layout: MatrixSpec) -> str:
    (row,) = grouping_report([_group(shape, layout)]).rows
    return _holds(row)


def _group(shape: tuple[int, ...], layout: MatrixSpec) -> dict[str, Any]:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    return {
        "params": [parameter], "param_names": ["p"], "rule": "muon", "matrices": {"p": layout},
        "lr": 0.0, "weight_decay": 0.0,
    }  # fmt: skip


def _order(layout: MatrixSpec) -> str:
    words = ["transposed"] if layout.transposed else []
    if layout.splits:
        in_turn = layout.groups == min(layout.splits)
        blocks = f"interleaved in {layout.groups} blocks"
        words.append("stacked" if layout.groups == 1 else "row by row" if in_turn else blocks)
    return ", ".join(words) or "stack"


def known_uses() -> str:
    """Return the bare parameters whose use their code does not tell."""
    rows = [[f"`{cls}`", code(name), str(kind)] for (cls, name), kind in sorted(KNOWN_USES.items())]
    return table(["class of transformers", "parameter", "use"], rows)
