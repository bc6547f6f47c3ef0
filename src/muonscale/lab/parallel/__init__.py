"""Training on many processes: their arrangement, the sharding of parameters, and communication.

The nouns: a *topology* is the arrangement of the processes (data, tensor, sequence and expert
parallelism); a *placement* is the sharding of a parameter under it; `Processes` is one rank's view
of all ranks; `Parallelized` is the model on a rank.

`topology` -> `placements` (pure) -> `apply`, with `styles` and `experts` -> `forward`, `text_loss`.
`processes` joins the process group; `apply` makes the device meshes of a topology and wraps the
model with torch's FSDP and tensor parallelism; `gather` makes a sharded model whole again.
"""
