"""Estimate the memory, FLOPs, traffic and time of training a model, without running it.

The nouns: a *workload* is the work of one rank in a step; a *placement* is the sharding of the
model and of the optimizer's state; a *rank group* is a set of parameters on the same ranks, with
the *assignment* of its matrices to owners; a *device* (`muonscale.lab.devices`) has rates and a
memory size; *assumptions*
are the numbers that were not measured.

`resolve` (the request) -> `placement`, `workload` -> `activations`, `memory`, `flops`, `traffic` ->
`step_time` -> `estimate` (all facts) -> `text`, `figure`. `suggest` estimates many layouts of the
same devices, and takes the fastest that fits. `run_cost` counts one run on one process.
`assumptions` lists the assumptions with their sources.
"""
