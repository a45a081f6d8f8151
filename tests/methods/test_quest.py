"""Quest against pages bounded and taken one at a time."""

from dataclasses import replace

import pytest
import torch

from sparsecache.methods.quest import Quest
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    check_budget,
    random_text,
    random_texts,
    shape_of,
)


def _kept(text: Text, layer: int, budget: float, page: int) -> list[Kept]:
    ends = range(text.prompt, text.prompt + text.new)
    kv_heads = range(text.k.shape[1])
    return [[_chosen(text, layer, kv, past, budget_tokens(budget, past), page) for kv in kv_heads] for past in ends]


def _chosen(text: Text, layer: int, kv: int, past: int, budget: int, page: int) -> list[int]:
    pages = [list(range(start, min(start + page, past))) for start in range(0, past, page)]
    bounds = [_bound(text, layer, kv, past, positions) for positions in pages]
    chosen: list[int] = []
    newest = len(pages) - 1
    for at in sorted(range(len(pages)), key=lambda at: (at != newest, -bounds[at], at)):
        fits = min(budget - len(chosen), len(pages[at]))
        chosen += pages[at][len(pages[at]) - fits :]
    return sorted(chosen)


def _bound(text: Text, layer: int, kv: int, at: int, positions: list[int]) -> float:
    """Return the highest bound of q . k, over the heads of a KV head, of the query at `at` and these positions."""
    keys = text.k[layer, kv, positions].double()
    lowest, highest = keys.amin(0), keys.amax(0)
    heads = range(kv * text.group, (kv + 1) * text.group)
    queries = [text.q[layer, head, at].double() for head in heads]
    return max(float(torch.maximum(query * lowest, query * highest).sum()) for query in queries)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    ("budget", "page"), [(0.2, 16), (0.5, 5), (0.1, 1), (1.0, 16), (1, 4), (20, 16), (30, 3), (0.7, 100), (500, 7)]
)
def test_pages_are_taken_by_their_bounds(budget, page, group) -> None:
    shape = shape_of(group)
    method = Quest(budget=budget, page=page, dense_layers=1)
    check_against(lambda text, layer: _kept(text, layer, budget, page), method, shape, random_texts(shape))


def test_of_equal_pages_the_earlier_are_taken_and_the_last_gives_its_latest_tokens() -> None:
    shape = shape_of(2, layers=1)
    text = random_text(shape, 21, 4, seed=1)
    text = replace(text, k=torch.ones_like(text.k))
    steps = (
        [0, 1, 2, 3, 4, 5, 6, 7, 11, 20],
        [0, 1, 2, 3, 4, 5, 6, 7, 20, 21],
        [0, 1, 2, 3, 5, 6, 7, 20, 21, 22],
        [0, 1, 2, 3, 6, 7, 20, 21, 22, 23],
    )
    kept = [[each] * 2 for each in steps]
    check_against(lambda text, layer: kept, Quest(budget=10, page=4, dense_layers=0), shape, [text])


def test_a_kv_head_takes_the_page_of_the_highest_bound_of_its_heads() -> None:
    """Head 0 points at page 0, head 1 twice as strongly at page 2. After the newest, page 2 is taken, then page 0."""
    shape = shape_of(4, layers=1)
    text = random_text(shape, 14, 1, seed=1)
    q, k = torch.zeros_like(text.q), torch.zeros_like(text.k)
    q[:, 0, :, 0], q[:, 1, :, 1] = 1.0, 2.0
    k[:, :, 1, 0], k[:, :, 9, 1] = 1.0, 1.0
    text = replace(text, q=q, k=k)
    for budget, kept in ((6, [8, 9, 10, 11]), (10, [0, 1, 2, 3, 8, 9, 10, 11]), (8, [2, 3, 8, 9, 10, 11])):
        method = Quest(budget=budget, page=4, dense_layers=0)
        check_against(lambda text, layer, kept=kept: [[[*kept, 12, 13]]], method, shape, [text])


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 1, 13, 64])
def test_no_step_exceeds_the_budget(budget) -> None:
    shape = shape_of(2)
    method = Quest(budget=budget, page=7, dense_layers=0)
    check_budget(method, shape, random_texts(shape), lambda text, past: budget_tokens(budget, past))


def test_an_empty_page_is_refused() -> None:
    for page in (0, -1, 1025, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"^page={page} must be 1 to 1024 tokens\.$"):
            Quest(page=page)
