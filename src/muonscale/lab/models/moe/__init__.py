"""Mixtures of experts.

- `routing`: the arithmetic of loads, balance, router bias and auxiliary loss.
- `routers`: which routers transformers has, and how they compute.
- `gate_scale`: the factor that keeps the RMS of k gated experts that of one.
"""
