"""H2O against accumulated attention, added up one query, head and token at a time."""

import math
from dataclasses import replace

import pytest
import torch

from sparsecache.cache.eviction import attention_sums
from sparsecache.cache.model_cache import ModelCache
from sparsecache.methods.h2o import H2O
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    probabilities,
    random_text,
    random_texts,
    shape_of,
)


def _kept(text: Text, layer: int, budget: float, recent: float = 0.5, window: int | None = None) -> list[Kept]:
    heads = range(text.k.shape[1])
    each = [_kept_of_head(text, layer, budget, kv, recent, window) for kv in heads]
    return [[each[kv][step] for kv in heads] for step in range(text.new)]


def _kept_of_head(text: Text, layer: int, budget: float, kv: int, recent: float, window: int | None) -> list[list[int]]:
    got: dict[int, float] = {}
    for at in range(text.prompt):
        got[at] = 0.0
        if window is None or at >= text.prompt - window:
            _add(got, text, layer, kv, at)
    steps = []
    for past in range(text.prompt, text.prompt + text.new):
        _evict(got, budget_tokens(budget, past), recent)
        steps.append(sorted(got))
        got[past] = 0.0
        _add(got, text, layer, kv, past)
    return steps


def _add(got: dict[int, float], text: Text, layer: int, kv: int, at: int) -> None:
    """Add the attention of the queries at `at`, of each head of the KV head, to all that is there."""
    positions = list(got)
    for head in range(kv * text.group, (kv + 1) * text.group):
        weights = probabilities(text, layer, head, at, positions)
        for position, weight in zip(positions, weights, strict=True):
            got[position] += weight


def _evict(got: dict[int, float], budget: int, recent: float = 0.5) -> None:
    """A share of the budget, rounded up, is recent; of the others those that got least leave, the earliest first."""
    while len(got) > budget:
        others = sorted(got)[: len(got) - math.ceil(budget * recent)]
        del got[min(others, key=lambda position: (got[position], position))]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.03, 1.0, 1, 2, 9, 500])
def test_heavy_hitters_and_recent_tokens_are_kept(budget, group) -> None:
    shape = shape_of(group)
    method = H2O(budget=budget, dense_layers=1)
    check_against(lambda text, layer: _kept(text, layer, budget), method, shape, random_texts(shape))


@pytest.mark.parametrize("recent", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("budget", [0.2, 9, 1])
def test_shares_of_recent_tokens_and_windows_of_voting_queries(budget, window, recent) -> None:
    shape = shape_of(2)
    method = H2O(budget=budget, dense_layers=1, recent=recent, window=window)
    check_against(lambda text, layer: _kept(text, layer, budget, recent, window), method, shape, random_texts(shape))


@pytest.mark.parametrize(("option", "value"), [("recent", 0.0), ("recent", 1.1), ("recent", math.nan), ("window", 0)])
def test_shares_and_windows_out_of_range_are_refused(option, value) -> None:
    with pytest.raises(ValueError, match=rf"^{option}={value} must be"):
        H2O(**{option: value})


def test_of_equals_the_earliest_leaves() -> None:
    """Token 3 gets all attention once it is there, so all later ones tie; the last query attends to all alike."""
    shape = shape_of(2, layers=1)
    text = random_text(shape, 20, 15, seed=1)
    q, k = torch.zeros_like(text.q), torch.zeros_like(text.k)
    q[:, :, :-1, 0], k[:, :, 3, 0] = 1.0, 1e5

    def truth(text: Text, layer: int) -> list[Kept]:
        return [[[0, 1, 2, 3, *range(past - 11, past)]] * 2 for past in range(20, 35)]

    check_against(truth, H2O(budget=15, dense_layers=0), shape, [replace(text, q=q, k=k)])


def test_the_logsumexp_of_the_attention_gives_the_same_tokens_and_scores() -> None:
    shape = shape_of(2, layers=1)
    text = random_text(shape, 90, 0, seed=3)
    q, k, v = text.prompt_of(0)
    scores = q @ k.repeat_interleave(2, 0).mT / q.shape[2] ** 0.5
    logsumexp = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
    found, expected = (
        ModelCache(H2O(budget=20, dense_layers=0), shape, [q.device], 2, 100, 5, q.dtype).layers[0] for _ in "ab"
    )
    expected.prefill(1, q, k, v)
    found.prefill_with_logsumexp(1, q, k, v, logsumexp)
    for name in ("positions", "num_tokens", "keys", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.scores, expected.scores)
    found.prefill_with_logsumexp(1, q, k, v, logsumexp + math.log(2))
    torch.testing.assert_close(found.scores, expected.scores / 2)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 5, 63, 64, 129])
def test_attention_sums_are_those_of_the_whole_matrix(first, group) -> None:
    text = random_text(shape_of(group, layers=1), 130, 0, seed=2)
    q, k = text.q[0].double(), text.k[0].double()
    scores = q @ k.repeat_interleave(group, 0).mT / 6**0.5
    whole = scores.masked_fill(torch.ones(130, 130, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = whole[:, first:].sum(1).view(-1, group, 130).sum(1).float()
    torch.testing.assert_close(attention_sums(text.q[0], text.k[0], first), expected)


def test_attention_sums_build_no_square_matrix() -> None:
    seen = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    text = random_text(shape_of(2, layers=1), 1500, 0, seed=3)
    with Largest():
        attention_sums(text.q[0], text.k[0], 0)
    assert 0 < max(seen) <= 4 * 64 * 1500
