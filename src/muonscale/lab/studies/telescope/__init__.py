"""Telescoping sweeps: the grid of hyper-parameters shrinks while the width doubles.

`grid` and `levels` give the runs of each width; `law` and `drift` describe how the lowest loss and
the optimum change with the width; `full_sweep` checks the outcome against a sweep at the last
width.

Source: Essential AI, Practical Efficiency of Muon for Pretraining, arXiv 2505.02222.
"""
