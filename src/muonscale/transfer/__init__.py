"""Transfer of hyper-parameters from one width to another. Needs only torch.

The nouns: the *base* is the model for which hyper-parameters were found; a *convention* (spectral,
adam_table, standard) says how they change; *multipliers* are what a convention gives for one
parameter; *constants* are what a forward pass does with the width; a *fold* is a factor that is
missing from the forward pass and is multiplied into a parameter instead.

- `fields`: the fields of a configuration in which a model and its base may differ.
- `pair`: the parameters of a model, each with that of the base.
- `multipliers`: the formulas of every convention, for one parameter.
- `constants`: what the forward pass of known models does with the width. `folds`: the factors to
  fold in: scaled embeddings, the logits of a tied head, attention scores.
- `parametrization`: `parametrize` puts it all together, for a model and its groups.
- `apply`: applies multipliers to initial weights and to parameter groups.
- `coordinates`: measures outputs and updates, for coordinate checks.
"""
