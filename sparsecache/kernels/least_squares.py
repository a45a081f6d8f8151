"""Solve small linear systems, and factorise a prompt by alternating least squares, as in LRQK.

Matrices of systems are positive semidefinite. A small multiple of the identity matrix, the ridge, is added to each.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, tl, triton, use_kernel

RIDGE = 1e-5  # of the mean of the diagonal; with 1e-6, rounding in float32 changes what is selected
MIN_RIDGE = 1e-20  # above 0, so that a matrix of zeros gives zeros
_BLOCK_K = 16  # rows of a Gram matrix per iteration
_MAX_RANK = 16  # systems of a higher rank do not fit into registers


def factorise(query_gram: Tensor, key_gram: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Factorise a prompt's queries Q and keys K: return W_Q^T, W_K^T, B_Q and B_K, [4, G, R, D] float32.

    With A_Q = Q W_Q and A_K = K W_K, they minimise |Q - A_Q B_Q|^2 + |K - A_K B_K|^2 + |Q K^T - A_Q A_K^T|^2 by
    alternating least squares. query_gram, key_gram: Q^T Q and K^T K, [G, D, D] float32, each matrix contiguous. start:
    [G, R, D] float32, the first W_Q^T and W_K^T; a row of zeros stays zero in every result. iterations: 1 or more.
    """
    if use_kernel(query_gram) and start.shape[1] <= _MAX_RANK:
        kv_heads, rank, head_dim = start.shape
        factors = torch.empty((4, *start.shape), device=start.device, dtype=torch.float32)
        _factorise_kernel[(kv_heads,)](
            query_gram, query_gram.stride(0), key_gram, key_gram.stride(0), start.contiguous(), factors, rank, head_dim,
            iterations, RIDGE, MIN_RIDGE, BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16),
            BLOCK_K=_BLOCK_K, num_warps=8,
        )  # fmt: skip
        return factors
    query_weight = key_weight = start
    query_side, key_side = query_weight @ query_gram, key_weight @ key_gram  # A_Q^T Q and A_K^T K
    query_basis = solve(query_side @ query_weight.mT, query_side)
    key_basis = solve(key_side @ key_weight.mT, key_side)
    for _ in range(iterations):
        query_weight = solve(key_side @ key_weight.mT + query_basis @ query_basis.mT, key_side + query_basis)
        query_side = query_weight @ query_gram
        key_weight = solve(query_side @ query_weight.mT + key_basis @ key_basis.mT, query_side + key_basis)
        key_side = key_weight @ key_gram
        query_basis = solve(query_side @ query_weight.mT, query_side)
        key_basis = solve(key_side @ key_weight.mT, key_side)
    return torch.stack((query_weight, key_weight, query_basis, key_basis))


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the solution x of (matrix + ridge) x = right, [.., R, M]. Does not wait for the device.

    matrix: [.., R, R] float32, symmetric, positive semidefinite; right: [.., R, M] float32.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = (RIDGE * mean + MIN_RIDGE) * torch.eye(matrix.shape[-1], device=matrix.device)
    solution: Tensor = torch.linalg.solve_ex(matrix + ridge, right)[0]
    return solution


@triton.jit
def gauss_jordan(a, x, size, relative_ridge, min_ridge, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the solution y of (a + ridge) y = x by Gauss-Jordan elimination, [R, M].

    a: [R, R]; x: [R, M]. Rows and columns from `size` on must be zeros. A positive definite matrix needs no pivoting.
    """
    row = tl.arange(0, BLOCK_R)
    is_diagonal = row[:, None] == row[None, :]
    ridge = relative_ridge * tl.sum(tl.sum(tl.where(is_diagonal, a, 0.0), axis=1), axis=0) / size + min_ridge
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
def _solve_for(left, right, other, x, size, relative_ridge, min_ridge, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the solution y of (left right^T + other other^T + ridge) y = x. All are [R, D]."""
    a = tl.dot(left, tl.trans(right), input_precision="ieee")
    a = tl.dot(other, tl.trans(other), a, input_precision="ieee")
    return gauss_jordan(a, x, size, relative_ridge, min_ridge, BLOCK_R)


@triton.jit
def _store_and_multiply(  # type: ignore[no-untyped-def]
    weight, target, gram, mask, rank, head_dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store weight [R, D] in target, and return the product of weight and gram [D, D].

    The Gram matrix does not fit into registers, so both are read from global memory in blocks of BLOCK_K.
    """
    factor, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    tl.debug_barrier()  # all threads must have read the previous weight
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
    query_gram, query_stride, key_gram, key_stride, start, factors, rank, head_dim, iterations, relative_ridge,
    min_ridge, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Factorise the queries and keys of one KV head as the reference in `factorise` does."""
    kv, factor, channel = tl.program_id(0), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask = (factor < rank)[:, None] & (channel < head_dim)[None, :]
    at = factor[:, None] * head_dim + channel[None, :]
    query_gram += kv * query_stride
    key_gram += kv * key_stride
    size = tl.num_programs(0) * rank * head_dim
    at_query_weight = factors + kv * rank * head_dim
    at_key_weight = at_query_weight + size
    query_weight = tl.load(start + kv * rank * head_dim + at, mask=mask, other=0.0)
    key_weight = query_weight
    zero = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    query_side = _store_and_multiply(
        query_weight, at_query_weight, query_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K
    )
    key_side = _store_and_multiply(key_weight, at_key_weight, key_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K)
    query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, min_ridge, BLOCK_R)
    key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, min_ridge, BLOCK_R)
    for _ in range(iterations):
        query_weight = _solve_for(
            key_side, key_weight, query_basis, key_side + query_basis, rank, relative_ridge, min_ridge, BLOCK_R
        )
        query_side = _store_and_multiply(
            query_weight, at_query_weight, query_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K
        )
        key_weight = _solve_for(
            query_side, query_weight, key_basis, query_side + key_basis, rank, relative_ridge, min_ridge, BLOCK_R
        )
        key_side = _store_and_multiply(
            key_weight, at_key_weight, key_gram, mask, rank, head_dim, BLOCK_R, BLOCK_D, BLOCK_K
        )
        query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, min_ridge, BLOCK_R)
        key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, min_ridge, BLOCK_R)
    tl.store(at_key_weight + size + at, query_basis, mask=mask)
    tl.store(at_key_weight + 2 * size + at, key_basis, mask=mask)
