"""Configurations of runs and of studies: from a recipe and overrides to one validated object.

- `read`: reads YAML and JSON, shipped recipes, and the folders of earlier runs and studies.
- `overrides`: reads `key=value` and puts the value into the tree.
- `validate`: validates a tree against a pydantic model; errors name the key and the value
  (`sections` itself refuses an unknown `optimizer.*` key).
- `sections`: keys, types, defaults and help of every section of a run.
- `keys`: what each key is, as `muonscale config` and the reference print it.
- `load`: `Config`, the configuration of a run, and `load_config`.
- `run_length`: which step reads which sequences, when the batch size changes during a run.

recipe -> `read_tree` -> `assign` overrides -> `validate` -> `Config`, or the config of a study.
"""
