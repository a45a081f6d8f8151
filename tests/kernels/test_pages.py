"""Bounds of the scores in pages, against the reference and against the keys themselves."""

import pytest
import torch

from sparsecache.kernels.pages import page_bounds

CASES = {  # slots, KV heads, group, head size, pages allocated, pages scored, slots of the batch
    "one page": (1, 1, 1, 16, 1, 1, [0]),
    "around a block": (3, 2, 3, 24, 40, 33, [2, 0]),
    "wide group": (2, 2, 12, 32, 7, 7, [1, 0]),
}
if torch.cuda.is_available():
    CASES["long"] = (16, 8, 4, 128, 2049, 2047, [*range(15, -1, -1)])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree(case, device, dtype, agree) -> None:
    slots, kv_heads, group, head_dim, capacity, pages, of_batch = case
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(of_batch), kv_heads * group, 1, head_dim, generator=generator).to(device, dtype)
    ends = torch.randn(2, slots, kv_heads, capacity, head_dim, generator=generator).to(device, dtype).sort(0).values
    agree(page_bounds, q, ends[0].clone(), ends[1].clone(), torch.tensor(of_batch, device=device), pages)


def test_no_key_of_a_page_scores_above_its_bound() -> None:
    q, keys = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 5, 4, 8)  # 5 pages of 4 keys
    bounds = page_bounds(q, keys.amin(3), keys.amax(3), torch.arange(2), 5)
    scores = torch.einsum("bghd,bgptd->bghpt", q.view(2, 3, 2, 8), keys)
    assert (scores.amax(4) <= bounds + 1e-5).all()
    alike = keys[:, :, :, :1].expand(-1, -1, -1, 4, -1)  # pages of equal keys: the bound is the score
    bounds = page_bounds(q, alike.amin(3), alike.amax(3), torch.arange(2), 5)
    torch.testing.assert_close(bounds, torch.einsum("bghd,bgpd->bghp", q.view(2, 3, 2, 8), keys[:, :, :, 0]))
