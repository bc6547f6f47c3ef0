"""The update rules and their stages, as functions of tensors.

A *rule* (`base.Rule`) has options, state, an elementwise *direction* and, on matrices, an *update*
of whole matrices. `RULES` is the registry. The *stages* of the Muon rule are rows of tables:
`pre_norm`, `post_norm`, `scale`, `decay`, `constraint`; `row_magnitude` is the constraint by rows.
`moments` has the running averages that the rules share. *Master weights* preserve small updates of
16-bit parameters, which rounding would lose. *nonfinite* decides whether a step changes anything.
`reference` implements all rules again in float64, for tests.

A step reads from left to right: gradient -> direction -> update -> weight.
"""

from muonscale.optim.rules.adamw import ADAMW as ADAMW
from muonscale.optim.rules.muon import MUON as MUON
