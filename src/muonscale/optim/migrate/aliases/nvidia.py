"""NVIDIA Emerging-Optimizers."""

from __future__ import annotations

from itertools import cycle, islice

from muonscale.errors import ConfigError
from muonscale.optim.migrate.aliases.argument import (
    GROUPS,
    SPEED,
    Argument,
    Foreign,
    NoCounterpart,
    Options,
    ignore,
    map_to,
    refuse,
)
from muonscale.optim.newton_schulz.coefficients import SCHEDULES

_NVIDIA_SETS = {"simple": "jordan", "quintic": "you5", "aol": "aol"}
_NVIDIA_SETS_LAST = {"cans": "cans", "deepseekv4": "deepseek_v4", "cubic5": "cubic5"}


def _nvidia_coefficients(given: Options) -> Options:
    """Return triples: the first kind of row is cycled, the second kind repeats its last triple."""
    name, steps = given["coefficient_type"], given["num_ns_steps"]
    if name in _NVIDIA_SETS:
        triples = tuple(islice(cycle(SCHEDULES[_NVIDIA_SETS[name]].triples), steps))
    elif name == "cubic5" and steps != 5:
        raise ConfigError(f"num_ns_steps is {steps}, but coefficient_type='cubic5' accepts only 5")
    elif name in _NVIDIA_SETS_LAST:
        triples = SCHEDULES[_NVIDIA_SETS_LAST[name]].triples
    else:
        accepted = ", ".join(map(repr, [*_NVIDIA_SETS, *_NVIDIA_SETS_LAST]))
        raise ConfigError(
            f"coefficient_type is {name!r}: muonscale.optim.newton_schulz.coefficients has no row "
            f"with its numbers; accepted: {accepted}"
        )
    return {"ns_coefficients": triples}


def _nvidia_scale(given: Options) -> Options:
    mode, extra = given["scale_mode"], given["extra_scale_factor"]
    if mode == "spectral":  # sqrt(max(out, in)), which our "rms" multiplies by a number
        return {"scale": "rms", "rms": extra}
    if mode not in ("shape_scaling", "unit_rms_norm"):
        raise ConfigError(
            f"scale_mode is {mode!r}; accepted: spectral, shape_scaling, unit_rms_norm"
        )
    if extra != 1:
        raise ConfigError(
            f"extra_scale_factor is {extra}, but scale_mode={mode!r} accepts only 1: multiply lr "
            "by it and divide weight_decay by it instead"
        )
    return {"scale": f"nvidia:{mode}"}


ROWS: dict[str, Foreign] = {
    "nvidia": Foreign(
        what="NVIDIA Emerging-Optimizers: Muon",
        source="NVIDIA-NeMo/Emerging-Optimizers fd77292 (2026-08-20), "
        "orthogonalized_optimizers/muon.py",
        arguments={
            "params": GROUPS,
            "lr": map_to("lr", 3e-4),
            "momentum": map_to("momentum", 0.95),
            "weight_decay": map_to("weight_decay", 0.01),
            "nesterov": map_to("nesterov", False),
            "weight_decay_method": Argument(
                default="decoupled",
                ours="decay",
                choices={"decoupled": {"decay": "coupled"}},
                note='its `"independent"` ignores the schedule, but `decay="independent"` follows '
                "it",
            ),
            "fp32_matmul_prec": Argument(
                default="medium",
                ours="ns_dtype",
                choices={"medium": {"ns_dtype": "bfloat16"}, "highest": {"ns_dtype": "float32"}},
                note='`"high"` is TF32, which torch enables for all products',
            ),
            "coefficient_type": Argument(
                default="quintic",
                ours="ns_coefficients",
                to=_nvidia_coefficients,
                note='`"simple"` is `"jordan"`, `"quintic"` `"you5"`, `"deepseekv4"` '
                '`"deepseek_v4"`; `"cans"`, `"cubic5"` and `"aol"` have the same name here. All '
                "become "
                "triples; `simple`, `quintic` and `aol` start again after the last one",
            ),
            "num_ns_steps": map_to("ns_steps", 5),
            "scale_mode": Argument(
                default="spectral",
                ours="scale",
                to=_nvidia_scale,
                note='`"spectral"`: `scale="rms"` with `rms` equal to `extra_scale_factor`; '
                '`"shape_scaling"` and `"unit_rms_norm"`: `"nvidia:shape_scaling"`, '
                '`"nvidia:unit_rms_norm"`',
            ),
            "extra_scale_factor": Argument(
                default=1.0,
                ours="rms",
                to=_nvidia_scale,
                note='with `scale_mode="spectral"`; otherwise it must be 1',
            ),
            "use_syrk": ignore(False, SPEED),
            "weight_update_hook": refuse(
                None,
                'use `constraint`: "weight_norm" for HyperballHook, "radial_brake" for its own',
            ),
        },
        fixed={},
        has_adamw=False,
        note="It has no AdamW, only matrices.",
    ),
}

MISSING: dict[str, NoCounterpart] = {
    "nvidia_adaptive": NoCounterpart(
        what="NVIDIA Emerging-Optimizers: AdaptiveMuon",
        why="there is no NAMO; its AdaMuon lets the length of the update change, and has no sign; its "
        'NorMuon averages along the longer side, but that of the paper (`post_norm="normuon"`) along '
        "rows",
    ),
}
