"""Partial keys as codes: against arithmetic in float64, and kernels against their references."""

import math

import pytest
import torch
from torch import Tensor

from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.append_speculated import append_speculated
from sparsecache.kernels.partial_codes import PartialCodes, make_partial_codes
from sparsecache.kernels.scores import partial_query, scaled_scores
from sparsecache.kernels.speculation import speculated_scores

CPU = torch.device("cpu")
CASES = {  # slots, KV heads, group, head size, partial channels, capacity, tokens in the slots of the batch
    "empty": (2, 1, 2, 64, 64, 70, [0, 0]),
    "64 channels": (3, 2, 3, 64, 64, 140, [129, 1]),
    "96 channels": (3, 1, 1, 96, 96, 300, [299, 64, 127]),
    "128 channels": (2, 1, 4, 128, 128, 260, [257]),
    "256 channels": (2, 1, 2, 256, 256, 70, [65, 33]),
    "20 of 40 channels": (5, 1, 3, 40, 20, 300, [129, 299, 64, 127, 128]),
    "38 of 128 channels": (2, 2, 2, 128, 38, 150, [150, 77]),
}
if torch.cuda.is_available():  # the interpreter would take minutes for each
    CASES |= {
        "longest": (1, 8, 4, 128, 128, 131_073, [131_072]),
        "a full batch": (16, 4, 2, 128, 128, 5000, [*range(1, 4900, 333), 4999]),
        "long, wide heads": (2, 2, 8, 256, 256, 70_001, [70_000, 65_537]),
        "long, half of the channels": (3, 8, 4, 128, 64, 33_000, [32_769, 1, 32_999]),
    }
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
all_bits = pytest.mark.parametrize("bits", [8, 4])


def _inputs(
    case, bits: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, PartialCodes, Tensor, Tensor]:
    """Return the arguments of `speculated_scores`; without a projection if all channels speculate."""
    slots, kv_heads, group, head_dim, channels, capacity, lengths = case
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(len(lengths), group * kv_heads, 1, head_dim, generator=generator).to(device, dtype)
    projection = None
    if channels < head_dim:  # whole numbers, so that any order of sums gives the same codes
        projection = torch.randint(-1, 2, (slots, kv_heads, head_dim, channels), generator=generator).float().to(device)
    keys = make_partial_codes((slots, kv_heads, capacity, channels), bits, device)
    keys.codes[:] = torch.randint(0, 256, keys.codes.shape, generator=generator).to(device, torch.uint8)
    keys.step[:] = (0.05 + torch.rand(keys.step.shape, generator=generator)).to(device)
    keys.center[:] = torch.randn(keys.center.shape, generator=generator).to(device)
    order = torch.randperm(slots, generator=generator)[: len(lengths)].to(device)
    seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
    seq_lens[order] = torch.tensor(lengths, device=device)
    return q, projection, keys, seq_lens, order


def _code(keys: PartialCodes, at: tuple[int, int, int], channel: int) -> int:
    """Return the code of a slot, KV head and token."""
    row, half = keys.codes[at].tolist(), keys.channels // 2
    if keys.bits == 8:
        return row[channel]
    return row[channel] & 15 if channel < half else row[channel - half] >> 4


@all_bits
@pytest.mark.parametrize("channels", [2, 38, 64, 96, 256])
def test_codes_are_the_nearest_and_clamped(bits, channels) -> None:
    """Against a loop over values in float64, in one of several slots with ranges of their own."""
    generator = torch.Generator().manual_seed(channels)
    keys = make_partial_codes((3, 2, 11, channels), bits, CPU)
    assert keys.bits == bits
    prompts = [(slot + 1) * torch.randn(2, 7, channels, generator=generator) for slot in range(3)]
    for slot, prompt in enumerate(prompts):
        prompt[1, :, 1] = 5.0  # a channel of one value
        keys.set_range(slot, prompt.amin(1), prompt.amax(1))
        keys.codes[slot, :, :7] = keys.encode(slot, prompt)
    assert (keys.step > 0).all(), "a channel of one value, too"
    x, slots = 9 * torch.randn(2, 2, 1, channels, generator=generator), torch.tensor([2, 0])  # beyond the range, too
    keys.codes[slots, :, 7] = keys.encode(slots, x)[:, :, 0]
    for slot, prompt in enumerate(prompts):
        new = [x[at, :, 0] for at, other in enumerate(slots.tolist()) if other == slot]
        rows = torch.cat((prompt, *(each[:, None] for each in new)), 1)
        decoded = keys.decode(torch.tensor([slot]), rows.shape[1])[0]
        for kv in range(2):
            for channel in range(channels):
                low, high = prompt[kv, :, channel].min().item(), prompt[kv, :, channel].max().item()
                step, center = (high - low) / (2**bits - 1), (high + low) / 2
                for t, value in enumerate(rows[kv, :, channel].tolist()):
                    found = decoded[kv, t, channel].item() + center
                    code = _code(keys, (slot, kv, t), channel)
                    assert found == pytest.approx(center + step * (code - (2**bits - 1) / 2), abs=1e-5)
                    assert abs(found - min(max(value, low), high)) <= 0.5001 * step + 1e-6
        assert not keys.codes[slot, :, rows.shape[1] :].any()
    assert keys.codes[1, :, 7].count_nonzero() == 0, "other slots"


@all_bits
@cases
def test_scores_of_kernel_and_reference(case, bits, device, dtype) -> None:
    """The extremes are those of each head's scores.

    For queries in half precision the kernel rounds the query and the scores to float16: 11 bits each.
    """
    inputs = _inputs(case, bits, device, dtype)
    seq_lens, slots = inputs[3:]
    with force_backend("kernels"):
        scores, extremes, _ = speculated_scores(*inputs)
    with force_backend("reference"):
        exact = speculated_scores(*inputs).values
    q, projection, keys = inputs[:3]
    partial_q = q.float() if projection is None else partial_query(q, projection, slots)
    values = keys.decode(slots, exact.shape[3])
    sizes = scaled_scores(partial_q.abs(), values.abs(), q.shape[3]).view_as(exact)
    rounding = 2e-6 if dtype == torch.float32 else 2**-11
    assert scores.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    assert extremes is not None and exact.dtype == torch.float32
    for row, length in enumerate(seq_lens[slots].tolist()):
        ours, theirs = scores[row, :, :, :length].float(), exact[row, :, :, :length]
        assert ((ours - theirs).abs() <= rounding * (sizes[row, :, :, :length] + theirs.abs())).all()
        if length:
            assert torch.equal(extremes[0, row].amax(-1), ours.flatten(0, 1).amax(-1))
            assert torch.equal(extremes[1, row].amin(-1), ours.flatten(0, 1).amin(-1))


@all_bits
@pytest.mark.parametrize("case", [CASES["96 channels"], CASES["20 of 40 channels"]], ids=["all channels", "half"])
def test_scores_are_those_of_the_values_but_for_a_number_per_head(case, bits) -> None:
    """Against a loop in float64 over the values with their center."""
    q, projection, keys, seq_lens, slots = _inputs(case, bits, CPU, torch.float32)
    with force_backend("reference"):
        scores = speculated_scores(q, projection, keys, seq_lens, slots).values
    for row, slot in enumerate(slots.tolist()):
        query = q[row, :, 0].double()
        if projection is not None:
            query = query @ projection[slot, 0].double()
        step, center = keys.step[slot, 0].double(), keys.center[slot, 0].double()
        for head in range(len(query)):
            expected = []
            for t in range(0, int(seq_lens[slot]), 7):
                codes = torch.tensor([_code(keys, (slot, 0, t), channel) for channel in range(len(step))])
                value = center + step * (codes.double() - (2**bits - 1) / 2)
                expected.append(query[head] @ value / math.sqrt(q.shape[3]))
            difference = scores[row, 0, head, : int(seq_lens[slot]) : 7].double() - torch.stack(expected)
            torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=0, atol=1e-4)


@all_bits
@cases
def test_a_new_token_gets_the_codes_of_the_reference(case, bits, device, dtype) -> None:
    slots, kv_heads, _, head_dim, _, capacity, _ = case
    _, projection, keys, seq_lens, order = _inputs(case, bits, device, dtype)
    k, v = 3 * torch.randn(2, len(order), kv_heads, 1, head_dim).to(device, dtype)
    if projection is not None:
        k = k.round()
    keys.codes[..., keys.channels * bits // 8 :] = 0  # not a channel: neither may write there
    results = []
    for backend in ("kernels", "reference"):
        found = keys._replace(codes=keys.codes.clone())
        store = torch.zeros(slots, kv_heads, capacity, 2, head_dim, device=device, dtype=dtype)
        with force_backend(backend):
            append_speculated(k, v, projection, found, store, seq_lens, order)
        results.append((found.codes, store))
    assert all(torch.equal(kernel, reference) for kernel, reference in zip(*results, strict=True))
    row = seq_lens[order].clamp(max=capacity - 1)
    changed = results[0][0] != keys.codes
    assert changed[order, :, row].any() and changed.sum() == changed[order, :, row].sum()


@all_bits
@pytest.mark.parametrize("channels", [64, 96, 38, 256])
def test_codes_of_a_prompt_are_those_of_the_reference(bits, channels, device, dtype) -> None:
    """Stored in two blocks, of keys whose heads and tokens are not in the order of memory."""
    generator = torch.Generator().manual_seed(channels)
    k = 3 * torch.randn(150, 2, channels, generator=generator).to(device, dtype).transpose(0, 1)
    k[1, :, 3] = 2.5  # a channel of one value
    results = []
    for backend in ("kernels", "reference"):
        keys = make_partial_codes((3, 2, 200, channels), bits, device)
        with force_backend(backend):
            keys.set_range(1, k[:, :99].amin(1), k[:, :99].amax(1))
            keys.store(1, 0, k[:, :100])
            keys.store(1, 100, k[:, 100:])
        results.append(keys.codes)
    assert torch.equal(*results)
    assert results[0][1, :, :150].any(-1).all() and results[0].count_nonzero() == results[0][1, :, :150].count_nonzero()


def test_new_keys_without_a_projection_are_stored_as_they_are(device, dtype) -> None:
    k, v = torch.randn(2, 2, 2, 1, 48).to(device, dtype)
    seq_lens, slots = torch.tensor([3, 0, 9], device=device), torch.tensor([2, 0], device=device)
    for backend in ("kernels", "reference"):
        keys, store = (torch.zeros(3, 2, 9, *size, device=device, dtype=dtype) for size in ((48,), (2, 48)))
        with force_backend(backend):
            append_speculated(k, v, None, keys, store, seq_lens, slots)
        assert torch.equal(keys[slots, :, [8, 3]], k[:, :, 0]) and torch.equal(store[..., 0, :], keys)
        assert keys.any(-1).sum() == 4


@all_bits
def test_free_slots_may_be_named(bits, device) -> None:
    """A step may name a slot without a prompt. Its scores are never read, but must not fail."""
    keys = make_partial_codes((2, 1, 5, 16), bits, device)
    seq_lens, slots = torch.tensor([0, 5], device=device), torch.tensor([1, 0], device=device)
    store, x = torch.zeros(2, 1, 5, 2, 16, device=device), torch.randn(2, 1, 1, 16, device=device)
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            append_speculated(x, x, None, keys, store, seq_lens, slots)
            values = speculated_scores(x, None, keys, seq_lens, slots).values
        assert values[0, ..., :5].isfinite().all()
