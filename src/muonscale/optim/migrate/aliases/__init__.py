"""Tables of other projects' optimizers and their arguments, one file for each project.

`translate_arguments`, `convert_state_dict` and the migration guide read them. Shape factors under
other projects' names are in `muonscale.optim.rules.scale`.
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
"""Classes whose update no options reproduce, by name."""
