"""How long a step of the optimizer takes: measuring tools, and `muonscale bench`.

A *bucket* is a group of parameters that are stepped and measured together (`buckets`). *Contenders*
are the optimizers that are measured on it (`contenders`): ours, and torch's AdamW and Muon. `model`
measures every bucket, the whole model, and the passes beside them; `text` prints the result.
"""
