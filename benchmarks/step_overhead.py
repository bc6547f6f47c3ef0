"""What a step costs besides matrix products, paired in one run with other optimizers.

    python benchmarks/step_overhead.py [--threads 1]

Writes benchmarks/results/step_overhead.md: AdamW against torch's fused one, the 28 matrices of
llama-nano against pytorch_optimizer's Muon, and 219 tiny parameters with the number of times that
the host reads a number from a tensor. Every pair of steps is timed back to back; a ratio is the
median over pairs, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import PYTORCH_OPTIMIZER, float32_by_default
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from muonscale import Muon

OUT = Path(__file__).parent / "results" / "step_overhead.md"
GPT2_EMBEDDING = [(50257, 768)]
NANO_REST = [(1024, 128), (1024, 128), *[(128,)] * 9]
NANO_MATRICES = [(128, 128)] * 16 + [(352, 128)] * 8 + [(128, 352)] * 4
TINY = [(16, 16)] * 96, [(16,)] * 123


def drawn(shapes: Sequence[tuple[int, ...]]) -> list[Parameter]:
    torch.manual_seed(0)
    parameters = [Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def seconds(optimizer: Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def paired(name: str, ours: Optimizer, theirs: Optimizer, pairs: int = 40) -> str:
    for _ in range(5):
        seconds(ours), seconds(theirs)
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    ratios = sorted(a / b for a, b in times)
    middles = [1000 * sorted(column)[pairs // 2] for column in zip(*times, strict=True)]
    spread = f"{ratios[pairs // 10]:.2f}-{ratios[-pairs // 10]:.2f}"
    return f"| {name} | {middles[0]:.2f} | {middles[1]:.2f} | {ratios[pairs // 2]:.2f} ({spread}) |"


def adamw(shapes: Sequence[tuple[int, ...]], name: str) -> str:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    ours = Muon([{"params": drawn(shapes), "rule": "adamw"}], **options)
    return paired(name, ours, torch.optim.AdamW(drawn(shapes), **options, fused=True))


def nano(dtype: str) -> str:
    from pytorch_optimizer import Muon as Theirs

    ours = Muon(drawn(NANO_MATRICES), lr=1e-3, ns_dtype=dtype)
    groups = [{"params": drawn(NANO_MATRICES), "use_muon": True}]
    return paired(
        f"28 matrices of llama-nano, {dtype}", ours, Theirs(groups, lr=1e-3, use_adjusted_lr=True)
    )


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def tiny() -> str:
    matrices, vectors = map(drawn, TINY)
    optimizer = Muon(
        [{"params": matrices, "rule": "muon"}, {"params": vectors, "rule": "adamw"}],
        ns_dtype="float32",
    )
    times = sorted(seconds(optimizer) for _ in range(60))
    with Calls() as calls:
        optimizer.step()
    reads = calls.counts["aten::_local_scalar_dense"]
    return (
        f"219 tiny parameters (96 of 16x16 on Muon, 123 of 16 on AdamW): {1000 * times[30]:.2f} ms a "
        f"step (median of 60), {sum(calls.counts.values())} operations of torch, of which the host "
        f"waits for the value of {reads}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    rows = [
        adamw(GPT2_EMBEDDING, "AdamW, GPT-2's embedding; torch fused"),
        adamw(NANO_REST, "AdamW, embedding, head and norms of llama-nano; torch fused"),
        nano("bfloat16"),
    ]
    newton_schulz = "zero_power_via_newton_schulz_5"
    with float32_by_default(PYTORCH_OPTIMIZER, newton_schulz):
        rows.append(nano("float32"))
    head = "| | ours, ms | other, ms | ratio |\n|---|---|---|---|"
    text = [
        "# What a step costs besides matrix products",
        f"`python benchmarks/step_overhead.py --threads {threads}`, torch {torch.__version__}, "
        f"{platform.machine()}. Ratios are medians over 40 pairs, with the 10th and 90th percentile; "
        "below 1 ours is quicker. Our step checks all gradients for NaN and infinity before it "
        "writes; the others do not.",
        "\n".join([head, *rows]),
        tiny(),
    ]
    OUT.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
