"""Matrices in fp8: quantisation by its definition, products against float64, kernels against their references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.kernels import linear as linear_module
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.fp8 import Fp8Matrix, quantise, quantise_normed, quantise_swiglu, scaled_product
from sparsecache.kernels.linear import MAX_FUSED_ROWS, add_linear, linear, linear_rope, norm_for, swiglu
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.rotation import Rotation
from sparsecache.kernels.swiglu import swiglu as activation

CUDA = torch.cuda.is_available()
needs_fp8 = pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that multiplies in fp8"
)
LARGEST, SMALLEST_STEP = 448, 2**-9  # of e4m3


def _draw(*shape: int, seed: int = 1) -> Tensor:
    """Return values over many magnitudes, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def _matrix(rows: int, size: int, device: Any = "cpu", dtype: torch.dtype = torch.bfloat16) -> Fp8Matrix:
    with force_backend("reference"):
        return quantise((_draw(rows, size, seed=3) / size**0.5).to(device, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 300)], ids=str)
def test_a_value_is_off_by_half_a_step_at_most(shape, dtype) -> None:
    x = _draw(*shape).to(dtype)
    found = quantise(x)
    exact, scale = x.double(), x.double().abs().amax(1, keepdim=True) / LARGEST
    torch.testing.assert_close(found.scales.double(), scale[:, 0], rtol=1e-6, atol=0)
    off = (found.dequantise(torch.float64) - exact).abs()
    # A step is an eighth of the power of two below a value, and never less than the smallest.
    step = torch.exp2(torch.floor(torch.log2((exact / scale).abs().clamp(min=2**-6))) - 3)
    assert (step >= SMALLEST_STEP).all()
    assert (off <= step / 2 * scale * (1 + 1e-5)).all()
    assert (found.values.float().abs().amax(1) == LARGEST).all()
    assert found.dequantise().dtype == dtype


def test_rows_are_quantised_independently() -> None:
    x = _draw(4, 33)
    x[1] *= 1e6
    x[2] *= 1e-12
    whole = quantise(x)
    for row in range(4):
        alone = quantise(x[row : row + 1])
        assert torch.equal(alone.values.view(torch.uint8), whole[row : row + 1].values.view(torch.uint8))
        assert torch.equal(alone.scales, whole[row : row + 1].scales)


def test_a_row_of_zeros_stays_zero_and_one_that_is_not_finite_spoils_its_products_alone() -> None:
    x = _draw(4, 40)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    assert not quantise(x).dequantise()[0].any()
    out = scaled_product(quantise(x), _matrix(6, 40))
    assert not out[0].any() and out[1:3].isnan().all() and out[3].isfinite().all()


@pytest.mark.parametrize(("rows", "size", "width"), [(1, 1, 1), (17, 35, 9), (40, 300, 48)])
def test_a_product_of_fp8_by_fp8_is_that_of_the_values(rows, size, width) -> None:
    x, weight, bias = quantise(_draw(rows, size)), _matrix(width, size), _draw(width, seed=5)
    expected = x.dequantise(torch.float64) @ weight.dequantise(torch.float64).t() + bias.double()
    torch.testing.assert_close(scaled_product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, MAX_FUSED_ROWS, MAX_FUSED_ROWS + 1])
def test_projections_quantise_what_they_multiply(rows) -> None:
    x, weight, gain, bias = _draw(rows, 32), _matrix(24, 32), _draw(32, seed=9), _draw(24, seed=5)
    product = scaled_product(quantise(x), weight, bias)
    for given in (x, quantise(x)):
        assert torch.equal(linear(given, weight, bias), product)
        target = torch.ones_like(product)
        add_linear(target, given, weight, bias)
        assert torch.equal(target, product + 1)
        hidden = swiglu(given, weight, bias)
        assert isinstance(hidden, Fp8Matrix)
        _assert_equal(hidden, quantise(activation(product)))
    normed = norm_for(weight, x, gain, 1e-5)
    assert isinstance(normed, Fp8Matrix)
    _assert_equal(normed, quantise(rms_norm(x, gain, 1e-5)))
    assert torch.equal(norm_for(x, x, gain, 1e-5), rms_norm(x, gain, 1e-5))


def _assert_equal(one: Fp8Matrix, other: Fp8Matrix) -> None:
    assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    assert torch.equal(one.scales, other.scales)


# Kernels


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 70), (2, 1000)])
def test_the_quantising_kernels(rows, size, device, dtype) -> None:
    """Triton's interpreter rounds ties away from zero, up to powers of two wrongly, and the smallest values too."""
    x, gain = _draw(rows, size).to(device, dtype), _draw(size, seed=2).to(device, dtype)
    cases: list[tuple[Callable[..., Fp8Matrix], tuple[Any, ...]]] = [
        (quantise, (x,)),
        (quantise, (torch.cat((x, x), 1)[:, 1 : size + 1],)),  # rows that are not contiguous
        (quantise_normed, (x, gain, 1e-5)),
        (quantise_swiglu, (torch.cat((x, gain.expand(rows, -1)), 1),)),
    ]
    for function, arguments in cases:
        with force_backend("kernels"):
            found = function(*arguments)
        with force_backend("reference"):
            expected = function(*arguments)
        assert found.dtype == expected.dtype == dtype
        # Norm and SwiGLU may round otherwise before they are quantised.
        torch.testing.assert_close(found.scales, expected.scales, rtol=0 if function is quantise else 1e-2, atol=0)
        codes, wanted = (each.values.view(torch.uint8).int() for each in (found, expected))
        off = (codes - wanted).abs()
        if device.type == "cpu":
            off = off[(wanted % 8 > 0) & (wanted % 128 > 8)]
        assert (off <= (0 if function is quantise and device.type == "cuda" else 1)).all()


def test_the_kernel_keeps_values_that_fp8_holds(device, dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[codes.float().isfinite()].float().repeat(3, 1) / 16
    finite[1] *= 2**-4
    with force_backend("kernels"):
        found = quantise(finite.to(device, dtype))
    assert torch.equal(found.dequantise().cpu().float(), finite.to(dtype).float())


FEW_ROWS = [(1, 1100, 3), (2, 512, 16), (5, 300, 65), (16, 257, 33)]
if CUDA:  # the interpreter would take minutes for them
    FEW_ROWS += [(1, 64, 48), (1, 4096, 2049), (1, 14336, 128), (3, 1030, 300), (8, 14336, 2048), (16, 4096, 14336)]


@pytest.mark.parametrize("large_memory", [True, False], ids=["", "small memory"])
@pytest.mark.parametrize(("rows", "size", "width"), FEW_ROWS, ids=str)
def test_kernels_of_few_rows(rows, size, width, large_memory, device, dtype, agree, monkeypatch) -> None:
    """Sizes that are not multiples of blocks reveal weights skipped or read twice, and scales of other rows."""
    monkeypatch.setattr(linear_module, "has_large_shared_memory", lambda _: large_memory)
    with force_backend("reference"):
        x = quantise(_draw(rows, size).to(device, dtype))
        small = quantise(x.dequantise() / x.dequantise().norm(dim=1, keepdim=True))
    weight, residual = _matrix(2 * width, size, device), _draw(rows, 2 * width, seed=4).to(device, dtype)
    agree(linear, x, weight)
    agree(linear, x, weight, bias=residual[0], residual=residual)
    angles = torch.rand(rows, 4).repeat(1, 2).to(device, dtype)
    heads = _matrix(3 * 8, size, device)
    for part, rotated in ((heads, 2), (heads[:8], 1)):  # q, k and v, and q alone for a speculation
        agree(linear_rope, x, part, None, Rotation(angles.cos(), angles.sin()), rotated)
    # Quantised, values differ by a whole step where products differ a little.
    monkeypatch.setattr(linear_module, "quantise", lambda hidden: hidden)
    monkeypatch.setattr(linear_module, "quantise_swiglu", activation)
    agree(swiglu, small, weight)


@needs_fp8
@pytest.mark.parametrize(("size", "width"), [(64, 48), (4096, 6144), (300, 33)])
@pytest.mark.parametrize("rows", [17, 100, 1025])
def test_tensor_cores_give_the_product_of_the_reference(rows, size, width, device, agree) -> None:
    """33 columns of 300 are computed by the reference on a GPU, too."""
    x, bias = quantise(_draw(rows, size).to(device, torch.bfloat16)), _draw(width).to(device, torch.bfloat16)
    for some in (None, bias):
        agree(scaled_product, x, _matrix(width, size, device), some)
    agree(linear, x, _matrix(width, size, device))
