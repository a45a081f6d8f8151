"""The step of LRQK: reduce a new query and key by low-rank factors of the text, and update the bases of the factors.

In one file because the steps share their tensors.
"""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.least_squares import LEAST_RIDGE, RIDGE, gauss_jordan, solve
from sparsecache.kernels.rows import index_slots, mask_of_first, take_rows

_BLOCK_N = 64  # tokens that a program adds up at a time
_ONE_WARP = 16  # the highest rank whose systems fit into the registers of one warp
_TINY = 1e-6  # the authors' too: it shortens a step whose reduced rows are nearly 0


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

    The reduced key is also appended to reduced_keys [slots, G, T, R]; a full slot overwrites its last row. seq_lens:
    [slots] int64, past tokens, not changed. q: [B, H, 1, D]; k: [B, G, 1, D]; slots: [B] int64, distinct.

    query_basis, key_basis: [slots, G, R, D] float32, B_Q and B_K. products: [slots, G, D, R] float32, K^T A of some
    tokens, with their keys K and reduced keys A; gram: [slots, G, R, R] float32, A^T A. By alternating least squares
    the reduced rows a_q and a_k come to minimise

        |q - a_q B_Q|^2 + |q K^T - a_q A^T|^2 + |k - a_k B_K|^2 + |q k^T - a_q a_k^T|^2
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
    """Take a step of steepest descent from each basis towards |q - a_q B_Q| = 0 and |k - a_k B_K| = 0.

    It has the length that lowers the square most. Tensors are as in `reduce_token`; the bases change in place.
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
    """Set the `products` and the `gram` of slots to those of selected tokens and a new one.

    k: [B, G, 1, D]; reduced_key: [B, G, 1, R]; keys: [S, G, T, D]; reduced_keys: [S, G, T, R], in their dtype.
    sources: [B] int64, the first index of each sequence's keys. positions: [B, G, N] int64, the first counts [B, G]
    (int64) of a KV head valid. slots: [B] int64, distinct; products and gram: as in `reduce_token`, written in place.
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
    batch, heads, _, head_dim = q.shape
    kv_heads, rank = k.shape[1], gram.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device=q.device, dtype=torch.float32)

    reduced_query, reduced_key = empty(batch, heads, 1, rank), empty(batch, kv_heads, 1, rank)
    systems = empty(pairs, 2, rank, rank), empty(pairs, group + 1, rank), empty(pairs, group)
    block_r = next_power_of_2(rank, 16)
    sizes = {"GROUP": group, "BLOCK_Q": next_power_of_2(group, 16), "BLOCK_R": block_r, **pdl_options()}
    _systems_kernel[(pairs,)](
        q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), query_basis, key_basis, products, gram, slots,
        *systems, kv_heads, rank, head_dim, BLOCK_D=next_power_of_2(head_dim, 16), num_warps=8, **sizes,
    )  # fmt: skip
    _reduce_kernel[(pairs,)](
        *systems, slots, reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, reduced_keys.shape[2], rank,
        RIDGE, LEAST_RIDGE, ITERATIONS=iterations,
        num_warps=1 if block_r <= _ONE_WARP else 4,  # one warp needs no barriers, of which each elimination has many
        **sizes,
    )  # fmt: skip
    return reduced_query, reduced_key


@triton.jit
def _systems_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, query_basis, key_basis, products, gram, slots,
    grams, sides, product, kv_heads, rank, head_dim,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Write the parts of the systems of one slot and KV head that do not depend on reduced rows."""
    pdl_wait(USE_PDL)
    pair, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    owner = tl.load(slots + row) * kv_heads + kv
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
    square, square_mask = factor[:, None] * rank + factor[None, :], in_rank[:, None] & in_rank[None, :]
    query_gram = tl.load(gram + owner * rank * rank + square, mask=square_mask, other=0.0)
    query_gram = tl.dot(of_queries, tl.trans(of_queries), query_gram, input_precision="ieee")
    key_gram = tl.dot(of_keys, tl.trans(of_keys), input_precision="ieee")
    query_side = tl.dot(queries, tl.trans(of_queries) + of_tokens, input_precision="ieee")  # [BLOCK_Q, BLOCK_R]
    tl.store(grams + 2 * pair * rank * rank + square, query_gram, mask=square_mask)
    tl.store(grams + (2 * pair + 1) * rank * rank + square, key_gram, mask=square_mask)
    side = sides + pair * (GROUP + 1) * rank + factor
    tl.store(side[None, :] + query[:, None] * rank, query_side, mask=(query < GROUP)[:, None] & in_rank[None, :])
    tl.store(side + GROUP * rank, tl.sum(of_keys * key[None, :], axis=1), mask=in_rank)
    tl.store(product + pair * GROUP + query, tl.sum(queries * key[None, :], axis=1), mask=query < GROUP)


@triton.jit(do_not_specialize=["capacity"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    grams, sides, product, slots, reduced_query, reduced_key, reduced_keys, seq_lens, kv_heads, capacity, rank,
    relative_ridge, least_ridge,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Solve the systems of one slot and KV head in turn."""
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
    # The key's side in each column: in the shape of the queries' side it needs no other layout.
    key_side = tl.load(side + GROUP * rank + query[None, :] * 0, mask=in_rank[:, None], other=0.0)
    weight = tl.load(product + pair * GROUP + query, mask=query < GROUP, other=0.0)
    a_k = gauss_jordan(key_gram, key_side, rank, relative_ridge, least_ridge, BLOCK_R)
    a_q = query_side
    for _ in tl.static_range(ITERATIONS):
        new_key = tl.max(a_k, axis=1)  # all columns are equal
        query_right = query_side + a_k * weight[None, :]
        matrix = query_gram + new_key[:, None] * new_key[None, :]
        a_q = gauss_jordan(matrix, query_right, rank, relative_ridge, least_ridge, BLOCK_R)
        key_right = key_side + tl.sum(a_q * weight[None, :], axis=1)[:, None]
        matrix = tl.dot(a_q, tl.trans(a_q), key_gram, input_precision="ieee")
        a_k = gauss_jordan(matrix, key_right, rank, relative_ridge, least_ridge, BLOCK_R)
    tl.store(reduced_query + (pair * GROUP + query)[None, :] * rank + factor[:, None], a_q, mask=mask)
    new_key = tl.max(a_k, axis=1)
    tl.store(reduced_key + pair * rank + factor, new_key, mask=in_rank)
    slot = tl.load(slots + row)
    place = (slot * kv_heads + kv) * capacity + tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    tl.store(reduced_keys + place * rank + factor, new_key, mask=in_rank)


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, k_row_stride, k_head_stride, reduced_query, reduced_key, query_basis, key_basis,
    slots, kv_heads, rank, head_dim, tiny,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Update the bases of one slot and KV head."""
    pdl_wait(USE_PDL)
    pair, row, kv = tl.program_id(0), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    owner = tl.load(slots + row) * kv_heads + kv
    query, factor, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    head, in_head, in_rank = kv * GROUP + query, channel < head_dim, factor < rank
    queries = tl.load(
        q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :],
        mask=(query < GROUP)[:, None] & in_head[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + channel, mask=in_head, other=0.0).to(tl.float32)
    mask = (query < GROUP)[:, None] & in_rank[None, :]
    a_q = tl.load(reduced_query + (pair * GROUP + query)[:, None] * rank + factor[None, :], mask=mask, other=0.0)
    a_k = tl.load(reduced_key + pair * rank + factor, mask=in_rank, other=0.0)[:, None]
    at_basis = (owner * rank + factor)[:, None] * head_dim + channel[None, :]
    basis_mask = in_rank[:, None] & in_head[None, :]
    of_queries = tl.load(query_basis + at_basis, mask=basis_mask, other=0.0)
    of_keys = tl.load(key_basis + at_basis, mask=basis_mask, other=0.0)
    gradient = tl.dot(a_q, of_queries, -queries, input_precision="ieee")  # [BLOCK_Q, BLOCK_D]
    gradient = tl.dot(tl.trans(a_q), gradient, input_precision="ieee")
    along = tl.dot(a_q, gradient, input_precision="ieee")
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(tl.sum(along * along, axis=1), axis=0) + tiny)
    tl.store(query_basis + at_basis, of_queries - step * gradient, mask=basis_mask)
    gradient = a_k * (tl.sum(a_k * of_keys, axis=0) - key)[None, :]
    along = tl.sum(a_k * gradient, axis=0)
    step = tl.sum(tl.sum(gradient * gradient, axis=1), axis=0) / (tl.sum(along * along, axis=0) + tiny)
    tl.store(key_basis + at_basis, of_keys - step * gradient, mask=basis_mask)


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
