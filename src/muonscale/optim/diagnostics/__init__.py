"""Statistics of weights and updates, and QK-clip. Both run outside a step.

The nouns:

- *snapshot*: copies of the weights before a step.
- *figure*: a number for a parameter group or a kind of matrix, such as `update_rms`.
- *spectrum*: the squared singular values of a matrix. `SPECTRUM` lists the figures of a spectrum.
- `Outputs`: some outputs of a linear map, in its weight and bias.
- *gamma*: the factor, at most 1, that QK-clip applies to the attention logits of a head.

The path of figures: `snapshot` -> `Muon.step` -> `measure` or `measure_kinds`. Nothing is written.
The path of QK-clip: largest logits -> `clip_factors` -> `clip_grouped_` or `clip_latent_` ->
weights.
"""
