"""From text to batches of tokens.

The nouns: a *document* is a text with a key; a *corpus* is tokenized documents in two splits,
training and validation; *rows* are token ids `[L + 1]` by number; a *mixture* is several corpora
with weights.

`sources` (a corpus) -> `folders` (its files) -> `readers` (by suffix: text of `files`, `records`,
`tables`, archives; `formats` refuses what is not text) -> `document_store` (read once, and split)
-> `tokenizer` (`tokenizer_files` are those of other programs) -> `encode` (`encode_chunk` is what
its processes run) -> `tokens` (shards on disk, cut into rows by `Sequences`) -> `mixture`,
`shuffle` (which row comes when). `token_files` copies tokens that another program wrote. `prepare`
does this once, into `cache`. `chat` is the same for conversations (`chat.store` packs them into
rows), `loss_mask` says which tokens are targets, and `ngram` is the baseline of counts.

The weights of a mixture are `config.sections.DataSection.weights`; `training.batches.build_batches`
gives them to `mixture`, which turns shares into an order.
"""
