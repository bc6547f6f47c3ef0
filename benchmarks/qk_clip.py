"""What QK-clip does to a model that is driven to large attention logits.

    python benchmarks/qk_clip.py [--folder runs/qk-clip]

`demo` and `moonlight-nano` at five times their learning rate, without decay of it or of the weights, with
and without QK-clip; two seeds. Runs that are finished are not run again. Everything that is said comes
from the run folders. Written to docs/results/qk-clip.md and .png.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_many

from muonscale.lab.report.matplotlib_charts import draw_panels
from muonscale.lab.report.page import Chart, Mark, Series
from muonscale.lab.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "docs" / "results" / "qk-clip.md"
RECIPES = {"demo": "Llama, multi-head attention", "moonlight-nano": "DeepSeek-V3, latent attention"}
TAU = 100
VARIANTS = {"off": [], "clip": [f"optimizer.qk_clip={TAU}"]}
LABELS = {"off": "no clipping", "clip": f"QK-clip, tau {TAU}"}
SEEDS = (0, 1)
COMMON = [
    "run.threads=1", "optimizer.lr=0.1", "optimizer.weight_decay=0", "schedule.name=constant",
    "schedule.warmup=5", "train.steps=120", "train.batch_tokens=1024", "telemetry.attention_every=1",
    "eval.every=1000", "eval.sample_tokens=0",
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What a run folder says, by step."""

    logit: list[float]
    """Largest of all layers."""
    share: list[float]
    """Largest share of logits above 100, of all layers."""
    loss: list[float]
    clipped: list[int]
    """Heads, of all layers; empty without clipping."""
    heads: int
    validation_loss: float
    extra: float
    """Part of the training time that recording logits took."""


def path(folder: Path, recipe: str, variant: str, seed: int) -> Path:
    return folder / f"{recipe}-{variant}-seed{seed}"


def words(folder: Path, recipe: str, variant: str, seed: int) -> list[str]:
    """Return what `muonscale` is asked to do for a run."""
    place = [f"run.path={path(folder, recipe, variant, seed)}", f"run.seed={seed}"]
    return ["train", recipe, *place, *COMMON, *VARIANTS[variant]]


def read(place: Path) -> Seen:
    run = RunFolder(place)
    result: Any = run.result()
    steps = run.read_metrics("train")
    clips = [record["qk_clip"] for record in steps if "qk_clip" in record]
    return Seen(
        [max(record["attention"]["max_logit"]) for record in steps],
        [max(record["attention"]["share_above_100"]) for record in steps],
        [record["loss"] for record in steps],
        [clip["clipped"] for clip in clips],
        clips[0]["heads"] if clips else 0,
        result["validation_loss"],
        result["attention"]["seconds"] / result["train_seconds"],
    )


Runs = dict[str, dict[str, list[Seen]]]
"""By recipe, variant and seed."""


def table(runs: Runs) -> str:
    rows = []
    for recipe, variants in runs.items():
        for variant, each in variants.items():
            for seed, run in zip(SEEDS, each, strict=True):
                first = next((n for n, x in enumerate(run.logit, 1) if x > TAU), None)
                heads = f"{max(run.clipped)} of {run.heads}" if run.clipped else "-"
                rows.append(
                    [
                        recipe,
                        LABELS[variant],
                        str(seed),
                        "-" if first is None else str(first),
                        f"{max(run.logit):,.0f}",
                        f"{run.logit[-1]:,.0f}",
                        f"{max(run.share):.2g}",
                        heads,
                        f"{run.validation_loss:.3f}",
                        f"{100 * run.extra:.0f} %",
                    ]
                )
    head = ["recipe", "", "seed", f"first step above {TAU}", "largest logit", "at the end",
            "largest share above 100", "heads clipped in a step, at most", "validation loss",
            "time to record"]  # fmt: skip
    return run_many.markdown(head, rows)


def draw(runs: Runs) -> None:
    """Draw the largest logit and the loss by step, a column for each recipe."""
    logits = [chart(recipe, runs, "largest attention logit") for recipe in runs]
    losses = [chart(recipe, runs, "training loss, nats per token") for recipe in runs]
    title = "QK-clip under large attention logits"
    RESULT.with_suffix(".png").write_bytes(draw_panels([logits, losses], title, (11, 8))["png"])


def chart(recipe: str, runs: Runs, what: str) -> Chart:
    is_logit = "logit" in what
    return Chart(
        name=recipe,
        title=f"{recipe}: {RECIPES[recipe]}" if is_logit else "",
        x_label="step",
        y_label=what,
        series=tuple(
            Series(
                name=f"{LABELS[variant]}, seed {seed}",
                group=LABELS[variant],
                x=tuple(range(1, len(run.loss) + 1)),
                y=tuple(run.logit if is_logit else run.loss),
            )
            for variant, each in runs[recipe].items()
            for seed, run in zip(SEEDS, each, strict=True)
        ),
        marks=(Mark(axis="y", at=TAU, label=f"tau {TAU}"),) if is_logit else (),
        log_y=is_logit,
    )


def finding(runs: Runs) -> str:
    said = []
    for recipe, variants in runs.items():
        off = [run.logit[-1] for run in variants["off"]]
        clip = [run.logit[-1] for run in variants["clip"]]
        losses = [[run.validation_loss for run in variants[v]] for v in ("clip", "off")]
        difference, half, _ = run_many.interval(losses, 0, 1)
        said.append(
            f"- `{recipe}`: at the end the largest logit is {min(off):,.0f} to {max(off):,.0f} without and "
            f"{min(clip):,.0f} to {max(clip):,.0f} with clipping. Validation loss with it less that "
            f"without: {run_many.verdict(difference, half)}."
        )
    return "\n".join(said)


TEXT = """\
# QK-clip under large attention logits

`{command}`, which does for both recipes and seeds

```sh
{off}
{clip}
```

torch {torch}, on a CPU, one thread to a run.

Five times the recipe's learning rate, constant, and no weight decay: a setting meant to go wrong. QK-clip \
(arXiv 2507.20534) scales the weights of queries and keys of a head whose largest logit in a step was above \
{tau}; logits above it are of weights that are then scaled, so that the figure may pass {tau} by what \
one step adds.

{finding}

Two seeds are few for a loss; intervals are Student's t with two degrees of freedom.

{table}

Logits are after scaling, of all pairs that attention sees. Time to record: part of the training time that \
computing logits of every step took.

![Largest attention logit and training loss by step](qk-clip.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/qk-clip"))
    folder = parser.parse_args().folder
    asked = [(recipe, v, seed) for recipe in RECIPES for seed in SEEDS for v in VARIANTS]
    run_many.train(words(folder, *each) for each in asked)
    runs: Runs = {
        recipe: {v: [read(path(folder, recipe, v, seed)) for seed in SEEDS] for v in VARIANTS}
        for recipe in RECIPES
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    draw(runs)
    env = RunFolder(path(folder, "demo", "off", 0)).environment()
    text = TEXT.format(
        command=shlex.join(["python", "benchmarks/qk_clip.py", "--folder", str(folder)]),
        **{v: shlex.join(["muonscale", *words(folder, "demo", v, 0)]) for v in VARIANTS},
        torch=env["versions"]["torch"],
        tau=TAU,
        finding=finding(runs),
        table=table(runs),
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
