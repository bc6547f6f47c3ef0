"""Tokens to a loss by batch size: the critical batch size, and how two optimizers compare.

`measurements` are read from the runs; `laws` and `ratio` are fitted to them; `noise` is the
gradient noise scale to compare them with.
"""
