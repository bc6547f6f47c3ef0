"""What each argument of other projects' optimizers is here, as data: one file for each project.

`muonscale.optim.migrate.translate` and `convert_state_dict` read the table, and the migration guide is
written from it. Shape factors under other projects' names are in `muonscale.optim.rules.scale`.
"""

from __future__ import annotations

from muonscale.optim.migrate.aliases import (
    dion,
    nvidia,
    optax,
    papers,
    pytorch_optimizer,
    timm,
    torch_,
)
from muonscale.optim.migrate.aliases.argument import Foreign, NoCounterpart

FOREIGN: dict[str, Foreign] = {
    **torch_.ROWS,
    **papers.ROWS,
    **dion.ROWS,
    **pytorch_optimizer.ROWS,
    **timm.ROWS,
    **optax.ROWS,
    **nvidia.ROWS,
}
"""Other projects' optimizers by name."""

NO_COUNTERPART: dict[str, NoCounterpart] = {
    **dion.MISSING,
    **pytorch_optimizer.MISSING,
    **nvidia.MISSING,
}
"""Classes whose update no options give, by name."""
