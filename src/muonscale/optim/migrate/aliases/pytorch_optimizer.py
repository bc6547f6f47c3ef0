"""kozistr/pytorch_optimizer."""

from __future__ import annotations

from muonscale.errors import ConfigError
from muonscale.optim.migrate.aliases.argument import (
    ASCENT,
    GROUPS,
    KELLER,
    MATCH_RMS,
    SPEED,
    Argument,
    Foreign,
    NoCounterpart,
    Options,
    ignore,
    map_to,
    map_to_adamw,
    read_coefficients,
    refuse,
)


def _normuon_scale(given: Options) -> Options:
    if given["update_scale"] == "match_rms":
        return {"scale": "rms_exact", "rms": 0.2}
    if given["update_scale"] != "preserve_norm":
        raise ConfigError(
            f"update_scale is {given['update_scale']!r}; accepted: preserve_norm, match_rms"
        )
    return MATCH_RMS if given["use_adjusted_lr"] else KELLER


_PYTORCH_OPTIMIZER: dict[str, Argument] = {
    "params": GROUPS,
    "lr": map_to("lr", 0.02),
    "momentum": map_to("momentum", 0.95),
    "weight_decay": map_to("weight_decay", 0.0),
    "weight_decouple": refuse(True, "weight decay is always decoupled"),
    "nesterov": map_to("nesterov", True),
    "ns_steps": map_to("ns_steps", 5),
    "ns_coeffs": Argument(
        default="original",
        ours="ns_coefficients",
        to=read_coefficients("ns_coeffs", {"original": "jordan", "quintic": "you5"}),
        note='`"original"` is `"jordan"`, `"quintic"` is `"you5"`; triples stay as they are. Its '
        '`"polar_express"` tables have other numbers: give the triples',
    ),
    "use_adjusted_lr": Argument(
        default=False, ours="scale", choices={False: KELLER, True: MATCH_RMS}
    ),
    "adamw_lr": map_to_adamw("lr", 3e-4),
    "adamw_betas": map_to("betas", (0.9, 0.95)),
    "adamw_wd": map_to_adamw("weight_decay", 0.0),
    "adamw_eps": map_to("eps", 1e-10),
    "maximize": refuse(False, ASCENT),
    "foreach": ignore(None, SPEED),
}


ROWS: dict[str, Foreign] = {
    "pytorch_optimizer": Foreign(
        what="kozistr/pytorch_optimizer: Muon",
        source="pytorch_optimizer 4.1.0, optimizer/muon/muon.py",
        arguments={
            **_PYTORCH_OPTIMIZER,
            "ns_method": Argument(
                default="newton_schulz",
                ours="ns_form",
                choices={
                    "newton_schulz": {"ns_form": "direct"},
                    "gram_newton_schulz": {"ns_form": "gram"},
                },
            ),
            "ns_reset_steps": ignore((2,), "the Gram form restarts as rarely as rounding allows"),
        },
        fixed={},
        note="DistributedMuon has the same arguments except the last two, and translates in the "
        "same way.",
    ),
    "pytorch_optimizer_normuon": Foreign(
        what="kozistr/pytorch_optimizer: NorMuon",
        source="pytorch_optimizer 4.1.0, optimizer/muon/normuon.py",
        arguments={
            **_PYTORCH_OPTIMIZER,
            "beta2": map_to("normuon_beta2", 0.95),
            "use_adjusted_lr": Argument(
                default=False,
                ours="scale",
                to=_normuon_scale,
                note='as for `pytorch_optimizer`, if `update_scale` is `"preserve_norm"`',
            ),
            "update_scale": Argument(
                default="preserve_norm",
                ours="scale",
                to=_normuon_scale,
                note='`"match_rms"`: `scale="rms_exact", rms=0.2`',
            ),
            "eps": map_to("post_norm_eps", 1e-10),
        },
        fixed={"post_norm": "normuon"},
    ),
}

MISSING: dict[str, NoCounterpart] = {
    "pytorch_optimizer_adamuon": NoCounterpart(
        what="kozistr/pytorch_optimizer: AdaMuon",
        why='use `preset("adamuon")`, which is the code of its authors; its options are not translated',
    ),
    "pytorch_optimizer_adago": NoCounterpart(
        what="kozistr/pytorch_optimizer: AdaGO",
        why="it has an AdaGrad step size from the norm of the gradient",
    ),
    "pytorch_optimizer_muonclip": NoCounterpart(
        what="kozistr/pytorch_optimizer: MuonClip",
        why='use `translate_arguments("pytorch_optimizer", nesterov=False, use_adjusted_lr=True)`, '
        "and "
        "QK-clip after each step (`muonscale.optim.diagnostics.qk_clip`, or `optimizer.qk_clip` in "
        "the trainer)",
    ),
}
