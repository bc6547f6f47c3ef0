"""Coordinate checks: whether a parametrization keeps a model the same at every width.

`plan` makes one configuration for each width and seed, `run` trains them and measures coordinates,
`slopes` fits each against the width, `tolerances` and `verdict` judge the slopes, and `result`
turns everything into plain values, from which `text` and `page` are built. The numbers are measured
by `muonscale.transfer.coordinates`: outputs of modules, weights and updates. Quantities that are
not the output of a module, such as attention logits, are added in `run.probe_forward`. `components`
names the parts of a model, by which `tolerances` looks up a limit.
"""
