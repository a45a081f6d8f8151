"""Fused projections, RoPE and RMS norm against their references. Odd sizes reveal weights skipped or read twice."""

import itertools

import pytest
import torch

from sparsecache.kernels import linear as linear_module
from sparsecache.kernels.linear import MAX_FUSED_ROWS, add_linear, linear, linear_rope, swiglu
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.rotation import Rotation, split_and_rotate
from sparsecache.kernels.swiglu import swiglu as activation

SIZES = [(1, 64, 48), (1, 4100, 21), (2, 256, 16), (5, 300, 33), (16, 257, 130), (MAX_FUSED_ROWS + 3, 40, 24)]
sizes = pytest.mark.parametrize(("rows", "size", "width"), SIZES, ids=["x".join(map(str, each)) for each in SIZES])


@pytest.fixture
def draw(device, dtype):
    """Draw random tensors."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make


@sizes
def test_linear(rows, size, width, draw, agree) -> None:
    for has_bias, has_residual in itertools.product((False, True), repeat=2):
        options = {
            "bias": draw(width) if has_bias else None,
            "residual": draw(rows, width) if has_residual else None,
        }
        agree(linear, draw(rows, size), draw(width, size) / size**0.5, **options)


@sizes
def test_add_linear(rows, size, width, draw, agree) -> None:
    """Adds to some rows of a tensor in place and leaves the others unchanged."""

    def added(target, x, weight, bias):
        target = target.clone()
        add_linear(target[2 : 2 + rows], x, weight, bias)
        return target

    x, weight, target = draw(rows, size), draw(width, size) / size**0.5, draw(rows + 3, width)
    for bias in (None, draw(width)):
        agree(added, target, x, weight, bias)
        expected = target.double()
        expected[2 : 2 + rows] += x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        off = (added(target, x, weight, bias).double() - expected).abs()
        assert off.max() <= 4 * torch.finfo(target.dtype).eps * expected.abs().max()
        assert not off[:2].any() and not off[2 + rows :].any()


@sizes
def test_swiglu(rows, size, width, draw, agree) -> None:
    x, weight = draw(rows, size), draw(2 * width, size) / size**0.5
    agree(swiglu, x, weight)
    agree(swiglu, x, weight, draw(2 * width))
    agree(activation, draw(rows, 2 * width))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 32), (3, 2, 20), (0, 1, 64)])
@pytest.mark.parametrize(("rows", "size"), [(1, 1300), (5, 300), (16, 257), (MAX_FUSED_ROWS + 3, 40)])
def test_linear_rope(rows, size, heads, kv_heads, head_dim, draw, agree) -> None:
    """Heads beyond num_rotated (values) are not rotated. A slice of the weight projects the queries and keys alone."""
    x, count, rotation = draw(rows, size), heads + 2 * kv_heads, _rotation(rows, head_dim, draw)
    weight, bias = draw(count * head_dim, size) / size**0.5, draw(count * head_dim)
    agree(linear_rope, x, weight, bias, rotation, count - kv_heads)
    agree(linear_rope, x, weight[: -kv_heads * head_dim], None, rotation, count)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 32), (3, 3, 20), (0, 2, 64)])
@pytest.mark.parametrize("rows", [1, 5, 19])
def test_split_and_rotate(rows, heads, kv_heads, head_dim, draw, agree) -> None:
    projected, rotation = draw(rows, heads + 2 * kv_heads, head_dim), _rotation(rows, head_dim, draw)
    for capacity in (rows, rows + 37):
        agree(split_and_rotate, projected, rotation, kv_heads, capacity)


def _rotation(rows: int, head_dim: int, draw) -> Rotation:
    angles = draw(rows, head_dim // 2).repeat(1, 2)
    return Rotation(angles.cos(), angles.sin())


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (2, 5, 64), (17, 4096), (2, 0, 64)], ids=str)
def test_rms_norm(shape, draw, agree) -> None:
    agree(rms_norm, draw(*shape), draw(shape[-1]), 1e-5)
    agree(rms_norm, draw(*shape[:-1], shape[-1] + 3)[..., 3:], draw(shape[-1]), 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("shape", [(768, 96), (1001, 70), (20, 4000), (48, 7)], ids=str)
def test_torch_products_on_a_cpu(rows, shape) -> None:
    """Weights that are large or small, divisible into blocks or not, slices of rows, and not contiguous."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape[0], 2 * shape[1], generator=generator)
    bias, x = torch.randn(shape[0], generator=generator), torch.randn(rows, shape[1], generator=generator)
    for part in (weight[:, ::2].contiguous(), weight[:, ::2]):
        for size in (shape[0], shape[0] - 4):
            expected = x.double() @ part[:size].double().t() + bias[:size].double()
            torch.testing.assert_close(linear(x, part[:size], bias[:size]).double(), expected, rtol=1e-5, atol=1e-4)
            assert linear(x, part[:size]).is_contiguous()


@pytest.mark.parametrize(("num_sms", "large_memory"), [(0, True), (0, False), (1000, True)])
def test_every_block_size(num_sms, large_memory, draw, agree, monkeypatch) -> None:
    """The sizes for many pairs of rows, for little shared memory, and for few pairs."""
    monkeypatch.setattr(linear_module, "num_sms", lambda _: num_sms)
    monkeypatch.setattr(linear_module, "has_large_shared_memory", lambda _: large_memory)
    x, rotation = draw(5, 300), Rotation(*draw(2, 5, 32).repeat(1, 1, 2))
    agree(linear, x, draw(70, 300) / 300**0.5, residual=draw(5, 70))
    agree(swiglu, x, draw(2 * 70, 300) / 300**0.5)
    agree(linear_rope, x, draw(3 * 64, 300) / 300**0.5, None, rotation, 2)


def test_every_output_is_written(draw, agree, monkeypatch) -> None:
    """Uninitialized memory is filled with NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    agree(linear, draw(3, 100), draw(35, 100))
    agree(linear, draw(1, 100), draw(35, 100))
    agree(swiglu, draw(16, 100), draw(70, 100) / 10)


def test_large_values_before_a_norm_do_not_overflow(draw, agree) -> None:
    x = draw(2, 64)
    x[0, 3] = 12_000
    agree(rms_norm, x, 8 * draw(64), 1e-5)
