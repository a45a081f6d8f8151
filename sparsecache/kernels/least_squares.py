"""Solve small systems of equations, and factorise a prompt by alternating least squares, as in LRQK.

Systems are positive semidefinite. A small multiple of the unit matrix is added to each.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel

RIDGE = 1e-5  # a share of the mean of the diagonal; with 1e-6 rounding in float32 changes what is selected
LEAST_RIDGE = 1e-20  # above 0, so that a matrix of zeros gives zeros
_BLOCK_K = 16  # rows of a Gram matrix at a time
_MAX_RANK = 16  # systems of a higher rank do not fit into registers


def factorise(
    query_gram: Tensor, key_gram: Tensor, start: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_Q, W_K and the bases B_Q, B_K of the factors Q W_Q and K W_K of a prompt, [G, R, D] each, W transposed.

    By alternating least squares they come to minimise |Q - A_Q B_Q|^2 + |K - A_K B_K|^2 + |Q K^T - A_Q A_K^T|^2, with
    A_Q = Q W_Q and A_K = K W_K. query_gram, key_gram: Q^T Q and K^T K, [G, D, D] float32; start: [G, R, D] float32, the
    first W_Q and W_K. Rows of zeros stay so.
    """
    if use_kernel(query_gram) and start.shape[1] <= _MAX_RANK:
        kv_heads, rank, head_dim = start.shape
        found = torch.empty((4, *start.shape), device=start.device, dtype=torch.float32)
        _factorise_kernel[(kv_heads,)](
            query_gram.contiguous(), key_gram.contiguous(), start.contiguous(), found, rank, head_dim, iterations,
            RIDGE, LEAST_RIDGE, BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16),
            BLOCK_K=_BLOCK_K, num_warps=8,
        )  # fmt: skip
        return found[0], found[1], found[2], found[3]
    query_weight = key_weight = start
    query_side, key_side = query_weight @ query_gram, key_weight @ key_gram  # A^T X
    query_basis = solve(query_side @ query_weight.mT, query_side)
    key_basis = solve(key_side @ key_weight.mT, key_side)
    for _ in range(iterations):
        query_weight = solve(key_side @ key_weight.mT + query_basis @ query_basis.mT, key_side + query_basis)
        query_side = query_weight @ query_gram
        key_weight = solve(query_side @ query_weight.mT + key_basis @ key_basis.mT, query_side + key_basis)
        key_side = key_weight @ key_gram
        query_basis = solve(query_side @ query_weight.mT, query_side)
        key_basis = solve(key_side @ key_weight.mT, key_side)
    return query_weight, key_weight, query_basis, key_basis


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return x of (matrix + ridge) x = right: [.., R, M]; does not wait for the device.

    matrix: [.., R, R] float32, symmetric, positive semidefinite; right: [.., R, M] float32.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = (RIDGE * mean + LEAST_RIDGE) * torch.eye(matrix.shape[-1], device=matrix.device)
    solution: Tensor = torch.linalg.solve_ex(matrix + ridge, right)[0]
    return solution


@triton.jit
def gauss_jordan(a, x, size, relative_ridge, least_ridge, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the solution of (a + ridge) x = right, by Gauss-Jordan elimination; a: [R, R], right: [R, M].

    Rows from `size` on must be zeros. Positive definite matrices need no pivoting.
    """
    row = tl.arange(0, BLOCK_R)
    is_diagonal = row[:, None] == row[None, :]
    ridge = relative_ridge * tl.sum(tl.sum(tl.where(is_diagonal, a, 0.0), axis=1), axis=0) / size + least_ridge
    a = tl.where(is_diagonal, a + tl.where(row < size, ridge, 1.0)[:, None], a)
    for step in range(size):
        is_pivot = row == step
        a_row = tl.sum(tl.where(is_pivot[:, None], a, 0.0), axis=0)
        x_row = tl.sum(tl.where(is_pivot[:, None], x, 0.0), axis=0)
        pivot = tl.sum(tl.where(is_pivot, a_row, 0.0), axis=0)
        a_row, x_row = a_row / pivot, x_row / pivot
        factor = tl.where(is_pivot, 0.0, tl.sum(tl.where(is_pivot[None, :], a, 0.0), axis=1))
        a = tl.where(is_pivot[:, None], a_row[None, :], a - factor[:, None] * a_row[None, :])
        x = tl.where(is_pivot[:, None], x_row[None, :], x - factor[:, None] * x_row[None, :])
    return x


@triton.jit
def _solve_for(left, right, other, x, size, relative_ridge, least_ridge, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the solution of (left right^T + other other^T + ridge) y = x; all are [R, D]."""
    a = tl.dot(left, tl.trans(right), input_precision="ieee")
    a = tl.dot(other, tl.trans(other), a, input_precision="ieee")
    return gauss_jordan(a, x, size, relative_ridge, least_ridge, BLOCK_R)


@triton.jit
def _times(  # type: ignore[no-untyped-def]
    weight, target, gram, mask, rank, head_dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store weight [R, D] in target, and return weight gram; gram: [D, D] in global memory, too large for registers."""
    factor, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    tl.debug_barrier()  # all threads have read what target held
    tl.store(target + factor[:, None] * head_dim + channel[None, :], weight, mask=mask)
    tl.debug_barrier()
    product = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in range(0, head_dim, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        left = tl.load(
            target + factor[:, None] * head_dim + at[None, :],
            mask=(factor < rank)[:, None] & (at < head_dim)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            gram + at[:, None] * head_dim + channel[None, :],
            mask=(at < head_dim)[:, None] & (channel < head_dim)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(left, right, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["iterations"])
def _factorise_kernel(  # type: ignore[no-untyped-def]
    query_gram, key_gram, start, found, rank, head_dim, iterations, relative_ridge, least_ridge,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Factorise the queries and keys of one KV head, as the reference in `factorise`."""
    kv, factor, channel = tl.program_id(0), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask = (factor < rank)[:, None] & (channel < head_dim)[None, :]
    at = factor[:, None] * head_dim + channel[None, :]
    query_gram += kv * head_dim * head_dim
    key_gram += kv * head_dim * head_dim
    size = tl.num_programs(0) * rank * head_dim
    of_queries = found + kv * rank * head_dim
    of_keys = of_queries + size
    query_weight = tl.load(start + kv * rank * head_dim + at, mask=mask, other=0.0)
    key_weight = query_weight
    zero = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    query_side = _times(query_weight, of_queries, query_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K)
    key_side = _times(key_weight, of_keys, key_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K)
    query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, least_ridge, BLOCK_R)
    key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    for _ in range(iterations):
        query_weight = _solve_for(
            key_side, key_weight, query_basis, key_side + query_basis, rank, relative_ridge, least_ridge, BLOCK_R
        )
        query_side = _times(query_weight, of_queries, query_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K)
        key_weight = _solve_for(
            query_side, query_weight, key_basis, query_side + key_basis, rank, relative_ridge, least_ridge, BLOCK_R
        )
        key_side = _times(key_weight, of_keys, key_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K)
        query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, least_ridge, BLOCK_R)
        key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    tl.store(of_keys + size + at, query_basis, mask=mask)
    tl.store(of_keys + 2 * size + at, key_basis, mask=mask)
