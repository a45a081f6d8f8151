"""ArkVale against pages whose centre and mean deviation are computed one page at a time, in float64."""

import pytest
import torch

from sparsecache.methods.arkvale import ArkVale
from tests.methods.stepping import Kept, Text, budget_tokens, check_against, random_texts, shape_of


def _kept(text: Text, layer: int, budget: float, page: int) -> list[Kept]:
    ends = range(text.prompt, text.prompt + text.new)
    kv_heads = range(text.k.shape[1])
    return [[_selected(text, layer, kv, past, budget_tokens(budget, past), page) for kv in kv_heads] for past in ends]


def _selected(text: Text, layer: int, kv: int, past: int, budget: int, page: int) -> list[int]:
    pages = [list(range(start, min(start + page, past))) for start in range(0, past, page)]
    heads = range(kv * text.group, (kv + 1) * text.group)
    worth = [max(_score(text, layer, kv, head, past, positions) for head in heads) for positions in pages]
    kept: list[int] = []
    for at in sorted(range(len(pages)), key=lambda at: (at != len(pages) - 1, -worth[at], at)):
        fits = min(budget - len(kept), len(pages[at]))
        kept += pages[at][len(pages[at]) - fits :]
    return sorted(kept)


def _score(text: Text, layer: int, kv: int, head: int, at: int, positions: list[int]) -> float:
    """Return the highest q . k in the box around the centre of a page's keys, as far as they deviate on average."""
    query, keys = text.q[layer, head, at].double(), text.k[layer, kv, positions].double()
    centre = (keys.amax(0) + keys.amin(0)) / 2
    deviation = (keys - centre).abs().mean(0)
    return float(torch.maximum(query * (centre - deviation), query * (centre + deviation)).sum())


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("budget", "page"), [(0.2, 16), (0.5, 5), (1, 1), (1.0, 32), (20, 7)])
def test_pages_are_taken_by_centre_and_mean_deviation(budget, page, group) -> None:
    shape = shape_of(group)
    method = ArkVale(budget=budget, page=page, dense_layers=1)
    check_against(lambda text, layer: _kept(text, layer, budget, page), method, shape, random_texts(shape))


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^page=0 must be 1 to 1024 tokens\.$"):
        ArkVale(page=0)
