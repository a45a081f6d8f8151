"""The kernels of LRQK: factorise a prompt; at a step reduce a query and a key, and update the bases of the factors.

Systems of equations are small and positive semidefinite. A small multiple of the unit matrix is added to each.

In one file because all kernels share the solver.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rows import index_slots, mask_of_first, take_rows

_RIDGE = 1e-5  # a share of the mean of the diagonal; with 1e-6 rounding in float32 changes what is selected
_LEAST = 1e-20  # above 0, so that a matrix of zeros gives zeros
_BLOCK_N = 64  # tokens that a program adds up at a time
_TINY = 1e-6  # the authors' too: it shortens a step whose reduced rows are nearly 0


def update_factors(
    q: Tensor,
    k: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    products: Tensor,
    gram: Tensor,
    reduced_keys: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Return the reduced query [B, H, 1, R] and key [B, G, 1, R], float32, and update the bases of the slots.

    The reduced key is also appended to reduced_keys [slots, G, T, R]; a full slot overwrites its last row. seq_lens:
    [slots] int64, past tokens, not changed. q: [B, H, 1, D]; k: [B, G, 1, D]; slots: [B] int64, distinct.

    query_basis, key_basis: [slots, G, R, D] float32, B_Q and B_K. products: [slots, G, D, R] float32, K^T A of some
    tokens, with their keys K and reduced keys A; gram: [slots, G, R, R] float32, A^T A. By alternating least squares
    the reduced rows a_q and a_k come to minimise

        |q - a_q B_Q|^2 + |q K^T - a_q A^T|^2 + |k - a_k B_K|^2 + |q k^T - a_q a_k^T|^2

    Then each basis takes the step along the gradient of its own term that lowers this term most.
    """
    if use_kernel(q):
        return _launch(q, k, query_basis, key_basis, products, gram, reduced_keys, seq_lens, slots, iterations)
    of_queries, of_keys = index_slots(query_basis, slots), index_slots(key_basis, slots)
    queries = q.view(len(slots), k.shape[1], -1, q.shape[3]).float()  # [B, G, H / G, D]
    key = k.float()
    product = queries @ key.mT  # [B, G, H / G, 1]
    query_gram, key_gram = of_queries @ of_queries.mT + index_slots(gram, slots), of_keys @ of_keys.mT
    query_side, key_side = queries @ (of_queries.mT + index_slots(products, slots)), key @ of_keys.mT
    reduced_key = solve(key_gram, key_side.mT).mT
    for _ in range(iterations):
        query_right = query_side + product @ reduced_key
        reduced_query = solve(query_gram + reduced_key.mT @ reduced_key, query_right.mT).mT
        key_right = key_side + product.mT @ reduced_query
        reduced_key = solve(key_gram + reduced_query.mT @ reduced_query, key_right.mT).mT
    query_basis[slots] = _descend(of_queries, reduced_query, queries)
    key_basis[slots] = _descend(of_keys, reduced_key, key)
    row = seq_lens[slots].clamp(max=reduced_keys.shape[2] - 1)
    reduced_keys[slots, :, row] = reduced_key[:, :, 0].to(reduced_keys.dtype)
    return reduced_query.flatten(1, 2)[:, :, None], reduced_key


def sum_products(
    k: Tensor,
    reduced_key: Tensor,
    keys: Tensor,
    reduced_keys: Tensor,
    sources: Tensor,
    slots: Tensor,
    positions: Tensor,
    counts: Tensor,
    products: Tensor,
    gram: Tensor,
) -> None:
    """Set the `products` and the `gram` of slots to those of selected tokens and a new one.

    k: [B, G, 1, D]; reduced_key: [B, G, 1, R]; keys: [S, G, T, D]; reduced_keys: [S, G, T, R], in their dtype.
    sources: [B] int64, the first index of each sequence's keys. positions: [B, G, N] int64, the first counts [B, G]
    (int64) of a KV head valid. slots: [B] int64, distinct; products and gram: as in `update_factors`, written in place.
    """
    batch, kv_heads, width = positions.shape
    rank, head_dim = reduced_keys.shape[3], keys.shape[3]
    if use_kernel(k):
        _sum_kernel[(batch * kv_heads,)](
            k, k.stride(0), k.stride(1), reduced_key, keys, reduced_keys, sources, slots, positions.contiguous(),
            counts.contiguous(), products, gram, kv_heads, keys.shape[2], width, rank, head_dim,
            BLOCK_N=_BLOCK_N, BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4,
            **pdl_options(),
        )  # fmt: skip
        return
    valid = mask_of_first(counts, width)
    rows = positions.masked_fill(~valid, 0)
    reduced = take_rows(reduced_keys, sources, rows).float().masked_fill(~valid[..., None], 0)
    reduced = torch.cat((reduced, reduced_key), 2)
    products[slots] = torch.cat((take_rows(keys, sources, rows), k), 2).float().mT @ reduced
    gram[slots] = reduced.mT @ reduced


def factorise(
    query_gram: Tensor, key_gram: Tensor, start: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_Q, W_K and the bases B_Q, B_K of the factors Q W_Q and K W_K of a prompt, [G, R, D] each, W transposed.

    By alternating least squares they come to minimise |Q - A_Q B_Q|^2 + |K - A_K B_K|^2 + |Q K^T - A_Q A_K^T|^2, with
    A_Q = Q W_Q and A_K = K W_K. query_gram, key_gram: Q^T Q and K^T K, [G, D, D] float32; start: [G, R, D] float32, the
    first W_Q and W_K. Rows of zeros stay so.
    """
    if use_kernel(query_gram):
        kv_heads, rank, head_dim = start.shape
        found = torch.empty((4, *start.shape), device=start.device, dtype=torch.float32)
        _factorise_kernel[(kv_heads,)](
            query_gram.contiguous(), key_gram.contiguous(), start.contiguous(), found, rank, head_dim, iterations,
            _RIDGE, _LEAST, BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16), num_warps=8,
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
    ridge = (_RIDGE * mean + _LEAST) * torch.eye(matrix.shape[-1], device=matrix.device)
    solution: Tensor = torch.linalg.solve_ex(matrix + ridge, right)[0]
    return solution


def _descend(basis: Tensor, reduced: Tensor, rows: Tensor) -> Tensor:
    """Return the basis [B, G, R, D] after a step of steepest descent towards reduced @ basis = rows [B, G, N, D]."""
    gradient = reduced.mT @ (reduced @ basis - rows)
    length = gradient.square().sum((2, 3), keepdim=True)
    return basis - length / ((reduced @ gradient).square().sum((2, 3), keepdim=True) + _TINY) * gradient


def _launch(
    q: Tensor,
    k: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    products: Tensor,
    gram: Tensor,
    reduced_keys: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = q.shape
    kv_heads, rank = k.shape[1], gram.shape[2]
    reduced_query = torch.empty((batch, heads, 1, rank), device=q.device, dtype=torch.float32)
    reduced_key = torch.empty((batch, kv_heads, 1, rank), device=q.device, dtype=torch.float32)
    group = heads // kv_heads
    _update_kernel[(batch * kv_heads,)](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), query_basis, key_basis, products, gram, slots,
        reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, reduced_keys.shape[2], rank, head_dim,
        _RIDGE, _LEAST, _TINY, ITERATIONS=iterations, GROUP=group,
        BLOCK_Q=next_power_of_2(group, 16), BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16),
        num_warps=8, **pdl_options(),  # with four, registers spill
    )  # fmt: skip
    return reduced_query, reduced_key


@triton.jit
def _solve(a, x, size, relative_ridge, least_ridge, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
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
    return _solve(a, x, size, relative_ridge, least_ridge, BLOCK_R)


@triton.jit(do_not_specialize=["iterations"])
def _factorise_kernel(  # type: ignore[no-untyped-def]
    query_gram, key_gram, start, found, rank, head_dim, iterations, relative_ridge, least_ridge,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Factorise the queries and keys of one KV head, as the reference in `factorise`."""
    kv, factor, channel = tl.program_id(0), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    mask = (factor < rank)[:, None] & in_head[None, :]
    at_gram = (kv * head_dim + channel)[:, None] * head_dim + channel[None, :]
    square = in_head[:, None] & in_head[None, :]
    at = (kv * rank + factor)[:, None] * head_dim + channel[None, :]
    query_weight = tl.load(start + at, mask=mask, other=0.0)
    key_weight = query_weight
    zero = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    query_side = tl.dot(query_weight, tl.load(query_gram + at_gram, mask=square, other=0.0), input_precision="ieee")
    key_side = tl.dot(key_weight, tl.load(key_gram + at_gram, mask=square, other=0.0), input_precision="ieee")
    query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, least_ridge, BLOCK_R)
    key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    for _ in range(iterations):
        query_weight = _solve_for(
            key_side, key_weight, query_basis, key_side + query_basis, rank, relative_ridge, least_ridge, BLOCK_R
        )
        query_side = tl.dot(query_weight, tl.load(query_gram + at_gram, mask=square, other=0.0), input_precision="ieee")
        key_weight = _solve_for(
            query_side, query_weight, key_basis, query_side + key_basis, rank, relative_ridge, least_ridge, BLOCK_R
        )
        key_side = tl.dot(key_weight, tl.load(key_gram + at_gram, mask=square, other=0.0), input_precision="ieee")
        query_basis = _solve_for(query_side, query_weight, zero, query_side, rank, relative_ridge, least_ridge, BLOCK_R)
        key_basis = _solve_for(key_side, key_weight, zero, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    size = tl.num_programs(0) * rank * head_dim
    tl.store(found + at, query_weight, mask=mask)
    tl.store(found + size + at, key_weight, mask=mask)
    tl.store(found + 2 * size + at, query_basis, mask=mask)
    tl.store(found + 3 * size + at, key_basis, mask=mask)


@triton.jit(do_not_specialize=["capacity"])
def _update_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, query_basis, key_basis, products, gram, slots,
    reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, capacity, rank, head_dim,
    relative_ridge, least_ridge, tiny,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Update the factors of one slot and KV head."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row)
    owner = slot * kv_heads + kv
    query, factor, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    head, in_head, in_rank = kv * GROUP + query, channel < head_dim, factor < rank
    queries = tl.load(
        q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :],
        mask=(query < GROUP)[:, None] & in_head[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + channel, mask=in_head, other=0.0).to(tl.float32)
    at_basis = (owner * rank + factor)[:, None] * head_dim + channel[None, :]
    basis_mask = in_rank[:, None] & in_head[None, :]
    of_queries = tl.load(query_basis + at_basis, mask=basis_mask, other=0.0)
    of_keys = tl.load(key_basis + at_basis, mask=basis_mask, other=0.0)
    at_products = (owner * head_dim + channel)[:, None] * rank + factor[None, :]
    of_tokens = tl.load(products + at_products, mask=in_head[:, None] & in_rank[None, :], other=0.0)
    at_gram = (owner * rank + factor)[:, None] * rank + factor[None, :]
    query_gram = tl.load(gram + at_gram, mask=in_rank[:, None] & in_rank[None, :], other=0.0)

    query_gram = tl.dot(of_queries, tl.trans(of_queries), query_gram, input_precision="ieee")
    key_gram = tl.dot(of_keys, tl.trans(of_keys), input_precision="ieee")
    product = tl.sum(queries * key[None, :], axis=1)  # [BLOCK_Q]
    query_side = tl.dot(queries, tl.trans(of_queries) + of_tokens, input_precision="ieee")
    query_side = tl.trans(query_side)  # [BLOCK_R, BLOCK_Q]
    key_side = tl.sum(of_keys * key[None, :], axis=1)[:, None]  # [BLOCK_R, 1]
    a_k = _solve(key_gram, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    a_q = query_side
    for _ in tl.static_range(ITERATIONS):
        query_right = query_side + a_k * product[None, :]
        a_q = _solve(query_gram + a_k * tl.trans(a_k), query_right, rank, relative_ridge, least_ridge, BLOCK_R)
        key_right = key_side + tl.sum(a_q * product[None, :], axis=1)[:, None]
        own = tl.dot(a_q, tl.trans(a_q), input_precision="ieee")
        a_k = _solve(key_gram + own, key_right, rank, relative_ridge, least_ridge, BLOCK_R)

    gradient = tl.dot(tl.trans(a_q), of_queries, -queries, input_precision="ieee")  # [BLOCK_Q, BLOCK_D]
    gradient = tl.dot(a_q, gradient, input_precision="ieee")
    along = tl.dot(tl.trans(a_q), gradient, input_precision="ieee")
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(tl.sum(along * along, axis=1), axis=0) + tiny)
    tl.store(query_basis + at_basis, of_queries - step * gradient, mask=basis_mask)
    gradient = a_k * (tl.sum(a_k * of_keys, axis=0) - key)[None, :]
    along = tl.sum(a_k * gradient, axis=0)
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(along * along, axis=0) + tiny)
    tl.store(key_basis + at_basis, of_keys - step * gradient, mask=basis_mask)
    at_query = (row * kv_heads * GROUP + head)[None, :] * rank + factor[:, None]
    tl.store(reduced_query + at_query, a_q, mask=(query < GROUP)[None, :] & in_rank[:, None])
    new_key = tl.sum(a_k, axis=1)
    tl.store(reduced_key + tl.program_id(0) * rank + factor, new_key, mask=in_rank)
    place = owner * capacity + tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    tl.store(reduced_keys + place * rank + factor, new_key, mask=in_rank)


@triton.jit(do_not_specialize=["capacity", "width"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    k, k_row_stride, k_head_stride, reduced_key, keys, reduced_keys, sources, slots, positions, counts, products, gram,
    kv_heads, capacity, width, rank, head_dim,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Sum the products of one slot and KV head."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0).to(tl.int64)
    row, kv = head // kv_heads, head % kv_heads
    source, owner = tl.load(sources + row) * kv_heads + kv, tl.load(slots + row) * kv_heads + kv
    count = tl.load(counts + head).to(tl.int32)
    factor, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rank, in_head = factor < rank, channel < head_dim
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + channel, mask=in_head, other=0.0).to(tl.float32)
    reduced = tl.load(reduced_key + head * rank + factor, mask=in_rank, other=0.0)
    of_keys = key[:, None] * reduced[None, :]  # [BLOCK_D, BLOCK_R]
    own = reduced[:, None] * reduced[None, :]
    for first in range(0, count, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        is_valid = token < count
        place = source * capacity + tl.load(positions + head * width + token, mask=is_valid, other=0)
        tile = tl.load(
            keys + place[:, None] * head_dim + channel[None, :], mask=is_valid[:, None] & in_head[None, :], other=0.0
        )
        factors = tl.load(
            reduced_keys + place[:, None] * rank + factor[None, :],
            mask=is_valid[:, None] & in_rank[None, :], other=0.0,
        )  # fmt: skip
        of_keys = tl.dot(tl.trans(tile), factors, of_keys, input_precision="ieee")
        own = tl.dot(tl.trans(factors), factors, own, input_precision="ieee")
    at_products = (owner * head_dim + channel)[:, None] * rank + factor[None, :]
    tl.store(products + at_products, of_keys, mask=in_head[:, None] & in_rank[None, :])
    at_gram = (owner * rank + factor)[:, None] * rank + factor[None, :]
    tl.store(gram + at_gram, own, mask=in_rank[:, None] & in_rank[None, :])
