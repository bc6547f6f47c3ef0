"""Coordinate checks of the four nano models, with the spectral rules and without any.

    python benchmarks/coordcheck.py [--folder runs/coordcheck] [--threads 1]

A check that is in the folder is not run again. Everything that is said comes from the files of the
checks. Written to docs/results/coordcheck.md, pictures to docs/results/coordcheck/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from muonscale.lab.coordcheck.text import verdict_line, worst_rows
from muonscale.lab.coordcheck.tolerances import QUANTITIES

RESULT = Path(__file__).parents[1] / "docs" / "results" / "coordcheck.md"
MODELS = {
    "llama-nano": "Llama, untied head",
    "gpt-nano": "GPT-2, tied head",
    "gemma-nano": "Gemma 3, tied head, embedding times the root of the width",
    "moonlight-nano": "DeepSeek-V3, latent attention, mixture of experts",
}
CONVENTIONS = ("spectral", "standard")


def words(folder: Path, model: str, convention: str, threads: int) -> list[str]:
    """Return what `muonscale` is asked to do for a check."""
    place = ["--out", str(folder / f"{model}-{convention}")]
    return ["coordcheck", model, f"run.threads={threads}", "--convention", convention, *place]


def check(folder: Path, model: str, convention: str, threads: int) -> dict[str, Any]:
    """Return the facts of a check, made if they are not there."""
    place = folder / f"{model}-{convention}"
    if not (place / "coordcheck.json").exists():
        command = [sys.executable, "-m", "muonscale", *words(folder, model, convention, threads)]
        if subprocess.run(command).returncode not in (0, 1):
            raise SystemExit(f"{shlex.join(command)} has failed")
    RESULT.with_suffix("").mkdir(exist_ok=True)
    shutil.copy(place / "coordcheck.png", RESULT.with_suffix("") / f"{model}-{convention}.png")
    return json.loads((place / "coordcheck.json").read_text())


def table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def summary(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    rows = [["model", "widths", "convention", "verdict", "s", "CPU s"]]
    for (model, convention), facts in found.items():
        widths = f"{facts['widths'][0]} to {facts['widths'][-1]}"
        verdict = verdict_line(facts)
        times = [f"{facts['seconds']:.0f}", f"{facts['cpu_seconds']:.0f}"]
        rows.append([model, widths, convention, verdict, *times])
    return table(rows)


def slopes(both: dict[str, dict[str, Any]]) -> list[str]:
    """Return the worst slope of each part and quantity, of both conventions."""
    worst = {name: {} for name in both}
    for name, facts in both.items():
        worst[name] = {(r["part"], r["quantity"]): r for r in worst_rows(facts["rows"])}
    rows = [["part", "quantity", *both]]
    for part, quantity in worst["spectral"]:
        cells = [cell(worst[name].get((part, quantity))) for name in both]
        rows.append([part, QUANTITIES[quantity], *cells])
    return table(rows)


def cell(row: dict[str, Any] | None) -> str:
    if row is None or row["slope"] is None:
        return "-"
    mark = {"pass": "", "fail": " **fail**", "undecided": " undecided"}[row["outcome"]]
    return f"{row['slope']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}){mark}"


def text(folder: Path, threads: int, found: dict[tuple[str, str], dict[str, Any]]) -> str:
    facts = found["llama-nano", "spectral"]
    commands = [shlex.join(["muonscale", *words(folder, *key, threads)]) for key in found]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Coordinate checks of the nano models",
        "",
        f"`python benchmarks/coordcheck.py --folder {folder}`, which does",
        "",
        "```sh",
        *commands,
        "```",
        "",
        f"{versions}, on a CPU, {threads} thread{'s' if threads > 1 else ''}. "
        f"{len(facts['seeds'])} seeds, {facts['steps']} steps of {facts['batch_tokens']:,} tokens of the "
        f"Python standard library's source, lr {facts['lr']:g} and scale {facts['scale']} at the smallest width. "
        "Slopes are exponents of the width with 90 % intervals, of steps "
        f"{facts['judged_steps'][0]} to {facts['judged_steps'][-1]}; what they are held against is in "
        "[Transfer](../transfer.md#coordinate-checks). Seconds are of a machine that did other work too.",
        "",
        *summary(found),
    ]
    for model, what in MODELS.items():
        both = {convention: found[model, convention] for convention in CONVENTIONS}
        notes = [f"Note: {note}." for note in both["spectral"]["notes"]]
        pictures = [f"![{model}, {name}](coordcheck/{model}-{name}.png)" for name in CONVENTIONS]
        lines += ["", f"## {model}", "", f"{what}. The worst of each part and quantity:", ""]
        lines += [*slopes(both), "", *notes, *([""] if notes else []), "\n\n".join(pictures)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/coordcheck"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    found = {
        (model, convention): check(given.folder, model, convention, given.threads)
        for model in MODELS
        for convention in CONVENTIONS
    }
    RESULT.write_text(text(given.folder, given.threads, found), encoding="utf-8")


if __name__ == "__main__":
    main()
