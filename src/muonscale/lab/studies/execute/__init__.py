"""Starting, watching and ending the runs of a study: in local processes or in a Slurm array.

`job` is what an executor is given; `executor` chooses one of `local` and `slurm`; `folder` holds
the plan and the outcomes of a study; `worker` is the process that does runs.
"""
