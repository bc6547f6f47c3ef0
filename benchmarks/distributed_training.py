"""The trainer on several processes: tokens per second, and the optimizer's share of a step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "training_worker.py"
PAIRS, STEPS, WIDE_STEPS = 4, 20, 6
WIDE = ("model.fields.hidden_size=256", "model.fields.intermediate_size=704")
LAYOUTS = ("fsdp", "ddp")


def measure(
    processes: int, threads: int, blocks: int, steps: int, mib: int, *words: str
) -> dict[str, list[dict[str, float]]]:
    """Return what a job measures, by `overlap` and `no overlap`."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(WORKER), str(blocks), str(steps), str(mib), uuid.uuid4().hex, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(found: list[dict[str, float]], key: str) -> float:
    """Return the median of a figure over blocks."""
    return statistics.median(each[key] for each in found)


def speed() -> list[str]:
    """Return the table of tokens per second: jobs alternate, so that all meet the same machine."""
    sides: dict[str, tuple[Any, ...]] = {
        "1 process, 2 threads": (1, 2),
        "2 processes, 1 thread, fsdp": (2, 1, "parallel.data=fsdp"),
        "2 processes, 1 thread, ddp": (2, 1, "parallel.data=ddp"),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(PAIRS):
        for name, (processes, threads, *words) in sides.items():
            found = measure(processes, threads, 1, STEPS, 64, *words)
            rates[name].append(median(found["overlap"], "tokens_per_second"))
    base = rates["1 process, 2 threads"]
    lines = []
    for name, values in rates.items():
        ratios = [value / one for value, one in zip(values, base, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(values):,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    return ["| demo | tokens/s | against one process |", "|---|---|---|", *lines]


def overlap() -> list[str]:
    """Return the table of the optimizer's share."""
    lines = []
    for processes in (2, 4):
        for layout in LAYOUTS:
            for mib in (64, 1):
                found = measure(
                    processes, 1, PAIRS, WIDE_STEPS, mib, f"parallel.data={layout}", *WIDE
                )
                on, off = found["overlap"], found["no overlap"]
                pairs = zip(on, off, strict=True)
                ratio = statistics.median(b["optimizer_ms"] / a["optimizer_ms"] for a, b in pairs)
                cells = [str(processes), layout, str(mib)]
                cells += [f"{median(side, 'optimizer_ms'):.0f}" for side in (on, off)]
                cells += [f"{100 * median(side, 'share'):.1f} %" for side in (on, off)]
                lines.append(f"| {' | '.join([*cells, f'{ratio:.2f}'])} |")
    names = ["W", "layout", "cap of a round, MiB", "optimizer, ms: overlap", "none"]
    names += ["share of the step: overlap", "none", "none / overlap"]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *lines]


def section() -> list[str]:
    """Return the text of the section."""
    return [
        f"`muonscale train demo` (1M parameters, 4,096 tokens a step), {STEPS} steps a block, medians; "
        f"jobs one after the other, {PAIRS} times each; in brackets the range of the ratios.",
        "",
        *speed(),
        "",
        f"The demo at width 256 (3.7M parameters), one thread per process; blocks of {WIDE_STEPS} steps with "
        f"and without overlap in turn, {PAIRS} of each. *none*: every exchange of the optimizer's step "
        "is waited for where it begins. A round takes up to 64 MiB, more than all matrices here, so "
        "that there is nothing to overlap with; under a cap of 1 MiB there are several rounds.",
        "",
        *overlap(),
        "",
        "4 processes share 2 cores here: what one of them waits for, another computes, so that overlap "
        "has little to hide.",
    ]
