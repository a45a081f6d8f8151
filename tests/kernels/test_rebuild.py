"""Keys rebuilt from a low rank: the kernel against the reference, and the reference against products in float64."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.rebuild import append_exact, rebuild_rows
from sparsecache.kernels.rotation import Rotation
from sparsecache.testing.cache_checks import plain_rope

DTYPES = [torch.float16, torch.float32, torch.bfloat16][: 3 if torch.cuda.is_available() else 2]
CASES = {  # slots, batch, KV heads, tokens, width, rank, channels
    "one token": (1, 1, 1, 9, 1, 3, 8),
    "odd sizes": (4, 3, 2, 150, 77, 40, 24),
    "a rank of blocks": (2, 2, 3, 100, 100, 64, 64),
}
if torch.cuda.is_available():
    CASES["long"] = (4, 4, 8, 9000, 1100, 160, 128)


def _draw(case, device, dtype):
    slots, batch, kv_heads, tokens, width, rank, head_dim = case
    generator = torch.Generator().manual_seed(tokens)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    rotation = Rotation(*(1.2 * table.to(device) for table in plain_rope(head_dim)(torch.arange(tokens))))
    order = torch.randperm(slots, generator=generator)[:batch].to(device)
    positions = torch.stack([torch.randperm(tokens, generator=generator)[:width] for _ in range(batch * kv_heads)])
    counts = torch.randint(0, width + 1, (batch, kv_heads), generator=generator).to(device)
    counts[0, 0] = width
    coefficients, basis = draw(slots, tokens, rank), draw(slots, kv_heads, rank, head_dim) / rank**0.5
    values = draw(slots, kv_heads, tokens, head_dim)
    places = torch.randint(-3, 3, (slots, kv_heads, tokens), generator=generator).clamp(min=-1).int().to(device)
    return coefficients, basis, values, places, rotation, order, positions.view(batch, kv_heads, -1).to(device), counts


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_equals_the_reference(case, dtype, device) -> None:
    arguments = _draw(case, device, dtype)
    *_, positions, counts = arguments
    with force_backend("reference"):
        expected, expected_places = rebuild_rows(*arguments)
    with force_backend("kernels"):
        found, found_places = rebuild_rows(*arguments)
        keys_only, _ = rebuild_rows(*arguments[:2], None, *arguments[3:])
    valid = torch.arange(positions.shape[2], device=device) < counts[..., None]
    assert torch.equal(found_places[valid], expected_places[valid])
    valid &= expected_places < 0
    assert torch.equal(found[valid][:, 1], expected[valid][:, 1])
    assert torch.equal(keys_only[valid][:, 0], found[valid][:, 0])
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found[valid], expected[valid], rtol=tolerance, atol=tolerance)


def test_rows_are_rotated_products_and_values(device) -> None:
    """Also where only a part of a head is rotated, which the kernel leaves to the reference."""
    case = (3, 2, 2, 40, 12, 5, 8)
    coefficients, basis, values, places, rotation, slots, positions, counts = _draw(case, device, torch.float32)
    for rotated in (8, 4):
        tables = rotation if rotated == 8 else plain_rope(4)(torch.arange(40))
        tables = Rotation(*(table.to(device) for table in tables))
        with force_backend("kernels"):
            rows, found = rebuild_rows(coefficients, basis, values, places, tables, slots, positions, counts)
        for b, slot in enumerate(slots.tolist()):
            for g in range(2):
                for n, position in enumerate(positions[b, g, : int(counts[b, g])].tolist()):
                    assert found[b, g, n] == places[slot, g, position]
                    if found[b, g, n] >= 0:
                        continue
                    key = coefficients[slot, position].double() @ basis[slot, g].double()
                    half = rotated // 2
                    c, s = (table[position, :half].double() for table in tables)
                    low, high = key[:half].clone(), key[half:rotated].clone()
                    key[:half], key[half:rotated] = low * c - high * s, high * c + low * s
                    torch.testing.assert_close(rows[b, g, n, 0].double(), key, rtol=1e-4, atol=1e-5)
                    assert torch.equal(rows[b, g, n, 1], values[slot, g, position])


def test_a_new_token_is_appended_to_the_exact_rows(device, gpu_dtype, agree) -> None:
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 3, 4, 1, 24, generator=generator).to(device, gpu_dtype)[:, :, :2]  # strided
    exact = torch.randn(4, 2, 9, 2, 24, generator=generator).to(device, gpu_dtype)
    places = torch.full((4, 2, 30), -1, dtype=torch.int32, device=device)
    seq_lens, offsets = (torch.tensor(x, device=device) for x in ([30, 0, 25, 29], [20, 5, 20, 25]))
    slots = torch.tensor([2, 0, 3], device=device)
    agree(append_exact, k, v, exact, places, seq_lens, offsets, slots)
    with force_backend("kernels"):
        append_exact(k, v, exact, places, seq_lens, offsets, slots)
    assert places[2, :, 25].tolist() == [5, 5] and places[3, :, 29].tolist() == [4, 4]
    assert places[0, :, 29].tolist() == [8, 8]  # the last row of a full slot
    assert torch.equal(exact[2, :, 5], torch.cat((k[0], v[0]), 1)) and int((places >= 0).sum()) == 6
