"""FreeKV against queries, pages and shares that are compared one at a time, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from sparsecache.methods.freekv import FreeKV
from tests.methods.stepping import Kept, Text, budget_tokens, check_against, random_text, random_texts, shape_of


def _kept(text: Text, layer: int, method: FreeKV) -> list[Kept]:
    ends = range(text.prompt, text.prompt + text.new)
    return [[_selected(text, layer, kv, past, method) for kv in range(text.k.shape[1])] for past in ends]


def _selected(text: Text, layer: int, kv: int, past: int, method: FreeKV) -> list[int]:
    heads = range(kv * text.group, (kv + 1) * text.group)
    likeness = [_cosine(*text.q[layer, head, past - 1 : past + 1].double().tolist()) for head in heads]
    asked = past if sum(likeness) / len(likeness) < method.similarity else past - 1
    pages = [range(start, min(start + method.page, past)) for start in range(0, past, method.page)]
    shares = [0.0] * len(pages)
    for head in heads:
        weights = [math.exp(_bound(text, layer, kv, head, asked, page)) for page in pages]
        shares = [share + weight / sum(weights) for share, weight in zip(shares, weights, strict=True)]
    budget = min(budget_tokens(method.budget, past), past)
    sinks, recent = (math.floor(share * budget / method.page + 0.5) for share in (method.sinks, method.recent))
    if method.recent:
        recent = max(recent, 1) + (len(pages[-1]) <= method.page // 2)
        while recent > 1 and sum(map(len, pages[-recent:])) > budget:
            recent -= 1
    while sinks and sinks * method.page + sum(map(len, pages[len(pages) - recent :])) > budget:
        sinks -= 1
    first = [at for at in range(len(pages)) if at < sinks or at >= len(pages) - recent]
    others = [at for at in range(len(pages)) if at not in first]
    kept: list[int] = []
    for at in [*first, *sorted(others, key=lambda at: -shares[at])]:
        fits = min(budget - len(kept), len(pages[at]))
        kept += pages[at][len(pages[at]) - fits :]
    return sorted(kept)


def _bound(text: Text, layer: int, kv: int, head: int, at: int, positions: range) -> float:
    """Return the bound of q . k that the query at `at` has over a page."""
    keys, query = text.k[layer, kv, list(positions)].double(), text.q[layer, head, at].double()
    return float(torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum())


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.3, "page": 4, "similarity": 0.0},  # of random queries about half have turned
        {"budget": 0.5, "page": 5, "similarity": 1.0},
        {"budget": 20, "page": 3, "similarity": -1.0, "sinks": 0.3, "recent": 0.2},
        {"budget": 7, "page": 2, "similarity": 0.1, "sinks": 0.0, "recent": 1.0},
        {"budget": 1.0},
    ],
)
def test_pages_are_selected_by_the_query_before_unless_it_turned(options, group) -> None:
    shape = shape_of(group)
    method = FreeKV(dense_layers=1, **options)
    check_against(lambda text, layer: _kept(text, layer, method), method, shape, random_texts(shape))


def test_the_query_before_of_the_first_step_is_the_prompts_last() -> None:
    """It points at page 0, and the true one at page 2."""
    shape = shape_of(4, layers=1)
    text = random_text(shape, 12, 1, seed=1)
    q, k = torch.zeros_like(text.q), torch.zeros_like(text.k)
    q[:, :, 11, 0], q[:, :, 12, 1] = 1.0, 1.0
    k[:, :, 1, 0], k[:, :, 9, 1] = 1.0, 1.0
    text = replace(text, q=q, k=k)
    for similarity, kept in ((-1.0, [0, 1, 2, 3]), (0.5, [8, 9, 10, 11])):
        method = FreeKV(4, 0, page=4, similarity=similarity, sinks=0.0, recent=0.0)
        check_against(lambda text, layer, kept=kept: [[kept]], method, shape, [text])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sinks": -0.1}, r"^sinks=-0\.1 must be a share of the budget, 0 to 1\.$"),
        ({"sinks": 1.0, "recent": 1.0}, r"^sinks=1\.0 and recent=1\.0 must be at most 1 together\.$"),
        ({"recent": 1.1}, r"^recent=1\.1 must be a share of the budget, 0 to 1\.$"),
        ({"recent": math.nan}, r"^recent=nan must be a share"),
        ({"similarity": math.nan}, r"^similarity=nan must be -1 to 1\.$"),
        ({"page": 0}, r"^page=0 must be 1 to 1024 tokens\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        FreeKV(**options)


@pytest.mark.parametrize("prompt", [64, 70, 90])
@pytest.mark.parametrize(("budget", "newest"), [(8, 1), (24, 4), (256, 4)])
def test_the_newest_tokens_are_always_selected(budget, newest, prompt) -> None:
    """The query before cannot ask for the token before this one."""
    shape = shape_of(4, layers=1)
    text = random_text(shape, prompt, 3, seed=2)
    method = FreeKV(budget, 0, page=8, similarity=-1.0)
    for past, kept in enumerate(_kept(text, 0, method), prompt):
        assert all({*range(past - newest, past)} <= set(of_head) for of_head in kept)
    check_against(lambda text, layer: _kept(text, layer, method), method, shape, [text])
