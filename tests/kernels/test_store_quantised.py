"""Storing quantised tokens: kernels and references leave the same codes, bit for bit."""

import pytest
import torch

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.quantisation import QuantisedStore
from sparsecache.kernels.store_quantised import append_quantised, store_prompt_quantised

DTYPES = [torch.float16, torch.float32, torch.bfloat16][: 3 if torch.cuda.is_available() else 1]
PARTS = ("key_codes", "key_ranges", "value_codes", "value_ranges", "key_tail", "value_tail")
PROMPTS = [(2, 16, 16, 24, 79), (4, 32, 0, 16, 64), (8, 32, 32, 40, 31)]  # bits, group, residual, channels, tokens
if torch.cuda.is_available():
    PROMPTS += [(bits, 32, 128, 128, 33_000) for bits in (2, 4, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_is_stored_alike_by_kernel_and_reference(device, dtype) -> None:
    for bits, group, residual, head_dim, length in PROMPTS:
        sizes = (2, 2, length + 20, head_dim, bits, group, residual)
        stores = [QuantisedStore.allocate(*sizes, device, dtype) for _ in range(2)]
        generator = torch.Generator().manual_seed(bits)
        k, v = torch.randn(2, length, 2, head_dim, generator=generator).transpose(1, 2).to(device, dtype)
        k[..., 0], v[:, 1] = 7.0, 0.0  # groups of equal numbers
        for store, backend in zip(stores, ("kernels", "reference"), strict=True):
            with force_backend(backend):
                store_prompt_quantised(k, v, store, 1, torch.tensor([length, length - 5], device=device))
        for name in PARTS:
            assert torch.equal(*(getattr(store, name) for store in stores)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_are_quantised_as_tokens_come(device, dtype) -> None:
    """Kernels and references leave what `store_prompt` makes of the whole text, step by step."""
    for bits, group, residual in ((2, 16, 16), (4, 16, 0), (8, 32, 32)):
        store, whole = (QuantisedStore.allocate(2, 2, 100, 24, bits, group, residual, device, dtype) for _ in range(2))
        generator = torch.Generator().manual_seed(5)
        k, v = torch.randn(2, 2, 79, 24, generator=generator).to(device, dtype)
        store.store_prompt(1, k[:, :40], v[:, :40])
        whole.store_prompt(1, k, v)
        for past in range(40, 79):
            lengths, slots = torch.tensor([3, past], device=device), torch.tensor([1], device=device)
            with force_backend("kernels" if past % 2 else "reference"):
                append_quantised(k[None, :, past : past + 1], v[None, :, past : past + 1], store, lengths, slots)
        count = int(store.num_quantised(torch.tensor(79)))
        for name in PARTS:
            found, expected = getattr(store, name)[1], getattr(whole, name)[1]
            rows = expected.shape[1] if "tail" in name else count if expected.shape[1] % group == 0 else count // group
            assert torch.equal(found[:, :rows], expected[:, :rows]), name
