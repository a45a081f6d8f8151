"""Rows of slots against torch indexing."""

import pytest
import torch

from sparsecache.kernels.rows import index_slots, take_rows


@pytest.mark.parametrize("slots", [[0], [2, 0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("beyond", [(), (5,), (2, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 6])
def test_equals_torch_indexing(slots: list[int], beyond: tuple[int, ...], count: int) -> None:
    """Over a whole store, a strided half of it, and its first rows."""
    generator = torch.Generator().manual_seed(count)
    store = torch.randn(max(slots) + 1, 3, 7, 2, *beyond, generator=generator)
    rows = torch.randint(0, 4, (len(slots), 3, count), generator=generator)
    index = torch.tensor(slots)[:, None, None], torch.arange(3)[:, None], rows
    for part in (store, store[:, :, :, 1], store[:, :, :4]):
        assert torch.equal(take_rows(part, torch.tensor(slots), rows), part[index])
        assert torch.equal(index_slots(part, torch.tensor(slots)), part[slots])


def test_the_only_slot_is_not_copied() -> None:
    store = torch.randn(1, 3, 7)
    assert index_slots(store, torch.tensor([0])).data_ptr() == store.data_ptr()
