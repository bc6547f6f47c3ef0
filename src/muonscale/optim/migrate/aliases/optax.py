"""optax, for JAX."""

from __future__ import annotations

from collections.abc import Sequence

from muonscale.errors import ConfigError
from muonscale.optim.migrate.aliases.argument import (
    KELLER,
    NO_EPS,
    REQUIRED,
    Argument,
    Foreign,
    Options,
    map_to,
    map_to_adamw,
    read_coefficients,
    refuse,
)

OPTAX_NAMES = {"standard": "jordan", "dion": "you5"}


def _optax_scale(given: Options) -> Options:
    rms = given["consistent_rms"]
    return KELLER if rms is None else {"scale": "rms", "rms": rms}


def _optax_steps(given: Options) -> Options:
    """Return `ns_steps`, which is the number of triples if there are several."""
    triples = read_coefficients("ns_coeffs", OPTAX_NAMES)(given)["ns_coefficients"]
    if isinstance(triples, str) or not isinstance(triples[0], Sequence):
        return {"ns_steps": given["ns_steps"]}
    if len(triples) > given["ns_steps"]:
        raise ConfigError(
            f"ns_steps is {given['ns_steps']}, but ns_coeffs has {len(triples)} triples: set "
            "ns_steps to at least that number"
        )
    return {"ns_steps": len(triples)}


def _optax_betas(given: Options) -> Options:
    return {"betas": (given["adam_b1"], given["adam_b2"])}


ROWS: dict[str, Foreign] = {
    "optax": Foreign(
        what="optax.contrib.muon",
        source="optax 0.2.8, optax/contrib/_muon.py",
        arguments={
            "learning_rate": map_to(
                "lr", REQUIRED, "a number; for a schedule use a torch scheduler"
            ),
            "ns_coeffs": Argument(
                default=(3.4445, -4.7750, 2.0315),
                ours="ns_coefficients",
                to=read_coefficients("ns_coeffs", OPTAX_NAMES),
                note='`"standard"` is `"jordan"`, `"dion"` is `"you5"`; triples stay as they are',
            ),
            "ns_steps": Argument(
                default=5,
                ours="ns_steps",
                to=_optax_steps,
                note="with one triple; several triples, as in `dion`, set the number of steps",
            ),
            "beta": map_to("momentum", 0.95),
            "eps": map_to("eps", 1e-8, f"for AdamW only; {NO_EPS}"),
            "weight_decay": map_to("weight_decay", 0.0),
            "weight_decay_mask": refuse(None, "use `overrides` of `parameter_groups`"),
            "mu_dtype": refuse(None, "momentum is always float32"),
            "nesterov": map_to("nesterov", True),
            "adaptive": refuse(
                False, "the update does not depend on the dual norm of the gradient"
            ),
            "preconditioning": refuse(
                "frobenius", 'use `ns_coefficients="jordan+aol"` or `"jordan+schatten4"`'
            ),
            "adam_b1": Argument(default=0.9, ours="betas", to=_optax_betas, note="the first one"),
            "adam_b2": Argument(
                default=0.999, ours="betas", to=_optax_betas, note="the second one"
            ),
            "adam_eps_root": refuse(0.0, "AdamW here has no epsilon inside the square root"),
            "adam_weight_decay": map_to_adamw("weight_decay", 0.0),
            "adam_learning_rate": map_to_adamw("lr", None, "None means `learning_rate`"),
            "muon_weight_dimension_numbers": refuse(None, "use `matrices` in an override"),
            "consistent_rms": Argument(
                default=None,
                ours="scale",
                to=_optax_scale,
                note='None: `scale="keller"`; a number: `scale="rms"` with that `rms`',
            ),
        },
        fixed={},
        note="Its momentum has a bias correction, which with Nesterov changes the direction of the "
        "first steps a little. The Nesterov term of its Adam has one too.",
    ),
}
