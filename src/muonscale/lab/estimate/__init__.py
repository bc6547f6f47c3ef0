"""What training a model costs, in memory, operations, bytes sent and seconds; nothing is run.

The nouns: a *workload* is what one rank works through in a step; a *placement* says which rank holds
which part of the model and of the optimizer's state; a *device* has rates and a memory size;
*assumptions* are the numbers that were not measured.

`resolve` (what was asked) -> `placement`, `workload` -> `activations`, `memory`, `flops`, `traffic` ->
`step_time` -> `estimate` (all facts) -> `text`, `figure`. `run_cost` counts one run on one process.
"""
