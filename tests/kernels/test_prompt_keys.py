"""Keys of a prompt before RoPE, and mean keys of pages: kernels against references, and references against RoPE."""

import pytest
import torch

from sparsecache.kernels.page_means import page_means
from sparsecache.kernels.rotation import Rotation, rotate_rows
from sparsecache.kernels.unrotate import unrotate_keys
from sparsecache.testing.cache_checks import plain_rope


def _keys(length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(3, length + 5, 24, generator=generator).to(device, dtype)[:, :length]  # strided


@pytest.mark.parametrize("length", [1, 37])
def test_unrotated_keys_rotate_to_the_keys(length, device, gpu_dtype, agree) -> None:
    keys = _keys(length, device, gpu_dtype)
    for channels in (24, 12):
        rotation = Rotation(*(1.3 * table.to(device) for table in plain_rope(channels)(torch.arange(40))))
        agree(lambda k, rotation=rotation: unrotate_keys(k, rotation), keys)
        plain = unrotate_keys(keys, rotation)
        assert plain.shape == (length, 3, 24) and plain.is_contiguous()
        rotated = rotate_rows(plain, Rotation(*(table[:length, None] for table in rotation))).transpose(0, 1)
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[gpu_dtype]
        torch.testing.assert_close(rotated, keys.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("length", "page", "pages"), [(1, 1, 1), (41, 8, 5), (60, 20, 2), (9, 16, 0)])
def test_means_and_similarities_of_pages(length, page, pages, device, gpu_dtype, agree) -> None:
    keys = _keys(length, device, gpu_dtype)
    keys[0, :page] = 0  # similar to nothing
    agree(page_means, keys, page, pages)


def test_means_are_stored_where_asked(device, gpu_dtype, agree) -> None:
    keys = _keys(41, device, gpu_dtype)

    def stored(k: torch.Tensor) -> torch.Tensor:
        target = torch.zeros(3, 9, 24, device=device, dtype=gpu_dtype)
        page_means(k, 8, 5, target[:, :5])
        return target

    agree(stored, keys)
    expected = page_means(keys, 8, 5)[0].to(gpu_dtype)
    torch.testing.assert_close(stored(keys)[:, :5], expected, rtol=0, atol=0)
