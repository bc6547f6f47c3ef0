"""The models that are trained: Hugging Face classes, from presets or configuration files.

- `presets`: named shapes of the papers, and small twins of them.
- `config`, `contexts`, `build`: from the `model` section to a Hugging Face configuration and model.
- `pretrained`, `convert`, `hub`, `card`: checkpoints in and out, and the model card; `adapter`:
  LoRA added to a checkpoint, merged and saved.
- `structure`, `flops`: what a model consists of, and its operations.
- These find the parts of a transformers model: `attention` its logits, `query_key` its query and
  key weights, `matrix_kinds` the kinds of its matrices, `moe` its routers (`moe.routing` has the
  formulas of router bias and auxiliary loss).
- `loss` (cross-entropy, mean loss, bits per byte), `generate` (samples), `packed_rows` (rows of
  several conversations or documents), `widen` (the same architecture at another width).
"""
