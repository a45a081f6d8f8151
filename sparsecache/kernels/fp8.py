"""Matrices in fp8 (e4m3) with one float32 scale per row, and products of two of them.

A row is quantised by its largest magnitude: values = round(row * 448 / amax), scale = amax / 448. Each value is then
off by half a step of e4m3 at most: a sixteenth of itself, or amax / 448 / 1024 if that is more. NaN and infinity in a
row make its products NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_launch, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.swiglu import swiglu

FP8 = torch.float8_e4m3fn
_MAX = 448.0  # the largest e4m3
_MIN_AMAX = 2.0**-100  # for a row of zeros: its inverse is finite in float32
_PLAIN, _NORM, _SWIGLU = 0, 1, 2  # what comes before the quantisation
_ALIGNMENT = 16  # rows and columns that torch's product requires multiples of


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [M, K]: values [M, K] in e4m3 times scales [M] in float32. dtype: of the matrix that it stands for."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "Fp8Matrix":
        return Fp8Matrix(self.values[rows], self.scales[rows], self.dtype)

    @property
    def shape(self) -> torch.Size:
        """Return [M, K]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Return the device of the values."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Return the bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> "Fp8Matrix":
        """Return the matrix on a device."""
        return Fp8Matrix(self.values.to(device), self.scales.to(device), self.dtype)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix as a tensor of a dtype, by default its own."""
        return (self.values.float() * self.scales[:, None]).to(dtype or self.dtype)


Matrix = Tensor | Fp8Matrix


def to_tensor(matrix: Matrix) -> Tensor:
    """Return a matrix as a tensor of its dtype, dequantised if it is in fp8."""
    return matrix.dequantise() if isinstance(matrix, Fp8Matrix) else matrix


def quantise(x: Tensor) -> Fp8Matrix:
    """Quantise x [N, K] row by row."""
    return _launch(_PLAIN, x, x.shape[1]) if use_kernel(x) else _reference(x)


def quantise_normed(x: Tensor, weight: Tensor, eps: float) -> Fp8Matrix:
    """Return rms_norm(x, weight, eps) quantised row by row. x: [N, K]; weight: [K]."""
    if use_kernel(x):
        return _launch(_NORM, x, x.shape[1], weight, eps)
    return _reference(rms_norm(x, weight, eps))


def quantise_swiglu(gate_up: Tensor) -> Fp8Matrix:
    """Return silu(gate) * up quantised row by row: [N, I]. gate_up: [N, 2 * I], the gate first."""
    return _launch(_SWIGLU, gate_up, gate_up.shape[1] // 2) if use_kernel(gate_up) else _reference(swiglu(gate_up))


def scaled_product(x: Fp8Matrix, weight: Fp8Matrix, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in the dtype of x: [N, M]. x: [N, K]; weight: [M, K]; bias: [M].

    On a GPU tensor cores multiply the fp8 values. Elsewhere, and for sizes that torch's product does not take, float32
    products of the same values are the reference.
    """
    aligned = not (weight.shape[0] % _ALIGNMENT or weight.shape[1] % _ALIGNMENT)
    if use_kernel(x.values) and x.values.is_cuda and aligned and x.dtype == torch.bfloat16:
        # Fast accumulation keeps fewer bits than float32, and far more than the 4 bits of e4m3.
        return torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scales[:, None],
            scale_b=weight.scales[None],
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    out = x.values.float() @ weight.values.float().t() * x.scales[:, None] * weight.scales
    return (out if bias is None else out + bias).to(x.dtype)


def _reference(x: Tensor) -> Fp8Matrix:
    wide = x.float()
    amax = wide.abs().amax(dim=1).clamp(min=_MIN_AMAX)
    largest = torch.full_like(amax, _MAX)  # on a GPU, torch divides inexactly by a Python number
    values = (wide * (largest / amax)[:, None]).clamp(-_MAX, _MAX)
    return Fp8Matrix(values.to(FP8), amax / largest, x.dtype)


def _launch(kind: int, x: Tensor, width: int, weight: Tensor | None = None, eps: float = 0.0) -> Fp8Matrix:
    x = x if x.stride(1) == 1 else x.contiguous()
    values = torch.empty((len(x), width), device=x.device, dtype=FP8)
    scales = torch.empty(len(x), device=x.device, dtype=torch.float32)
    if len(x):
        block = next_power_of_2(width)
        _quantise_kernel[(len(x),)](
            x, x.stride(0), weight if weight is not None else x, values, scales, width, eps, _MAX, _MIN_AMAX,
            KIND=kind, BLOCK=block, num_warps=min(16, max(1, block // 512)), **pdl_options(),
        )  # fmt: skip
    return Fp8Matrix(values, scales, x.dtype)


@triton.jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x, row_stride, weight, values, scales, size, eps, largest, min_amax,
    KIND: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Quantise a row of x, of its norm, or of its SwiGLU, which are rounded to the dtype of x before."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    if KIND == 1:
        gain = tl.load(weight + column, mask=mask, other=0.0)  # before the wait: no kernel writes weights
    pdl_wait(USE_PDL)
    wide = tl.load(x + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps))
        wide = (wide.to(x.dtype.element_ty) * gain).to(tl.float32)
    elif KIND == 2:
        up = tl.load(x + row * row_stride + size + column, mask=mask, other=0.0).to(tl.float32)
        wide = (wide / (1.0 + tl.exp(-wide)) * up).to(x.dtype.element_ty).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(wide)), min_amax)
    quantised = wide * tl.div_rn(largest, amax)
    pdl_launch(USE_PDL)
    # Rounding may have left a value a little above the largest, which must not become NaN. NaN stays.
    quantised = tl.where(quantised > largest, largest, tl.where(quantised < -largest, -largest, quantised))
    tl.store(values + row * size + column, quantised.to(values.dtype.element_ty), mask=mask)
    tl.store(scales + row, tl.div_rn(amax, largest))
