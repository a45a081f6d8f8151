"""LRQK against the paper's updates, written with the whole factors in double precision."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.methods.lrqk import LRQK
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


def _rows_of(x: Tensor, basis: Tensor, *products: tuple[Tensor, Tensor]) -> Tensor:
    """Return a that minimises |x - a basis|^2 + sum of |p - a f^T|^2 over products (p, f), row by row."""
    left = torch.cat((basis.mT, *(factor for _, factor in products)))  # [D + .., R]
    right = torch.cat((x, *(product for product, _ in products)), 1)
    return torch.linalg.lstsq(left, right.mT).solution.mT


def _descend(basis: Tensor, reduced: Tensor, rows: Tensor) -> Tensor:
    """Return a basis after the step along the gradient of |rows - reduced basis|^2 that lowers it most.

    Tiny reduced rows make a shorter one, as in the authors' code.
    """
    gradient = -reduced.mT @ (rows - reduced @ basis)
    along = reduced @ gradient
    return basis - (along * (reduced @ basis - rows)).sum() / (along.square().sum() + 1e-6) * gradient


class _Slow:
    """One KV head of one text: queries of its heads [H / G, L, D], keys [L, D]."""

    def __init__(self, queries: Tensor, keys: Tensor, prompt: int, method: LRQK) -> None:
        self.queries, self.keys, self.method = queries, keys, method
        self.prompt = prompt
        q, k = queries[:, :prompt].flatten(0, 1), keys[:prompt]
        magnitude = queries[:, :prompt].abs().sum((0, 1)) / len(queries) + k.abs().sum(0)
        channels = magnitude.topk(min(method.rank, k.shape[1])).indices
        a_q, a_k = q[:, channels], k[:, channels]
        for _ in range(method.iterations):
            b_q, b_k = (torch.linalg.lstsq(a, x).solution for a, x in ((a_q, q), (a_k, k)))
            a_q = _rows_of(q, b_q, (q @ k.mT, a_k))
            a_k = _rows_of(k, b_k, (k @ q.mT, a_q))
        self.b_q, self.b_k = (torch.linalg.lstsq(a, x).solution for a, x in ((a_q, q), (a_k, k)))
        self.a_k = a_k
        self.active = self._chosen(a_q.view(len(queries), prompt, -1)[:, -1], prompt)

    def step(self, past: int) -> list[int]:
        """Decode the token at position `past`; return the positions selected for it."""
        query, key = self.queries[:, past], self.keys[past : past + 1]
        before, a_before = self.keys[self.active], self.a_k[self.active]
        a_k = _rows_of(key, self.b_k)
        for _ in range(self.method.iterations):
            a_q = _rows_of(query, self.b_q, (query @ before.mT, a_before), (query @ key.mT, a_k))
            a_k = _rows_of(key, self.b_k, (key @ query.mT, a_q))
        self.b_q, self.b_k = _descend(self.b_q, a_q, query), _descend(self.b_k, a_k, key)
        chosen = self._chosen(a_q, past)
        self.a_k = torch.cat((self.a_k, a_k))
        self.active = [*chosen, past]
        return sorted(chosen)

    def _chosen(self, a_q: Tensor, past: int) -> list[int]:
        scores = a_q @ self.a_k.mT  # [H / G, past]
        margin = (scores - scores.amax(1, keepdim=True)).amax(0).tolist()
        budget = min(past, budget_tokens(self.method.budget, self.prompt if past == self.prompt else past))
        recent = int(self.method.recent * budget)
        margin[past - recent :] = range(1, recent + 1)
        return sorted(range(past), key=lambda at: -margin[at])[:budget]


def _kept(text: Text, layer: int, method: LRQK) -> list[Kept]:
    heads = [
        _Slow(text.q[layer, kv * text.group : (kv + 1) * text.group].double(), keys.double(), text.prompt, method)
        for kv, keys in enumerate(text.k[layer])
    ]
    return [[head.step(text.prompt + at) for head in heads] for at in range(text.new)]


@pytest.mark.parametrize(
    ("group", "options"),
    [
        (1, {"budget": 0.3, "rank": 3, "recent": 0.4}),
        (2, {"budget": 12, "rank": 2, "recent": 0.0, "iterations": 1}),
        (4, {"budget": 9, "rank": 4, "recent": 0.3, "iterations": 3}),
        (2, {"budget": 5, "rank": 3, "recent": 1.0}),
        (2, {"budget": 0.5, "rank": 16, "recent": 0.0}),
    ],
)
def test_tokens_are_selected_by_the_factors_of_the_paper(group, options) -> None:
    shape, method = shape_of(group), LRQK(dense_layers=1, **options)
    texts = [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate(((37, 20), (75, 9), (50, 12)))]
    check_against(lambda text, layer: _kept(text, layer, method), method, shape, texts)


def test_keys_of_the_rank_give_the_order_of_the_true_scores() -> None:
    """Queries and keys of two channels, of six, are factorised without loss by a rank of two."""
    shape = shape_of(2)
    text = random_text(shape, 60, 10, seed=3)
    q, k = text.q.clone(), text.k.clone()
    q[..., 2:], k[..., 2:] = 0.0, 0.0
    text = replace(text, q=q, k=k)

    def best(text: Text, layer: int) -> list[Kept]:
        return [[_best(text, layer, kv, text.prompt + at) for kv in range(2)] for at in range(text.new)]

    check_against(best, LRQK(budget=8, rank=2, recent=0.0, dense_layers=1), shape, [text])


def _best(text: Text, layer: int, kv: int, past: int) -> list[int]:
    scores = torch.tensor([text.scores[layer][kv * text.group + head][past][:past] for head in range(text.group)])
    margin = (scores - scores.amax(1, keepdim=True)).amax(0)
    return sorted(margin.topk(8).indices.tolist())


@pytest.mark.parametrize("budget", [0.02, 1, 13])
def test_no_step_exceeds_the_budget(budget) -> None:
    """Also with prompts shorter than the rank, whose factors are not unique."""
    shape = shape_of(2)
    method = LRQK(budget=budget, rank=5, dense_layers=0)
    check_budget(method, shape, random_texts(shape), lambda text, past: budget_tokens(budget, past))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^rank=0 must be 1 or more\.$"),
        ({"recent": 1.5}, r"^recent=1.5 must be a share of the budget, 0 to 1\.$"),
        ({"iterations": 17}, r"^iterations=17 must be 1 to 16\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LRQK(**options)


def test_a_rank_above_the_channels_of_a_head_is_refused() -> None:
    """The default is taken as far as it goes."""
    with pytest.raises(ValueError, match=r"^rank=65 must be at most 64, the channels of a head of this model\.$"):
        LRQK(rank=65).check(Shape(4, 2, 2, 64))
    LRQK(rank=64).check(Shape(4, 2, 2, 64))
    LRQK().check(Shape(4, 2, 2, 8))
