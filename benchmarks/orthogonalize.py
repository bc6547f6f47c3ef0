"""What Newton-Schulz costs and how exact it is, on this machine.

    python benchmarks/orthogonalize.py cost [--threads 2] [--rounds 7]
    python benchmarks/orthogonalize.py choices [--threads 1] [--rounds 7]
    muonscale train && python benchmarks/orthogonalize.py accuracy --run runs/demo

`cost` confirms the FLOP model of `muonscale.optim.newton_schulz.flops` by shape, and measures the time against
one addmm per product and matrix. `choices` sets the constants of `muonscale.optim` beside their
alternatives. `accuracy` sets the distance from the exact polar factor against
FLOPs, for every coefficient set and number of steps, on the momentum in a run's newest checkpoint.
Written to benchmarks/results/orthogonalize_cost.md, _choices.md and _accuracy.md (and .png).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import orthogonalize_accuracy
import orthogonalize_choices
import orthogonalize_cost
import torch

from muonscale.optim.newton_schulz.orthogonalize import ns_dtype

RESULTS = Path(__file__).parent / "results"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "avx512_fp16")


def machine() -> str:
    """Return processor, instruction sets, threads, versions and load as one line of Markdown."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    features = " ".join(name for name in FEATURES if name in flags)
    return (
        f"{names[0] if names else platform.processor() or platform.machine()} "
        f"({features or 'instruction sets unknown'}), {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f} before, python {platform.python_version()}, "
        f"torch {torch.__version__}; not on a GPU. "
        f"`auto` products are {str(ns_dtype('cpu')).removeprefix('torch.')}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("cost", "choices"):
        timed = parts.add_parser(name)
        timed.add_argument("--threads", type=int, default=torch.get_num_threads())
        timed.add_argument("--rounds", type=int, default=7)
        timed.add_argument("--seconds", type=float, default=2.0, help="at least, per line")
    accuracy = parts.add_parser("accuracy")
    accuracy.add_argument("--run", type=Path, required=True, help="folder of a run")
    arguments = parser.parse_args()
    command = f"`python benchmarks/orthogonalize.py {' '.join(sys.argv[1:])}`"
    RESULTS.mkdir(exist_ok=True)
    if arguments.part == "accuracy":
        figure = RESULTS / "orthogonalize_accuracy.png"
        text = orthogonalize_accuracy.report(f"{command}: {machine()}", arguments.run, figure)
    else:
        torch.set_num_threads(arguments.threads)
        part = {"cost": orthogonalize_cost, "choices": orthogonalize_choices}[arguments.part]
        text = part.report(f"{command}: {machine()}", arguments.rounds, arguments.seconds)
    (RESULTS / f"orthogonalize_{arguments.part}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
