"""Parameter groups: roles, known architectures, and the matrices in fused parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from docs.blocks.architectures import FUSED_IN
from docs.blocks.docstrings import read_docstrings
from docs.blocks.markdown import code, size, table
from muonscale import grouping_report, parameter_groups
from muonscale.lab.targets import inspect as inspect_model
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.fused_weights import ELEMENTWISE, FUSED
from muonscale.optim.parameters.groups import MATRIX_ROLES
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
    """Return the matrices of parameters that hold several, or a transposed one."""
    cells = [
        [f"`{name}`", code(parameter), size(shape), _sum(shape, layout), _order(layout)]
        for name, parameter, shape, layout in _fused_rows()
    ]
    titles = ["configuration", "parameter", "shape", "matrices", "stored"]
    return table(titles, cells)


@cache
def _fused_rows() -> list[tuple[str, str, tuple[int, ...], MatrixSpec]]:
    rows, met = [], set()
    for name, (auto, config, fields) in FUSED_IN.items():
        model = _on_meta(auto, config, fields)
        met |= set(_known_places(model))
        for group in parameter_groups(model, lr=1.0):
            for place, parameter in zip(group["param_names"], group["params"], strict=True):
                layout = group["matrices"].get(place, PLAIN)
                kept = parameter.ndim > 2 or layout != PLAIN
                if group["rule"] == "muon" and kept and not _seen(rows, name, place):
                    rows.append((name, place, tuple(parameter.shape), layout))
    if unmet := FUSED.keys() - met:
        raise LookupError(f"docs/blocks/architectures.py has no model with {sorted(unmet)}")
    return rows


def _seen(rows: list[Any], name: str, place: str) -> bool:
    """Return whether another layer of the same model has the parameter already."""
    plain = ".".join(part for part in place.split(".") if not part.isdecimal())
    return any(
        row[0] == name and ".".join(p for p in row[1].split(".") if not p.isdecimal()) == plain
        for row in rows
    )


def _known_places(model: nn.Module) -> Iterator[tuple[str, str]]:
    for module in model.modules():
        for cls in type(module).__mro__:
            yield from ((cls.__name__, child) for child, _ in module.named_children())


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


def elementwise_parameters() -> str:
    """Return the parameters with two axes that hold no matrix."""
    rows = [[f"`{cls}`", code(attribute)] for cls, attribute in sorted(ELEMENTWISE)]
    return table(["class of transformers", "parameter"], rows)
