"""Mixtures of experts.

- `routing`: the arithmetic of loads, balance, router bias and auxiliary loss.
- `routers`: the supported routers of transformers, and their scores.
- `gate_scale`: the factor that gives k gated experts the RMS of one.
"""
