"""The prompt tokens of highest score: the kernel against sorting, and its order and ties."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.highest import highest_positions

SIZES = {"one token": (1, 1), "a block": (2, 128), "beyond a block": (3, 300)}
if torch.cuda.is_available():
    SIZES["long"] = (8, 131_073)


@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_kernel_selects_as_by_sorting(size, kind, device, gpu_dtype, monkeypatch) -> None:
    if size[1] < 1000:
        monkeypatch.setattr("sparsecache.kernels.page_selection._TILE_PAGES", 8)  # several tiles and blocks
    scores = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(device, gpu_dtype)
    if kind == "ties":
        scores = scores.round()  # zeros of both signs too
    if kind == "infinite":
        scores[:, ::3], scores[:, 1::3] = torch.inf, -torch.inf

    for count in {0, 1, size[1] // 5, size[1] - 1, size[1]}:
        found = []
        for backend in ("kernels", "reference"):
            with force_backend(backend):
                found.append(highest_positions(scores, count))
        assert found[0].dtype == torch.int64 and torch.equal(*found)


def test_positions_ascend_and_the_lower_one_wins_a_tie() -> None:
    scores = torch.tensor([[1.0, 3, 2, 3, 2, 0], [0, 0, 0, 0, 5, 0]])
    assert highest_positions(scores, 3).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert highest_positions(scores, 0).shape == (2, 0)
