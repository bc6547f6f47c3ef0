"""One step of Muon against other implementations of it, paired in one run.

    python -m venv .venv-bench
    .venv-bench/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv-bench/bin/pip install --no-deps timm==1.0.31
    .venv-bench/bin/python benchmarks/optimizer_step.py [--quick] [--limit 10] [--only WORKLOAD]

Writes benchmarks/results/optimizer_step.md, and the single measurements beside it as JSON. Each
workload is kept as soon as it is finished: called again, the same command goes on with the next
one, unless the sources, the versions or the machine have changed since. `--quick` takes a
sixteenth of the matrices and two rounds, leaves out what compiles itself, prints the tables and writes
nothing. Side by side are the Muon parameters alone, without the AdamW part; `step_meter.py` says how
they are timed, `peers.py` who they are. A side that is not installed or fails is a row that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import all_sides, versions
from step_meter import Workload, best_rate, measure
from step_report import report

from muonscale.lab.console import dtype_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OPTIMIZER = HERE.parent / "src" / "muonscale" / "optim"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "sve")
LAB = OPTIMIZER.parent / "lab"
MEASURING = (
    *(HERE / name for name in ("optimizer_step.py", "peers.py", "step_meter.py")),
    *(LAB / name for name in ("training/profiler_memory.py", "bench/measure.py", "bench/rates.py")),
)

WORKLOADS = (
    Workload(
        name="thin",
        title="64 thin matrices of 64 x 1408",
        shapes=((64, 64, 1408),),
        rounds=15,
    ),
    Workload(
        name="llama-60m",
        title="Llama 60M: 8 layers, width 512, feed-forward 1376",
        shapes=((32, 512, 512), (16, 1376, 512), (8, 512, 1376)),
        rounds=5,
    ),
    Workload(
        name="moonlight-moe",
        title="one MoE layer of Moonlight at a quarter of its width: MLA, router, 64 experts of "
        "inner width 352, two shared ones",
        shapes=(
            (128, 352, 512),
            (64, 512, 352),
            (2, 704, 512),
            (1, 512, 704),
            (1, 64, 512),
            (1, 768, 512),
            (1, 144, 512),
            (1, 1024, 128),
            (1, 512, 512),
        ),
        rounds=3,
    ),
    Workload(
        name="gpt2-small",
        title="GPT-2 small: 12 layers, width 768, Q, K and V apart",
        shapes=((48, 768, 768), (12, 3072, 768), (12, 768, 3072)),
        rounds=3,
    ),
)


def machine() -> dict[str, Any]:
    """Return what a result depends on beside the sources."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text(encoding="utf-8") if cpu.exists() else ""
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    has = set(flags.group(1).split()) if flags else set()
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "features": [flag for flag in CPU_FLAGS if flag in has],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def sources() -> str:
    """Return a digest of our optimizer and of what measures it."""
    digest = hashlib.sha256()
    for path in sorted([*OPTIMIZER.rglob("*.py"), *MEASURING]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Kept:
    """Finished workloads in a JSON file, with what they depend on; forgotten if that differs."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"key": key, "workloads": {}}
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == key:
                self.content = found
        if "rates" not in self.content:
            self.content["rates"] = {dtype_text(dtype): best_rate(dtype) for dtype in DTYPES}

    @property
    def fast_bf16(self) -> bool:
        rates = self.content["rates"]
        return rates["bfloat16"] > rates["float32"] / 2

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.content["workloads"][name] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def dependencies(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that a measurement depends on, as JSON would give it back."""
    options = ["--quick"] * arguments.quick + ["--limit", f"{arguments.limit:g}"]
    options += ["--threads", str(arguments.threads)]
    return {
        "command": shlex.join(["python", "benchmarks/optimizer_step.py", *options]),
        "machine": machine(),
        "versions": versions(),
        "sources": sources(),
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small part, printed only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--limit",
        type=float,
        default=10.0,
        help="leave out sides with emulated products whose step takes longer, in seconds, and say so",
    )
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="measure no other now")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    torch.set_num_threads(arguments.threads)
    workloads = [w.quick if arguments.quick else w for w in WORKLOADS]
    stem = None if arguments.quick else arguments.out / "optimizer_step"
    kept = Kept(stem and stem.with_suffix(".json"), dependencies(arguments))
    sides = all_sides(kept.fast_bf16)
    text = ""
    for workload in workloads:
        if workload.name not in kept.content["workloads"]:
            if arguments.only not in (None, workload.name):
                continue
            kept.add(
                workload.name, measure(workload, sides, arguments.limit, quick=arguments.quick)
            )
        done = [w for w in workloads if w.name in kept.content["workloads"]]
        text = report(done, sides, kept.content)
        if stem is not None:
            stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
