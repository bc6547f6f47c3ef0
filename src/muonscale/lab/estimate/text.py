"""The facts of a plan as text for a console."""

from __future__ import annotations

from typing import Any

import yaml

from muonscale.lab.console import (
    bytes_text,
    counted,
    duration_text,
    seconds_text,
    si_text,
    table_text,
)

Row = tuple[str, str, str]
"""A quantity, its value, and a remark."""

PARTS = {
    "parameters": "float32",
    "gradients": "float32",
    "matrix_state": "momentum",
    "elementwise_state": "two moments",
    "average": "of the weights",
    "gathered": "layers in flight, in the dtype of the passes",
    "unreduced": "gradients of a layer before they are reduced",
    "activations": "of one micro-batch",
    "logits": "and their loss",
    "step_workspace": "of the optimizer, after the four above are freed",
}

TIMES = {
    "passes": "forward and backward",
    "exposed": "transfer of parameters and gradients that is not hidden",
    "activations": "transfer in tensor and expert parallelism",
    "newton_schulz": "on the busiest device",
    "exchange": "of the optimizer, not hidden",
    "elementwise": "moments and parameters",
}

MOMENTS = {"loss": "at the loss", "backward": "in the backward pass", "step": "in the step"}


def plan_text(facts: dict[str, Any]) -> str:
    """Return the facts as tables, followed by the verdict."""
    sections = [
        ("", _head(facts)),
        ("memory per device", _memory(facts["memory"])),
        ("bytes per device and step", _traffic(facts["traffic"])),
        ("Newton-Schulz", _newton_schulz(facts)),
        ("time of a step", _time(facts)),
        ("assumptions", [(a["what"], a["value"], a["source"]) for a in facts["assumptions"]]),
    ]
    blocks = [
        (f"{title}\n" if title else "") + table_text(rows, indent=2) for title, rows in sections
    ]
    return "\n\n".join([*blocks, "\n".join(_verdict(facts))])


def _head(facts: dict[str, Any]) -> list[Row]:
    model, layout = facts["model"], facts["layout"]
    name = f"{model['name']} ({model['model_type']})"
    rows = [
        ("model", f"{model['parameters']:,}", f"parameters; {name}"),
        ("", f"{model['without_embeddings']:,}", "without embeddings and head"),
    ]
    if model["mixture_of_experts"]:
        rows.append(("", f"{model['active_without_embeddings']:,}", "of these active per token"))
    largest = f"; the largest of {layout['largest_of']}" if layout["largest_of"] else ""
    micro_batches = counted(layout["micro_batches"], "micro-batch", "micro-batches")
    return [
        *rows,
        ("", si_text(model["flops_per_token"]), "FLOPs per token, forward and backward"),
        ("devices", f"{layout['devices']:,}", f"x {layout['device']}: {layout['layout']}"),
        (
            "batch",
            f"{layout['batch_tokens']:,}",
            f"tokens in sequences of {layout['sequence_length']:,}{largest}",
        ),
        (
            "",
            f"{layout['device_tokens']:,}",
            f"of them on a data-parallel rank, in {micro_batches}",
        ),
    ]


def _memory(memory: dict[str, Any]) -> list[Row]:
    moments = memory["moments"]
    peak = MOMENTS[max(moments, key=lambda name: sum(moments[name].values()))]
    return [
        *(
            (name.replace("_", " "), bytes_text(memory["parts"][name]), text)
            for name, text in PARTS.items()
        ),
        ("peak", bytes_text(memory["peak"]), f"of {bytes_text(memory['device'])}, {peak}"),
        ("", bytes_text(memory["activations_plain"]), "activations without checkpointing"),
        ("", bytes_text(memory["activations_checkpointed"]), "activations with checkpointing"),
    ]


def _traffic(traffic: dict[str, Any]) -> list[Row]:
    rows = []
    for row in traffic["messages"]:
        uneven = row["busiest"] != row["mean"]
        busiest = f", busiest {bytes_text(row['busiest'])}" if uneven else ""
        rows.append((row["purpose"], bytes_text(row["mean"]), row["collective"] + busiest))
    sent, received = bytes_text(traffic["busiest_sent"]), bytes_text(traffic["busiest_received"])
    total = f"busiest sends {sent}, receives {received}"
    return [*rows, ("sent", bytes_text(traffic["mean_sent"]), total)]


def _newton_schulz(facts: dict[str, Any]) -> list[Row]:
    flops, balance = facts["flops"], facts["balance"]
    if not balance["matrices"]:
        return [("matrices", "0", "every parameter is on AdamW")]
    split = f"{balance['split_matrices']:,} split over subgroups of {balance['subgroup_size']}"
    return [
        (
            "matrices",
            f"{balance['matrices']:,}",
            split if balance["split_matrices"] else "none split",
        ),
        (
            "FLOPs",
            si_text(flops["newton_schulz_per_step"]),
            f"in {flops['newton_schulz_dtype']}, {flops['newton_schulz_kernel']}",
        ),
        ("share", f"{100 * flops['newton_schulz_share']:.3g} %", "of the FLOPs of a step"),
        ("balance", f"{balance['busiest_over_mean']:.3f}", "busiest device over the mean"),
    ]


def _time(facts: dict[str, Any]) -> list[Row]:
    time = facts["time"]
    rows = [
        (k.replace("_", " "), seconds_text(time["parts"][k]), text) for k, text in TIMES.items()
    ]
    rows += [
        ("step", seconds_text(time["step"]), f"{time['tokens_per_second']:,.0f} tokens per second"),
        ("with AdamW", seconds_text(time["adamw_step"]), "in the same layout"),
    ]
    if time["hours"] is not None:
        rows.append(("run", duration_text(3600 * time["hours"]), counted(time["steps"], "step")))
    return rows


def _verdict(facts: dict[str, Any]) -> list[str]:
    memory, time = facts["memory"], facts["time"]
    lines = []
    if not memory["fits"]:
        need, there = bytes_text(memory["peak"]), bytes_text(memory["device"])
        lines.append(f"does not fit: needs {need} of {there}; {memory['advice']}")
    if facts["balance"]["matrices"]:
        slower, fewer = 100 * time["slower_than_adamw"], 100 * time["break_even_fewer_steps"]
        lines += [
            f"A step takes {slower:.2g} % longer than AdamW's: Muon pays if it needs at least "
            f"{fewer:.2g} % fewer steps.",
            "Published: about 52 % of AdamW's FLOPs (Moonlight, arXiv 2502.16982), 10-15 % fewer "
            "tokens (Essential AI, arXiv 2505.02222).",
        ]
    return lines


def suggestion_text(facts: dict[str, Any], most: int = 6) -> str:
    """Return the findings of `suggest` as a recipe, with the choices in its first comments.

    Args:
        facts: choices, layouts that were left out, and the sections of the recipe.
        most: how many choices are listed.
    """
    head = ("layout", "micro-batch", "recompute", "peak", "step", "tokens/s", "run", "")
    rows = [
        (
            row["layout"],
            f"{row['micro_batch_tokens']:,}",
            "yes" if row["activation_checkpointing"] else "no",
            bytes_text(row["peak"]),
            seconds_text(row["step"]),
            f"{row['tokens_per_second']:,.0f}",
            duration_text(3600 * row["hours"]),
            row["reason"],
        )
        for row in facts["choices"][:most]
    ]
    devices, machines = facts["devices"], facts["machines"]
    launch = f"torchrun --nproc-per-node {devices // machines} " * (devices > 1)
    launch += f"--nnodes {machines} ... " * (machines > 1)
    launch += "-m muonscale" if launch else "muonscale"
    lines = [
        f"Layouts of {devices:,} x {facts['device']} that fit into {facts['room']}:",
        "",
        *table_text(rows, head, indent=2).splitlines(),
        "",
        *(f"Left out: {row['layout']}: {row['reason']}" for row in facts["left_out"]),
        f"Assumed is an MFU of {facts['mfu']:g}. What train.compile gains is not estimated; its "
        "first step takes a minute.",
        f"Train with: {launch} train FILE.yaml",
    ]
    comments = "\n".join(f"# {line}".rstrip() for line in lines)
    return f"{comments}\n\n{yaml.safe_dump(facts['config'], sort_keys=False).rstrip()}"
