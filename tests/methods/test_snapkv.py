"""SnapKV against votes counted one query and head at a time."""

from dataclasses import replace

import pytest
import torch

from sparsecache.methods.snapkv import SnapKV
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    check_budget,
    make_cache,
    prefill,
    probabilities,
    random_text,
    random_texts,
    shape_of,
    step,
)


def _kept(text: Text, layer: int, budget: float, window: int, kernel: int, pooling: str) -> list[Kept]:
    count = min(budget_tokens(budget, text.prompt), text.prompt)
    prompts = [_stay(text, layer, kv, count, window, kernel, pooling) for kv in range(text.k.shape[1])]
    ends = range(text.prompt, text.prompt + text.new)
    return [[[*stay, *range(text.prompt, end)] for stay in prompts] for end in ends]


def _stay(text: Text, layer: int, kv: int, count: int, window: int, kernel: int, pooling: str) -> list[int]:
    if count <= window:
        return list(range(text.prompt - count, text.prompt))
    before = text.prompt - window
    votes = [0.0] * before
    for at in range(before, text.prompt):
        for head in range(kv * text.group, (kv + 1) * text.group):
            weights = probabilities(text, layer, head, at, list(range(at + 1)))
            votes = [vote + weight for vote, weight in zip(votes, weights[:before], strict=True)]
    reach = kernel // 2
    around = [[votes[p] for p in range(at - reach, at + reach + 1) if 0 <= p < before] for at in range(before)]
    pooled = [max(near) if pooling == "max" else sum(near) / kernel for near in around]
    best = sorted(range(before), key=lambda at: (-pooled[at], at))[: count - window]
    return [*sorted(best), *range(before, text.prompt)]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize(
    ("budget", "window", "kernel"),
    [(0.5, 4, 7), (0.2, 1, 1), (9, 5, 3), (0.9, 40, 5), (1.0, 32, 7), (6, 6, 3), (3, 9, 1)],
)
def test_the_window_and_what_it_attended_to_are_kept(budget, window, kernel, pooling, group) -> None:
    shape = shape_of(group)
    options = {"budget": budget, "window": window, "kernel": kernel, "pooling": pooling}
    method = SnapKV(**options, dense_layers=1)
    check_against(lambda text, layer: _kept(text, layer, **options), method, shape, random_texts(shape))


def test_pooling_keeps_the_neighbours_of_what_was_attended_to() -> None:
    """The prompt attends to token 20 alone. Pooling keeps its neighbours, the earlier ones first.

    Without enough neighbours the earliest tokens stay. Generated tokens attend to all that is left alike.
    """
    shape = shape_of(2, layers=1)
    text = random_text(shape, 40, 3, seed=1)
    q, k = torch.zeros_like(text.q), torch.zeros_like(text.k)
    q[:, :, :40, 0], k[:, :, 20, 0] = 1.0, 1e5
    text = replace(text, q=q, k=k)
    for kernel, stay in ((5, [18, 19, 20, 21]), (7, [17, 18, 19, 20]), (3, [0, 19, 20, 21]), (1, [0, 1, 2, 20])):
        kept = [[[*stay, 38, 39, *range(40, end)]] * 2 for end in range(40, 43)]
        method = SnapKV(budget=6, window=2, kernel=kernel, dense_layers=0)
        check_against(lambda text, layer, kept=kept: kept, method, shape, [text])


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0, 1, 12])
def test_generated_tokens_are_on_top_of_the_prompts_budget(budget) -> None:
    shape = shape_of(2)
    method = SnapKV(budget=budget, window=3, dense_layers=0)
    assert method.budget_excludes_generated
    check_budget(
        method, shape, random_texts(shape), lambda text, past: budget_tokens(budget, text.prompt) + past - text.prompt
    )


@torch.inference_mode()
def test_the_capacity_is_the_prompts_budget_and_the_new_tokens() -> None:
    shape = shape_of(2)
    for budget, capacity in ((10, 40), (0.5, 180), (1.0, 300)):
        cache = make_cache(SnapKV(budget=budget, window=3, dense_layers=0), shape, 2, 300, 30)
        for layer in cache.layers:
            assert layer.kv.keys.shape == layer.kv.values.shape == (2, 2, capacity, 6)


@torch.inference_mode()
def test_steps_count_as_capped_when_the_prompt_was() -> None:
    """A prompt within the budget is kept whole, however much is generated: nothing could have been dropped."""
    shape = shape_of(2)
    cache = make_cache(SnapKV(budget=20, window=3, dense_layers=1), shape, 1, 60, 10)
    for prompt, capped, kept in (
        (15, 0, 1.0),
        (40, 10, pytest.approx(sum((20 + i) / (40 + i) for i in range(10)) / 10)),
    ):
        text = random_text(shape, prompt, 10, seed=1)
        prefill(cache, 0, text)
        for at in range(prompt, prompt + 10):
            step(cache, 0, text, at)
        assert cache.report(0) == {"kept": kept, "sparse_steps": 10, "capped_steps": capped, "dense_layers": 1}
        cache.free_slot(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"^window=0 must be 1 token or more\.$"),
        ({"kernel": 4}, r"^kernel=4 must be an odd number of positions, 1 to 1023\.$"),
        ({"kernel": -1}, r"^kernel=-1 must be an odd number of positions, 1 to 1023\.$"),
        ({"kernel": 1025}, r"^kernel=1025 must be an odd number of positions, 1 to 1023\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**options)
