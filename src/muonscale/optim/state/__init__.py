"""The state of each parameter, and saving and loading of it.

- `state`: creates the state of a parameter (`new_state`), and keeps it by parameter name when a
  parameter is replaced, moved or cast (`keep_by_name`).
- `state_io`: makes a state dict loadable for `torch.load` (`to_loadable`), and loads one by
  parameter name (`load_by_name`).

A state tensor is a plain tensor on one process, a DTensor with the placements of a sharded
parameter, or a `PartitionedTensor` (ZeRO-1) of a replicated parameter.

The path of saved state: `state_dict` -> `to_loadable` -> file -> `load_by_name`, which matches
names; `distributed.zero1.copy_` then copies each tensor into the sharding that the optimizer has.
"""
