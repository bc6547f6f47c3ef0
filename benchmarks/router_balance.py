"""Does the router bias keep experts in balance, and what does it cost: `moonlight-nano` with and without.

    python benchmarks/router_balance.py [--folder runs/router-balance]

Six runs of `muonscale train moonlight-nano`: three seeds, each with the recipe's bias update and
without any. A run that is finished is not run again, one that was stopped goes on. Everything that
is said comes from the run folders. Written to docs/results/router-balance.md and .png.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import numpy as np
import run_many
from router_balance_figure import draw
from router_balance_runs import LABELS, SEEDS, VARIANTS, Balanced, read, shape, words

from muonscale.lab.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "docs" / "results" / "router-balance.md"
STEPS = (20, 50, 100, 200)
BEFORE = 10
"""Steps that a figure at a step is averaged over: it and those before."""
LAST = 20
"""Steps at the end of a run that its last figures are of."""
FEW = 0.01
"""An expert with less than this part of the mean load is as good as dead."""


def mean_until(values: np.ndarray, step: int, window: int) -> float:
    """Return the mean over a window of steps of which `step` is the last, the first step being 1."""
    return float(values[max(0, step - window) : step].mean())


def span(values: list[float], digits: int = 2) -> str:
    """Return the smallest and the largest, or one number where both read the same."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def violation_table(runs: dict[str, list[Balanced]]) -> str:
    head = ["", "seed", *(f"step {s}" for s in STEPS), "end", "worst layer, end"]
    rows = []
    for variant, each in runs.items():
        for run in each:
            steps = [mean_until(run.violation, step, BEFORE) for step in STEPS]
            ends = [mean_until(v, len(v), LAST) for v in (run.violation, run.worst)]
            after = run.worst[STEPS[1] :].max()
            cells = [f"{value:.2f}" for value in (*steps, *ends, after)]
            rows.append([LABELS[variant], str(run.seed), *cells])
    return run_many.markdown([*head, f"worst layer, any step after {STEPS[1]}"], rows)


def experts_table(runs: dict[str, list[Balanced]]) -> str:
    head = ["", "seed", "least load", f"steps with one below {FEW:.0%}", "experts never chosen"]
    rows = []
    for variant, each in runs.items():
        for run in each:
            last = run.quietest[-LAST:]
            rows.append(
                [
                    LABELS[variant],
                    str(run.seed),
                    f"{last.min():.3f}",
                    f"{(last < FEW).sum()} of {LAST}",
                    f"{run.dead[-LAST:].mean():.2f}",
                    f"{run.entropy[-LAST:].mean():.3f}",
                    f"{run.validation_loss:.4f}",
                ]
            )
    return run_many.markdown([*head, "router entropy", "validation loss"], rows)


def verdict(runs: dict[str, list[Balanced]]) -> list[str]:
    """Say in words what the tables show, whichever way it is."""
    said = [_violation(name, each) for name, each in runs.items()]
    return [f"- {sentence}" for sentence in (*said, _compared(runs), _loss(runs))]


def _at_end(run: Balanced) -> float:
    return mean_until(run.violation, len(run.violation), LAST)


def _violation(name: str, each: list[Balanced]) -> str:
    early = [mean_until(run.violation, STEPS[0], BEFORE) for run in each]
    end = [_at_end(run) for run in each]
    lower = sum(b < a for a, b in zip(early, end, strict=True))
    after = max(run.worst[STEPS[1] :].max() for run in each)
    least = min(run.quietest[-LAST:].min() for run in each)
    few = sum(int((run.quietest[-LAST:] < FEW).sum()) for run in each)
    return (
        f"**{LABELS[name].capitalize()}**: MaxVio is {span(early)} at step {STEPS[0]} and "
        f"{span(end)} at the end, lower than at step {STEPS[0]} in {lower} of {len(each)} seeds. After "
        f"step {STEPS[1]} the worst layer of any seed and step is at {after:.2f}. In the last {LAST} "
        f"steps the least load of an expert is {least:.3f} of the mean; {few} of the "
        f"{LAST * len(each)} steps have one below {FEW:.0%}."
    )


def _compared(runs: dict[str, list[Balanced]]) -> str:
    lower = sum(_at_end(a) < _at_end(b) for a, b in zip(runs["bias"], runs["off"], strict=True))
    return f"MaxVio at the end is lower with the update in {lower} of {len(SEEDS)} seeds."


def _loss(runs: dict[str, list[Balanced]]) -> str:
    bias, off = ([run.validation_loss for run in runs[name]] for name in ("bias", "off"))
    mean, half = run_many.paired(bias, off)
    each = ", ".join(f"{a - b:+.4f}" for a, b in zip(bias, off, strict=True))
    return (
        f"Validation loss with the update less that without: {run_many.verdict(mean, half)} (Student's t "
        f"on the paired differences of {len(SEEDS)} seeds, {each})."
    )


TEXT = """\
# Does the router bias keep experts in balance

`{command}`, which does for seeds {seeds}

```sh
{bias}
{off}
```

torch {torch}, transformers {transformers}, on a CPU.

Latent attention; a dense layer, then {layers} layers of {experts} routed experts, of which a token \
meets {chosen}, beside {shared} shared; {steps} steps of {tokens:,} tokens of the Python standard \
library's source. The update is Moonlight's (arXiv 2502.16982, appendix C) with the recipe's rate of \
{rate:g}, ten times the paper's. Without it biases stay 0. Neither has an auxiliary loss.

{verdict}

![MaxVio, and the loads of the busiest and the least used expert, by step]({figure})

Lines are means over seeds, bands their range.

## Load violation

MaxVio = max_i load_i / mean load - 1 (arXiv 2408.15664, section 4.1); 0 is balance. The load of an \
expert is the number of times it was chosen in the batch of one step; its mean is {mean_load:,}. Means \
over the {layers} layers unless it says worst. The figure of a step is averaged over the {before} steps \
up to it, that of the end over the last {last}.

{violations}

## Experts and loss

Of the last {last} steps. Least load: of any expert of any layer in any of them, over the mean load. An \
expert below {few:.0%} of it, {few_tokens:.0f} tokens of a step, is as good as dead. Never chosen: \
experts that had no token of a step, of all {all_experts}, mean over the steps. Router entropy: of a \
token's affinities, the bias left out, over its largest value. Validation loss: of the whole validation \
split after the last step, nats per token; both variants of a seed have the same split, initial weights \
and order of data.

{kept}
"""


def report(runs: dict[str, list[Balanced]], folder: Path) -> str:
    """Return the result as Markdown."""
    first = folder / f"bias-seed{SEEDS[0]}"
    config, model = RunFolder(first).saved_config(), shape(first)
    versions = RunFolder(first).environment()["versions"]
    experts, chosen = model["n_routed_experts"], model["num_experts_per_tok"]
    layers = model["num_hidden_layers"] - model["first_k_dense_replace"]
    tokens = config["train"]["batch_tokens"]
    mean_load = tokens * chosen // experts
    return TEXT.format(
        command=shlex.join(["python", "benchmarks/router_balance.py", "--folder", str(folder)]),
        seeds=", ".join(map(str, SEEDS)),
        **{name: shlex.join(["muonscale", *words(folder, name, SEEDS[0])]) for name in VARIANTS},
        torch=versions["torch"],
        transformers=versions["transformers"],
        layers=layers,
        experts=experts,
        all_experts=layers * experts,
        chosen=chosen,
        shared=model["n_shared_experts"],
        steps=len(runs["bias"][0].violation),
        tokens=tokens,
        rate=config["routing"]["bias_rate"],
        mean_load=mean_load,
        verdict="\n".join(verdict(runs)),
        figure=f"{RESULT.stem}.png",
        before=BEFORE,
        last=LAST,
        few=FEW,
        few_tokens=FEW * mean_load,
        violations=violation_table(runs),
        kept=experts_table(runs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/router-balance"))
    folder = parser.parse_args().folder
    run_many.train(words(folder, variant, seed) for seed in SEEDS for variant in VARIANTS)
    runs = {name: [read(folder / f"{name}-seed{s}", s) for s in SEEDS] for name in VARIANTS}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    model = shape(folder / f"bias-seed{SEEDS[0]}")
    limit = model["n_routed_experts"] / model["num_experts_per_tok"]
    draw(runs, limit, RESULT.with_suffix(".png"))
    RESULT.write_text(text := report(runs, folder), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
