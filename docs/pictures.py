"""Draws the pictures of the concept pages, from the package's own functions.

    python docs/pictures.py [FOLDER]

Writes docs/images/concepts/*.png, about half a minute on two cores. The spectra are those of a
small Llama after 100 steps on the bytes of Python's standard library, once with Muon and once with
AdamW; everything else follows from formulas.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from muonscale import Muon, orthogonalize, parameter_groups
from muonscale.lab.report.matplotlib_charts import draw
from muonscale.lab.report.page import Chart, Mark, Series
from muonscale.lab.report.palette import styles
from muonscale.optim.diagnostics.telemetry import squared_singular_values
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.flops import ns_flops
from muonscale.optim.parameters.groups import RuleT
from muonscale.optim.rules.post_norm import POST_NORMS, NormContext
from muonscale.optim.rules.scale import shape_factor

IMAGES = Path(__file__).parent / "images" / "concepts"
MATRIX = "model.layers.2.mlp.up_proj.weight"
STEPS, BATCH, LENGTH = 100, 8, 128
MODULES = ("argparse", "ast", "heapq", "shutil", "inspect", "tarfile", "typing", "pathlib")


def byte_batches() -> list[Tensor]:
    """Return STEPS batches `[BATCH, LENGTH]` of bytes of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(
        p.read_bytes() for name in MODULES for p in [folder / f"{name}.py"] if p.exists()
    )
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - LENGTH, (STEPS, BATCH), generator=generator)
    return [torch.stack([tokens[at : at + LENGTH] for at in row]) for row in starts]


def trained(rule: RuleT) -> dict[str, Tensor]:
    """Return the state of MATRIX after STEPS steps of a small Llama."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, **shape))
    lr = 0.01 if rule == "muon" else 0.002
    optimizer = Muon(parameter_groups(model, lr=lr, rule=rule))
    for ids in byte_batches():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer.state[model.get_parameter(MATRIX)]


def spectrum(X: Tensor) -> tuple[float, ...]:
    """Return the singular values over the largest, falling."""
    values = squared_singular_values(X.double()).clamp_min(0).sqrt().flip(-1)
    return tuple((values / values[0]).tolist())


def spectra() -> Chart:
    """Draw what the polar step does to the momentum of a trained model."""
    muon, adamw = trained("muon"), trained("adamw")
    M = muon["momentum_buffer"]
    lines = {
        "momentum of Muon": M,
        "update of Muon": orthogonalize(M, dtype="float32"),
        "update of AdamW": adamw["exp_avg"] / (adamw["exp_avg_sq"].sqrt() + 1e-8),
    }
    groups = dict(zip(lines, ("momentum", "Muon", "AdamW"), strict=True))
    number = tuple(float(i + 1) for i in range(min(M.shape)))
    return Chart(
        name="spectra",
        title="Singular values of momentum and of updates",
        x_label="singular value, from the largest to the smallest",
        y_label="over the largest",
        series=tuple(
            Series(name=n, x=number, y=spectrum(X), group=groups[n]) for n, X in lines.items()
        ),
        log_y=True,
        y_limits=(1e-3, 1.5),
    )


def polynomial(name: str, steps: int, at: Tensor) -> Tensor:
    """Return what becomes of singular values under the Newton-Schulz steps of a schedule."""
    s = at.clone()
    for a, b, c in resolve(name, steps).triples:
        s = a * s + b * s**3 + c * s**5
    return s


def polynomials() -> Chart:
    """Draw the map of a singular value, for several schedules and numbers of steps."""
    at = torch.logspace(-4, 0, 3000, dtype=torch.float64)
    shown = [("jordan", 1), ("jordan", 5), ("polar_express", 8), ("you6", 6)]
    return Chart(
        name="polynomials",
        title="What Newton-Schulz makes of a singular value",
        x_label="singular value before, over the norm of the matrix",
        y_label="after",
        series=tuple(
            Series(
                name=f"{name}, {steps} step{'s' * (steps > 1)}",
                x=tuple(at.tolist()),
                y=tuple(polynomial(name, steps, at).tolist()),
            )
            for name, steps in shown
        ),
        marks=(Mark(axis="y", at=1.0, label="polar factor"),),
        log_x=True,
    )


def lengths() -> Chart:
    """Draw the RMS of an exact polar factor's update under each shape factor."""
    ratios = [2.0**k for k in range(-4, 5)]
    width = 1024

    def rms(scale: str, ratio: float) -> float:
        out = round(width * ratio)
        return shape_factor(scale, (out, width), 0.2) / math.sqrt(max(out, width))

    return Chart(
        name="lengths",
        title="Length of the update by shape, for matrices of 1024 columns",
        x_label="rows over columns",
        y_label="root mean square of the update, in units of lr",
        series=tuple(
            Series(
                name=f'scale="{scale}"',
                x=tuple(ratios),
                y=tuple(rms(scale, ratio) for ratio in ratios),
                kind="both",
            )
            for scale in ("rms", "spectral", "keller", "none")
        ),
        log_x=True,
        log_y=True,
    )


def rows() -> Chart:
    """Draw the lengths of an update's rows without and with Muon+."""
    update = orthogonalize(trained("muon")["momentum_buffer"], dtype="float32")
    context = NormContext(shape=(update.shape[0], update.shape[1]), eps=1e-8, beta2=0.95)
    by_row, _ = POST_NORMS["row"].apply(update[None], None, context)
    lines = {"Muon": update, 'Muon+, post_norm="row"': by_row[0]}
    number = tuple(float(i + 1) for i in range(len(update)))

    def sorted_lengths(X: Tensor) -> tuple[float, ...]:
        norms = torch.linalg.vector_norm(X, dim=1)
        return tuple((norms / norms.square().mean().sqrt()).sort(descending=True).values.tolist())

    return Chart(
        name="rows",
        title="Lengths of the rows of an update of 352 x 128",
        x_label="row, from the longest to the shortest",
        y_label="over their root mean square",
        series=tuple(Series(name=n, x=number, y=sorted_lengths(X)) for n, X in lines.items()),
    )


def share() -> Chart:
    """Draw what Newton-Schulz adds to the operations of a step, by width and batch."""
    widths = [256, 512, 1024, 2048, 4096, 8192]

    def part(width: int, tokens: int) -> float:
        shapes = [(width, width)] * 4 + [(8 * width // 3, width)] * 3  # of a layer of Llama
        passes = 6 * tokens * sum(out * in_ for out, in_ in shapes)
        steps = sum(ns_flops(shape, form="direct", device="cuda") for shape in shapes)
        return 100 * steps / passes

    return Chart(
        name="share",
        title="Newton-Schulz beside the passes of a layer of Llama",
        x_label="width",
        y_label="operations, % of forward and backward",
        series=tuple(
            Series(
                name=f"batch of {tokens:,} tokens",
                x=tuple(map(float, widths)),
                y=tuple(part(width, tokens) for width in widths),
                kind="both",
            )
            for tokens in (16_384, 131_072, 1_048_576, 4_194_304)
        ),
        log_x=True,
        log_y=True,
    )


def main(folder: Path = IMAGES) -> None:
    """Draw all pictures into a folder."""
    charts = (spectra(), polynomials(), lengths(), rows(), share())
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        (folder / f"{chart.name}.png").write_bytes(draw(chart, styles(charts))["png"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
