"""The assumptions of a cost estimate, with their sources."""

from __future__ import annotations

from muonscale.lab.console import dtype_text
from muonscale.lab.estimate.activations import Activations
from muonscale.lab.estimate.resolve import ResolvedPlan
from muonscale.lab.estimate.step_time import NS_MFU

Assumption = dict[str, str]
"""Keys `what`, `value`, `source`."""


def assumptions(planned: ResolvedPlan, activations: Activations) -> list[Assumption]:
    """Return the assumptions in the order of the table."""
    rows = [("not given", "default", text) for text in planned.defaults]
    return [
        {"what": what, "value": value, "source": source}
        for what, value, source in [
            *rows,
            *_rates(planned),
            *_counting(planned, activations),
        ]
    ]


def _rates(planned: ResolvedPlan) -> list[tuple[str, str, str]]:
    device, request = planned.device, planned.request
    precision = dtype_text(planned.workload.precision)
    inter = "--bandwidth" if request.bandwidth is not None else "assumption: one port per device"
    rows = [
        ("dtype of passes", precision, f"train.precision={planned.config.train.precision}"),
        ("peak of a device", f"{device.flops[precision] / 1e12:,.4g} TFLOP/s", device.source),
        ("memory of a device", f"{device.memory / 2**30:.1f} GiB", device.source),
        ("memory bandwidth", _rate(device.memory_bandwidth), device.source),
        ("within a machine", _rate(device.intra), f"{device.source}; one direction"),
        ("between machines", f"{_rate(device.inter)} per device", inter),
        ("devices in a machine", str(device.ranks_per_machine), "assumption"),
        ("MFU of the model", f"{request.mfu:g}", "--mfu; assumption, untested"),
    ]
    if planned.placement.matrices:
        products = dtype_text(planned.placement.matrices[0].products_dtype)
        rows.append(("Newton-Schulz", f"{NS_MFU:g} of peak", f"{products}; assumption, untested"))
    return rows


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.4g} GB/s"


def _counting(planned: ResolvedPlan, activations: Activations) -> list[tuple[str, str, str]]:
    measured = "autograd's saved tensors on the meta device, fused attention"
    formula = "34 bytes per token and width in 16 bits: Korthikanti et al., arXiv 2205.05198"
    rows = [
        ("operations", "6 N + "
            "attention", "Kaplan et al., arXiv 2001.08361; PaLM, arXiv 2204.02311"),
        ("collectives", "ring", "all-reduce 2 (W-1)/W of the bytes sent, others (W-1)/W"),
        ("hidden", "FSDP and DDP messages", "behind the passes, up to their duration; assumption"),
        ("hidden", "Muon's exchange", "behind Newton-Schulz, except for one round; assumption"),
        ("not hidden", "tensor and expert parallel", "the passes wait for activations; assumption"),
        ("activations", "measured" if activations.measured else "formula",
         measured if activations.measured else formula),
        ("logits", "and their gradient", "float32 for a part of the tokens at a time"),
        ("not "
            "counted", "allocator, "
                "libraries", "fragmentation, workspaces of kernels and collectives"),
    ]  # fmt: skip
    if planned.placement.stacks:
        rows.append(
            ("routed experts", "even", "every expert gets the same number of tokens; assumption")
        )
    if period := max((max(g.periods) for g in planned.placement.matrices), default=1) - 1:
        average = f"of one step on whole matrices and {period} on blocks"
        rows.append(("Newton-Schulz and its exchange", "averages", average))
    if any(rank_group.assignment.subgroup_size > 1 for rank_group in planned.placement.matrices):
        rows.append(
            ("split matrices", "a part each", "workspace: with Gram matrices, without messages")
        )
    return rows
