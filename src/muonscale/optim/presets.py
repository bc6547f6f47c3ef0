"""Named sets of options: what the recipes of papers and of their code say of the optimizer.

For example:

    optimizer = Muon(parameter_groups(model, lr=1e-3), **preset("muon_plus_repo"))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muonscale.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of `Muon`, and where they come from."""

    options: Mapping[str, Any]
    source: str


PRESETS: dict[str, Preset] = {
    "moonlight": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "scale": "rms",
            "rms": 0.2,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
        },
        source="Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2 and "
        "appendix B; the defaults of Muon",
    ),
    "essential": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "scale": "rms",
            "rms": 0.2,
            "weight_decay": 0.1,
            "betas": (0.95, 0.95),
            "eps": 1e-8,
        },
        source="Practical Efficiency of Muon for Pretraining, arXiv 2505.02222, section 2 and "
        "appendix G",
    ),
    "keller": Preset(
        options={"momentum": 0.95, "nesterov": True, "scale": "keller", "weight_decay": 0.0},
        source="Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024)",
    ),
    "muoneq": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "pre_norm": "row",
            "scale": "rms",
            "rms": 0.2,
            "weight_decay": 0.1,
            "betas": (0.95, 0.95),
            "eps": 1e-8,
        },
        source="MaeChd/muon-eq, the code of Chang et al., MuonEq, arXiv 2603.28254; without its "
        "epsilon of 1e-8 inside the root of a sum of squares",
    ),
    "aurora": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 12,
            "pre_norm": "aurora",
            "scale": "keller",
            "weight_decay": 0.025,
        },
        source="tilde-research/aurora-release, the code of Aurora, arXiv 2606.27715",
    ),
    "muon2": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 12,
            "second_moment": "gradient",
            "second_moment_beta": 0.95,
            "second_moment_eps": 1e-10,
            "scale": "keller",
        },
        source="KellerJordan/modded-nanogpt, track 3, MuonSq (2026-05-01), of Muon2, arXiv "
        "2604.09967",
    ),
    "adamuon": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "pre_norm": "sign",
            "second_moment": "update",
            "second_moment_beta": 0.95,
            "second_moment_eps": 1e-8,
            "scale": "rms_exact",
            "rms": 0.2,
            "weight_decay": 0.1,
        },
        source="Chongjie-Si/AdaMuon, the code of Si et al., AdaMuon, arXiv 2507.11005, for GPT-2",
    ),
    "muonh": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 12,
            "constraint": "weight_norm",
        },
        source="KellerJordan/modded-nanogpt, track 3, MuonH (2026-04-30); its lr of matrices is 0.014",
    ),
    "dion2": Preset(
        options={
            "momentum": 0.95,
            "nesterov": False,
            "ns_coefficients": "polar_express_nanochat",
            "row_fraction": 0.25,
            "scale": "spectral",
            "weight_decay": 0.01,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
        },
        source="microsoft/dion, the code of Ahn et al., Dion2, arXiv 2512.16928, as on row-sharded "
        'matrices with selection_scope="global"; its Newton-Schulz has the margin 1.02, this 1.01',
    ),
    "nordion2": Preset(
        options={
            "momentum": 0.95,
            "nesterov": False,
            "ns_coefficients": "polar_express_nanochat",
            "row_fraction": 0.25,
            "post_norm": "normuon",
            "post_norm_eps": 1e-8,
            "normuon_beta2": 0.95,
            "scale": "spectral",
            "weight_decay": 0.01,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
        },
        source="microsoft/dion, NorDion2, there also Dion3; otherwise as dion2",
    ),
    "muonbp": Preset(
        options={
            "momentum": 0.95,
            "nesterov": False,
            "block_period": 5,
            "scale": "rms",
            "rms": 0.2,
        },
        source="Khaled et al., MuonBP, arXiv 2510.16981, algorithm 1 with the period of its "
        "experiments; the shape factor of a block is that of its own shape",
    ),
    "muown": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "scale": "rms",
            "rms": 0.2,
            "constraint": "row_magnitude",
            "weight_decay": 0.0,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
        },
        source="kcc-lion/muown, the code of Lion et al., Muown, arXiv 2605.10797; its fused qkv is "
        "three matrices, as splits make it here",
    ),
    "muon_plus_paper": Preset(
        options={
            "momentum": 0.95,
            "nesterov": False,
            "post_norm": "col",
            "post_norm_eps": 1e-8,
            "scale": "spectral",
        },
        source="Zhang et al., Muon+, arXiv 2602.21545, algorithm 1",
    ),
    "muon_plus_repo": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "post_norm": "col_row",
            "post_norm_eps": 1e-7,
            "scale": "spectral",
            "betas": (0.95, 0.95),
            "eps": 1e-8,
        },
        source="K1seki221/MuonPlus, the code of arXiv 2602.21545; its GPT runs have row_col",
    ),
    "normuon": Preset(
        options={
            "momentum": 0.95,
            "nesterov": True,
            "post_norm": "normuon",
            "post_norm_eps": 1e-10,
            "normuon_beta2": 0.95,
            "scale": "keller",
        },
        source="zichongli5/NorMuon, the code of Li et al., NorMuon, arXiv 2510.05491",
    ),
    "normuon_paper": Preset(
        options={
            "momentum": 0.95,
            "nesterov": False,
            "post_norm": "normuon",
            "post_norm_eps": 1e-8,
            "normuon_beta2": 0.95,
            "scale": "rms_exact",
            "rms": 0.2,
        },
        source="Li et al., NorMuon, arXiv 2510.05491, algorithm 1",
    ),
}
"""A preset sets the direction and the shape factor; learning rates are yours. Options given
after it win: `Muon(groups, **(preset("muon_plus_repo") | {"post_norm": "row_col"}))`."""


def preset(name: str) -> dict[str, Any]:
    """Return the options of `Muon` that `name` stands for.

    Raises:
        ConfigError: for an unknown name.

    Examples:
        >>> preset("muon_plus_repo")["post_norm_eps"]
        1e-07
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}: {nearest(name, PRESETS)}")
    return dict(PRESETS[name].options)
