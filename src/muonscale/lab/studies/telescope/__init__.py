"""Telescoping sweeps: the grid of hyper-parameters shrinks while the width doubles.

`grid` and `levels` say which runs a width has; `law` and `drift` say how the optimum moves with the
width; `full_sweep` checks the outcome against a sweep of the largest width.

Source: Essential AI, Practical Efficiency of Muon for Pretraining, arXiv 2505.02222.
"""
