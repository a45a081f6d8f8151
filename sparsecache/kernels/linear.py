"""Projections of a decode step, each one kernel: a norm before it and what follows it ride along.

With few rows a projection takes as long as its weights take to be read. The kernels therefore read each weight once,
and do everything else (RMS norm, bias, RoPE, SwiGLU, residual) on the way. More than MOST_ROWS rows, as a prompt has,
go through torch's own matrix product.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sparsecache.kernels import swiglu as gating
from sparsecache.kernels._triton import after_previous, fast, launching, prefetch, tl, triton
from sparsecache.kernels.norm import Norm, rms_norm
from sparsecache.kernels.rotation import Rotation, rotate

MOST_ROWS = 16
_PLAIN, _SWIGLU, _ROTATED = 0, 1, 2
_WIDTH = 256  # columns of the weights that a program reads at a time
_AHEAD = 4096  # columns that a program asks for before the kernel before it has ended


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """norm(x) weight^T + bias + residual. x: [N, K], weight: [M, K], bias: [M], residual: [N, M]; returns [N, M]."""
    if _few(x):
        return _kernel(_PLAIN, x, weight, bias, norm, len(weight), residual=residual)
    out = functional.linear(_normed(x, norm), weight, bias)
    return out if residual is None else residual + out


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None) -> Tensor:
    """silu(gate) * up of gate and up = norm(x) weight^T + bias. x: [N, K], weight: [2 * I, K]; returns [N, I]."""
    if _few(x):
        return _kernel(_SWIGLU, x, weight, bias, norm, len(weight) // 2)
    return gating.swiglu(functional.linear(_normed(x, norm), weight, bias))


def rotated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rotation: Rotation,
    turning: int,
    norm: Norm | None = None,
) -> Tensor:
    """norm(x) weight^T + bias of x [N, K] and weight [M, K] as heads [N, M / D, D], the first `turning` rotated."""
    head_dim = rotation.cos.shape[1]
    if _few(x):
        out = _kernel(_ROTATED, x, weight, bias, norm, len(weight), rotation=rotation, turning=turning)
        return out.view(len(x), -1, head_dim)
    heads = functional.linear(_normed(x, norm), weight, bias).view(len(x), -1, head_dim)
    return torch.cat((rotate(heads[:, :turning], rotation), heads[:, turning:]), dim=1)


def _few(x: Tensor) -> bool:
    """Whether a kernel is the fastest: not for float32 on a GPU, which has no tensor cores for it."""
    return len(x) <= MOST_ROWS and fast(x) and not (x.is_cuda and x.dtype == torch.float32)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else rms_norm(x, norm)


def _kernel(
    kind: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    width: int,
    *,
    residual: Tensor | None = None,
    rotation: Rotation | None = None,
    turning: int = 0,
) -> Tensor:
    if norm is not None and x.dtype == torch.float16:  # before it is divided by its norm, x times a weight may overflow
        x, norm = rms_norm(x, norm), None
    rows, size = x.shape
    out = torch.empty((rows, width), device=x.device, dtype=x.dtype)
    pairs = len(weight) if kind == _PLAIN else len(weight) // 2  # a pair: two rows of weights that are used together
    half = rotation.cos.shape[1] // 2 if rotation is not None else 1
    block = 16 if kind != _PLAIN or pairs < 8192 else 32
    none = weight  # is not read where its flag is off
    _project[(-(-pairs // block),)](
        x, x.stride(0), weight, bias if bias is not None else none,
        norm.weight if norm is not None else none, norm.eps if norm is not None else 0.0,
        residual if residual is not None else none,
        rotation.cos if rotation is not None else none, rotation.sin if rotation is not None else none,
        out, rows, size, pairs, half, turning,
        KIND=kind, BIAS=bias is not None, NORM=norm is not None, RESIDUAL=residual is not None,
        BATCH=MOST_ROWS, BLOCK=block, WIDTH=_WIDTH, AHEAD=_AHEAD, num_warps=4, num_stages=4 if kind == _PLAIN else 3,
        **launching(),
    )  # fmt: skip
    return out


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    x, x_stride, weight, bias, norm, eps, residual, cos, sin, out, rows, size, pairs, half, turning,
    KIND: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK columns of the output, or pairs of them, for all rows of x.

    KIND 0: column n of row n of the weights. 1 (SwiGLU): column n of the rows n and pairs + n. 2 (RoPE): columns i and
    half + i of a head, of the rows of that head.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = pair // half
    first = pair if KIND != 2 else head * 2 * half + pair % half
    second = first + (half if KIND == 2 else pairs)
    batch = tl.arange(0, BATCH)
    there = (pair < pairs)[:, None]
    if EARLY:  # weights depend on nothing; a line is 64 columns
        line = tl.arange(0, WIDTH // 64) * 64
        rows_of_one = weight + tl.where(pair < pairs, first, 0).to(tl.int64)[:, None] * size
        rows_of_two = weight + tl.where(pair < pairs, second, 0).to(tl.int64)[:, None] * size
        for start in tl.static_range(0, AHEAD, WIDTH):
            at_line = tl.minimum(start + line, size - 1)[None, :]
            prefetch(rows_of_one + at_line)
            if KIND != 0:
                prefetch(rows_of_two + at_line)
    after_previous(EARLY)
    one = tl.zeros((BLOCK, BATCH), dtype=tl.float32)
    two = tl.zeros((BLOCK, BATCH), dtype=tl.float32)
    squares = tl.zeros((BATCH,), dtype=tl.float32)
    for start in tl.range(0, size, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = at < size
        part = tl.load(
            x + batch[None, :] * x_stride + at[:, None], mask=(batch < rows)[None, :] & inside[:, None], other=0.0
        )
        if NORM:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            part = (wide * tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)[:, None]).to(part.dtype)
        seen = there & inside[None, :]
        one_weight = tl.load(weight + first.to(tl.int64)[:, None] * size + at[None, :], mask=seen, other=0.0)
        one = tl.dot(one_weight, part, one, input_precision="ieee")
        if KIND != 0:
            two_weight = tl.load(weight + second.to(tl.int64)[:, None] * size + at[None, :], mask=seen, other=0.0)
            two = tl.dot(two_weight, part, two, input_precision="ieee")
    if NORM:
        scale = (1.0 / tl.sqrt(squares / size + eps))[None, :]
        one *= scale
        two *= scale
    if BIAS:
        one += tl.load(bias + first, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
        if KIND != 0:
            two += tl.load(bias + second, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
    stored = there & (batch < rows)[None, :]
    if KIND == 0:
        target = batch[None, :] * pairs + pair[:, None]
        if RESIDUAL:
            one += tl.load(residual + target, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + target, one, mask=stored)
    elif KIND == 1:
        tl.store(out + batch[None, :] * pairs + pair[:, None], one / (1.0 + tl.exp(-one)) * two, mask=stored)
    else:
        angle = batch[None, :] * 2 * half + (pair % half)[:, None]
        turns = stored & (head < turning)[:, None]
        c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        target = batch[None, :] * 2 * pairs + first[:, None]
        tl.store(out + target, one * c - two * s, mask=stored)
        tl.store(out + target + half, two * c + one * s, mask=stored)
