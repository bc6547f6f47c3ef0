"""Optimizers of torch itself."""

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
    missing,
    same,
    unneeded,
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
            "lr": same("lr", 1e-3),
            "weight_decay": same("weight_decay", 0.1),
            "momentum": same("momentum", 0.95),
            "nesterov": same("nesterov", True),
            "ns_coefficients": same("ns_coefficients", (3.4445, -4.7750, 2.0315)),
            "eps": unneeded(1e-7, NO_EPS),
            "ns_steps": same("ns_steps", 5),
            "adjust_lr_fn": Argument(default=None, ours="scale", choices=_TORCH_SCALES),
        },
        fixed={},
        alone=True,
        note='Its products are in bfloat16 on every device: `ns_dtype="bfloat16"`.',
    ),
    "torch_adamw": Foreign(
        what="torch.optim.AdamW (2.13)",
        source="torch 2.13.0, torch/optim/adamw.py",
        arguments={
            "params": GROUPS,
            "lr": same("lr", 1e-3),
            "betas": same("betas", (0.9, 0.999)),
            "eps": same("eps", 1e-8),
            "weight_decay": same("weight_decay", 1e-2),
            "amsgrad": missing(False, "AdamW here has no running maximum"),
            "maximize": missing(False, ASCENT),
            "foreach": unneeded(None, SPEED),
            "capturable": missing(False, "a step is not captured into a CUDA graph"),
            "differentiable": missing(False, "no gradient goes through a step"),
            "fused": unneeded(None, SPEED),
        },
        fixed={},
        rule="adamw",
        note="The learning rate and the decay of AdamW are the right ones for Muon with "
        '`scale="rms"`: put the matrices on Muon with them.',
    ),
}
