"""Coordinate checks: whether a parametrization keeps a model the same at every width.

`plan` makes one configuration for each width and seed, `run` trains them and measures coordinates,
`slopes` fits each against the width, `tolerances` and `verdict` judge the slopes, and `result`
makes plain values of all, from which `text` and `page` are made.
"""
