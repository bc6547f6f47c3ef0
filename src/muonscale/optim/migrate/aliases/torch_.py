"""Optimizers in torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muonscale.optim.migrate.aliases.argument import (
    ASCENT,
    GROUPS,
    KELLER,
    MATCH_RMS,
    NO_EPS,
    SPEED,
    Argument,
    Foreign,
    Options,
    ignore,
    map_to,
    refuse,
)

_TORCH_SCALES: Mapping[Any, Options] = {
    None: KELLER,
    "original": KELLER,
    "match_rms_adamw": MATCH_RMS,
    "spectral_unclamped": {"scale": "spectral"},
}

ROWS: dict[str, Foreign] = {
    "torch": Foreign(
        what="torch.optim.Muon (2.13)",
        source="torch 2.13.0, torch/optim/_muon.py; spectral_unclamped: 2.14",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 1e-3),
            "weight_decay": map_to("weight_decay", 0.1),
            "momentum": map_to("momentum", 0.95),
            "nesterov": map_to("nesterov", True),
            "ns_coefficients": map_to("ns_coefficients", (3.4445, -4.7750, 2.0315)),
            "eps": ignore(1e-7, NO_EPS),
            "ns_steps": map_to("ns_steps", 5),
            "adjust_lr_fn": Argument(default=None, ours="scale", choices=_TORCH_SCALES),
        },
        fixed={},
        has_adamw=False,
        note="Its matrix products are in bfloat16 on every device; for the same, set "
        '`ns_dtype="bfloat16"`.',
    ),
    "torch_adamw": Foreign(
        what="torch.optim.AdamW (2.13)",
        source="torch 2.13.0, torch/optim/adamw.py",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 1e-3),
            "betas": map_to("betas", (0.9, 0.999)),
            "eps": map_to("eps", 1e-8),
            "weight_decay": map_to("weight_decay", 1e-2),
            "amsgrad": refuse(False, "AdamW here has no AMSGrad"),
            "maximize": refuse(False, ASCENT),
            "foreach": ignore(None, SPEED),
            "capturable": refuse(False, "steps are not captured in CUDA graphs"),
            "differentiable": refuse(False, "a step is not differentiable"),
            "fused": ignore(None, SPEED),
        },
        fixed={},
        rule="adamw",
        note='With `scale="rms"` matrices can be put on Muon with the same learning rate and '
        "decay.",
    ),
}
