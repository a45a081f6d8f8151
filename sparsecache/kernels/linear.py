"""Projections of a decode step, each one kernel: what follows the product rides along.

With few rows a projection takes as long as its weights take to be read. The kernels therefore read each weight once,
and do what follows (bias, RoPE, SwiGLU, residual) on the way: one row is multiplied element by element, up to MOST_ROWS
by tensor cores. More rows, as a prompt has, go through torch's own matrix product.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sparsecache.kernels import swiglu as gating
from sparsecache.kernels._triton import (
    has_large_shared_memory,
    num_sms,
    pdl_launch,
    pdl_options,
    pdl_wait,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.rotation import Rotation, rotate

MOST_ROWS = 16
_MOST_BATCHED, _BLOCKS, _LARGE = 8, 16, 2**16  # rows, blocks of a weight, and its values, where batches are faster
_HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
_PLAIN, _SWIGLU, _ROTATED = 0, 1, 2
# Of a program: rows (or pairs of rows) of the weights, columns read at a time. For one row many small programs, for a
# few rows, of which each program reads all, a large one on each multiprocessor: two on some would be two rounds of all.
_ONE = {"BLOCK": 2, "WIDTH": 1024, "num_warps": 1}
_ONE_OF_PAIRS = {"BLOCK": 1, "WIDTH": 1024, "num_warps": 1}
_FEW = {"BLOCK": 64, "WIDTH": 128, "num_warps": 4, "num_stages": 7}
_FEW_OF_PAIRS = {"BLOCK": 64, "WIDTH": 128, "num_warps": 4, "num_stages": 4}
_FEW_OF_FEW_PAIRS = {"BLOCK": 32, "WIDTH": 256, "num_warps": 4, "num_stages": 4}
_FEW_SMALL = {"BLOCK": 16, "WIDTH": 256, "num_warps": 4, "num_stages": 4}  # for GPUs with less shared memory
_FEW_OF_PAIRS_SMALL = {**_FEW_OF_PAIRS, "num_stages": 3}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weight^T + bias + residual. x: [N, K], weight: [M, K], bias: [M], residual: [N, M]; returns [N, M]."""
    if _few(x):
        return _kernel(_PLAIN, x, weight, bias, len(weight), residual=residual)
    out = _product(x, weight, bias)
    return out if residual is None else residual + out


def add_linear(target: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Adds x weight^T + bias, as in `linear`, to target [N, M] in place: to many rows within the product.

    Not with a bias, which would be lost in half precision beside what it is added to.
    """
    if bias is None and len(x) > MOST_ROWS:
        target.addmm_(x, weight.t())
    else:
        target += linear(x, weight, bias)


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up of gate and up = x weight^T + bias. x: [N, K], weight: [2 * I, K]; returns [N, I]."""
    if _few(x):
        return _kernel(_SWIGLU, x, weight, bias, len(weight) // 2)
    return gating.swiglu(_product(x, weight, bias))


def linear_rope(x: Tensor, weight: Tensor, bias: Tensor | None, rotation: Rotation, turning: int) -> Tensor:
    """x weight^T + bias of x [N, K] and weight [M, K] as heads [N, M / D, D], the first `turning` rotated."""
    head_dim = rotation.cos.shape[1]
    if _few(x):
        out = _kernel(_ROTATED, x, weight, bias, len(weight), rotation=rotation, turning=turning)
        return out.view(len(x), -1, head_dim)
    heads = _product(x, weight, bias).view(len(x), -1, head_dim)
    return torch.cat((rotate(heads[:, :turning], rotation), heads[:, turning:]), dim=1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As functional.linear.

    On a CPU with MKL a few rows of float32 go through its batched product, over blocks of the weights: that reads them
    two to four times as use_kernel as the product of one row, which one core does alone (docs/performance.md).
    """
    blocks = math.gcd(len(weight), _BLOCKS)
    slow = _HAS_MKL and x.dtype == torch.float32 and x.device.type == "cpu"
    if not (slow and len(x) <= _MOST_BATCHED and blocks > 1 and weight.numel() >= _LARGE and weight.is_contiguous()):
        return functional.linear(x, weight, bias)
    columns = x.t().expand(blocks, -1, -1)
    out = torch.bmm(weight.view(blocks, -1, x.shape[1]), columns).view(len(weight), len(x)).t().contiguous()
    return out if bias is None else out + bias


def _few(x: Tensor) -> bool:
    """Whether a kernel is the fastest: not for float32 on a GPU, which has no tensor cores for it."""
    return len(x) <= MOST_ROWS and use_kernel(x) and not (x.is_cuda and x.dtype == torch.float32)


def _kernel(
    kind: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    width: int,
    *,
    residual: Tensor | None = None,
    rotation: Rotation | None = None,
    turning: int = 0,
) -> Tensor:
    rows, size = x.shape
    x = x.contiguous()
    out = torch.empty((rows, width), device=x.device, dtype=x.dtype)
    pairs = len(weight) if kind == _PLAIN else len(weight) // 2  # a pair: two rows of weights that are used together
    half = rotation.cos.shape[1] // 2 if rotation is not None else 1
    none = weight  # is not read where its flag is off
    if rows == 1:
        kernel, sizes = _project_one, _ONE if kind == _PLAIN else _ONE_OF_PAIRS
    else:
        kernel, sizes = _project_few, _sizes(kind, pairs, x.device)
    kernel[(-(-pairs // sizes["BLOCK"]),)](
        x, weight, bias if bias is not None else none, residual if residual is not None else none,
        rotation.cos if rotation is not None else none, rotation.sin if rotation is not None else none,
        out, rows, size, pairs, half, turning,
        KIND=kind, BIAS=bias is not None, RESIDUAL=residual is not None, BATCH=1 if rows == 1 else MOST_ROWS,
        **sizes, **pdl_options(),
    )  # fmt: skip
    return out


def _sizes(kind: int, pairs: int, device: torch.device) -> dict[str, int]:
    """Those of the programs for a few rows."""
    if not has_large_shared_memory(device):
        return _FEW_SMALL if kind == _PLAIN else _FEW_OF_PAIRS_SMALL
    if kind == _PLAIN:
        return _FEW
    fits = pairs <= _FEW_OF_FEW_PAIRS["BLOCK"] * num_sms(device)  # one each, at most
    return _FEW_OF_FEW_PAIRS if fits else _FEW_OF_PAIRS


@triton.jit
def _pair_rows(pair, pairs, half, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two rows of the weights that are used together.

    KIND 0: row n alone. 1 (SwiGLU): rows n and pairs + n. 2 (RoPE): rows i and half + i of a head.
    """
    if KIND == 2:
        first = pair // half * 2 * half + pair % half
        second = first + half
    else:
        first = pair
        second = pair + pairs
    return first.to(tl.int64), second.to(tl.int64)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    one, two, bias, residual, cos, sin, out, rows, pairs, half, turning, pair, batch,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores the products one and two [BLOCK, BATCH] of rows of the weights as what comes after them wants them."""
    first, second = _pair_rows(pair, pairs, half, KIND)
    if BIAS:
        one += tl.load(bias + first, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
        if KIND != 0:
            two += tl.load(bias + second, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
    stored = (pair < pairs)[:, None] & (batch < rows)[None, :]
    if KIND == 0:
        target = batch[None, :] * pairs + pair[:, None]
        if RESIDUAL:
            one += tl.load(residual + target, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + target, one, mask=stored)
    elif KIND == 1:
        tl.store(out + batch[None, :] * pairs + pair[:, None], one / (1.0 + tl.exp(-one)) * two, mask=stored)
    else:
        angle = batch[None, :] * 2 * half + (pair % half)[:, None]
        turns = stored & (pair // half < turning)[:, None]
        c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        target = batch[None, :] * 2 * pairs + first[:, None]
        tl.store(out + target, one * c - two * s, mask=stored)
        tl.store(out + target + half, two * c + one * s, mask=stored)


@triton.jit
def _project_one(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, cos, sin, out, rows, size, pairs, half, turning,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK columns of the output, or pairs of them, for the one row of x."""
    pdl_wait(USE_PDL)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = _pair_rows(tl.minimum(pair, pairs - 1), pairs, half, KIND)
    one = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    two = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for start in tl.range(0, size, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = at < size
        part = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        seen = inside[None, :]
        one += tl.load(weight + first[:, None] * size + at[None, :], mask=seen, other=0.0).to(tl.float32) * part
        if KIND != 0:
            two += tl.load(weight + second[:, None] * size + at[None, :], mask=seen, other=0.0).to(tl.float32) * part
    pdl_launch(USE_PDL)
    one_sum, two_sum, batch = tl.sum(one, axis=1)[:, None], tl.sum(two, axis=1)[:, None], tl.arange(0, BATCH)
    _finish(one_sum, two_sum, bias, residual, cos, sin, out, rows, pairs, half, turning, pair, batch,
            KIND, BIAS, RESIDUAL)  # fmt: skip


@triton.jit
def _project_few(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, cos, sin, out, rows, size, pairs, half, turning,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK columns of the output, or pairs of them, for all rows of x."""
    pdl_wait(USE_PDL)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = _pair_rows(pair, pairs, half, KIND)
    batch = tl.arange(0, BATCH)
    there = (pair < pairs)[:, None]
    one = tl.zeros((BLOCK, BATCH), dtype=tl.float32)
    two = tl.zeros((BLOCK, BATCH), dtype=tl.float32)
    for start in tl.range(0, size, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = at < size
        asked = (batch < rows)[None, :] & inside[:, None]
        part = tl.load(x + batch[None, :] * size + at[:, None], mask=asked, other=0.0)
        seen = there & inside[None, :]
        one_weight = tl.load(weight + first[:, None] * size + at[None, :], mask=seen, other=0.0)
        one = tl.dot(one_weight, part, one, input_precision="ieee")
        if KIND != 0:
            two_weight = tl.load(weight + second[:, None] * size + at[None, :], mask=seen, other=0.0)
            two = tl.dot(two_weight, part, two, input_precision="ieee")
    pdl_launch(USE_PDL)
    _finish(one, two, bias, residual, cos, sin, out, rows, pairs, half, turning, pair, batch,
            KIND, BIAS, RESIDUAL)  # fmt: skip
