"""Which optimizer to pretrain with, and which to fine-tune with: the 2 x 2 table at nano size.

    python benchmarks/finetune_table.py [--folder runs/finetune]

Pretrains `llama-nano` on the Python standard library with Muon and with AdamW, and fine-tunes each with
both on the conversations that `instructions.py` writes; two learning rates and two seeds of each. Runs
that are finished are not run again. Everything that is said comes from the run folders. Written to
docs/results/finetune.md.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import run_many

from muonscale.lab.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "docs" / "results" / "finetune.md"
NAMES = {"muon": "Muon", "adamw": "AdamW"}
PRETRAIN = {"muon": 0.02, "adamw": 0.002}
"""Of the recipe; and the best of 0.001, 0.002 and 0.004 for seed 0."""
FINETUNE = {"muon": (0.006, 0.02), "adamw": (0.0015, 0.005)}
SEEDS = (0, 1)
COMMON = ["run.threads=1", "eval.every=1000", "eval.sample_tokens=0", "checkpoint.every=1000"]


def base(folder: Path, first: str, seed: int) -> Path:
    return folder / f"base-{first}-seed{seed}"


def tuned(folder: Path, first: str, second: str, lr: float, seed: int) -> Path:
    return folder / f"chat-{first}-{second}-lr{lr:g}-seed{seed}"


def pretraining(folder: Path, first: str, seed: int) -> list[str]:
    """Return what `muonscale` is asked to do for a run from random weights."""
    return ["train", "demo", f"run.path={base(folder, first, seed)}", f"run.seed={seed}",
            f"optimizer.rule={first}", f"optimizer.lr={PRETRAIN[first]:g}", "train.tokens=600000",
            *COMMON]  # fmt: skip


def finetuning(folder: Path, first: str, second: str, lr: float, seed: int) -> list[str]:
    """Return what `muonscale` is asked to do for a run from pretrained weights."""
    return ["import", str(base(folder, first, seed) / "model"), "demo",
            f"run.path={tuned(folder, first, second, lr, seed)}", f"run.seed={seed}",
            f"data.path={folder / 'instructions' / 'chat.jsonl'}", "data.format=chat",
            "data.chat_template=plain", f"optimizer.rule={second}", f"optimizer.lr={lr:g}",
            "schedule.name=linear", "schedule.final=0", "train.tokens=200000", *COMMON]  # fmt: skip


def loss(path: Path) -> float:
    result: Any = RunFolder(path).result()
    return result["validation_loss"]


def pairs() -> list[tuple[str, str]]:
    return [(first, second) for first in NAMES for second in NAMES]


def listed(found: list[tuple[str, str]]) -> str:
    return ", ".join(f"{NAMES[first]} then {NAMES[second]}" for first, second in found) or "none"


TEXT = """\
# Pretraining and fine-tuning with Muon and AdamW

`{command}`, which writes the conversations (`python benchmarks/instructions.py`) and does for every \
pair of optimizers, learning rate and seed

```sh
{pretrain}
{finetune}
```

torch {torch}, on a CPU, one thread to a run. `llama-nano`, 600,000 tokens of the Python standard \
library's source, then 200,000 tokens of {chats:,} short conversations about that library: arguments and \
first sentences of functions, modules that define them, exercises on strings. The learning rate of \
pretraining is the same for all runs of an optimizer ({rates}: the recipe's, and the best of 0.001, 0.002 \
and 0.004 for seed 0); fine-tuning has two for each.

Validation loss of the assistant's tokens, nats per token, by learning rate and seed; the better rate in bold.

{table}

Before fine-tuning, validation loss on the source text: {bases}.

At the better learning rate of each pair, against pretraining and fine-tuning with Muon (Student's t, \
90 %, {freedom} degrees of freedom: the variance over seeds is taken to be the same everywhere):

{differences}

{finding} In the paper (arXiv 2502.16982, table 6), at 3B/16B parameters and on its benchmarks, Muon for both \
was best and a mixed pair no better than AdamW for both. Here pretraining is 147 steps, so that fine-tuning, 48 \
steps, goes on with it: it tells which optimizer is faster rather than what a mixed pair costs.

Of two rates the better one is at an edge; a third might be better still.
"""


def report(folder: Path) -> str:
    found = {
        (first, second): [
            [loss(tuned(folder, first, second, lr, seed)) for seed in SEEDS]
            for lr in FINETUNE[second]
        ]
        for first, second in pairs()
    }
    best = {pair: min(range(2), key=lambda n, p=points: statistics.fmean(p[n]))
            for pair, points in found.items()}  # fmt: skip
    rows, differences, verdicts = [], [], {}
    groups = [group for points in found.values() for group in points]
    at = {pair: 2 * number + best[pair] for number, pair in enumerate(found)}
    for (first, second), points in found.items():
        cells = []
        for number, (lr, each) in enumerate(zip(FINETUNE[second], points, strict=True)):
            mean = f"{statistics.fmean(each):.4f}"
            mean = f"**{mean}**" if number == best[first, second] else mean
            cells.append(f"{mean} ({', '.join(f'{x:.4f}' for x in each)}) at {lr:g}")
        rows.append([NAMES[first], NAMES[second], *cells])
        if (first, second) != ("muon", "muon"):
            difference, half, freedom = run_many.interval(
                groups, at[first, second], at["muon", "muon"]
            )
            said = run_many.verdict(difference, half)
            verdicts[first, second] = (difference, half)
            differences.append(f"- {NAMES[first]}, then {NAMES[second]}: {said}")
    higher = [pair for pair, (difference, half) in verdicts.items() if difference > half]
    mixed = [("muon", "adamw"), ("adamw", "muon")]
    plain = at["adamw", "adamw"]
    ahead = [(run_many.interval(groups, at[pair], plain), pair) for pair in mixed]
    lower = [pair for (difference, half, _), pair in ahead if difference < -half]
    env = RunFolder(base(folder, "muon", 0)).environment()
    chats = folder / "instructions" / "chat.jsonl"
    return TEXT.format(
        command=shlex.join(["python", "benchmarks/finetune_table.py", "--folder", str(folder)]),
        pretrain=shlex.join(["muonscale", *pretraining(folder, "muon", 0)]),
        finetune=shlex.join(
            ["muonscale", *finetuning(folder, "muon", "adamw", FINETUNE["adamw"][0], 0)]
        ),
        torch=env["versions"]["torch"],
        chats=len(chats.read_text(encoding="utf-8").splitlines()),
        rates=", ".join(f"{NAMES[rule]} {lr:g}" for rule, lr in PRETRAIN.items()),
        table=run_many.markdown(
            ["pretrained with", "fine-tuned with", "first rate", "second rate"], rows
        ),
        bases=", ".join(
            f"{NAMES[rule]} {' and '.join(f'{loss(base(folder, rule, s)):.4f}' for s in SEEDS)}"
            for rule in NAMES
        ),
        freedom=freedom,
        differences="\n".join(differences),
        finding=f"Worse than Muon for both at this size: {listed(higher)}. Of the mixed pairs, better than "
        f"AdamW for both: {listed(lower)}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    folder = parser.parse_args().folder
    script = Path(__file__).with_name("instructions.py")
    if not (folder / "instructions" / "chat.jsonl").exists():
        subprocess.run([sys.executable, script, str(folder / "instructions")], check=True)
    run_many.train(pretraining(folder, first, seed) for first in NAMES for seed in SEEDS)
    run_many.train(
        finetuning(folder, first, second, lr, seed)
        for first, second in pairs()
        for lr in FINETUNE[second]
        for seed in SEEDS
    )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text := report(folder), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
