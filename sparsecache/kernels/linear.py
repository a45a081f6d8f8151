"""Projections of a decode step, fused with what follows: bias, RoPE, SwiGLU or residual.

With few rows, reading the weights takes all the time. The kernels therefore read each weight once. One row is
multiplied element-wise, up to MAX_FUSED_ROWS rows by tensor cores. More rows, such as a prompt's, use torch.

With a weight in fp8 the rows are quantised, unless they are given as an Fp8Matrix. Even one row is then multiplied by
tensor cores: converting each weight to another type would take longer than reading it. Hopper's tensor cores add
products of fp8 with about 14 bits (arXiv 2412.19437, section 3.3.2), so each block of columns is added in float32.

In one file because all kernels share what follows the product.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sparsecache.kernels import swiglu as activation
from sparsecache.kernels._triton import (
    has_large_shared_memory,
    num_sms,
    pdl_launch,
    pdl_options,
    pdl_wait,
    tl,
    triton,
    uses_kernels,
)
from sparsecache.kernels.fp8 import Fp8Matrix, Matrix, quantise, quantise_normed, quantise_swiglu, scaled_product
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.rotation import Rotation, rotate

MAX_FUSED_ROWS = 16
# Where MKL's batched product is faster on a CPU: rows of x, blocks of the weight, and values of the weight.
_MAX_BATCHED_ROWS, _BLOCKS, _MIN_BATCHED_NUMEL = 8, 16, 2**16
_HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
_PLAIN, _SWIGLU, _ROPE = 0, 1, 2  # what follows the product
# Block sizes of a program: BLOCK_M rows, or pairs of rows, of the weight, and BLOCK_K columns per iteration.
# With one row of x, many small programs are fastest. With a few rows each program reads all of x, so one large program
# per multiprocessor is fastest: if some ran two in turn, the others would idle.
_ONE_ROW = {"BLOCK_M": 2, "BLOCK_K": 1024, "num_warps": 1}
_ONE_ROW_PAIRS = {"BLOCK_M": 1, "BLOCK_K": 1024, "num_warps": 1}
_FEW_ROWS = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 7}
_FEW_ROWS_PAIRS = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_FEW_ROWS_FEW_PAIRS = {"BLOCK_M": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4}
_FEW_ROWS_SMALL_MEMORY = {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4}
_FEW_ROWS_PAIRS_SMALL_MEMORY = {**_FEW_ROWS_PAIRS, "num_stages": 3}
# In fp8, BLOCK_M rows, or pairs of rows, of the weight in SPLITS parts fill the tensor cores' dimension of 64.
_FP8 = {
    _PLAIN: {"BLOCK_M": 32, "SPLITS": 2, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
    _SWIGLU: {"BLOCK_M": 64, "SPLITS": 1, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    _ROPE: {"BLOCK_M": 16, "SPLITS": 2, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
}
_FP8_SMALL_MEMORY = {"num_stages": 3}


def linear(x: Matrix, weight: Matrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias + residual: [N, M].

    x: [N, K]; weight: [M, K]; bias: [M]; residual: [N, M].
    """
    if _is_fused(x):
        return _launch(_PLAIN, x, weight, bias, len(weight), residual=residual)
    out = _product(x, weight, bias)
    return out if residual is None else residual + out


def add_linear(target: Tensor, x: Matrix, weight: Matrix, bias: Tensor | None = None) -> None:
    """Add x weight^T + bias to target [N, M] in place. Other arguments as in `linear`."""
    # addmm_ adds before it rounds. A bias would have to be added to the target on its own, where half precision
    # could round it away.
    if bias is None and len(x) > MAX_FUSED_ROWS and isinstance(x, Tensor) and isinstance(weight, Tensor):
        target.addmm_(x, weight.t())
    else:
        target += linear(x, weight, bias)


def swiglu(x: Matrix, weight: Matrix, bias: Tensor | None = None) -> Matrix:
    """Return silu(gate) * up, where gate and up are the halves of x weight^T + bias: [N, I].

    The result is an Fp8Matrix if the weight is one. x: [N, K]; weight: [2 * I, K], the gate first; bias: [2 * I].
    """
    in_fp8 = isinstance(weight, Fp8Matrix)
    if _is_fused(x):
        hidden = _launch(_SWIGLU, x, weight, bias, len(weight) // 2)
        return quantise(hidden) if in_fp8 else hidden
    gate_up = _product(x, weight, bias)
    return quantise_swiglu(gate_up) if in_fp8 else activation.swiglu(gate_up)


def norm_for(weight: Matrix, x: Tensor, gain: Tensor, eps: float) -> Matrix:
    """Return rms_norm(x, gain, eps) for a product with a weight: an Fp8Matrix if the weight is one."""
    return quantise_normed(x, gain, eps) if isinstance(weight, Fp8Matrix) else rms_norm(x, gain, eps)


def linear_rope(x: Matrix, weight: Matrix, bias: Tensor | None, rotation: Rotation, num_rotated: int) -> Tensor:
    """Return x weight^T + bias as heads [N, M / D, D], the first `num_rotated` heads rotated.

    x: [N, K]; weight: [M, K]; bias: [M]; rotation: of the N tokens, with head size D.
    """
    head_dim = rotation.cos.shape[1]
    if _is_fused(x):
        out = _launch(_ROPE, x, weight, bias, len(weight), rotation=rotation, num_rotated=num_rotated)
        return out.view(len(x), -1, head_dim)
    heads = _product(x, weight, bias).view(len(x), -1, head_dim)
    return torch.cat((rotate(heads[:, :num_rotated], rotation), heads[:, num_rotated:]), dim=1)


def _product(x: Matrix, weight: Matrix, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, faster than functional.linear for a few float32 rows with MKL.

    On a CPU a batched product over blocks of the weight reads it two to four times as fast as the product of one row,
    which uses one core (docs/performance.md).
    """
    if isinstance(weight, Fp8Matrix):
        return scaled_product(_in_fp8(x), weight, bias)
    assert isinstance(x, Tensor), "rows in fp8 need a weight in fp8"
    blocks = math.gcd(len(weight), _BLOCKS)
    use_batched = (
        _HAS_MKL
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and len(x) <= _MAX_BATCHED_ROWS
        and blocks > 1
        and weight.numel() >= _MIN_BATCHED_NUMEL
        and weight.is_contiguous()
    )
    if not use_batched:
        return functional.linear(x, weight, bias)
    columns = x.t().expand(blocks, -1, -1)
    out = torch.bmm(weight.view(blocks, -1, x.shape[1]), columns).view(len(weight), len(x)).t().contiguous()
    return out if bias is None else out + bias


def _in_fp8(x: Matrix) -> Fp8Matrix:
    return quantise(x) if isinstance(x, Tensor) else x


def _is_fused(x: Matrix) -> bool:
    """Return whether a kernel is faster than torch."""
    # Tensor cores do not support float32, so on a GPU torch is faster.
    in_float32 = x.device.type == "cuda" and x.dtype == torch.float32
    return len(x) <= MAX_FUSED_ROWS and uses_kernels(x.device) and not in_float32


def _launch(
    kind: int,
    x: Matrix,
    weight: Matrix,
    bias: Tensor | None,
    width: int,
    *,
    residual: Tensor | None = None,
    rotation: Rotation | None = None,
    num_rotated: int = 0,
) -> Tensor:
    """Return the output [N, width] of one projection."""
    rows, size = x.shape
    out = torch.empty((rows, width), device=x.device, dtype=x.dtype)
    pairs = len(weight) if kind == _PLAIN else len(weight) // 2
    half = rotation.cos.shape[1] // 2 if rotation is not None else 1
    factors: tuple[Tensor, ...]
    if isinstance(weight, Fp8Matrix):
        x = _in_fp8(x)
        factors = x.values, x.scales, weight.values, weight.scales
        kernel, sizes = _linear_quantised_kernel, _fp8_sizes(kind, rows, size, x.device)
    else:
        assert isinstance(x, Tensor), "rows in fp8 need a weight in fp8"
        factors = x.contiguous(), weight
        if rows == 1:
            kernel, sizes = _linear_one_row_kernel, _ONE_ROW if kind == _PLAIN else _ONE_ROW_PAIRS
        else:
            kernel, sizes = _linear_few_rows_kernel, _few_rows_sizes(kind, pairs, x.device)
        sizes = {**sizes, "BLOCK_N": 1 if rows == 1 else MAX_FUSED_ROWS}
    unused = out  # takes the place of a missing tensor; the constexpr flags turn its loads off
    kernel[(-(-pairs // sizes["BLOCK_M"]),)](
        *factors, bias if bias is not None else unused, residual if residual is not None else unused,
        rotation.cos if rotation is not None else unused, rotation.sin if rotation is not None else unused,
        out, rows, size, pairs, half, num_rotated,
        KIND=kind, BIAS=bias is not None, RESIDUAL=residual is not None, **sizes, **pdl_options(),
    )  # fmt: skip
    return out


def _fp8_sizes(kind: int, rows: int, size: int, device: torch.device) -> dict[str, int]:
    """Return the block sizes and options of the fp8 kernel for x of rows [rows, size]."""
    sizes = _FP8[kind] if has_large_shared_memory(device) else {**_FP8[kind], **_FP8_SMALL_MEMORY}
    splits = sizes["SPLITS"]
    return {
        **sizes,
        "BLOCK_N": 8 if rows <= 8 and splits > 1 else MAX_FUSED_ROWS,  # BLOCK_N * SPLITS must be 16 or more
        "EVEN": size % (splits * sizes["BLOCK_K"]) == 0,
    }


def _few_rows_sizes(kind: int, pairs: int, device: torch.device) -> dict[str, int]:
    if not has_large_shared_memory(device):
        return _FEW_ROWS_SMALL_MEMORY if kind == _PLAIN else _FEW_ROWS_PAIRS_SMALL_MEMORY
    if kind == _PLAIN:
        return _FEW_ROWS
    one_per_sm = pairs <= _FEW_ROWS_FEW_PAIRS["BLOCK_M"] * num_sms(device)
    return _FEW_ROWS_FEW_PAIRS if one_per_sm else _FEW_ROWS_PAIRS


@triton.jit
def _pair_rows(pair, pairs, half, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the two rows of the weight whose products are combined.

    Plain: row n alone. SwiGLU: rows n and pairs + n. RoPE: rows i and half + i of a head.
    """
    if KIND == 2:
        first = pair // half * 2 * half + pair % half
        second = first + half
    else:
        first = pair
        second = pair + pairs
    return first.to(tl.int64), second.to(tl.int64)


@triton.jit
def _load_operands(  # type: ignore[no-untyped-def]
    bias, residual, cos, sin, rows, pairs, half, num_rotated, pair, row,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Load what `_store` applies: two biases [BLOCK_M], and residual, or cos and sin [BLOCK_M, BLOCK_N].

    Called before the loop over the weight, which then hides the latency of these loads. The values stay in their dtype:
    a conversion, and the change of layout that Triton adds to it, would wait for the loads here.
    """
    first, second = _pair_rows(pair, pairs, half, KIND)
    one_bias = tl.zeros(pair.shape, dtype=tl.float32)
    two_bias = tl.zeros(pair.shape, dtype=tl.float32)
    if BIAS:
        one_bias = tl.load(bias + first, mask=pair < pairs, other=0.0)
        if KIND != 0:
            two_bias = tl.load(bias + second, mask=pair < pairs, other=0.0)
    mask = (pair < pairs)[:, None] & (row < rows)[None, :]
    one_tile = tl.zeros(mask.shape, dtype=tl.float32)
    two_tile = tl.zeros(mask.shape, dtype=tl.float32)
    if RESIDUAL:
        one_tile = tl.load(residual + row[None, :] * pairs + pair[:, None], mask=mask, other=0.0)
    if KIND == 2:
        angle = row[None, :] * 2 * half + (pair % half)[:, None]
        is_rotated = mask & (pair // half < num_rotated)[:, None]
        one_tile = tl.load(cos + angle, mask=is_rotated, other=1.0)
        two_tile = tl.load(sin + angle, mask=is_rotated, other=0.0)
    return one_bias, two_bias, one_tile, two_tile


@triton.jit
def _store(one, two, operands, out, rows, pairs, half, pair, row, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply what follows the products one and two [BLOCK_M, BLOCK_N], and store the result."""
    one_bias, two_bias, one_tile, two_tile = operands
    mask = (pair < pairs)[:, None] & (row < rows)[None, :]
    one += one_bias.to(tl.float32)[:, None]
    if KIND == 0:
        tl.store(out + row[None, :] * pairs + pair[:, None], one + one_tile.to(tl.float32), mask=mask)
    else:
        two += two_bias.to(tl.float32)[:, None]
        if KIND == 1:
            tl.store(out + row[None, :] * pairs + pair[:, None], one / (1.0 + tl.exp(-one)) * two, mask=mask)
        else:
            first, _ = _pair_rows(pair, pairs, half, KIND)
            target = row[None, :] * 2 * pairs + first[:, None]
            c, s = one_tile.to(tl.float32), two_tile.to(tl.float32)
            tl.store(out + target, one * c - two * s, mask=mask)
            tl.store(out + target + half, two * c + one * s, mask=mask)


@triton.jit
def _linear_one_row_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, cos, sin, out, rows, size, pairs, half, num_rotated,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M columns of the output, or pairs of them, for a single row of x."""
    pdl_wait(USE_PDL)
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, second = _pair_rows(tl.minimum(pair, pairs - 1), pairs, half, KIND)
    row = tl.arange(0, BLOCK_N)
    operands = _load_operands(bias, residual, cos, sin, rows, pairs, half, num_rotated, pair, row, KIND, BIAS, RESIDUAL)
    one = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in tl.range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < size
        x_block = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = inside[None, :]
        one += tl.load(weight + first[:, None] * size + k[None, :], mask=mask, other=0.0).to(tl.float32) * x_block
        if KIND != 0:
            two += tl.load(weight + second[:, None] * size + k[None, :], mask=mask, other=0.0).to(tl.float32) * x_block
    pdl_launch(USE_PDL)
    one_sum, two_sum = tl.sum(one, axis=1)[:, None], tl.sum(two, axis=1)[:, None]
    _store(one_sum, two_sum, operands, out, rows, pairs, half, pair, row, KIND)


@triton.jit
def _linear_few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, cos, sin, out, rows, size, pairs, half, num_rotated,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M columns of the output, or pairs of them, for all rows of x."""
    pdl_wait(USE_PDL)
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, second = _pair_rows(pair, pairs, half, KIND)
    row = tl.arange(0, BLOCK_N)
    operands = _load_operands(bias, residual, cos, sin, rows, pairs, half, num_rotated, pair, row, KIND, BIAS, RESIDUAL)
    is_pair = (pair < pairs)[:, None]
    one = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < size
        x_mask = (row < rows)[None, :] & inside[:, None]
        x_block = tl.load(x + row[None, :] * size + k[:, None], mask=x_mask, other=0.0)
        mask = is_pair & inside[None, :]
        one_weight = tl.load(weight + first[:, None] * size + k[None, :], mask=mask, other=0.0)
        one = tl.dot(one_weight, x_block, one, input_precision="ieee")
        if KIND != 0:
            two_weight = tl.load(weight + second[:, None] * size + k[None, :], mask=mask, other=0.0)
            two = tl.dot(two_weight, x_block, two, input_precision="ieee")
    pdl_launch(USE_PDL)
    _store(one, two, operands, out, rows, pairs, half, pair, row, KIND)


@triton.jit
def _linear_quantised_kernel(  # type: ignore[no-untyped-def]
    x, x_scales, weight, scales, bias, residual, cos, sin, out, rows, size, pairs, half, num_rotated,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M columns of the output, or pairs of them, for all rows of x, with both in fp8.

    With splits, a program with few rows of the weight fills the tensor cores' dimension of 64. The columns of x and of
    the weight are cut into SPLITS parts. A tile of the weight stacks its rows of all splits, and a tile of x does so
    too. The blocks on the diagonal of their product are the products of equal splits. These blocks are added.
    EVEN: splits consist of whole blocks.
    """
    pdl_wait(USE_PDL)
    parts: tl.constexpr = 1 if KIND == 0 else 2  # rows of a pair
    split_size = tl.cdiv(tl.cdiv(size, SPLITS), 16) * 16
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)
    # The rows of a tile of the weight are ordered by split, part and pair, those of x by split and row. Instead of rows
    # beyond the last, the last row is read. Their products are not stored.
    tile = tl.arange(0, SPLITS * parts * BLOCK_M)
    tile_pair = tl.minimum(tl.program_id(0) * BLOCK_M + tile % BLOCK_M, pairs - 1)
    tile_first, tile_second = _pair_rows(tile_pair, pairs, half, KIND)
    weight_row = tl.where(tile // BLOCK_M % parts == 0, tile_first, tile_second)
    x_tile = tl.arange(0, SPLITS * BLOCK_N)
    x_row = x_tile % BLOCK_N
    tile_split, x_split = tile // (parts * BLOCK_M), x_tile // BLOCK_N
    weight_start, x_start = tile_split * split_size, x_split * split_size
    weight_end, x_end = tl.minimum(size - weight_start, split_size), tl.minimum(size - x_start, split_size)

    operands = _load_operands(
        bias, residual, cos, sin, rows, pairs, half, num_rotated, pair, row, KIND, BIAS, RESIDUAL
    )  # fmt: skip
    first, second = _pair_rows(tl.minimum(pair, pairs - 1), pairs, half, KIND)
    x_scale = tl.load(x_scales + row, mask=row < rows, other=0.0)
    one_scale = tl.load(scales + first)
    two_scale = tl.load(scales + second) if parts == 2 else one_scale

    total = tl.zeros((SPLITS * parts * BLOCK_M, SPLITS * BLOCK_N), dtype=tl.float32)
    weight_ptrs, x_ptrs = weight + (weight_row * size + weight_start)[:, None], x + (x_row * size + x_start)[None, :]
    for start in tl.range(0, split_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            weight_block = tl.load(weight_ptrs + k[None, :])
            x_block = tl.load(x_ptrs + k[:, None], mask=(x_row < rows)[None, :], other=0.0)
        else:
            weight_block = tl.load(weight_ptrs + k[None, :], mask=k[None, :] < weight_end[:, None], other=0.0)
            x_mask = (x_row < rows)[None, :] & (k[:, None] < x_end[None, :])
            x_block = tl.load(x_ptrs + k[:, None], mask=x_mask, other=0.0)
        total += tl.dot(weight_block, x_block)  # unlike tl.dot(.., total), this adds blocks in float32
    pdl_launch(USE_PDL)
    if SPLITS > 1:
        total = tl.where(tile_split[:, None] == x_split[None, :], total, 0.0)
        total = tl.sum(tl.reshape(total, (SPLITS, parts * BLOCK_M, SPLITS, BLOCK_N)), axis=2)
        total = tl.sum(total, axis=0)
    if parts == 2:
        one, two = tl.split(tl.permute(tl.reshape(total, (2, BLOCK_M, BLOCK_N)), (1, 2, 0)))
    else:
        one, two = total, total
    one = one * one_scale[:, None] * x_scale[None, :]
    two = two * two_scale[:, None] * x_scale[None, :]
    _store(one, two, operands, out, rows, pairs, half, pair, row, KIND)
