"""Muon against AdamW on `moonlight-nano`: validation loss, and the spectra of the weights.

    python benchmarks/muon_adamw.py [--folder runs/muon-adamw]

Twelve runs: three learning rates for each optimizer, two seeds, equal tokens. Runs that are finished
are not run again. Everything that is said comes from the run folders. Written to
docs/results/muon-adamw.md and .png.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_many
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muonscale.lab.models.matrix_kinds import KINDS
from muonscale.lab.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "docs" / "results" / "muon-adamw.md"
RATES = {"muon": (0.01, 0.02, 0.04), "adamw": (0.002, 0.004, 0.008)}
NAMES = {"muon": "Muon", "adamw": "AdamW"}
COLORS = {"muon": "#4477aa", "adamw": "#cc3311"}
SEEDS = (0, 1)
COMMON = ["run.threads=1", "train.tokens=600000", "eval.every=1000", "eval.sample_tokens=0"]
WATCHED = ["telemetry.every=12", "telemetry.matrices=12"]


@dataclass(frozen=True)
class Trained:
    """What a run folder says."""

    loss: float
    """Validation loss, nats per token."""
    seconds: float
    steps: list[int]
    entropy: dict[str, list[float]]
    """SVD entropy of the weights by kind of matrix, at these steps."""
    stable_rank: dict[str, list[float]]


def path(folder: Path, rule: str, lr: float, seed: int) -> Path:
    return folder / f"{rule}-lr{lr:g}-seed{seed}"


def words(folder: Path, rule: str, lr: float, seed: int) -> list[str]:
    """Return what `muonscale` is asked to do for a run."""
    place = [f"run.path={path(folder, rule, lr, seed)}", f"run.seed={seed}"]
    return ["train", "moonlight-nano", *place, f"optimizer.rule={rule}", f"optimizer.lr={lr:g}",
            *COMMON, *WATCHED]  # fmt: skip


def read(place: Path) -> Trained:
    run = RunFolder(place)
    result: Any = run.result()
    seen = run.read_metrics("telemetry")
    kinds = [kind for kind in KINDS if kind in seen[0]["matrices"]]

    def series(figure: str) -> dict[str, list[float]]:
        return {kind: [record["matrices"][kind][figure] for record in seen] for kind in kinds}

    return Trained(
        result["validation_loss"],
        result["train_seconds"],
        [record["step"] for record in seen],
        series("weight_svd_entropy"),
        series("weight_stable_rank"),
    )


Runs = dict[str, list[list[Trained]]]
"""By rule, learning rate and seed."""


def best(runs: Runs) -> dict[str, int]:
    """Return the number of the learning rate with the lowest mean loss."""
    means = {rule: [statistics.fmean(r.loss for r in each) for each in points]
             for rule, points in runs.items()}  # fmt: skip
    return {rule: values.index(min(values)) for rule, values in means.items()}


def loss_table(runs: Runs, chosen: dict[str, int]) -> str:
    rows = []
    for rule, points in runs.items():
        for number, (lr, each) in enumerate(zip(RATES[rule], points, strict=True)):
            losses = [run.loss for run in each]
            mean = f"{statistics.fmean(losses):.4f}"
            mean = f"**{mean}**" if number == chosen[rule] else mean
            longest = max(run.seconds for run in each)
            rows.append(
                [NAMES[rule], f"{lr:g}", *(f"{x:.4f}" for x in losses), mean, f"{longest:.0f} s"]
            )
    head = ["optimizer", "learning rate", *(f"seed {s}" for s in SEEDS), "mean", "longest training"]
    return run_many.markdown(head, rows)


def spectrum_table(muon: Sequence[Trained], adamw: Sequence[Trained]) -> str:
    """Compare the two at their best learning rates: at the end, and over all looks."""
    rows = []
    for kind in muon[0].entropy:
        ends = [statistics.fmean(r.entropy[kind][-1] for r in each) for each in (muon, adamw)]
        ranks = [statistics.fmean(r.stable_rank[kind][-1] for r in each) for each in (muon, adamw)]
        pairs = [(a, b) for one, two in zip(muon, adamw, strict=True)
                 for a, b in zip(one.entropy[kind], two.entropy[kind], strict=True)]  # fmt: skip
        above = sum(a > b for a, b in pairs)
        cells = [
            *(f"{x:.4f}" for x in ends),
            f"{ends[0] - ends[1]:+.4f}",
            f"{above} of {len(pairs)}",
        ]
        rows.append([kind, *cells, *(f"{x:.1f}" for x in ranks)])
    head = ["matrices", "entropy, Muon", "AdamW", "difference", "Muon higher",
            "stable rank, Muon", "AdamW"]  # fmt: skip
    return run_many.markdown(head, rows)


def spectrum_verdict(muon: Sequence[Trained], adamw: Sequence[Trained]) -> str:
    higher = [kind for kind in muon[0].entropy
              if all(a.entropy[kind][-1] > b.entropy[kind][-1]
                     for a, b in zip(muon, adamw, strict=True))]  # fmt: skip
    lower = [kind for kind in muon[0].entropy
             if all(a.entropy[kind][-1] < b.entropy[kind][-1]
                    for a, b in zip(muon, adamw, strict=True))]  # fmt: skip
    shows = "shows" if len(higher) == len(muon[0].entropy) else "does not show"
    return (
        f"The paper's finding, entropy higher with Muon in every group, **{shows}** at this size: at "
        f"the end it is higher with Muon in both seeds for {', '.join(higher) or 'no group'}, lower in "
        f"both for {', '.join(lower) or 'no group'}."
    )


def draw(muon: Sequence[Trained], adamw: Sequence[Trained]) -> None:
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(2, 3, sharex=True).flat, muon[0].entropy, strict=False):
        for rule, each in (("muon", muon), ("adamw", adamw)):
            for number, run in enumerate(each):
                label = NAMES[rule] if number == 0 else None
                axes.plot(run.steps, run.entropy[kind], color=COLORS[rule], label=label)
        axes.set_title(kind, fontsize="medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.supxlabel("step")
    figure.supylabel("SVD entropy of the weights")
    figure.savefig(RESULT.with_suffix(".png"))


TEXT = """\
# Muon and AdamW on moonlight-nano

`{command}`, which does for every optimizer, learning rate and seed

```sh
{example}
```

torch {torch}, on a CPU, one thread to a run, two runs at a time.

A mixture of experts with latent attention, {steps} steps of 4,096 tokens of the Python standard \
library's source, weight decay 0.1, cosine. Both optimizers have three learning rates a factor of two \
apart and two seeds; embeddings, head and norms are on AdamW in both, at the same learning rate as the \
matrices, which Muon's update RMS of 0.2 is meant for.

## Loss

Validation loss, on the whole split after the last step.

{losses}

{edges}Muon at its best learning rate less AdamW at its best: {verdict} (Student's t with {freedom} degrees \
of freedom: the variance over seeds is taken to be the same at every learning rate). The best of three \
learning rates is picked by the same losses in both.

## Spectra

SVD entropy of the weights (arXiv 2502.16982, section 3.4) by the paper's groups of matrices, at the best \
learning rates, every 12 steps: mean over 12 matrices of a group, spread evenly, and over the seeds. \
"Muon higher" counts looks of both seeds. Stable rank at the end.

{spectra}

{finding}

![SVD entropy by step and group](muon-adamw.png)
"""


def report(runs: Runs, folder: Path) -> str:
    chosen = best(runs)
    losses = [[run.loss for run in each] for points in runs.values() for each in points]
    difference, half, freedom = run_many.interval(
        losses, chosen["muon"], len(RATES["muon"]) + chosen["adamw"]
    )
    edges = [NAMES[rule] for rule, number in chosen.items() if number in (0, len(RATES[rule]) - 1)]
    edge = f"The best of {' and '.join(edges)} is at the edge of what was tried. " if edges else ""
    muon, adamw = (runs[rule][chosen[rule]] for rule in ("muon", "adamw"))
    draw(muon, adamw)
    first = path(folder, "muon", RATES["muon"][0], SEEDS[0])
    env = RunFolder(first).environment()
    steps = RunFolder(first).read_metrics("train")
    return TEXT.format(
        command=shlex.join(["python", "benchmarks/muon_adamw.py", "--folder", str(folder)]),
        example=shlex.join(["muonscale", *words(folder, "muon", RATES["muon"][0], SEEDS[0])]),
        torch=env["versions"]["torch"],
        steps=len(steps),
        losses=loss_table(runs, chosen),
        edges=edge,
        verdict=run_many.verdict(difference, half),
        freedom=freedom,
        spectra=spectrum_table(muon, adamw),
        finding=spectrum_verdict(muon, adamw),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/muon-adamw"))
    folder = parser.parse_args().folder
    asked = [(rule, lr, seed) for seed in SEEDS for rule, rates in RATES.items() for lr in rates]
    run_many.train(words(folder, *each) for each in asked)
    runs: Runs = {
        rule: [[read(path(folder, rule, lr, seed)) for seed in SEEDS] for lr in rates]
        for rule, rates in RATES.items()
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text := report(runs, folder), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
