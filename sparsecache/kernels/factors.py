"""A decode step of LRQK: reduce the new query and key to a low rank, then update the bases and the products.

In one file because the parts of the step share their tensors.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.least_squares import MIN_RIDGE, RIDGE, gauss_jordan, solve
from sparsecache.kernels.rows import index_slots, mask_of_first, take_rows

_BLOCK_N = 64  # tokens per iteration
_MAX_RANK_OF_A_WARP = 16  # systems of a higher rank do not fit into the registers of one warp
_TINY = 1e-6  # as in the authors' code; it shortens a step whose reduced rows are nearly 0


def reduce_token(
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
    """Return the reduced query [B, H, 1, R] and key [B, G, 1, R] of a new token, float32.

    The reduced rows a_q and a_k minimise, by alternating least squares,

        |q - a_q B_Q|^2 + |q K^T - a_q A^T|^2 + |k - a_k B_K|^2 + |q k^T - a_q a_k^T|^2

    with the bases B_Q and B_K, and the keys K and reduced keys A of the tokens attended to in the previous step.

    q: [B, H, 1, D]; k: [B, G, 1, D]; slots: [B] int64, distinct. query_basis, key_basis: [slots, G, R, D] float32, B_Q
    and B_K. products: [slots, G, D, R] float32, K^T A; gram: [slots, G, R, R] float32, A^T A. reduced_keys: [slots, G,
    T, R]; the reduced key is appended to it, and a full slot overwrites its last row. seq_lens: [slots] int64, past
    tokens, not changed. iterations: of alternating least squares, 1 or more.
    """
    if use_kernel(q):
        return _launch(q, k, query_basis, key_basis, products, gram, reduced_keys, seq_lens, slots, iterations)
    b_q, b_k = index_slots(query_basis, slots), index_slots(key_basis, slots)
    queries = q.view(len(slots), k.shape[1], -1, q.shape[3]).float()  # [B, G, H / G, D]
    key = k.float()
    qk = queries @ key.mT  # [B, G, H / G, 1], q k^T
    query_gram, key_gram = b_q @ b_q.mT + index_slots(gram, slots), b_k @ b_k.mT
    query_side, key_side = queries @ (b_q.mT + index_slots(products, slots)), key @ b_k.mT
    reduced_key = solve(key_gram, key_side.mT).mT  # the first one ignores the query
    for _ in range(iterations):
        query_right = query_side + qk @ reduced_key
        reduced_query = solve(query_gram + reduced_key.mT @ reduced_key, query_right.mT).mT
        key_right = key_side + qk.mT @ reduced_query
        reduced_key = solve(key_gram + reduced_query.mT @ reduced_query, key_right.mT).mT
    row = seq_lens[slots].clamp(max=reduced_keys.shape[2] - 1)
    reduced_keys[slots, :, row] = reduced_key[:, :, 0].to(reduced_keys.dtype)
    return reduced_query.flatten(1, 2)[:, :, None], reduced_key


def update_bases(
    q: Tensor,
    k: Tensor,
    reduced_query: Tensor,
    reduced_key: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    slots: Tensor,
) -> None:
    """Lower |q - a_q B_Q|^2 and |k - a_k B_K|^2 by one step of steepest descent in each basis, in place.

    The step has the length that lowers the square most. Tensors: as in `reduce_token`.
    """
    batch, kv_heads, _, head_dim = k.shape
    group, rank = q.shape[1] // kv_heads, query_basis.shape[2]
    if use_kernel(q):
        _update_kernel[(batch * kv_heads,)](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), reduced_query, reduced_key, query_basis,
            key_basis, slots, kv_heads, rank, head_dim, _TINY, GROUP=group, BLOCK_Q=next_power_of_2(group, 16),
            BLOCK_R=next_power_of_2(rank, 16), BLOCK_D=next_power_of_2(head_dim, 16), num_warps=8, **pdl_options(),
        )  # fmt: skip
        return
    queries = q.view(batch, kv_heads, group, head_dim).float()
    query_rows = reduced_query.view(batch, kv_heads, group, rank)
    query_basis[slots] = _descend(index_slots(query_basis, slots), query_rows, queries)
    key_basis[slots] = _descend(index_slots(key_basis, slots), reduced_key, k.float())


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
    """Set the products K^T A and the Gram matrix A^T A of slots to those of selected tokens and the new token.

    k: [B, G, 1, D]; reduced_key: [B, G, 1, R]; keys: [S, G, T, D]; reduced_keys: [S, G, T, R], in the dtype of keys.
    sources: [B] int64, each sequence's index in the first dimension of keys. positions: [B, G, N] int64, the first
    counts [B, G] (int64) of a KV head valid. slots: [B] int64, distinct. products, gram: as in `reduce_token`, written
    in place.
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
    """Launch the kernels of `reduce_token`."""
    batch, heads, _, head_dim = q.shape
    kv_heads, rank = k.shape[1], gram.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device=q.device, dtype=torch.float32)

    reduced_query, reduced_key = empty(batch, heads, 1, rank), empty(batch, kv_heads, 1, rank)
    systems = empty(pairs, 2, rank, rank), empty(pairs, group + 1, rank), empty(pairs, group)  # grams, sides, q k^T
    block_r = next_power_of_2(rank, 16)
    sizes = {"GROUP": group, "BLOCK_Q": next_power_of_2(group, 16), "BLOCK_R": block_r, **pdl_options()}
    _systems_kernel[(pairs,)](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), query_basis, key_basis, products, gram, slots,
        *systems, kv_heads, rank, head_dim, BLOCK_D=next_power_of_2(head_dim, 16), num_warps=8, **sizes,
    )  # fmt: skip
    _reduce_kernel[(pairs,)](
        *systems, slots, reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, reduced_keys.shape[2], rank,
        RIDGE, MIN_RIDGE, ITERATIONS=iterations,
        num_warps=1 if block_r <= _MAX_RANK_OF_A_WARP else 4,  # one warp needs no barriers; an elimination has many
        **sizes,
    )  # fmt: skip
    return reduced_query, reduced_key


@triton.jit
def _load_token(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, row, kv, head_dim,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the queries [BLOCK_Q, BLOCK_D] and the key [BLOCK_D] of a sequence and KV head, in float32."""
    query, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    head, in_head = kv * GROUP + query, channel < head_dim
    queries = tl.load(
        q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :],
        mask=(query < GROUP)[:, None] & in_head[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + channel, mask=in_head, other=0.0).to(tl.float32)
    return queries, key


@triton.jit
def _systems_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, query_basis, key_basis, products, gram, slots,
    grams, sides, qk, kv_heads, rank, head_dim,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Write the parts of the linear systems of one slot and KV head that do not depend on reduced rows."""
    pdl_wait(USE_PDL)
    pair, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    owner = tl.load(slots + row) * kv_heads + kv
    query, factor, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_head, in_rank = channel < head_dim, factor < rank
    queries, key = _load_token(
        q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, row, kv, head_dim, GROUP, BLOCK_Q, BLOCK_D
    )  # fmt: skip
    at_basis = (owner * rank + factor)[:, None] * head_dim + channel[None, :]
    basis_mask = in_rank[:, None] & in_head[None, :]
    b_q = tl.load(query_basis + at_basis, mask=basis_mask, other=0.0)
    b_k = tl.load(key_basis + at_basis, mask=basis_mask, other=0.0)
    at_products = (owner * head_dim + channel)[:, None] * rank + factor[None, :]
    of_attended = tl.load(products + at_products, mask=in_head[:, None] & in_rank[None, :], other=0.0)
    square, square_mask = factor[:, None] * rank + factor[None, :], in_rank[:, None] & in_rank[None, :]
    query_gram = tl.load(gram + owner * rank * rank + square, mask=square_mask, other=0.0)
    query_gram = tl.dot(b_q, tl.trans(b_q), query_gram, input_precision="ieee")
    key_gram = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    query_side = tl.dot(queries, tl.trans(b_q) + of_attended, input_precision="ieee")  # [BLOCK_Q, BLOCK_R]
    tl.store(grams + 2 * pair * rank * rank + square, query_gram, mask=square_mask)
    tl.store(grams + (2 * pair + 1) * rank * rank + square, key_gram, mask=square_mask)
    side = sides + pair * (GROUP + 1) * rank + factor
    tl.store(side[None, :] + query[:, None] * rank, query_side, mask=(query < GROUP)[:, None] & in_rank[None, :])
    tl.store(side + GROUP * rank, tl.sum(b_k * key[None, :], axis=1), mask=in_rank)
    tl.store(qk + pair * GROUP + query, tl.sum(queries * key[None, :], axis=1), mask=query < GROUP)


@triton.jit(do_not_specialize=["capacity"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    grams, sides, qk, slots, reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, capacity, rank,
    relative_ridge, min_ridge,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Solve the linear systems of one slot and KV head for the reduced queries and for the reduced key, in turn."""
    pdl_wait(USE_PDL)
    pair, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    query, factor = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R)
    in_rank = factor < rank
    square, square_mask = factor[:, None] * rank + factor[None, :], in_rank[:, None] & in_rank[None, :]
    query_gram = tl.load(grams + 2 * pair * rank * rank + square, mask=square_mask, other=0.0)
    key_gram = tl.load(grams + (2 * pair + 1) * rank * rank + square, mask=square_mask, other=0.0)
    side = sides + pair * (GROUP + 1) * rank + factor[:, None]
    mask = in_rank[:, None] & (query < GROUP)[None, :]
    query_side = tl.load(side + query[None, :] * rank, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_Q]
    # The key's side is repeated in every column. With the shape of the queries' side it needs no other layout.
    key_side = tl.load(side + GROUP * rank + query[None, :] * 0, mask=in_rank[:, None], other=0.0)
    qk_row = tl.load(qk + pair * GROUP + query, mask=query < GROUP, other=0.0)
    a_k = gauss_jordan(key_gram, key_side, rank, relative_ridge, min_ridge, BLOCK_R)
    a_q = query_side
    for _ in tl.static_range(ITERATIONS):
        a_k_row = tl.max(a_k, axis=1)  # all columns are equal
        query_right = query_side + a_k * qk_row[None, :]
        matrix = query_gram + a_k_row[:, None] * a_k_row[None, :]
        a_q = gauss_jordan(matrix, query_right, rank, relative_ridge, min_ridge, BLOCK_R)
        key_right = key_side + tl.sum(a_q * qk_row[None, :], axis=1)[:, None]
        matrix = tl.dot(a_q, tl.trans(a_q), key_gram, input_precision="ieee")
        a_k = gauss_jordan(matrix, key_right, rank, relative_ridge, min_ridge, BLOCK_R)
    tl.store(reduced_query + (pair * GROUP + query)[None, :] * rank + factor[:, None], a_q, mask=mask)
    a_k_row = tl.max(a_k, axis=1)
    tl.store(reduced_key + pair * rank + factor, a_k_row, mask=in_rank)
    slot = tl.load(slots + row)
    place = (slot * kv_heads + kv) * capacity + tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    tl.store(reduced_keys + place * rank + factor, a_k_row, mask=in_rank)


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, reduced_query, reduced_key, query_basis, key_basis,
    slots, kv_heads, rank, head_dim, tiny,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Take a step of steepest descent in both bases of one slot and KV head."""
    pdl_wait(USE_PDL)
    pair, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    owner = tl.load(slots + row) * kv_heads + kv
    query, factor, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_head, in_rank = channel < head_dim, factor < rank
    queries, key = _load_token(
        q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, row, kv, head_dim, GROUP, BLOCK_Q, BLOCK_D
    )  # fmt: skip
    mask = (query < GROUP)[:, None] & in_rank[None, :]
    a_q = tl.load(reduced_query + (pair * GROUP + query)[:, None] * rank + factor[None, :], mask=mask, other=0.0)
    a_k = tl.load(reduced_key + pair * rank + factor, mask=in_rank, other=0.0)[:, None]
    at_basis = (owner * rank + factor)[:, None] * head_dim + channel[None, :]
    basis_mask = in_rank[:, None] & in_head[None, :]
    b_q = tl.load(query_basis + at_basis, mask=basis_mask, other=0.0)
    b_k = tl.load(key_basis + at_basis, mask=basis_mask, other=0.0)
    gradient = tl.dot(a_q, b_q, -queries, input_precision="ieee")  # [BLOCK_Q, BLOCK_D]
    gradient = tl.dot(tl.trans(a_q), gradient, input_precision="ieee")
    delta = tl.dot(a_q, gradient, input_precision="ieee")
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(tl.sum(delta * delta, axis=1), axis=0) + tiny)
    tl.store(query_basis + at_basis, b_q - step * gradient, mask=basis_mask)
    gradient = a_k * (tl.sum(a_k * b_k, axis=0) - key)[None, :]
    delta = tl.sum(a_k * gradient, axis=0)
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(delta * delta, axis=0) + tiny)
    tl.store(key_basis + at_basis, b_k - step * gradient, mask=basis_mask)


@triton.jit(do_not_specialize=["capacity", "width"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    k, k_row_stride, k_head_stride, reduced_key, keys, reduced_keys, sources, slots, positions, counts, products, gram,
    kv_heads, capacity, width, rank, head_dim,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Sum the products and the Gram matrix of one slot and KV head over its tokens."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0).to(tl.int64)
    row, kv = head // kv_heads, head % kv_heads
    source, owner = tl.load(sources + row) * kv_heads + kv, tl.load(slots + row) * kv_heads + kv
    count = tl.load(counts + head).to(tl.int32)
    factor, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    in_rank, in_head = factor < rank, channel < head_dim
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + channel, mask=in_head, other=0.0).to(tl.float32)
    reduced = tl.load(reduced_key + head * rank + factor, mask=in_rank, other=0.0)
    product_tile = key[:, None] * reduced[None, :]  # [BLOCK_D, BLOCK_R]
    gram_tile = reduced[:, None] * reduced[None, :]
    for first in range(0, count, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        is_valid = token < count
        at_token = source * capacity + tl.load(positions + head * width + token, mask=is_valid, other=0)
        token_keys = tl.load(
            keys + at_token[:, None] * head_dim + channel[None, :], mask=is_valid[:, None] & in_head[None, :], other=0.0
        )
        token_factors = tl.load(
            reduced_keys + at_token[:, None] * rank + factor[None, :],
            mask=is_valid[:, None] & in_rank[None, :], other=0.0,
        )  # fmt: skip
        product_tile = tl.dot(tl.trans(token_keys), token_factors, product_tile, input_precision="ieee")
        gram_tile = tl.dot(tl.trans(token_factors), token_factors, gram_tile, input_precision="ieee")
    at_products = (owner * head_dim + channel)[:, None] * rank + factor[None, :]
    tl.store(products + at_products, product_tile, mask=in_head[:, None] & in_rank[None, :])
    at_gram = (owner * rank + factor)[:, None] * rank + factor[None, :]
    tl.store(gram + at_gram, gram_tile, mask=in_rank[:, None] & in_rank[None, :])
