"""What Muon's exchange adds to the bytes that AdamW sends under FSDP2, by the plan; pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from distributed_balance import forget
from distributed_models import MODELS, Model, planned

from muonscale.optim.distributed.assignment import assign_owners, traffic

WORLDS = (2, 4, 8, 64, 512, 4096)
BYTES = {"float32": 4, "bfloat16": 2}
SMALL_WORLD, LARGE_WORLD = 1.25, 1.05
"""Total over AdamW's that is printed in bold, and that is the aim from 64 ranks on."""


def adamw_bytes(elements: int, ranks: int, element_bytes: int) -> float:
    """Return what a rank sends per step under FSDP2: one reduce-scatter and two all-gathers."""
    return 3 * (ranks - 1) / ranks * elements * element_bytes


def sent(model: Model, ranks: int, comm_bytes: int) -> tuple[list[int], int]:
    """Return the bytes that every rank sends for Muon in one step, both ways, and most to a team."""
    moved = traffic(assign_owners(planned(model, ranks), comm_bytes=comm_bytes))
    both = zip(moved.sent_in, moved.sent_out, strict=True)
    return [comm_bytes * (into + out) for into, out in both], 4 * max(moved.shared)


def line(model: Model, ranks: int, wire: str) -> str:
    """Return one line of the table."""
    bytes_sent, to_team = sent(model, ranks, BYTES[wire])
    mean, busiest = sum(bytes_sent) / ranks, max(bytes_sent)
    bound = 2 / ranks * model.matrix_elements * BYTES[wire]
    adamw = [adamw_bytes(model.elements, ranks, size) for size in BYTES.values()]
    cells = [model.name, str(ranks), wire]
    cells += [f"{value / 2**20:,.1f}" for value in (*adamw, mean, busiest, to_team)]
    cells += [f"{mean / bound:.3f}"]
    cells += [f"{total(1 + mean / base)}, {1 + busiest / base:.3f}" for base in adamw]
    cells.append(verdict(mean <= bound, [1 + mean / base for base in adamw], ranks))
    return f"| {' | '.join(cells)} |"


def total(ratio: float) -> str:
    """Return a ratio, in bold where a small world exceeds its limit."""
    return f"**{ratio:.3f}**" if ratio > SMALL_WORLD else f"{ratio:.3f}"


def verdict(within: bool, ratios: Sequence[float], ranks: int) -> str:
    """Return which aims are met."""
    text = "bound met" if within else "bound MISSED"
    if ranks >= 64:
        text += f", {LARGE_WORLD} {'met' if max(ratios) <= LARGE_WORLD else 'MISSED'}"
    return text


def section(worlds: Sequence[int] = WORLDS) -> list[str]:
    """Return the text of the section."""
    names = ["model", "W", "wire", *(f"AdamW, {dtype} parameters, MiB" for dtype in BYTES)]
    names += ["Muon adds: mean, MiB", "busiest, MiB", "to its team, MiB", "mean / bound"]
    names += [*(f"total / AdamW, {dtype}: mean, busiest" for dtype in BYTES), "aims"]
    sizes = "; ".join(
        f"{m.name} {m.elements / 1e9:.2f}G parameters, {m.matrix_elements / 1e9:.2f}G of them on Muon"
        for m in MODELS
    )
    lines = []
    for model, ranks in itertools.product(MODELS, worlds):
        lines += [line(model, ranks, wire) for wire in BYTES]
        forget()
    return [
        f"Bytes that a rank sends in one step. {sizes}. AdamW under FSDP2: a reduce-scatter of "
        "gradients, an all-gather of parameters for the forward and one for the backward pass, each "
        "(W - 1) / W of the parameter bytes in the parameters' dtype, so 3 (W - 1) / W * P. Muon adds "
        "directions to the owners and updates back, in the dtype of the wire; what the plan says.",
        "",
        "Aims: added bytes per rank, on average, of at most 2 / W of the matrix bytes in the wire "
        f"dtype (the *bound*); a total of at most {LARGE_WORLD} of AdamW's from W = 64 on, with "
        f"either dtype of the parameters. Bold: a total over {SMALL_WORLD}.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *lines,
        "",
        "The busiest rank owns most: it sends the updates of its matrices to all others. What goes to "
        "the other members of a team (float32 sums and squares of Gram matrices, most on one rank) "
        "stays within a machine and is not in the totals.",
    ]
