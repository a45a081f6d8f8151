"""Statistics: shares of past tokens against fractions, and a last step that can be discarded exactly."""

import random
from fractions import Fraction

import pytest
import torch

from sparsecache.cache.stats import DeviceStats, mean_share

CPU = torch.device("cpu")
LAYERS, SLOTS, KV_HEADS, MAX_TOKENS = 3, 4, 2, 2000


def _stats() -> DeviceStats:
    return DeviceStats(LAYERS, SLOTS, KV_HEADS, MAX_TOKENS, CPU)


def _step(stats: DeviceStats, slots: list[int], draw: random.Random) -> dict[int, list[list[int]]]:
    """Do a step with random counts in rows of random order; return each slot's counts [layers][G]."""
    rows = draw.sample(slots, len(slots))
    counts = {slot: [[0] * KV_HEADS for _ in range(LAYERS)] for slot in slots}
    for layer in range(LAYERS):
        for slot in rows:
            past = int(stats.seq_lens[slot])
            counts[slot][layer] = [draw.randint(1, past) for _ in range(KV_HEADS)]
        stats.layers[layer].record(torch.tensor([counts[slot][layer] for slot in rows]), torch.tensor(rows))
    stats.end_step(torch.tensor(rows), sparse=True)
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_fractions(seed) -> None:
    draw, stats = random.Random(seed), _stats()
    lengths = {slot: draw.choice((1, 3, 997, 1700)) for slot in range(SLOTS)}
    for slot, tokens in lengths.items():
        stats.start_sequence(slot, tokens)
    steps = dict.fromkeys(range(SLOTS), 0)
    shares = {slot: [[Fraction(0)] * KV_HEADS for _ in range(LAYERS)] for slot in range(SLOTS)}
    sums = {slot: [[0] * KV_HEADS for _ in range(LAYERS)] for slot in range(SLOTS)}
    for _ in range(40):
        slots = draw.sample(range(SLOTS), draw.randint(1, SLOTS))
        for slot, counts in _step(stats, slots, draw).items():
            for layer in range(LAYERS):
                for head in range(KV_HEADS):
                    shares[slot][layer][head] += Fraction(counts[layer][head], lengths[slot] + steps[slot])
                    sums[slot][layer][head] += counts[layer][head]
            steps[slot] += 1
    for slot in range(SLOTS):
        length, found_shares, found_sums = stats.read(slot, discard_last_step=False)
        assert length == lengths[slot] + steps[slot] and found_sums == sums[slot]
        flat = [share for of_layer in found_shares for share in of_layer]
        exact = sum((share for of_layer in shares[slot] for share in of_layer), Fraction(0)) / len(flat)
        assert mean_share(flat, steps[slot]) == pytest.approx(float(exact / steps[slot]), abs=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_a_discarded_step_leaves_exactly_what_was_before_it(seed) -> None:
    draw, stats = random.Random(seed), _stats()
    for slot in range(SLOTS):
        stats.start_sequence(slot, draw.randint(1, 900))
    _step(stats, [0, 1, 2, 3], draw)
    for _ in range(20):
        before = {slot: stats.read(slot, discard_last_step=False) for slot in range(SLOTS)}
        slots = draw.sample(range(SLOTS), draw.randint(1, SLOTS))
        _step(stats, slots, draw)
        for slot in range(SLOTS):
            if slot in slots:
                assert stats.read(slot, discard_last_step=True) == before[slot]
            else:
                assert stats.read(slot, discard_last_step=False) == before[slot]


def test_keeping_everything_is_a_share_of_exactly_one_and_order_does_not_matter() -> None:
    for prompt in (1, 3, 7, 1023, 1999):
        stats = _stats()
        stats.start_sequence(1, prompt)
        for past in range(prompt, min(prompt + 50, MAX_TOKENS)):
            for layer in stats.layers:
                layer.record(torch.full((1, KV_HEADS), past), torch.tensor([1]))
            stats.end_step(torch.tensor([1]), sparse=True)
        length, shares, _ = stats.read(1, discard_last_step=False)
        assert mean_share([share for of_layer in shares for share in of_layer], length - prompt) == 1.0


def test_without_a_step_or_a_sparse_layer_there_is_no_mean() -> None:
    assert mean_share([], 5) is None and mean_share([0, 0], 0) is None
    stats = _stats()
    stats.start_sequence(0, 10)
    stats.end_step(torch.tensor([0]), sparse=False)
    zeros = [[0] * KV_HEADS] * LAYERS
    assert stats.read(0, discard_last_step=False) == (11, zeros, zeros)


def test_a_new_sequence_starts_at_zero_and_leaves_others_alone() -> None:
    draw, stats = random.Random(0), _stats()
    stats.start_sequence(0, 10)
    stats.start_sequence(2, 20)
    _step(stats, [0, 2], draw)
    other = stats.read(2, discard_last_step=False)
    stats.start_sequence(0, 5)
    zeros = [[0] * KV_HEADS] * LAYERS
    assert stats.read(0, discard_last_step=False) == (5, zeros, zeros)
    assert stats.read(2, discard_last_step=False) == other


def test_lengths_never_exceed_the_capacity_and_long_sums_do_not_overflow() -> None:
    stats = DeviceStats(1, 1, 1, 2**20, CPU)
    stats.start_sequence(0, 2**20 - 1)
    for _ in range(3):
        stats.layers[0].record(stats.seq_lens[:, None].clone(), torch.tensor([0]))
        stats.end_step(torch.tensor([0]), sparse=True)
    length, shares, _ = stats.read(0, discard_last_step=False)
    assert length == 2**20 and mean_share(shares[0], 3) == 1.0
    assert 2**20 << 40 < 2**63  # the largest share that is divided; 2**23 steps at a share of 1 fit into a sum
