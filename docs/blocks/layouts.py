"""Layouts, from the lists that the tests go through."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from docs.blocks.markdown import code, size, table
from muonscale.errors import ConfigError
from muonscale.lab.parallel.topology import parse_layout
from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes
from tests.distributed.layouts import RULES, SHAPES, SIZES, STEPS, TOLERANCES, VECTORS, Row, rows
from tests.distributed.trained import (
    ARRANGEMENTS,
    MORE_ARRANGEMENTS,
    ROWS,
    VARIANT_ROWS,
    VARIANTS,
)
from tests.distributed.trained import STEPS as TRAINED_STEPS
from tests.distributed.trained import TOLERANCE as TRAINED_TOLERANCE
from tests.lab.parallel.test_topology import REFUSED


def optimizer() -> str:
    """Return every layout of the optimizer's tests, and what is compared."""
    found: dict[str, list[Row]] = defaultdict(list)
    for number in SIZES:
        for row in rows(number):
            found[row.name].append(row)
    cells = [[code(name), *_where(same)] for name, same in found.items()]
    plain = f"plain tensors on {_numbers(list(SIZES))}"
    cells += [["`replicated`", plain, "the whole parameter on all ranks, state partitioned"]]
    rules = "; ".join(f"{code(name)} ({_options(options)})" for name, options in RULES.items())
    tolerances = ", ".join(code(f"{name}={value:g}") for name, value in TOLERANCES.items())
    return (
        table(["layout", "mesh", "placements"], cells)
        + f"\n\nRules: {rules}. Compared on every rank after {STEPS} steps: every parameter, with "
        f"that of one process, {tolerances}."
    )


def _where(same: list[Row]) -> tuple[str, str]:
    sizes: list[Any] = ["x".join(map(str, row.mesh)) for row in same]
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, shape in {**{n: s for n, (s, _) in SHAPES.items()}, **VECTORS}.items():
        placements = same[-1].placements(name, shape)
        kinds["(" + ", ".join(map(str, placements)) + ")"].append(name)
    common = Counter({text: len(names) for text, names in kinds.items()}).most_common()
    told = [
        code(text) + ("" if number == 0 else f" of {', '.join(kinds[text])}")
        for number, (text, _) in enumerate(common)
    ]
    return _numbers(sizes), "; ".join(told)


def _numbers(sizes: list[Any]) -> str:
    words = [str(one) for one in sizes]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) + " processes"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(code(f"{name}={value}") for name, value in options.items()) or "the defaults"


def parameters() -> str:
    """Return the parameters that lie on each layout."""
    cells = [
        [code(name), size(shape), _matrices(shape, layout), "Muon"]
        for name, (shape, layout) in SHAPES.items()
    ]
    cells += [[code(name), size(shape), "-", "AdamW"] for name, shape in VECTORS.items()]
    return table(["parameter", "shape", "matrices", "rule"], cells)


def _matrices(shape: tuple[int, ...], layout: MatrixSpec) -> str:
    counts: Counter[str] = Counter()
    for number, out, in_ in matrix_shapes(shape, layout):
        counts[f"{out}x{in_}"] += number
    return " + ".join(f"{number} of {shape}" for shape, number in counts.items())


def trainer() -> str:
    """Return every arrangement of the trainer, and what of it is compared."""
    told: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for what, listed in (("losses", ROWS), ("gradients", [*ARRANGEMENTS, *MORE_ARRANGEMENTS])):
        for kind, layout in listed:
            told[layout][what].append(kind)
    cells = [
        [
            code(layout),
            str(parse_layout(layout).world),
            *(", ".join(found[what]) or "-" for what in ("losses", "gradients")),
        ]
        for layout, found in sorted(told.items())
    ]
    return (
        table(["layout", "processes", "trained", "gradients compared"], cells)
        + f"\n\nTrained: {TRAINED_STEPS} steps; the loss of every step is that of one process within a "
        f"relative {TRAINED_TOLERANCE:g}, validation losses and the RMS of updates within twice that. "
        "Gradients: the raw ones of one batch, and where every parameter lies."
    )


def variants() -> str:
    """Return what is trained with other options."""
    where = ", ".join(f"{kind} with {code(layout)}" for kind, layout in VARIANT_ROWS)
    cells = [[code(name), ", ".join(map(code, words))] for name, words in VARIANTS.items()]
    return f"On {where}:\n\n" + table(["variant", "options"], cells)


def refused_layouts() -> str:
    """Return layouts that are refused, with what is said."""
    cells = []
    for text, _ in REFUSED:
        try:
            parse_layout(text)
        except ConfigError as error:
            if "is not valid" in str(error):
                continue  # misspelt
            cells.append([code(text), str(error)])
    return table(["layout", "answer"], cells)
