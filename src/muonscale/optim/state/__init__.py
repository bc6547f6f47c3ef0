"""The optimizer's state: what is kept for each parameter, and how it is saved and loaded.

- `state`: creates the state of a parameter (`new_state`), and keeps it by parameter name when a
  parameter is replaced, moved or cast (`keep_by_name`).
- `state_io`: the form that is saved (`to_loadable`), and loading by name (`load_by_name`).

A state tensor has one of three forms. It is a plain tensor on one process, a DTensor with the
placements of a sharded parameter, or a `PartitionedTensor` (ZeRO-1) for a replicated one.

State goes parameter -> `new_state` -> step -> `state_dict` -> `to_loadable` -> file, and back from a file
through `load_by_name`, which copies it by name into the state that the optimizer already has.
"""
