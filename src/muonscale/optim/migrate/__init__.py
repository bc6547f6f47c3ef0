"""From other projects' optimizers to this one.

The nouns:

- `Foreign`: one optimizer class of another project, as a table of its arguments.
- `Argument`: one argument of it, with the options that replace it or the reason that none does.
- `NoCounterpart`: a class whose update no options give.
- `Translation`: the options of `Muon` that do what another optimizer does.
- `Source`: an optimizer whose saved state can be converted.
- `ConversionTable`: the factor of the learning rate for each matrix shape.

The path of arguments: `FOREIGN` -> `translate_arguments` -> `Translation` -> `Muon`.
The path of saved state: `convert_state_dict` -> `Muon.load_state_dict`.
"""
