"""Computations on the metrics of runs that studies of every kind use.

`curves` reads losses along a run; `reach` finds what a run spends until it has a loss; `sweep`
finds the best value of a swept key; `seed_blocks` gives intervals from runs that differ in their
seed.
"""
