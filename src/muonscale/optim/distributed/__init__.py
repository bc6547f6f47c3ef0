"""A step of the optimizer on many ranks.

- `dtensor`: reads the `Sharding` of a parameter from its DTensor placements.
- `context`: `DistributedContext`, the shardings, process groups and rank groups of an optimizer.
- `consensus`: what ranks agree on before a step: gradients that are missing or not finite.
- `assignment`: `OwnerAssignment`, which rank updates which matrix in which round. Pure.
- `rank_group`: `RankGroup`, one step of all parameters on the same ranks.
- `exchange`: `Payload`, the tensors that a rank group sends, and the collectives that send them.
- `zero1`: `PartitionedTensor`, the state of replicated parameters, partitioned over the ranks; and
  `copy_`, which copies a state tensor into another sharding when a state dict is loaded.
- `shard_block`: how a checkpoint stores shards that FSDP and tensor parallelism divide unevenly.
- `memory`: predicts the memory of a step.

Newton-Schulz needs whole matrices, and a rank holds shards. Every matrix therefore has an *owner*.
A step runs in rounds of a limited size, and a round has five phases:

1. *collect*: ranks compute directions on their shards and send the pieces to the owners.
2. *assemble*: owners put the pieces together, in batches of matrices of one shape.
3. *update*: owners compute the updates of their batches.
4. *distribute*: owners send the pieces of each update to all ranks that hold them.
5. *deliver*: ranks write the pieces into local tensors and apply each update that is complete.

Rounds overlap: during the update of a round, the directions of the next round and the updates of
the previous one are being sent. With partitioned state (ZeRO-1) the owner already has the whole
direction, so nothing is collected. A matrix shared by a *subgroup* has several owners.
"""
