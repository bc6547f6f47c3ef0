"""The optimizer library. It needs torch alone.

The packages:

- `newton_schulz`: the polynomial that approximates the polar factor of a matrix, and its cost.
- `matrices`: which logical matrices a parameter holds, and which rank holds which part of them.
- `rules`: the update rules and their stages, as functions of tensors, and the registry of rules.
- `parameters`: from a model to checked parameter groups, and the report of them.
- `distributed`: what ranks agree on, which rank works on which matrix, and what they send.
- `state`: the state of each parameter by its name, and state dicts.
- `migrate`: arguments, learning rates and saved state of other projects' optimizers.
- `diagnostics`: figures of weights and updates, and QK-clip; both run outside a step.

Beside them:

- `muon`: `Muon`, the `torch.optim.Optimizer` that applies every rule.
- `step`: one step of one rule, on one rank or on many.
- `arguments`: what may be given to `Muon`: parameters, groups and keywords in their many spellings.
- `options`: every option once, with its type, default, range and meaning.
- `option_schedule`: values of options that change from step to step, as learning rates do.
- `presets`: the options of published recipes.
- `hf_trainer`: `Muon` for trainers that make an optimizer of a model.

A step: gradient -> `Rule.direction_` -> matrices gathered -> `MatrixUpdate.update` -> weight.

docs/concepts/life-of-a-step.md follows a step function by function, and docs/glossary.md defines
every noun.
"""
