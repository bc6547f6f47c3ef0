"""One GPU: is every rule right on it, how long is a step, how fast is training, and what waits.

    python benchmarks/gpu.py [--device cuda] [--tiny] [--out benchmarks/results]

Needs no network. It writes gpu.md and gpu.json, and ends with code 1 if a result is wrong:

1. *Correctness.* Newton-Schulz in every form and dtype against float64 products, and three steps of
   AdamW and of every preset against the same steps in float64 on the CPU.
2. *The step* beside torch's fused AdamW, torch.optim.Muon and the peers that are installed
   (benchmarks/requirements.txt), and its share of the rate of matrix products.
3. *Training* of GPT-2 small and of a Llama of 350M parameters: tokens per second and MFU of the
   trainer, of a plain loop with fused AdamW, and as `muonscale plan` predicts them.
4. *Waiting.* What makes the host wait for the device in a step, counted by the profiler.

`--tiny` does the same with small matrices and models, so that the CPU can show that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import PEERS, our_muon, versions
from run_many import markdown
from step_meter import reference
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from muonscale import Muon, preset
from muonscale.errors import first_line
from muonscale.lab.bench.contenders import Contender, make_adamw, run_rounds
from muonscale.lab.bench.measure import wait_for
from muonscale.lab.bench.rates import direct_flops, weighted_rate
from muonscale.lab.config.load import load_config
from muonscale.lab.console import dtype_text
from muonscale.lab.devices import recognize
from muonscale.lab.models.build import build_model
from muonscale.lab.run_folder import RunFolder
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize
from muonscale.optim.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest accepted distance from float64, over the length of the result, by dtype of the
products."""

WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH"),
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"),
)
"""Events of the profiler that make the host wait, or that may."""

STEP = "the step of the optimizer"

Shapes = tuple[tuple[int, int, int], ...]
"""(number, out, in) of the matrices of each shape."""

GPT2 = ((48, 768, 768), (12, 3072, 768), (12, 768, 3072))
LLAMA_1B = ((96, 2048, 2048), (48, 5461, 2048), (24, 2048, 5461))
MOONLIGHT_LAYER = (
    *((64, 1408, 2048), (64, 1408, 2048), (64, 2048, 1408), (2, 2816, 2048), (1, 2048, 2816)),
    *((1, 64, 2048), (1, 3072, 2048), (1, 576, 2048), (1, 4096, 512), (1, 2048, 2048)),
)
TINY_SHAPES = ((4, 48, 48), (2, 80, 48), (2, 48, 80))


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    workloads: dict[str, Shapes]
    rounds: int
    models: dict[str, list[str]]
    """Words after `muonscale train` by name of the model."""
    steps: int


COMMON = [
    *("data.source=python-stdlib", "schedule.warmup=0", "checkpoint.every=1000000"),
    *("eval.every=1000000", "eval.tokens=65536", "eval.sample_tokens=0"),
]
LARGE = ["data.max_bytes=null", "data.vocab_size=32000", "data.validation=0.01"]
FULL = Sizes(
    workloads={
        "GPT-2 small": GPT2,
        "Llama 1B": LLAMA_1B,
        "one layer of Moonlight": MOONLIGHT_LAYER,
    },
    rounds=7,
    models={
        "GPT-2 small": [
            *("muon-plus-gpt-small", *COMMON, *LARGE, "train.batch_tokens=131072"),
            *("data.sequence_length=1024", "train.micro_batch_tokens=32768"),
        ],
        "Llama 350M": [
            *("muon-plus-llama-350m", *COMMON, *LARGE, "train.batch_tokens=131072"),
            *("data.sequence_length=2048", "train.micro_batch_tokens=16384"),
        ],
    },
    steps=100,
)
TINY = Sizes(
    workloads={"tiny": TINY_SHAPES},
    rounds=2,
    models={
        "llama-pico": [
            *("demo", *COMMON, "model.preset=llama-pico", "data.vocab_size=300"),
            *("data.sequence_length=32", "data.max_bytes=60000", "train.batch_tokens=256"),
        ]
    },
    steps=4,
)


def check_newton_schulz(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the distance of every form in every dtype from the polynomial in float64."""
    shapes = [(33, 96), (96, 33)] if tiny else [(768, 3072), (1000, 1000), (3072, 768), (64, 1408)]
    for form in ("direct", "gram"):
        for dtype in BOUNDS:
            errors = []
            for shape in shapes:
                X = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
                found = orthogonalize(X.to(device), "jordan", 5, form, dtype).double().cpu()
                expected = torch.stack([reference(x, resolve("jordan", 5).triples) for x in X])
                errors.append(float((found - expected).norm() / expected.norm()))
            yield row_of(f"Newton-Schulz, {form}, {dtype_text(dtype)}", max(errors), BOUNDS[dtype])


def check_rules(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the distance of the weights after three steps on the device from those in float64."""
    rules: dict[str, dict[str, Any]] = {"AdamW": {"rule": "adamw"}}
    rules |= {f"preset {name}": preset(name) for name in PRESETS}
    for name, options in rules.items():
        found = three_steps(options, device, torch.float32)
        expected = three_steps(options, torch.device("cpu"), torch.float64)
        yield row_of(name, float((found - expected).norm() / expected.norm()), 2e-3)


def three_steps(options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return how three steps change some weights; parameters, state and products are of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 96), (96, 64), (80, 80)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [nn.Parameter(start.to(device, dtype, copy=True)) for start in starts]
    named = [(f"matrix{n}", parameter) for n, parameter in enumerate(parameters)]
    rule = options.get("rule", "muon")
    own = {key: value for key, value in options.items() if key != "rule"}
    names, values = zip(*named, strict=True)
    group = {"params": list(values), "param_names": list(names), "rule": rule}
    optimizer = Muon([group], lr=0.02, ns_dtype=dtype_text(dtype), **own)
    for _ in range(3):
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.grad = torch.randn(start.shape, generator=generator).to(device, dtype)
        optimizer.step()
    ends = [parameter.detach().double().cpu() for parameter in parameters]
    changes = [end - start for end, start in zip(ends, starts, strict=True)]
    return torch.cat([change.flatten() for change in changes])


def row_of(what: str, error: float, bound: float) -> dict[str, Any]:
    return {"what": what, "error": error, "bound": bound, "right": error < bound}


def measure_steps(
    name: str, shapes: Shapes, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Return one row for ours and one for each other optimizer, timed right beside ours."""
    count = [(out, in_) for number, out, in_ in shapes for _ in range(number)]
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in count]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    products = "bfloat16" if device.type == "cuda" else "float32"
    others: dict[str, Callable[[list[nn.Parameter]], Any]] = {"torch AdamW, fused": make_adamw}
    others |= {f"{peer.name} as shipped": peer.build for peer in PEERS}
    dtype = getattr(torch, products)
    flops = sum(number * direct_flops(out, in_) for number, out, in_ in shapes)
    rate = weighted_rate(shapes, dtype, device)
    tell(f"{name}: muonscale")
    found = paired(parameters, products, device, rounds)
    share = flops / found["muonscale"]["seconds"]["median"] / rate
    own = {"workload": name, "optimizer": f"muonscale {products}", **found["muonscale"]}
    rows: list[dict[str, Any]] = [{**own, "share_of_rate": share}]
    for other, build in others.items():
        tell(f"{name}: {other}")
        try:
            facts = paired(parameters, products, device, rounds, other, build)[other]
        except Exception as error:  # what others' code raises has no common base
            facts = {"failed": first_line(error)[:160]}
        rows.append({"workload": name, "optimizer": other, **facts})
    return rows


def paired(
    parameters: list[nn.Parameter],
    products: str,
    device: torch.device,
    rounds: int,
    name: str = "",
    build: Callable[[list[nn.Parameter]], Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return what steps of ours take, and of another optimizer right beside them."""
    release_memory()
    others = [] if build is None else [Contender(name, build(list(parameters)), device)]
    ours = Contender("muonscale", our_muon(products, list(parameters)), device)
    return run_rounds(ours, others, rounds, lambda _: None)


def release_memory() -> None:
    """Give back the memory of the GPU that nothing uses: training is a process of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(
    name: str, words: list[str], device: torch.device, steps: int, cache: Path
) -> dict[str, Any]:
    """Return the speed of the trainer, of a plain loop, and of the plan."""
    tell(f"{name}: {steps} steps of the trainer")
    release_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        length = [f"train.steps={steps}", "train.tokens=null", f"run.device={device.type}"]
        words = [*words, *length]
        call("train", *words, f"run.path={path}", f"data.cache={cache}")
        run = RunFolder(path)
        records = list(run.read_metrics("train"))[steps // 2 :]
        environment = run.environment()
        config = load_config(words[0], words[1:])
        shape = AutoConfig.from_pretrained(path / "model")
    median = {
        key: statistics.median(record[key] for record in records)
        for key in ("tokens_per_second", "step_ms", "optimizer_ms")
    }
    found: dict[str, Any] = {
        "model": name,
        **median,
        "mfu": statistics.median(r["mfu"] for r in records) if "mfu" in records[0] else None,
        "precision": environment["precision"],
        "optimizer_share": median["optimizer_ms"] / median["step_ms"],
    }
    tell(f"{name}: the plain loop")
    found["plain_tokens_per_second"] = plain_loop(config, shape, device, max(3, steps // 5))
    known = recognize(environment["device_name"])
    if known is not None or device.type == "cpu":
        where = known.name if known is not None else "cpu"
        plan = json.loads(call("plan", *words, "--device", where, "--json"))
        found["planned_tokens_per_second"] = plan["time"]["tokens_per_second"]
        found["planned_optimizer_share"] = plan["time"]["optimizer"] / plan["time"]["step"]
    return found


def plain_loop(config: Any, shape: Any, device: torch.device, steps: int) -> float:
    """Return the tokens per second of a loop with autocast and fused AdamW, on random tokens."""
    model = build_model(shape, seed=0).to(device).train()
    optimizer = make_adamw(list(model.parameters()))
    length = config.data.sequence_length
    tokens = config.train.micro_batch_tokens or config.train.batch_tokens
    micro_batches = max(1, config.train.batch_tokens // tokens)
    batch = torch.randint(shape.vocab_size, (max(1, tokens // length), length + 1), device=device)
    times = []
    for _ in range(steps):
        wait_for(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        for _ in range(micro_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            (loss / micro_batches).backward()
        optimizer.step()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return micro_batches * batch[:, 1:].numel() / statistics.median(times[1:])


def count_waits(shapes: Shapes, device: torch.device) -> dict[str, int]:
    """Return how often a step of the optimizer, after the first two, makes the host wait."""
    count = [(out, in_) for number, out, in_ in shapes for _ in range(number)]
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in count]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = our_muon("auto", parameters)
    for _ in range(2):
        optimizer.step()
    wait_for(device)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=kinds) as recorded:
        with record_function(STEP):
            optimizer.step()
        wait_for(device)
    events = recorded.events() or []
    step = next(event for event in events if event.name == STEP).time_range
    found = dict.fromkeys(WAITS, 0)
    for event in events:
        inside = step.start <= event.time_range.start <= step.end
        for name in WAITS:
            found[name] += inside and event.name.startswith(name)
    return found


def call(*words: str) -> str:
    """Return what a `muonscale` command prints."""
    asked = [sys.executable, "-m", "muonscale", *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"muonscale {shlex.join(words)} failed:\n{done.stderr}")
    return done.stdout


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def page(found: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    checks = [
        [row["what"], f"{row['error']:.1e}", f"{row['bound']:.0e}", "yes" if row["right"] else "NO"]
        for row in found["correctness"]
    ]
    steps = [step_row(row) for row in found["steps"]]
    trained = [
        [
            row["model"],
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %",
            f"{100 * row['optimizer_share']:.1f} %",
            f"{row['plain_tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / row['plain_tokens_per_second']:.2f}",
            *(
                [
                    f"{row['planned_tokens_per_second']:,.0f}",
                    f"{100 * row['planned_optimizer_share']:.1f} %",
                ]
                if "planned_tokens_per_second" in row
                else ["-", "-"]
            ),
        ]
        for row in found["training"]
    ]
    waits = [[name, str(number)] for name, number in found["waits"].items()]
    return "\n\n".join(
        [
            "# One GPU",
            f"`{found['command']}` on {found['device_name']}, torch {found['versions']['torch']}; "
            f"{found['seconds']:.0f} s.",
            "## Correctness",
            "Distance from float64 over the length of the result.",
            markdown(["what", "distance", "bound", "right"], checks),
            "## The step",
            "Milliseconds of a step: medians, quartiles in brackets. Times ours: the median of "
            "pairs of steps, one of ours and one of theirs. Share of the rate: operations of the "
            "direct form per second over those of `addmm` at the same shapes.",
            markdown(
                ["matrices", "optimizer", "ms", "times ours", "share of the rate", "state, MB"],
                steps,
            ),
            "## Training",
            "Medians of the second half of the steps. The plain loop has autocast and torch's fused "
            "AdamW, on random tokens.",
            markdown(
                [
                    *("model", "tokens/s", "MFU", "optimizer", "plain loop, tokens/s", "ratio"),
                    *("planned tokens/s", "planned optimizer"),
                ],
                trained,
            ),
            "## Waiting",
            "Events within one step of the optimizer that make the host wait, or that may. By design "
            "it copies one flag to the host, that of non-finite gradients, and asks for the flag of "
            "the step before, which has arrived long since (cudaEventSynchronize).",
            markdown(["event", "number"], waits),
        ]
    )


def step_row(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["workload"], row["optimizer"], f"not run: {row['failed']}", "", "", ""]
    times = {key: 1000 * value for key, value in row["seconds"].items()}
    return [
        row["workload"],
        row["optimizer"],
        f"{times['median']:.2f} ({times['low']:.2f}-{times['high']:.2f})",
        f"{row['times_ours']['median']:.2f}" if "times_ours" in row else "1",
        f"{row['share_of_rate']:.2f}" if "share_of_rate" in row else "",
        f"{row['state_bytes'] / 1e6:,.0f}",
    ]


def keep(found: dict[str, Any], folder: Path, start: float) -> None:
    """Write what has been measured so far: what follows may fail."""
    found["seconds"] = time.monotonic() - start
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(page(found) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small matrices and models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.md and gpu.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no GPU; `--device cpu --tiny` shows that the benchmark itself works"
        )
    device, sizes = torch.device(arguments.device), TINY if arguments.tiny else FULL
    start, cuda = time.monotonic(), arguments.device == "cuda"
    options = [f"--device {arguments.device}", *(["--tiny"] if arguments.tiny else [])]
    tell("correctness")
    found: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu.py", *options]),
        "device_name": torch.cuda.get_device_name() if cuda else "the CPU",
        "versions": versions(),
        "correctness": [*check_newton_schulz(device, arguments.tiny), *check_rules(device)],
        "steps": [
            row
            for name, shapes in sizes.workloads.items()
            for row in measure_steps(name, shapes, device, sizes.rounds)
        ],
        "waits": count_waits(next(iter(sizes.workloads.values())), device),
        "training": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep(found, arguments.out, start)
    with tempfile.TemporaryDirectory() as cache:
        for name, words in sizes.models.items():
            found["training"].append(train(name, words, device, sizes.steps, Path(cache)))
            keep(found, arguments.out, start)
    print(page(found))
    wrong = [row["what"] for row in found["correctness"] if not row["right"]]
    if wrong:
        raise SystemExit(f"wrong on this device: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
