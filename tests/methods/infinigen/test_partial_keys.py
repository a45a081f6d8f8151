"""Partial keys: which channels are chosen, what is kept of a key, and the scores that they give."""

import math

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, Shape
from sparsecache.cache.stats import LayerStats
from sparsecache.cache.streams import SideStream
from sparsecache.kernels.append_speculated import append_speculated
from sparsecache.kernels.scores import partial_scores, scaled_scores
from sparsecache.methods.infinigen import partial_keys
from sparsecache.methods.infinigen.partial_keys import PartialKeys
from sparsecache.methods.infinigen.skewing import skewing_matrix

SHAPES = [(2, 2, 32), (4, 2, 64), (4, 1, 128), (8, 1, 32), (8, 2, 16)]
every_shape = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
SLOT, SLOTS, CAPACITY = 2, 3, 20


def _partial(
    heads: int, kv_heads: int, head_dim: int, channels: int, skewed: bool = True, bits: int = 16
) -> PartialKeys:
    queries = torch.randn(kv_heads, heads // kv_heads, 99, head_dim)
    matrices = skewing_matrix(queries) if skewed else torch.eye(head_dim).expand(kv_heads, -1, -1)
    seq_lens, counts = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(SLOTS, kv_heads, dtype=torch.int64)
    config = CacheConfig(
        Shape(2, heads, kv_heads, head_dim), SLOTS, CAPACITY, 9, torch.device("cpu"), torch.float32, seq_lens,
        LayerStats(counts), SideStream(torch.device("cpu"), high_priority=False),
    )  # fmt: skip
    return PartialKeys(matrices, channels, config, bits)


def _channels(partial: PartialKeys, kv: int) -> list[int]:
    """Return the channels that a KV head's projection consists of, in its order."""
    assert partial._matrices is not None and partial.projection is not None
    matrix, projection = partial._matrices[kv], partial.projection[SLOT, kv]
    return [int((matrix == projection[:, [at]]).all(0).nonzero().item()) for at in range(projection.shape[1])]


@every_shape
def test_the_channels_are_those_with_the_largest_sum_over_queries_and_keys(heads, kv_heads, head_dim) -> None:
    partial = _partial(heads, kv_heads, head_dim, head_dim // 4)
    q, k = torch.randn(heads, 9, head_dim), torch.randn(kv_heads, 9, head_dim)
    partial.prefill(SLOT, q, k)
    group = heads // kv_heads
    for kv in range(kv_heads):
        sums = [0.0] * head_dim
        for row in [*q[kv * group : (kv + 1) * group].flatten(0, 1), *k[kv]]:
            rotated = (row @ partial._matrices[kv]).tolist()
            sums = [total + abs(value) for total, value in zip(sums, rotated, strict=True)]
        best = sorted(range(head_dim), key=lambda channel: -sums[channel])[: head_dim // 4]
        assert _channels(partial, kv) == sorted(best)


def test_queries_and_keys_both_count_and_every_head_of_a_group() -> None:
    q, k = torch.zeros(4, 6, 8), torch.zeros(2, 6, 8)
    q[1, :, 5] = 3.0  # a head that is not the first of its group
    q[2, :, 1], q[3, :, 1] = 2.0, -2.0  # two heads, which must not cancel out
    k[0, 0, 2], k[0, 1, 2] = 9.0, -9.0  # nor two tokens
    k[1, :, 7] = 5.0
    q[2, :, 0] = 1.0
    partial = _partial(4, 2, 8, 2, skewed=False)
    partial.prefill(SLOT, q, k)
    assert [_channels(partial, kv) for kv in range(2)] == [[2, 5], [1, 7]]
    assert not partial.projection[:SLOT].any() and not partial.keys[:SLOT].any(), "other slots"


def test_of_equal_channels_the_first_are_chosen() -> None:
    partial = _partial(2, 1, 8, 3, skewed=False)
    partial.prefill(SLOT, torch.ones(2, 4, 8), torch.ones(1, 4, 8))
    assert _channels(partial, 0) == [0, 1, 2]


def test_a_long_prompt_is_taken_block_by_block(monkeypatch) -> None:
    q, k = torch.randn(4, 19, 16), torch.randn(2, 19, 16)
    whole = _partial(4, 2, 16, 4, skewed=False)
    whole.prefill(SLOT, q, k)
    monkeypatch.setattr(partial_keys, "_BLOCK", 8)
    blocks = _partial(4, 2, 16, 4, skewed=False)
    blocks.prefill(SLOT, q, k)
    assert whole.projection is not None and blocks.projection is not None
    assert torch.equal(whole.projection, blocks.projection) and torch.equal(whole.keys, blocks.keys)
    assert whole.keys[SLOT, :, :19].any(-1).all()


@every_shape
@pytest.mark.parametrize("share", [2, 4])
def test_scores_are_those_of_the_chosen_channels(heads, kv_heads, head_dim, share) -> None:
    partial = _partial(heads, kv_heads, head_dim, head_dim // share)
    q, k = torch.randn(heads, 7, head_dim), torch.randn(kv_heads, 7, head_dim)
    query = torch.randn(1, heads, 1, head_dim)
    partial.prefill(SLOT, q, k)
    found = partial_scores(query, partial.projection, partial.keys[:, :, :7], torch.tensor([SLOT]))[0]
    assert found.dtype == torch.float32
    for head in range(heads):
        kv = head * kv_heads // heads
        matrix = partial._matrices[kv][:, _channels(partial, kv)]
        partial_k, partial_q = k[kv] @ matrix, query[0, head, 0] @ matrix
        torch.testing.assert_close(partial.keys[SLOT, kv, :7], partial_k)
        torch.testing.assert_close(found[head], partial_k @ partial_q / math.sqrt(head_dim), rtol=1e-4, atol=1e-4)


@every_shape
def test_all_channels_are_those_of_the_keys_themselves(heads, kv_heads, head_dim) -> None:
    """Skewing would not change the scores: the rotation cancels out."""
    partial = _partial(heads, kv_heads, head_dim, head_dim)
    q, k = torch.randn(heads, 7, head_dim), torch.randn(kv_heads, 7, head_dim)
    partial.prefill(SLOT, q, k)
    assert partial.projection is None and torch.equal(partial.keys[SLOT, :, :7], k)
    assert not partial.keys[SLOT, :, 7:].any() and not partial.keys[:SLOT].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("share", [1, 2])
def test_codes_stand_for_the_nearest_values_in_the_range_of_the_prompt(bits, head_dim, share) -> None:
    partial = _partial(4, 2, head_dim, head_dim // share, bits=bits)
    exact = _partial(4, 2, head_dim, head_dim // share)
    exact._matrices = partial._matrices
    length = 13
    q, k = 3 * torch.randn(4, length, head_dim), 3 * torch.randn(2, length, head_dim) + torch.randn(head_dim)
    for slot in range(SLOTS):
        partial.prefill(slot, q * (slot + 1), k * (slot + 1))
        exact.prefill(slot, q * (slot + 1), k * (slot + 1))
    for slot in range(SLOTS):
        values = exact.keys[slot, :, :length].double()
        low, high = values.amin(1), values.amax(1)
        step, center = (high - low) / (2**bits - 1), (high + low) / 2
        torch.testing.assert_close(partial.keys.step[slot].double(), step, rtol=1e-5, atol=0)
        torch.testing.assert_close(partial.keys.center[slot].double(), center, rtol=1e-5, atol=1e-5)
        found = partial.keys.decode(torch.tensor([slot]), length)[0].double() + center[:, None]
        assert ((found - values).abs() <= step[:, None] * 0.5001).all()
        assert not partial.keys.codes[slot, :, length:].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_a_long_prompt_are_made_block_by_block(bits, dtype, monkeypatch) -> None:
    q, k = (3 * torch.randn(heads, 19, 16) for heads in (4, 2))
    for channels in (16, 4):
        whole, blocks = (_partial(4, 2, 16, channels, skewed=False, bits=bits) for _ in range(2))
        whole.prefill(SLOT, q.to(dtype), k.to(dtype))
        with monkeypatch.context() as patch:
            patch.setattr(partial_keys, "_BLOCK", 8)
            blocks.prefill(SLOT, q.to(dtype), k.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(whole.keys[:3], blocks.keys[:3], strict=True))
        assert whole.keys.codes[SLOT, :, :19].any()


def test_a_new_token_takes_the_row_of_its_position_and_no_other() -> None:
    partial = _partial(4, 2, 16, 4)
    for slot in range(SLOTS):
        partial.prefill(slot, torch.randn(4, 9, 16), torch.randn(2, 9, 16))
    keys, store, seq_lens = partial.keys.clone(), torch.zeros(SLOTS, 2, CAPACITY, 2, 16), torch.tensor([19, 4, 9])
    k, v, slots = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), torch.tensor([2, 0])
    append_speculated(k, v, partial.projection, partial.keys, store, seq_lens, slots)
    for row, slot in enumerate(slots.tolist()):
        at = int(seq_lens[slot])
        for kv in range(2):
            keys[slot, kv, at] = k[row, kv, 0] @ partial.projection[slot, kv]
            assert torch.equal(store[slot, kv, at], torch.stack((k[row, kv, 0], v[row, kv, 0])))
    torch.testing.assert_close(partial.keys, keys)
    assert store.any(-1).sum() == 2 * 2 * 2


@pytest.mark.parametrize("batch", [(), (3,)])
@every_shape
def test_scaled_scores_equal_the_loop(heads, kv_heads, head_dim, batch) -> None:
    q, k = torch.randn(*batch, heads, 2, 5), torch.randn(*batch, kv_heads, 6, 5)
    found = scaled_scores(q, k, head_dim)
    assert found.shape == (*batch, heads, 2, 6)
    flat_q, flat_k, flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, found))

    def score(at: int, head: int, query: int, key: int) -> Tensor:
        return flat_q[at, head, query] @ flat_k[at, head * kv_heads // heads, key] / head_dim**0.5

    for at in range(len(flat)):
        for head in range(heads):
            expected = torch.stack([torch.stack([score(at, head, i, j) for j in range(6)]) for i in range(2)])
            torch.testing.assert_close(flat[at, head], expected, rtol=1e-4, atol=1e-4)
