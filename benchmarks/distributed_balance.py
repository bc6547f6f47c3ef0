"""How evenly the plan deals out Newton-Schulz, beside the policies of others; pure.

A *policy* gets all matrices of a model in order, as (shape, operations), and says how long the step
takes: the operations of the rank that is done last. They are written here after what the code of
others does, and all get the same matrices and the same costs, those of ours.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence

from distributed_models import MODELS, Model, planned

from muonscale.optim.distributed import assignment
from muonscale.optim.distributed.assignment import assign_owners, shapes_of
from muonscale.optim.matrices import sharding

WORLDS = (8, 64, 256, 1024, 4096)

Items = Sequence[tuple[tuple[int, int], int]]
"""(out, in) and operations of every matrix, in the order of the model."""


def barriers(items: Items, ranks: int) -> int:
    """Largest first, one matrix per rank and chunk; all wait for the longest of every chunk."""
    flops = _largest_first(items)
    return sum(max(flops[first : first + ranks]) for first in range(0, len(flops), ranks))


def by_index(items: Items, ranks: int) -> int:
    """Matrix number i is rank i % W's."""
    return max(sum(f for _, f in items[rank::ranks]) for rank in range(min(ranks, len(items))))


def padded(items: Items, ranks: int) -> int:
    """Matrices of one shape, filled up with zeros to a multiple of W; every rank as many."""
    counts = Counter(items)
    return sum(-(-count // ranks) * flops for (_, flops), count in counts.items())


def contiguous(items: Items, ranks: int) -> int:
    """Matrices of one shape, ceil(n / W) adjacent ones per rank, the first ranks served first."""
    loads = [0] * ranks
    for (_, flops), count in Counter(items).items():
        share = -(-count // ranks)
        for rank in range(ranks):
            loads[rank] += flops * max(0, min(share, count - rank * share))
    return max(loads)


def to_and_fro(items: Items, ranks: int) -> int:
    """Largest first, dealt to ranks 0 to W - 1, then back from W - 1 to 0, and so on."""
    loads = [0] * ranks
    for i, flops in enumerate(_largest_first(items)):
        turn, place = divmod(i, ranks)
        loads[place if turn % 2 == 0 else ranks - 1 - place] += flops
    return max(loads)


def longest_first(items: Items, ranks: int) -> int:
    """Longest processing time first, wherever a matrix lies."""
    loads = [0] * ranks
    for flops in _largest_first(items):
        heapq.heapreplace(loads, loads[0] + flops)
    return max(loads)


def _largest_first(items: Items) -> list[int]:
    return sorted((flops for _, flops in items), reverse=True)


POLICIES: dict[str, Callable[[Items, int], int]] = {
    "chunks with a barrier": barriers,
    "index % W": by_index,
    "padded per shape": padded,
    "contiguous per shape": contiguous,
    "ping-pong": to_and_fro,
    "plain LPT": longest_first,
}


def forget() -> None:
    """Empty the caches of the plan, so that planning is timed as in a new process."""
    for function in (
        sharding.replicas_by_coord,
        sharding.pieces,
        sharding.pieces_by_matrix,
        assignment.replica_sets,
        assignment._boxes,
    ):
        function.cache_clear()


def line(model: Model, ranks: int) -> str:
    """Return one line of the table."""
    forget()
    parameters = planned(model, ranks)
    began = time.perf_counter()
    ours = assign_owners(parameters)
    seconds = time.perf_counter() - began
    alone = assign_owners(parameters, subgroup_size=1)
    forget()
    items = [item for p in parameters for item in zip(shapes_of(p.sharding), p.flops, strict=True)]
    total = sum(flops for _, flops in items)
    busiest = [
        max(ours.loads()),
        max(alone.loads()),
        *(policy(items, ranks) for policy in POLICIES.values()),
    ]
    busiest.append(max(flops for _, flops in items))
    head, *rest = (f"{flops * ranks / total:.2f}" for flops in busiest)
    cells = [
        model.name,
        str(ranks),
        f"**{head}**",
        str(ours.subgroup_size),
        *rest,
        f"{seconds:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def section() -> list[str]:
    """Return the text of the section."""
    names = [
        "model",
        "W",
        "**ours**",
        "teams of",
        "ours, none split",
        *POLICIES,
        "largest matrix",
        "planning, s",
    ]
    counts = "; ".join(f"{m.name} {len(_matrices(m))} matrices" for m in MODELS)
    return [
        "Operations of the busiest rank, times W, over those of all matrices: 1 is perfect. FSDP2 "
        f"layout, five Jordan steps with bfloat16 products on a GPU. {counts}. *largest matrix*: "
        "what no policy that leaves matrices whole can go below. *planning*: `assign_owners` in a new "
        "process, once per run on every rank.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(line(model, ranks) for model in MODELS for ranks in WORLDS),
        "",
        "All policies get the same logical matrices (gate and up of an expert apart) and costs. "
        "Chunks with a barrier: Keller Jordan's Muon. index % W: muon-fsdp2. Padded per shape: dion. "
        "Contiguous per shape: nanochat. Ping-pong: Megatron-LM before it had LPT. Plain LPT: "
        "torchtitan, dmuon, Megatron-LM. Ours is LPT too, but shares a large matrix among adjacent "
        "ranks where there are too few (at 300 operations to a byte), and leaves a matrix that is whole on a "
        "rank there as long as moving it would cost more than it saves.",
    ]


def _matrices(model: Model) -> list[tuple[int, int]]:
    return [shape for p in planned(model, 1) for shape in shapes_of(p.sharding)]
