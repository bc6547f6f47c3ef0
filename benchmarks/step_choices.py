"""What choices of dtype, attention and compilation do to the time of a training step, by pairs.

    python benchmarks/step_choices.py [--width 64] [--rounds 16] [--choices bfloat16,eager]

The demo's model (llama-nano), or with `--width` a Llama of two layers, vocabulary 512, 128 tokens a
sequence and 2,048 a step, on one thread. Passes (`float32`, `bfloat16`, `eager`, `compile`) are
forward, loss and backward; `ns_float32` and `ns_bfloat16` are steps of Muon. In every round each
choice takes one step, in turn forwards and backwards, and is divided by the first of its kind. Times
are of the processor, so that other processes on the machine disturb them less. `compile` takes
minutes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from muonscale.lab.config.load import load_config
from muonscale.lab.models.structure import decoder_layers
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.setup import Run, build_optimizer, set_up

PASSES = ("float32", "bfloat16", "eager", "compile")
STEPS = ("ns_bfloat16", "ns_float32")


def small(width: int) -> list[str]:
    """Return the settings of a model of the studies."""
    heads = max(2, width // 32)
    return [
        f"model.fields={{hidden_size: {width}, intermediate_size: {round(width * 2.75)}, "
        f"num_hidden_layers: 2, num_attention_heads: {heads}, num_key_value_heads: {heads}}}",
        *("data.vocab_size=512", "data.sequence_length=128", "train.batch_tokens=2048"),
    ]


def passes(run: Run, choice: str) -> Callable[[], object]:
    """Return forward, loss and backward of a copy of the model."""
    model = copy.deepcopy(run.state.model).train()
    batch_BL = torch.from_numpy(run.batches.at(0))
    if choice == "eager":
        model.set_attn_implementation("eager")
    if choice == "compile":
        for layer in decoder_layers(model):
            layer.forward = torch.compile(layer.forward)  # pyrefly: ignore [bad-assignment]

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=choice == "bfloat16"):
            logits_BLV = model(input_ids=batch_BL[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())
        loss.backward()

    return step


def optimizer_step(run: Run, choice: str) -> Callable[[], object]:
    """Return a step of the optimizer on a copy of the model, with gradients of random numbers."""
    model = copy.deepcopy(run.state.model)
    section = run.config.optimizer.model_copy(update={"ns_dtype": choice.removeprefix("ns_")})
    optimizer = build_optimizer(model, section)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return optimizer.step


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> str:
    """Return a table: milliseconds of each side, and its ratios to the first one."""
    for step in sides.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else reversed(sides):
            start = time.process_time()
            sides[name]()
            times[name].append(1000 * (time.process_time() - start))
    first = next(iter(times.values()))
    rows = []
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, first, strict=True))
        spread = f"{ratios[rounds // 10]:.2f}-{ratios[-1 - rounds // 10]:.2f}"
        middle = f"{statistics.median(values):.2f} | {statistics.median(ratios):.2f} ({spread})"
        rows.append(f"| {name} | {middle} |")
    return "\n".join(["| | ms | ratio |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--choices", default="bfloat16,eager,ns_float32", help="of these, any")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.choices.split(",")
    if unknown := set(chosen) - {*PASSES, *STEPS}:
        parser.error(
            f"--choices={','.join(sorted(unknown))}; accepted: {', '.join(PASSES + STEPS)}"
        )
    shape = [] if arguments.width is None else small(arguments.width)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("demo", [f"run.path={folder}/run", *shape])
        run = set_up(config, RunFolder(config.run.path), RunConsole.silent(), Processes())
        for names, build in ((PASSES, passes), (STEPS, optimizer_step)):
            if any(name in chosen for name in names[1:]):
                wanted = [name for name in names if name in (names[0], *chosen)]
                sides = {name: build(run, name) for name in wanted}
                print(measure(sides, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
