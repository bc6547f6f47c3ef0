"""What a plan takes for granted, with where it is from."""

from __future__ import annotations

from muonscale.lab.estimate.activations import Activations
from muonscale.lab.estimate.resolve import Planned
from muonscale.lab.estimate.step_time import NS_MFU

Assumption = dict[str, str]
"""`what`, `value`, `source`."""


def assumptions(planned: Planned, activations: Activations) -> list[Assumption]:
    """Return them, in the order of the table."""
    rows = [("not given", "default", text) for text in planned.defaults]
    return [
        {"what": what, "value": value, "source": source}
        for what, value, source in [
            *rows,
            *_rates(planned),
            *_counting(planned, activations),
        ]
    ]


def _rates(planned: Planned) -> list[tuple[str, str, str]]:
    device, asked = planned.device, planned.asked
    precision = str(planned.workload.precision).removeprefix("torch.")
    inter = "--bandwidth" if asked.bandwidth is not None else "assumption: one port per device"
    rows = [
        ("dtype of passes", precision, f"train.precision={planned.config.train.precision}"),
        ("peak of a device", f"{device.flops[precision] / 1e12:,.4g} TFLOP/s", device.source),
        ("memory of a device", f"{device.memory / 2**30:.1f} GiB", device.source),
        ("memory bandwidth", _rate(device.memory_bandwidth), device.source),
        ("within a machine", _rate(device.intra), f"{device.source}; one direction"),
        ("between machines", f"{_rate(device.inter)} per device", inter),
        ("devices in a machine", str(device.ranks_per_machine), "assumption"),
        ("MFU of the model", f"{asked.mfu:g}", "--mfu; assumption, untested"),
    ]
    if planned.placed.matrices:
        products = str(planned.placed.matrices[0].products).removeprefix("torch.")
        rows.append(("Newton-Schulz", f"{NS_MFU:g} of peak", f"{products}; assumption, untested"))
    return rows


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.4g} GB/s"


def _counting(planned: Planned, activations: Activations) -> list[tuple[str, str, str]]:
    measured = "autograd's saved tensors on the meta device, fused attention"
    formula = "34 bytes per token and width in 16 bits: Korthikanti et al., arXiv 2205.05198"
    rows = [
        ("operations", "6 N + attention", "Kaplan et al., arXiv 2001.08361; PaLM, arXiv 2204.02311"),
        ("collectives", "ring", "all-reduce 2 (W-1)/W of the bytes sent, others (W-1)/W"),
        ("hidden", "FSDP and DDP messages", "behind the passes, as far as they last; assumption"),
        ("hidden", "Muon's exchange", "behind Newton-Schulz, but for one round; assumption"),
        ("not hidden", "tensor and expert parallel", "activations are waited for; assumption"),
        ("activations", "measured" if activations.measured else "formula",
         measured if activations.measured else formula),
        ("logits", "12 bytes each", "log-probabilities and two gradients in float32"),
        ("not counted", "allocator, libraries", "fragmentation, workspaces of kernels and collectives"),
    ]  # fmt: skip
    if planned.placed.stacks:
        rows.append(("routed experts", "even", "every expert gets as many tokens; assumption"))
    if any(domain.plan.subgroup_size > 1 for domain in planned.placed.matrices):
        rows.append(("split matrices", "a part each", "workspace: Gram matrices added, team's not"))
    return rows
