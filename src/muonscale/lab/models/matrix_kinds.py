"""Kinds of matrices of a transformer by function: the groups of Moonlight's spectra.

    AttnQO         queries and outputs of attention, including down- and up-projections of queries
    AttnKV         keys and values, including down- and up-projections of their latent vector
    Experts        routed experts
    SharedExperts  experts that every token uses
    Router         projections that choose experts
    Dense          feed-forward layers without experts

The kind follows from the class of the modules around a parameter and their attribute names. A
parameter with several matrices (a fused QKV) may have several kinds.

References:
    Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 3.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from muonscale.lab.models.attention import is_attention
from muonscale.optim.diagnostics.telemetry import Place
from muonscale.optim.matrices.spec import PLAIN, matrix_shapes
from muonscale.optim.parameters.fused_weights import holds_experts
from muonscale.optim.parameters.roles import Role
from muonscale.optim.rules.step_inputs import named

ATTENTION: dict[str, tuple[str, ...]] = {
    "q_proj": ("AttnQO",),
    "q_a_proj": ("AttnQO",),
    "q_b_proj": ("AttnQO",),
    "o_proj": ("AttnQO",),
    "c_proj": ("AttnQO",),
    "k_proj": ("AttnKV",),
    "v_proj": ("AttnKV",),
    "kv_a_proj_with_mqa": ("AttnKV",),
    "kv_b_proj": ("AttnKV",),
    "c_attn": ("AttnQO", "AttnKV", "AttnKV"),
}
"""Kinds of the matrices of a projection, by its name in an attention module."""

SHARED = ("shared_experts", "shared_expert")
"""Names of the shared experts in mixtures of experts."""


def matrix_kinds(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> dict[str, list[Place]]:
    """Return the matrices of a model by kind, as an argument of `measure_kinds`.

    Matrices without a kind (embeddings, unknown projections) are left out.

    Args:
        model: a causal language model of transformers, sharded or not.
        groups: parameter groups of its optimizer.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[Place]] = {}
    for group in groups:
        if group["role"] not in (Role.HIDDEN, Role.ROUTER):
            continue
        for name, parameter in named(group):
            batches = len(matrix_shapes(parameter.shape, group["matrices"].get(name, PLAIN)))
            kinds = _kinds(name, group["role"], modules)
            if len(kinds) == 1:
                kinds *= batches
            if len(kinds) == batches:
                for batch, kind in enumerate(kinds):
                    found.setdefault(kind, []).append((name, batch))
    return {kind: found[kind] for kind in KINDS if kind in found}


KINDS = ("AttnQO", "AttnKV", "Experts", "SharedExperts", "Router", "Dense")
"""The kinds in the order of the paper."""


def _kinds(name: str, role: Role, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the common kind of a parameter's matrices, or one for each; empty if there is none."""
    if role == Role.ROUTER:
        return ("Router",)
    path = name.split(".")[:-1]
    around = [(modules[".".join(path[:end])], path[:end]) for end in range(len(path), 0, -1)]
    for (_, inner), (module, _) in itertools.pairwise(around):
        if is_attention(module):
            return ATTENTION.get(inner[-1], ())
    if any(part in SHARED for part in path):
        return ("SharedExperts",)
    if any(holds_experts(module) or at[-1] == "experts" for module, at in around):
        return ("Experts",)
    return ("Dense",) if any(type(module).__name__.endswith("MLP") for module, _ in around) else ()
