"""What studies of every kind compute from the metrics of their runs.

`curves` reads losses by tokens; `reach` finds where a curve reaches a loss; `sweep` finds the best
value of a swept key; `seed_blocks` gives intervals from runs that differ in their seed.
"""
