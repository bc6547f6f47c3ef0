"""Migration from other projects' optimizers to `Muon`.

The nouns:

- `Foreign`: one optimizer class of another project, as a table of its arguments.
- `Argument`: one argument of it, and the options of `Muon` that replace it.
- `NoCounterpart`: a class whose update no options reproduce, with the reason.
- `Translation`: the options of `Muon` that reproduce another optimizer.
- `Source`: an optimizer whose saved state can be converted.
- `ConversionTable`: the factor of the learning rate for each matrix shape.

The path of arguments: `FOREIGN` -> `translate_arguments` -> `Translation` -> `Muon`.
The path of saved state: `convert_state_dict` -> `Muon.load_state_dict`.

`convert_lr` only divides two shape factors. What a name such as `torch:original` means is a row of
`muonscale.optim.rules.scale.ALIASES`.
"""
