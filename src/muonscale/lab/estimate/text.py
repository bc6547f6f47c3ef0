"""The facts of a plan as a table for a console."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str]
"""What, value, remark."""

PARTS = {
    "parameters": "float32",
    "gradients": "float32",
    "matrix_state": "momentum",
    "elementwise_state": "two moments",
    "gathered": "layers in flight, in the dtype of the passes",
    "unreduced": "gradients of a layer before they are reduced",
    "activations": "of one micro-batch",
    "logits": "and their loss",
    "step_workspace": "of the optimizer, when the four above are gone",
}

TIMES = {
    "passes": "forward and backward",
    "exposed": "parameters and gradients under way, not hidden",
    "activations": "of tensor and expert parallelism under way",
    "newton_schulz": "on the busiest device",
    "exchange": "of the optimizer, not hidden",
    "elementwise": "moments and parameters",
}


def table(facts: dict[str, Any]) -> str:
    """Return the facts as aligned lines."""
    sections = [
        ("", _head(facts)),
        ("memory per device", _memory(facts["memory"])),
        ("bytes per device and step", _traffic(facts["traffic"])),
        ("Newton-Schulz", _newton_schulz(facts)),
        ("time of a step", _time(facts)),
        ("assumptions", [(a["what"], a["value"], a["source"]) for a in facts["assumptions"]]),
    ]
    lines: list[str] = []
    for title, rows in sections:
        lines += ["", title] if title else []
        lines += _aligned(rows)
    return "\n".join([*lines, "", *_verdict(facts)])


def _aligned(rows: list[Row]) -> list[str]:
    first = max(len(what) for what, _, _ in rows)
    second = max(len(value) for _, value, _ in rows)
    return [
        f"  {what:{first}}  {value:>{second}}  {remark}".rstrip() for what, value, remark in rows
    ]


def _head(facts: dict[str, Any]) -> list[Row]:
    model, layout = facts["model"], facts["layout"]
    rows = [
        (
            "model",
            f"{model['parameters']:,}",
            f"parameters; {model['name']} ({model['model_type']})",
        ),
        ("", f"{model['without_embeddings']:,}", "without embeddings and head"),
    ]
    if model["mixture_of_experts"]:
        rows.append(("", f"{model['active_without_embeddings']:,}", "of these active per token"))
    return [
        *rows,
        ("", f"{model['flops_per_token']:.4g}", "FLOPs per token, forward and backward"),
        ("devices", f"{layout['devices']:,}", f"x {layout['device']}: {layout['layout']}"),
        (
            "batch",
            f"{layout['batch_tokens']:,}",
            f"tokens in sequences of {layout['sequence_length']:,}{_largest(layout)}",
        ),
        ("", f"{layout['device_tokens']:,}", _shared(layout)),
    ]


def _largest(layout: dict[str, Any]) -> str:
    return f"; the largest of {layout['largest_of']}" if layout["largest_of"] else ""


def _shared(layout: dict[str, Any]) -> str:
    number = layout["micro_batches"]
    return f"of them on a data-parallel rank, in {number} micro-batch{'es' if number > 1 else ''}"


def _memory(memory: dict[str, Any]) -> list[Row]:
    rows = [
        (name.replace("_", " "), size(memory["parts"][name]), text) for name, text in PARTS.items()
    ]
    return [
        *rows,
        ("at most", size(memory["peak"]), f"of {size(memory['device'])}, {_moment(memory)}"),
        ("", size(memory["activations_plain"]), "activations without checkpointing"),
        ("", size(memory["activations_checkpointed"]), "activations with it"),
    ]


def _moment(memory: dict[str, Any]) -> str:
    """Return when most is there."""
    moments = memory["moments"]
    most = max(moments, key=lambda name: sum(moments[name].values()))
    return {"loss": "at the loss", "backward": "in the backward pass", "step": "in the step"}[most]


def _traffic(traffic: dict[str, Any]) -> list[Row]:
    rows = [
        (
            row["purpose"],
            size(row["mean"]),
            f"{row['collective']}, busiest {size(row['busiest'])}"
            if row["busiest"] != row["mean"]
            else row["collective"],
        )
        for row in traffic["messages"]
    ]
    busiest = f"busiest sends {size(traffic['busiest_sent'])}, receives "
    busiest += size(traffic["busiest_received"])
    return [*rows, ("sent", size(traffic["mean_sent"]), busiest)]


def _newton_schulz(facts: dict[str, Any]) -> list[Row]:
    flops, balance = facts["flops"], facts["balance"]
    if not balance["matrices"]:
        return [("matrices", "0", "every parameter is on AdamW")]
    share = 100 * flops["newton_schulz_share"]
    split = f"{balance['split_matrices']:,} split over subgroups of {balance['subgroup_size']}"
    return [
        (
            "matrices",
            f"{balance['matrices']:,}",
            split if balance["split_matrices"] else "none split",
        ),
        ("FLOPs", f"{flops['newton_schulz_per_step']:.4g}", f"in {flops['newton_schulz_dtype']}"),
        ("share", f"{share:.3g} %", "of the FLOPs of a step"),
        ("balance", f"{balance['busiest_over_mean']:.3f}", "busiest device over the mean"),
    ]


def _time(facts: dict[str, Any]) -> list[Row]:
    time = facts["time"]
    rows = [(k.replace("_", " "), _seconds(time["parts"][k]), text) for k, text in TIMES.items()]
    rows += [
        ("step", _seconds(time["step"]), f"{time['tokens_per_second']:,.0f} tokens per second"),
        ("with AdamW", _seconds(time["adamw_step"]), "in the same layout"),
    ]
    if time["hours"] is not None:
        rows.append(("run", f"{time['hours']:,.4g} h", f"{time['steps']:,} steps"))
    return rows


def _verdict(facts: dict[str, Any]) -> list[str]:
    memory, time = facts["memory"], facts["time"]
    lines = []
    if not memory["fits"]:
        need, there = size(memory["peak"]), size(memory["device"])
        lines.append(f"does not fit: needs {need} of {there}; {memory['advice']}")
    if facts["balance"]["matrices"]:
        slower, fewer = 100 * time["slower_than_adamw"], 100 * time["break_even_fewer_steps"]
        lines += [
            f"A step is {slower:.2g} % longer than AdamW's: Muon pays if it needs at least "
            f"{fewer:.2g} % fewer steps.",
            "Published: about 52 % of AdamW's FLOPs (Moonlight, arXiv 2502.16982), 10-15 % fewer "
            "tokens (Essential AI, arXiv 2505.02222).",
        ]
    return lines


def size(nbytes: int) -> str:
    """Return bytes in the unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.2f} {unit}"
    return f"{nbytes} B"


def _seconds(value: float) -> str:
    return f"{value * 1000:,.3g} ms" if value < 1 else f"{value:,.3f} s"
