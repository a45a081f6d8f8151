"""The formula of quantised keys and values, against torch's own quantisation and KIVI's."""

import pytest
import torch

from sparsecache.kernels.quantisation import QuantisedStore, pack, quantise, token_nbytes, unpack

BITS = (2, 4, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_are_those_of_kivi(bits, dtype) -> None:
    """As quant_and_pack_kcache of the authors' quant/new_pack.py, on [B, heads, groups, group, D]."""
    x = (3 * torch.randn(2, 3, 4, 32, 24, generator=torch.Generator().manual_seed(bits))).to(dtype)
    codes, (minimum, step) = quantise(x, bits, 3)
    low, high = x.min(dim=-2, keepdim=True)[0], x.max(dim=-2, keepdim=True)[0]
    scale = ((high - low).float() / (2**bits - 1)).to(dtype)
    if dtype == torch.float32:  # in half precision their differences are rounded once more
        expected = ((x - low) / scale).clamp(0, 2**bits - 1).round()
        assert torch.equal(codes.float(), expected)
    assert torch.equal(minimum, low)
    torch.testing.assert_close(step, scale, rtol=2e-3 if dtype == torch.float16 else 1e-2, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_dequantised_numbers_are_those_of_torch(bits) -> None:
    """torch quantises each row with a scale and a zero point, both of any real value."""
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(bits))
    codes, (minimum, step) = quantise(x, bits, 1)
    scale, zero = step[:, 0], -minimum[:, 0] / step[:, 0]
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 2**bits - 1)
    torch.testing.assert_close(codes * step + minimum, expected, rtol=1e-5, atol=1e-5)
    assert bool(((codes * step + minimum - x).abs() <= step * 0.5001).all())


def test_equal_numbers_are_kept_exactly() -> None:
    x = torch.full((3, 16), 0.3)
    codes, (minimum, step) = quantise(x, 2, 1)
    assert torch.equal(codes * step + minimum, x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [1, 6, 7, 64])
def test_packed_codes_come_back(bits, channels) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, channels), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, -(-channels * bits // 16))
    assert torch.equal(unpack(packed, bits)[..., :channels], codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_store_is_as_small_as_its_tokens_say(bits) -> None:
    """token_nbytes times the quantised tokens, and a tail of fixed size."""
    size = {"slots": 2, "kv_heads": 3, "capacity": 1000, "head_dim": 128, "group": 32, "residual": 128}
    store = QuantisedStore.allocate(**size, bits=bits, device=torch.device("cpu"), dtype=torch.bfloat16)
    coded = sum(x.nbytes for x in (store.key_codes, store.key_ranges, store.value_codes, store.value_ranges))
    assert coded == 2 * 3 * 864 * token_nbytes(128, bits, 32, torch.bfloat16)
    assert store.key_tail.nbytes + store.value_tail.nbytes == 2 * 2 * 3 * (128 + 32) * 128 * 2
    assert token_nbytes(128, bits, 32, torch.bfloat16) == {2: 96, 4: 160, 8: 288}[bits]


def test_the_last_tokens_of_each_kv_head_are_exact_and_the_others_quantised_in_their_groups() -> None:
    k, v = torch.randn(2, 2, 90, 10, generator=torch.Generator().manual_seed(2))
    device = torch.device("cpu")
    store = QuantisedStore.allocate(1, 2, 100, 10, 4, 16, 32, device, torch.float32)
    counts = torch.tensor([[90, 61]])
    store.store_prompt(0, k, v, counts[0])
    keys, values = (read(counts, torch.tensor([0]), 90)[0] for read in (store.keys, store.values))
    for head, (count, coded) in enumerate(((90, 48), (61, 16))):
        assert torch.equal(keys[head, coded:count], k[head, coded:count])
        assert torch.equal(values[head, coded:count], v[head, coded:count])
        for start in range(0, coded, 16):
            codes, (minimum, step) = quantise(k[head, start : start + 16], 4, 0)
            torch.testing.assert_close(keys[head, start : start + 16], codes * step + minimum)
        codes, (minimum, step) = quantise(v[head, :coded], 4, 1)  # 10 channels are one group of at most 16
        torch.testing.assert_close(values[head, :coded], codes * step + minimum)
