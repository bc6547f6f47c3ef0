"""Figures of weights and updates, and QK-clip. Both run outside a step.

The nouns:

- *snapshot*: copies of the weights before a step.
- *figure*: a number for a parameter group or a kind of matrix, such as `update_rms`.
- *spectrum*: the singular values of a matrix, kept as their squares. `SPECTRUM` has its figures.
- `Outputs`: the outputs of a projection, in all tensors that make them.
- *gamma*: the factor, at most 1, that QK-clip applies to the attention logits of a head.

The path of figures: `snapshot` -> `Muon.step` -> `measure` or `measure_kinds`. They only read.
The path of QK-clip: largest logits -> `clip_factors` -> `clip_grouped_` or `clip_latent_` -> weights.
"""
