"""One process of a job that benchmarks/distributed_training.py measures; prints JSON on the first.

    python benchmarks/training_worker.py BLOCKS STEPS [MIB] [section.key=value ...]

Sets the demo up as `muonscale train` does, and trains BLOCKS of STEPS steps, after one that does not
count: with and without overlap in turn. MIB caps the rounds of the optimizer's step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from distributed_memory import rounds_of

from muonscale.lab.config.load import load_config
from muonscale.lab.parallel.processes import init_processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.loop import run_steps
from muonscale.lab.training.setup import Run, resolve_device, set_up
from muonscale.lab.training.signals import StopRequest
from muonscale.optim.newton_schulz.subgroup import ALL_GATHER

NEVER = 10**9


@contextmanager
def without_overlap() -> Generator[None]:
    """Let every exchange of the optimizer be over before anything else is done."""

    def waiting(collective: Any) -> Any:
        def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            work = collective(*args, async_op=async_op, **kwargs)
            if async_op:
                work.wait()
            return work

        return call

    names = ("all_to_all_single", ALL_GATHER)
    patches = [mock.patch.object(dist, name, waiting(getattr(dist, name))) for name in names]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def block(run: Run, steps: int) -> list[dict[str, Any]]:
    """Train `steps` more steps; return their records."""
    train = run.config.train.model_copy(update={"tokens": None, "steps": run.state.step + steps})
    before = run.state.step
    run_steps(replace(run, config=run.config.model_copy(update={"train": train})), StopRequest())
    return [r for r in run.folder.read_metrics("train") if r["step"] > before]


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return what a block shows."""
    step, optimizer = (sum(r[key] for r in records) for key in ("step_ms", "optimizer_ms"))
    return {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records),
        "optimizer_ms": statistics.median(r["optimizer_ms"] for r in records),
        "share": optimizer / step,
    }


def main() -> None:
    blocks, steps, mib = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    path = Path(tempfile.gettempdir()) / f"muonscale-bench-{sys.argv[4]}"
    words = [f"run.path={path}", f"eval.every={NEVER}", f"checkpoint.every={NEVER}", *sys.argv[5:]]
    config = load_config("demo", words)
    folder = RunFolder(path)
    with (
        init_processes(config.parallel, resolve_device("auto")) as processes,
        rounds_of(mib * 2**20),
    ):
        if processes.is_first:
            folder.path.mkdir(exist_ok=True)
        run = set_up(config, folder, RunConsole.silent(), processes)
        block(run, steps)
        found: dict[str, list[dict[str, float]]] = {"overlap": [], "no overlap": []}
        for _ in range(blocks):
            for name, how in (("overlap", nullcontext()), ("no overlap", without_overlap())):
                with how:
                    records = block(run, steps)
                if processes.is_first:
                    found[name].append(figures(records))
    if processes.is_first:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
