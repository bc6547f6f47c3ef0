"""From a model to checked parameter groups.

The nouns:

- `ParamSite`: one place at which a model holds a parameter. A tied weight has several.
- `Survey`: all sites of all parameters, and what the model says about embeddings and heads.
- `Role`: what a parameter is to the model: hidden, router, embedding, head, norm, convolution or
  unknown.
- `RoleAssignment`: one parameter with its role and its logical matrices.
- `AttentionProjection`: a weight with attention heads, and the module that says how large they are.
- *parameter group*: a dict of parameters with one rule and one set of options, as torch has it.
- `GroupSource`: the model that a list of groups was made from, held weakly.
- `GroupingReport`: the rule and the reason of every parameter.

The path of a model: `survey` (its `_heads` decides which layers are output layers;
`forward_path.output_layers` reads `forward` for it) -> `assign_roles` -> `parameter_groups`
(overrides, `AttentionProjection.by_head`) -> `check_keys`, `check_options`, `check_parameter` ->
`Muon`. Parameters that join later: `select` -> `groups_of` -> `find_home` (`unfreeze`).

What `assign_roles` asks: `fused_weights.stored_matrices`: fused weights (`fused_table` lists those
of transformers' classes; `fused_weights` reads the others from the module, and its `looks_fused`
says when to doubt); `kernel_matrices`: convolutions; `adapter_role`: adapters; `parameter_use`:
bare parameters.

`module_survey` says which layers are heads, `roles` what every other parameter is (a tied weight is
an embedding), and `groups` which rule a role has.
"""
