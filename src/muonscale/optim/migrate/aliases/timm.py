"""timm."""

from __future__ import annotations

from muonscale.optim.migrate.aliases.argument import (
    GROUPS,
    KELLER,
    MATCH_RMS,
    NO_EPS,
    Argument,
    Foreign,
    Options,
    ignore,
    map_to,
    read_coefficients,
    refuse,
)


def _fallback_lr(given: Options) -> Options:
    if given["adamw_lr"] is not None:
        return {"lr": given["adamw_lr"]}
    return {"lr": given["lr"] * given["fallback_lr_scale"]}


ROWS: dict[str, Foreign] = {
    "timm": Foreign(
        what="timm.optim.Muon",
        source="timm 1.0.31, timm/optim/muon.py",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 0.02),
            "weight_decay": map_to("weight_decay", 0.0),
            "momentum": map_to("momentum", 0.95),
            "nesterov": map_to("nesterov", False),
            "ns_steps": map_to("ns_steps", 5),
            "ns_coefficients": Argument(
                default="quintic",
                ours="ns_coefficients",
                to=read_coefficients("ns_coefficients", {"original": "jordan", "quintic": "you5"}),
                note='`"original"` is `"jordan"`, `"quintic"` is `"you5"`; triples stay as they '
                'are. Its `"polar_express"` tables have other numbers: give the triples',
            ),
            "eps": map_to("eps", 1e-7, f"for AdamW only; {NO_EPS}"),
            "safety_factor": refuse(1.0, "`ns_coefficients=Coefficients(triples=..., margin=...)`"),
            "adjust_lr_fn": Argument(
                default="match_rms_adamw",
                ours="scale",
                choices={
                    "match_rms_adamw": MATCH_RMS,
                    "original": KELLER,
                    "rms_to_rms": {"scale": "spectral"},
                    None: {"scale": "none"},
                },
            ),
            "conv_mode": refuse("flatten", "convolution kernels are always flattened"),
            "normalize_spatial": ignore(True, "belongs to `conv_mode`"),
            "adamw_lr": Argument(default=None, ours="lr", adamw=True, to=_fallback_lr),
            "fallback_lr_scale": Argument(
                default=1.0, ours="lr", adamw=True, to=_fallback_lr, note="times `lr`"
            ),
            "betas": map_to("betas", (0.9, 0.95)),
            "algo": refuse("muon", "there is no AdaMuon"),
            "scale_eps": ignore(False, NO_EPS),
            "capturable": refuse(False, "steps are not captured in CUDA graphs"),
            "verbose": ignore(False, "`grouping_report` lists all parameters"),
        },
        fixed={},
        note="It chooses the parameters on AdamW by shape; here the module type decides. With "
        "`nesterov=True` its AdamW is NAdamW.",
    ),
}
