"""Solve small systems of equations with positive semidefinite matrices, without the host."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel

_RIDGE = 1e-6  # a share of the mean of the diagonal
_LEAST = 1e-20  # so that a matrix of zeros gives zeros


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return x of (matrix + ridge) x = right: [.., R, M].

    matrix: [.., R, R] float32, symmetric, positive semidefinite; right: [.., R, M] float32. A small multiple of the
    unit matrix is added, so that a solution exists.
    """
    size, columns = right.shape[-2:]
    if not use_kernel(right):
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        ridge = (_RIDGE * mean + _LEAST) * torch.eye(size, device=matrix.device)
        solution: Tensor = torch.linalg.solve_ex(matrix + ridge, right)[0]
        return solution
    matrix, right = matrix.contiguous(), right.contiguous()
    out = torch.empty_like(right)
    _solve_kernel[(right.numel() // (size * columns),)](
        matrix, right, out, size, columns, _RIDGE, _LEAST,
        BLOCK_R=next_power_of_2(size), BLOCK_M=next_power_of_2(columns), num_warps=4, **pdl_options(),
    )  # fmt: skip
    return out


@triton.jit
def _solve_kernel(  # type: ignore[no-untyped-def]
    matrix, right, out, size, columns, relative_ridge, least_ridge,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Solve one system by Gauss-Jordan elimination. Positive definite matrices need no pivoting."""
    pdl_wait(USE_PDL)
    system = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    is_diagonal, inside = row[:, None] == row[None, :], row < size
    a = tl.load(
        matrix + (system * size + row[:, None]) * size + row[None, :],
        mask=inside[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    at_right = (system * size + row[:, None]) * columns + column[None, :]
    mask = inside[:, None] & (column < columns)[None, :]
    x = tl.load(right + at_right, mask=mask, other=0.0)
    ridge = relative_ridge * tl.sum(tl.sum(tl.where(is_diagonal, a, 0.0), axis=1), axis=0) / size + least_ridge
    a = tl.where(is_diagonal, a + tl.where(inside, ridge, 1.0)[:, None], a)
    for step in range(size):
        is_pivot = row == step
        a_row = tl.sum(tl.where(is_pivot[:, None], a, 0.0), axis=0)
        x_row = tl.sum(tl.where(is_pivot[:, None], x, 0.0), axis=0)
        pivot = tl.sum(tl.where(is_pivot, a_row, 0.0), axis=0)
        a_row, x_row = a_row / pivot, x_row / pivot
        factor = tl.where(is_pivot, 0.0, tl.sum(tl.where(is_pivot[None, :], a, 0.0), axis=1))
        a = tl.where(is_pivot[:, None], a_row[None, :], a - factor[:, None] * a_row[None, :])
        x = tl.where(is_pivot[:, None], x_row[None, :], x - factor[:, None] * x_row[None, :])
    tl.store(out + at_right, x, mask=mask)
