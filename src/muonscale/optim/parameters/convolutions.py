"""The matrices in the kernels of convolutions.

A convolution multiplies a matrix by every patch of its input. The kernel `[out, in/groups, k...]`
is therefore the matrix `(out, in*k)`, with k the product of the kernel's sides (Jordan et al.,
Muon: An optimizer for hidden layers in neural networks, 2024; it flattens kernels in the same way).
Each group of a grouped convolution reads channels of its own, so that its kernel is a matrix of its
own: `groups` matrices `(out/groups, in/groups*k)`.

A transposed convolution multiplies a matrix by every position of its input, and adds the patches
that result. Its weight `[in, out/groups, k...]` is the matrix `(out*k, in)`, stored transposed: the
transpose of the matrix of the convolution whose gradient it computes.
"""

from __future__ import annotations

from torch import Tensor, nn

from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kernel_matrices(kernel: Tensor, module: nn.Module) -> MatrixSpec:
    """Return how the kernel of a convolution stores its matrices.

    Args:
        kernel: `[out, in/groups, k...]`, or `[in, out/groups, k...]` of a transposed convolution.
        module: the convolution that owns it.

    Examples:
        >>> conv = nn.Conv2d(8, 16, 3, groups=2)
        >>> matrix_shapes(conv.weight.shape, kernel_matrices(conv.weight, conv))
        [(2, 8, 36)]
        >>> back = nn.ConvTranspose2d(16, 8, 3)
        >>> matrix_shapes(back.weight.shape, kernel_matrices(back.weight, back))
        [(1, 72, 16)]
    """
    transposed = isinstance(module, _TRANSPOSED)
    groups = int(module.groups)  # pyrefly: ignore
    return MatrixSpec(
        flattened=True, transposed=transposed, heads=groups, by_columns=transposed and groups > 1
    )


def holds_vectors(kernel: Tensor, matrices: MatrixSpec) -> bool:
    """Return whether every matrix of a kernel has one row or one column.

    This holds for depthwise convolutions. The polar factor of a vector is the vector at unit
    length.
    """
    return all(1 in shape for _, *shape in matrix_shapes(kernel.shape, matrices))
