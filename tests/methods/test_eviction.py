"""What eviction methods share: what they hold is bounded, and an evicted token does not return."""

import pytest
import torch

from sparsecache.cache.eviction import PromptEvictionCache, pin_last
from sparsecache.cache.model_cache import ModelCache
from sparsecache.methods.h2o import H2O
from sparsecache.methods.keydiff import KeyDiff
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.streaming import Streaming
from sparsecache.methods.tova import TOVA
from tests.methods.stepping import (
    Text,
    budget_tokens,
    check_budget,
    make_cache,
    prefill,
    random_text,
    random_texts,
    shape_of,
    step,
)

KINDS = {"streaming": Streaming, "h2o": H2O, "tova": TOVA, "snapkv": SnapKV, "keydiff": KeyDiff}
SHAPE = shape_of(2)

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
budgets = pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 1, 13, 64])


def _held(cache: ModelCache, slot: int, text: Text, past: int) -> list[set[int]]:
    """Return the positions that every layer and KV head holds; fail if one holds a token twice.

    A row is known by its key and value, which are random numbers.
    """
    found = []
    for layer, layer_cache in enumerate(cache.layers):
        for head in range(SHAPE.kv_heads):
            if isinstance(layer_cache, PromptEvictionCache):
                count = past - int(layer_cache.num_evicted[slot, head])
            else:
                count = int(layer_cache.num_tokens[slot, head])
            positions, of = [], getattr(layer_cache, "kv", layer_cache)
            for key, value in zip(of.keys[slot, head, :count], of.values[slot, head, :count], strict=True):
                same = (text.k[layer, head] == key).all(1) & (text.v[layer, head] == value).all(1)
                positions.append(int(same.nonzero()))
            assert len(positions) == len(set(positions))
            found.append(set(positions))
    return found


@budgets
@pytest.mark.parametrize("kind", [Streaming, H2O, TOVA])
def test_no_step_exceeds_the_budget(kind, budget) -> None:
    method = kind(budget=budget, dense_layers=0)
    check_budget(method, SHAPE, random_texts(SHAPE), lambda text, past: budget_tokens(budget, past))


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 13])
@every_kind
@torch.inference_mode()
def test_no_more_is_held_than_the_budget_and_an_evicted_token_does_not_return(kind, budget) -> None:
    cache = make_cache(kind(budget=budget, dense_layers=0), SHAPE, 2, 100, 30)
    for seed, (prompt, new) in enumerate([(70, 20), (3, 30)]):
        text = random_text(SHAPE, prompt, new, seed)
        prefill(cache, 1, text)
        before = _held(cache, 1, text, prompt)
        for at in range(prompt, prompt + new):
            most = budget_tokens(budget, at)
            if kind.budget_excludes_generated:
                most = budget_tokens(budget, prompt) + at - prompt
            assert all(len(held) <= most and max(held) < at for held in before)
            step(cache, 1, text, at)
            after = _held(cache, 1, text, at + 1)
            assert all(now <= {*then, at} for now, then in zip(after, before, strict=True))
            assert all(kind is Streaming or at in now for now in after)
            before = after
        cache.free_slot(1)


@every_kind
@pytest.mark.parametrize(("budget", "rows"), [(0.1, 101), (16, 17), (1.0, 1000), (5000, 1000)])
def test_memory_is_for_the_budget_and_one_more(budget, rows, kind) -> None:
    """With one new token. Nothing but the table of budgets is longer than that."""
    cache = make_cache(kind(budget=budget, dense_layers=0), SHAPE, 3, 1000, 1)
    for layer in cache.layers:
        of = getattr(layer, "kv", layer)
        assert of.keys.shape == of.values.shape == (3, 2, rows, 6)
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert max(tensor.numel() for tensor in tensors) <= max(3 * 2 * rows * 6, 1001)


@every_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "^budget=0 must be a share above 0 up to 1, or a whole number of tokens"),
        ({"budget": 2.5}, "^budget=2.5 must be "),
        ({"dense_layers": -1}, r"^dense_layers=-1 must be 0 or more\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message, kind) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@every_kind
def test_more_dense_layers_than_the_model_has_are_refused(kind) -> None:
    kind(dense_layers=2).check(SHAPE)
    with pytest.raises(ValueError, match=r"^dense_layers=3 must be 0 to 2, the layers of this model\.$"):
        kind(dense_layers=3).check(SHAPE)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9])
def test_pinned_tokens_come_before_all_others_the_last_one_first(count) -> None:
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)) * 1e6
    order = pin_last(scores, count).sort(dim=1, descending=True).indices.tolist()
    for found, row in zip(order, scores.tolist(), strict=True):
        pinned = list(range(4, max(4 - count, -1), -1))
        others = sorted(range(5 - len(pinned)), key=lambda at, row=row: -row[at])
        assert found == pinned + others


class _OfValues(KeyDiff):
    """Scores are the first channel of the values."""

    def score(self, q, k, v):
        return v[..., 0]


def test_a_score_that_is_nan_is_refused_and_an_infinite_one_is_not() -> None:
    q, k, v = torch.ones(4, 9, 8), torch.ones(2, 9, 8), torch.zeros(2, 9, 8)
    v[1, :4, 0] = torch.tensor([torch.inf, -torch.inf, torch.inf, 1.0])
    kept, _ = _OfValues().select_prompt(q, k, v, 3, 3)
    assert kept.tolist() == [[0, 1, 2], [0, 2, 3]]
    v[1, 2:4, 0] = torch.nan
    with pytest.raises(ValueError, match=r"score returned NaN for 2 of 9 tokens of KV head 1\. Scores must be numbers"):
        _OfValues().select_prompt(q, k, v, 3, 3)
    k[0, 0, 0] = torch.nan  # of the model, whose logits are then an error
    _OfValues().select_prompt(q, k, v, 3, 3)
