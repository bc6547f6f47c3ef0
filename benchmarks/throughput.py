"""Tokens per second of the trainer against a plain hand loop, paired in one run.

    python benchmarks/throughput.py [--pairs 5] [--steps 20]

Both sides train the demo's model on the demo's data with the same optimizer and batch. The trainer
side is `muonscale train` as it is: it reads batches from disk, measures gradient norms, clips,
schedules, logs every step, and writes a checkpoint per block. The hand loop does forward, backward,
`optimizer.step()` and nothing else, on a batch that is already a tensor. Blocks alternate, so that a
change in the machine's speed meets both. Written to benchmarks/results/throughput.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from muonscale.lab.config.load import load_config
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.loop import run_steps
from muonscale.lab.training.setup import Run, build_optimizer, environment, set_up
from muonscale.lab.training.signals import StopRequest

RESULT = Path(__file__).parent / "results" / "throughput.md"


def trainer_seconds(run: Run, steps: int) -> float:
    """Train `steps` more steps with the trainer; return the seconds."""
    train = run.config.train.model_copy(update={"tokens": None, "steps": run.state.step + steps})
    longer = replace(run, config=run.config.model_copy(update={"train": train}))
    start = time.perf_counter()
    run_steps(longer, StopRequest())
    return time.perf_counter() - start


def hand_seconds(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]
) -> float:
    """Train one step per batch with a plain loop; return the seconds."""
    start = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return time.perf_counter() - start


def measure(run: Run, pairs: int, steps: int) -> list[tuple[float, float]]:
    """Return (trainer, hand loop) tokens per second of each pair, after one uncounted pair."""
    model = copy.deepcopy(run.state.model).train()
    optimizer = build_optimizer(model, run.config.optimizer)
    batches = [torch.from_numpy(run.batches.at(step)) for step in range(steps)]
    rates = []
    for _ in range(pairs + 1):
        seconds = trainer_seconds(run, steps), hand_seconds(model, optimizer, batches)
        rates.append(tuple(steps * run.config.train.batch_tokens / s for s in seconds))
    return rates[1:]


def table(run: Run, rates: list[tuple[float, float]], command: str) -> str:
    """Return the result as Markdown."""
    env = environment(run)
    rows = [f"| {a:,.0f} | {b:,.0f} | {a / b:.3f} |" for a, b in rates]
    trainer, hand, ratio = (
        statistics.median(values)
        for values in ([a for a, _ in rates], [b for _, b in rates], [a / b for a, b in rates])
    )
    return "\n".join(
        [
            "# Trainer against a plain hand loop, tokens per second",
            "",
            f"`{command}`; {env['threads']} threads, torch {env['versions']['torch']}, "
            f"transformers {env['versions']['transformers']}.",
            "",
            "| trainer | hand loop | ratio |",
            "|---|---|---|",
            *rows,
            f"| **{trainer:,.0f}** | **{hand:,.0f}** | **{ratio:.3f}** (medians) |",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [f"run.path={folder}/run", "checkpoint.every=1000000", "eval.every=1000000"]
        config = load_config("demo", words)
        run_folder = RunFolder(config.run.path)
        with run_folder.locked():
            run = set_up(config, run_folder, RunConsole(), Processes())
            run_folder.create(config)
            rates = measure(run, arguments.pairs, arguments.steps)
            command = (
                f"python benchmarks/throughput.py --pairs {arguments.pairs} "
                f"--steps {arguments.steps}"
            )
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(text := table(run, rates, command))
    print(text)


if __name__ == "__main__":
    main()
