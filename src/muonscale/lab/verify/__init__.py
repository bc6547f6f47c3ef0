"""`muonscale verify`: whether a layout of processes trains a model with the numbers of one process.

`check` takes the same steps in the layout (`launch`, `worker`), in one process (`trajectory`), and
in one process with the sums in other orders (`reordered_run`), whose differences are rounding
alone. `compare` judges the layout by them, and `text` prints the result.
"""
