"""What Muon keeps on every rank, and what a step needs beside it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distributed_stack import FFN, LAYERS, WIDTH, Stack
from distributed_world import run_on

from muonscale import Muon
from muonscale.lab.bench.measure import peak_extra_bytes
from muonscale.optim.distributed.assignment import ROUND_BYTES, assign_owners
from muonscale.optim.distributed.dtensor import to_local
from muonscale.optim.distributed.memory import StepOptions, step_memory
from muonscale.optim.distributed.zero1 import PartitionedTensor
from muonscale.optim.rules import MUON

WORLDS = (2, 3, 4)
LAYOUTS = ("FSDP2", "data parallel")
WIRES = ("float32", "bfloat16")
SMALL_ROUND = 2**20


@contextmanager
def rounds_of(nbytes: int) -> Generator[None]:
    """Cap the rounds of the plan at a number of bytes per rank."""
    defaults = assign_owners.__kwdefaults__ | {"round_bytes": nbytes}
    with mock.patch.object(assign_owners, "__kwdefaults__", defaults):
        yield


def held_bytes(optimizer: Muon) -> int:
    """Return the bytes of this rank's state, without the step counters."""
    held = 0
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, PartitionedTensor):
                held += sum(part.nbytes for part in value.parts.values())
            elif value.ndim:
                held += to_local(value).nbytes
    return held


def facts(where: str, wire: str, round_bytes: int) -> dict[str, Any]:
    """Return what this rank holds, and its peak in the third step."""
    stack = Stack(sharded=where == "FSDP2")
    group = dist.group.WORLD if where == "data parallel" else None
    named = [(f"matrix{i}", p) for i, p in enumerate(stack.parameters)]
    with rounds_of(round_bytes):
        optimizer = Muon(named, ns_dtype="float32", comm_dtype=wire, process_group=group)
        for _ in range(2):
            stack.restore_gradients()
            optimizer.step()
        stack.restore_gradients()
        peak = peak_extra_bytes(optimizer.step)
        (rank_group,) = optimizer._context.rank_groups(optimizer.param_groups, MUON)
    options = StepOptions(products=torch.float32, comm_dtype=getattr(torch, wire))
    return {
        "said": step_memory(rank_group.assignment, dist.get_rank(), options).transient,
        "held": held_bytes(optimizer),
        "peak": peak,
        "share": stack.elements * 4 / dist.get_world_size(),
    }


def line(ranks: int, where: str, wire: str, round_bytes: int) -> str:
    """Return one line of the table: the rank with most."""
    found = run_on(ranks, facts, where, wire, round_bytes)
    share = found[0]["share"]
    held, peak, said = (max(rank[key] for rank in found) for key in ("held", "peak", "said"))
    cells = [str(ranks), where, wire, f"{round_bytes // 2**20}"]
    cells += [f"{value / 2**20:.2f}" for value in (share, held)]
    cells += [f"{held / share:.3f}", f"{peak / 2**20:.2f}", f"{peak / share:.2f}"]
    cells += [f"{said / 2**20:.2f}", f"{said / peak:.2f}"]
    return f"| {' | '.join(cells)} |"


def section() -> list[str]:
    """Return the text of the section."""
    names = ["W", "layout", "wire", "cap of a round, MiB", "share, MiB", "state, MiB"]
    names += ["state / share", "peak of a step, MiB", "peak / share", "said, MiB", "said / peak"]
    return [
        f"Matrices of {LAYERS} Llama layers of width {WIDTH} and feed-forward {FFN}, all on Muon, "
        "float32 parameters and products, gloo; the rank with most. *share*: matrix parameters x 4 "
        "bytes / W. *state*: momentum. *data parallel*: whole parameters on every rank, "
        "`process_group=` (ZeRO-1). *peak*: most bytes of tensors alive at once during the third step "
        "beyond those before it, from the profiler's record of allocations. *said*: by "
        "`step_memory` of the plan, before the step.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(
            line(ranks, where, wire, cap)
            for ranks in WORLDS
            for where in LAYOUTS
            for wire, cap in [*((w, ROUND_BYTES) for w in WIRES), (WIRES[0], SMALL_ROUND)]
        ),
        "",
        f"A round takes up to {ROUND_BYTES // 2**20} MiB of matrices, more than any share here, so that "
        "a step is one round and its peak grows with the share; the lines with a smaller cap show what "
        "rounds save.",
    ]
