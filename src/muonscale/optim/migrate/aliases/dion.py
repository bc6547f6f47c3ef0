"""microsoft/dion."""

from __future__ import annotations

import torch.distributed as dist

from muonscale.optim.migrate.aliases.argument import (
    GROUPS,
    MATCH_RMS,
    NO_EPS,
    SPEED,
    Argument,
    Foreign,
    NoCounterpart,
    Options,
    ignore,
    map_to,
    refuse,
)
from muonscale.optim.newton_schulz.coefficients import SCHEDULES, Coefficients


def _dion_coefficients(given: Options) -> Options:
    if given["use_gram_newton_schulz"]:
        return {"ns_form": "gram", "ns_coefficients": "gram_ns"}
    if given["use_polar_express"]:
        triples = SCHEDULES["polar_express_nanochat"].triples
        return {"ns_coefficients": Coefficients(triples=triples, margin=1.02)}
    return {"ns_coefficients": "you5"}


def _dion_group(given: Options) -> Options:
    mesh = given["distributed_mesh"]
    return {"process_group": mesh} if isinstance(mesh, dist.ProcessGroup) else {}


_DION: dict[str, Argument] = {
    "params": GROUPS,
    "distributed_mesh": Argument(
        default=None,
        ours="process_group",
        to=_dion_group,
        note="a ProcessGroup is `process_group`; a DeviceMesh is not needed, since DTensors have "
        "theirs",
    ),
    "lr": map_to("lr", 0.01),
    "mu": map_to("momentum", 0.95),
    "betas": map_to("betas", (0.9, 0.95)),
    "weight_decay": map_to("weight_decay", 0.01),
    "cautious_wd": map_to("cautious_decay", False),
    "epsilon": map_to("eps", 1e-8, f"for AdamW only; {NO_EPS}"),
    "nesterov": map_to("nesterov", False),
    "adjust_lr": Argument(
        default="spectral_norm",
        ours="scale",
        choices={
            "spectral_norm": {"scale": "spectral"},
            "rms_norm": MATCH_RMS,
            None: {"scale": "none"},
        },
    ),
    "flatten": ignore(
        False,
        "convolution kernels are always flattened; stacked experts are always separate matrices",
    ),
    "use_gram_newton_schulz": Argument(
        default=False,
        ours="ns_form",
        to=_dion_coefficients,
        note='True: `ns_form="gram"`, `ns_coefficients="gram_ns"`',
    ),
    "use_triton": ignore(False, SPEED),
    "use_polar_express": Argument(
        default=True,
        ours="ns_coefficients",
        to=_dion_coefficients,
        note='True: the triples of `"polar_express_nanochat"` with the margin 1.02; False: '
        '`"you5"`',
    ),
    "newton_schulz_func": refuse(None, "give `ns_coefficients`"),
}

ROWS: dict[str, Foreign] = {
    "dion": Foreign(
        what="microsoft/dion: Muon",
        source="microsoft/dion 0a059a4 (2026-08-07), dion/muon.py",
        arguments=_DION,
        fixed={"ns_steps": 5},
        note='For `algorithm="adamw"` of a group, put its role on AdamW. For `split_sizes` and '
        "`num_heads`, use `matrices` in an override. `lion` has no counterpart.",
    ),
    "dion_normuon": Foreign(
        what="microsoft/dion: NorMuon",
        source="microsoft/dion 0a059a4 (2026-08-07), dion/normuon.py",
        arguments={**_DION, "muon_beta2": map_to("normuon_beta2", 0.95)},
        fixed={"ns_steps": 5, "post_norm": "normuon", "post_norm_eps": 1e-8},
        note="If the rows of a matrix are sharded, it preserves the norm of each shard; here the "
        "norm of the whole matrix is preserved. It does not support sharded columns.",
    ),
}

MISSING: dict[str, NoCounterpart] = {
    "dion_dion": NoCounterpart(
        what="microsoft/dion: Dion", why="low-rank power iteration with error feedback"
    ),
    "dion_dion2": NoCounterpart(
        what="microsoft/dion: Dion2, NorDion2, Dion3",
        why='use `preset("dion2")` and `preset("nordion2")`; their options are not translated, because '
        "`selection_scope` and the choice of columns have no counterpart",
    ),
}
