"""Muon for a model, in one call: for trainers that hand over the model rather than groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from muonscale.optim.muon import Muon
from muonscale.optim.options import ConvolutionsT, HeadsT
from muonscale.optim.parameters.groups import Overrides, parameter_groups
from muonscale.optim.rules import MUON


class MuonFactory:
    """Make `Muon(parameter_groups(model, ...), ...)` of a model.

    Hugging Face's Trainer takes an optimizer's class and calls it with two groups of bare tensors,
    by decay, which say nothing of embeddings and heads. A class that is no optimizer it calls with
    the model instead, as `MuonFactory()(model, **options)`.

    Examples:
        >>> from torch import nn
        >>> from muonscale import MuonFactory
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> optimizer = MuonFactory()(model, lr=1e-3, post_norm="row_col")
        >>> [group["name"] for group in optimizer.param_groups]
        ['hidden', 'embedding', 'head', 'norm']
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        adamw_lr: float | None = None,
        overrides: Overrides | None = None,
        rule: str = MUON.name,
        heads: HeadsT = "whole",
        convolutions: ConvolutionsT = "adamw",
        **options: Any,
    ) -> Muon:
        """Return the optimizer of `model`.

        Args:
            model: see `parameter_groups`, as for the next five.
            adamw_lr: learning rate of embeddings, head, norms and biases.
            overrides: options by role or by a glob over parameter names.
            rule: "adamw" puts everything on AdamW.
            heads: "auto" makes the block of each attention head a matrix.
            convolutions: "muon" treats kernels as hidden matrices.
            options: of `Muon`, such as `lr` and `post_norm`.

        Raises:
            GroupingError, ConfigError, LayoutError: as from `parameter_groups` and `Muon`.
        """
        groups = parameter_groups(
            model,
            adamw_lr=adamw_lr,
            overrides=overrides,
            rule=rule,
            heads=heads,
            convolutions=convolutions,
        )
        return Muon(groups, **options)
