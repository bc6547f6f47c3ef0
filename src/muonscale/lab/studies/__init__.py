"""Studies: many runs that are planned, done once each, and read together.

The nouns: a *planned run* has coordinates (variant, lr, seed) and a configuration, whose hash is
its id (`planned_run`); an *outcome* is its state and result; a *study* is a function from the
outcomes so far to the runs it wants, and from all outcomes to findings (`study`); a *variant* is an
optimizer to compare; a *setting* is one value for each searched hyper-parameter.

`kinds` (recipe -> study) -> `engine` (plan, do what is missing, analyze, report) -> `execute` (here
or on Slurm). `compare`, `transfer`, `scaling`, `telescope` and `batch` are the kinds, each with
config, study, analysis and report; `frontier` is part of `batch`. What they share: `config` (keys),
`gpus` (of this machine), `variants` (what is compared), `search` (the best setting of each variant),
`cost` (hours of a plan), `analysis`, `report_blocks`, and `text` (plan and status).
"""
