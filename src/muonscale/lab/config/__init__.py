"""The configuration of a run: from recipes, files and overrides to one validated object.

- `sections`: keys, types, defaults and help of every section.
- `load`: reads a recipe, applies overrides `section.key=value`, and validates: `load_config`.
- `run_length`: which step reads which sequences, when the batch size changes during a run.

recipe -> `read_recipe` -> overrides -> `resolve_config` -> `Config`.
"""
