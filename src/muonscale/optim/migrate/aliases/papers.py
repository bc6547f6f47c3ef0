"""The published code of Jordan, Moonlight and NorMuon."""

from __future__ import annotations

from muonscale.optim.migrate.aliases.argument import (
    GROUPS,
    JORDAN_5,
    KELLER,
    MATCH_RMS,
    PARAMETERS,
    Foreign,
    map_to,
    map_to_adamw,
    refuse,
)

ROWS: dict[str, Foreign] = {
    "keller": Foreign(
        what="KellerJordan/Muon: Muon, SingleDeviceMuon, and groups of MuonWithAuxAdam with "
        "use_muon=True",
        source="KellerJordan/Muon 5bc6993, muon.py; muon-optimizer 0.1.0",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 0.02),
            "weight_decay": map_to("weight_decay", 0.0),
            "momentum": map_to("momentum", 0.95),
        },
        fixed={"nesterov": True, **JORDAN_5, **KELLER},
        has_adamw=False,
        note="A fused weight is one matrix there; here each of its matrices is updated separately. "
        "The factor of a square convolution kernel is 1 there and `sqrt(max(1, out/(in*k*k)))` "
        "here. The AdamW of MuonWithAuxAdam is `keller_adam`.",
    ),
    "keller_adam": Foreign(
        what="KellerJordan/Muon: groups of MuonWithAuxAdam with use_muon=False",
        source="KellerJordan/Muon 5bc6993, muon.py",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 3e-4),
            "betas": map_to("betas", (0.9, 0.95)),
            "eps": map_to("eps", 1e-10),
            "weight_decay": map_to("weight_decay", 0.0),
        },
        fixed={},
        rule="adamw",
        note="NorMuonWithAuxAdam has the same AdamW. In one optimizer, `lr` and `weight_decay` are "
        "those of the groups on AdamW.",
    ),
    "keller_2024": Foreign(
        what="KellerJordan/Muon: Muon of 2024, with its own AdamW",
        source="KellerJordan/Muon 28c793b (2025-01-04), muon.py",
        arguments={
            "muon_params": GROUPS,
            "lr": map_to("lr", 0.02),
            "momentum": map_to("momentum", 0.95),
            "nesterov": map_to("nesterov", True),
            "ns_steps": map_to("ns_steps", 6),
            "adamw_params": refuse(None, PARAMETERS),
            "adamw_lr": map_to_adamw("lr", 3e-4),
            "adamw_betas": map_to("betas", (0.95, 0.95)),
            "adamw_eps": map_to("eps", 1e-8),
            "adamw_wd": map_to_adamw("weight_decay", 0.0),
        },
        fixed={"weight_decay": 0.0, "ns_coefficients": "jordan", **KELLER},
        note="Its matrices have no weight decay.",
    ),
    "moonlight": Foreign(
        what="MoonshotAI/Moonlight: Muon of examples/toy_train.py",
        source="MoonshotAI/Moonlight abaa96e, examples/toy_train.py",
        arguments={
            "lr": map_to("lr", 1e-3),
            "wd": map_to("weight_decay", 0.1),
            "muon_params": refuse(None, PARAMETERS),
            "momentum": map_to("momentum", 0.95),
            "nesterov": map_to("nesterov", True),
            "ns_steps": map_to("ns_steps", 5),
            "adamw_params": refuse(None, PARAMETERS),
            "adamw_betas": map_to("betas", (0.9, 0.95)),
            "adamw_eps": map_to("eps", 1e-8),
        },
        fixed={"ns_coefficients": "jordan", **MATCH_RMS},
        note="These are the defaults here. Its AdamW adds eps before the bias correction of the "
        "second moment, which matters in the first steps only.",
    ),
    "normuon": Foreign(
        what="zichongli5/NorMuon: NorMuon, SingleDeviceNorMuon, and groups of NorMuonWithAuxAdam "
        "with use_muon=True",
        source="zichongli5/NorMuon e5aaaf4, normuon.py",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 0.02),
            "weight_decay": map_to("weight_decay", 0.0),
            "momentum": map_to("momentum", 0.95),
            "beta2": map_to("normuon_beta2", 0.95),
        },
        fixed={
            "nesterov": True,
            "post_norm": "normuon",
            "post_norm_eps": 1e-10,
            **JORDAN_5,
            **KELLER,
        },
        has_adamw=False,
        note="The AdamW of NorMuonWithAuxAdam is `keller_adam`. The factor of a square convolution "
        "kernel is 1 there and `sqrt(max(1, out/(in*k*k)))` here.",
    ),
}
