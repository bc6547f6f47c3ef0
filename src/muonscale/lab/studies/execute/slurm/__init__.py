"""Runs of a study as tasks of a Slurm job array.

`array` submits and watches; `queue` asks Slurm; `ledger` remembers what was submitted; `options`
are those of sbatch; `task` is what one task of the array does.
"""
