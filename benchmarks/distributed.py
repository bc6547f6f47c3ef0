"""Muon on many ranks: balance, bytes, memory and time, against plans, AdamW and others.

    python benchmarks/distributed.py [SECTION ...]

Sections: `balance` (who works how much, beside the policies of others), `traffic` (bytes by the
plan, for large models), `collectives` (bytes counted at torch's collectives, under FSDP2), `memory`
(state and peak), `time` (the step on gloo processes, beside other implementations, in the
environment of benchmarks/requirements.txt; the others need the lab), `plan` (what `muonscale plan`
says against counted bytes and memory) and `training` (tokens per second of the trainer, the
optimizer's share with and without overlap). Without a name: all. Each is written into its part of
benchmarks/results/distributed.md; the other parts stay.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from optimizer_step import machine

RESULT = Path(__file__).parent / "results" / "distributed.md"
TITLE = "# Muon on many ranks"
SECTIONS = {
    "balance": "Balance",
    "traffic": "Bytes, by the plan",
    "collectives": "Bytes, counted at the collectives",
    "memory": "Memory",
    "time": "Time of a step",
    "plan": "The plan against a training step",
    "training": "Training",
}
PACKAGES = ("muonscale", "torch", "transformers", "muon-fsdp2")


def versions() -> str:
    """Return the packages that there are, with their versions."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def head(name: str) -> str:
    """Return what a section was measured on."""
    facts = machine()
    return (
        f"`{shlex.join(['python', 'benchmarks/distributed.py', name])}`: {facts['cpu']} "
        f"({', '.join(facts['features'])}), {os.cpu_count()} cores, one thread per process, load "
        f"{os.getloadavg()[0]:.1f} before, Python {facts['python']}, {versions()}; not on a GPU."
    )


def parts_of(text: str) -> dict[str, str]:
    """Return the sections of a result, by title."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def merged(text: str, title: str, body: str) -> str:
    """Return a result with one section replaced, in the order of `SECTIONS`."""
    parts = parts_of(text) | {title: f"\n{body}\n\n"}
    ordered = [f"## {t}\n{parts[t]}" for t in SECTIONS.values() if t in parts]
    return f"{TITLE}\n\n{''.join(ordered)}".rstrip() + "\n"


def run(name: str) -> str:
    """Return the text of a section."""
    first, began = head(name), time.perf_counter()
    lines = importlib.import_module(f"distributed_{name}").section()
    took = f"The section took {time.perf_counter() - began:.0f} s."
    return "\n".join([f"{first} {took}", "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULT, help="file whose parts are replaced")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.sections).difference(SECTIONS):
        parser.error(f"no section is called {', '.join(sorted(unknown))}: {', '.join(SECTIONS)}")
    torch.set_num_threads(1)  # before anything is computed: processes are forked
    for name in arguments.sections or SECTIONS:
        body = run(name)
        print(f"## {SECTIONS[name]}\n\n{body}\n", file=sys.stdout, flush=True)
        before = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else ""
        text = merged(before, SECTIONS[name], body)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
