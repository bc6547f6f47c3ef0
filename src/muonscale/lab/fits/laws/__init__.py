"""The laws: one module each, registered in `registry.LAWS`. `base.Law` says what a law is.

Where a fit starts, and how robust it is, is said in the module of its law. `chinchilla` and
`power_offset` share `separable`: a grid over the exponents, with the rest solved exactly. The
search that follows is `fits.minimize`.
"""
