"""The polynomial that approximates the polar factor U V^T of a matrix U S V^T.

The nouns:

- `Coefficients`: a triple (a, b, c) for each step, and the norm that a matrix is divided by first.
- *Gram matrix*: X X^T or X^T X, whichever is smaller. A step multiplies X by a polynomial of it.
- `Segments`: the numbers of steps between two restarts. The direct form restarts after every step,
  the Gram form rarely or never.
- `Subgroup`: the ranks that share one matrix. Each holds a part of the long side.

The path of a matrix: `orthogonalize` -> `newton_schulz_` -> `product_` (panels: `panel_product_`)
-> `torch.baddbmm`. `exact_polar` computes the same from an SVD in float64, for tests.

Which norm a schedule has is `Coefficients.normalization` in `coefficients`; how it is computed is
`_take_scale_` in `orthogonalize`.
"""
