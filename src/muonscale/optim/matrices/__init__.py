"""The logical matrices of a parameter: how they are stored, sharded and batched.

- *logical matrix*: `(out, in)`, as in `y = W @ x`.
- `MatrixSpec` (`spec`): how a parameter stores its logical matrices. `view` returns them as
  batches, and `unview` is its inverse.
- *per-row state*: one value per row of each logical matrix, stored like the parameter.
- `MatrixBatches` (`batches`): the matrices of many parameters, in one batch per shape.
- `LocalMatrices` (`local`): sums and factors of the matrices in the part of a parameter on this
  rank.
- `Sharding` (`sharding`): how a stored tensor is sharded over a mesh of ranks.
- *mesh rank*, *shard coordinate*, *replicas*: a rank of the mesh, the shard it holds, and the mesh
  ranks that hold the same shard.
- `Piece`: a box of one logical matrix that a rank holds.

A whole parameter: stored tensor -> `view` -> batch by shape -> update -> `unview`.
A sharded one: local tensor -> `pieces` -> `read_piece` -> owner of the matrix -> `write_piece_`.
"""
