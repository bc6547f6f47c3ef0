"""How long a step of the optimizer takes: measuring tools, and `muonscale bench`.

A *bucket* is a group of parameters that are stepped and measured together (`buckets`). *Contenders*
are the optimizers that are measured on it: ours, and torch's AdamW and Muon. `contenders` also
warms them up and alternates them, round by round. `measure` has the clocks, `memory` refuses what
does not fit, `passes` times forward and backward, and `rates` times matrix products. `model` puts
the buckets, the whole model and the passes together; `text` prints the result. A new contender is a
function in `contenders` and a line in `model._contenders`.
"""
