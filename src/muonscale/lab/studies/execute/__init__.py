"""How a study's runs are started, watched and ended: `local` processes or a `slurm` array.

`folder` keeps what a study has planned and what has ended. `worker` is the process of one run.
"""
