"""SparQ against the paper's algorithm in plain loops, in float64."""

import math

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.methods.sparq import SparQ
from tests.methods.stepping import Text, budget_tokens, check_against, random_texts, run, shape_of
from tests.methods.stepping import attend as attend_to


def _step(text: Text, layer: int, at: int, method: SparQ, channels: int) -> tuple[Tensor, list[list[int]]]:
    """Return the output [H, D] of the query at position `at`, and the past positions that each KV head attends to."""
    attention = [_approximate(text, layer, head, at, channels) for head in range(text.q.shape[1])]
    budget = min(budget_tokens(method.budget, at), at)
    recent = range(at - math.floor(method.recent * budget), at)
    kept = []
    for kv in range(text.k.shape[1]):
        heads = attention[kv * text.group : (kv + 1) * text.group]
        votes = [sum(of_head[position] for of_head in heads) for position in range(at)]
        order = sorted(range(at), key=lambda position: (position not in recent, -votes[position]))
        kept.append(sorted(order[:budget]))
    out = attend_to(text, layer, at, kept).double()
    if method.mean_value:
        for head, of_head in enumerate(attention):
            kv = head // text.group
            share = sum(of_head[position] for position in [*kept[kv], at])
            mean = text.v[layer, kv, : at + 1].double().mean(0)
            out[head] = share * out[head] + (1 - share) * mean
    return out.float(), kept


def _approximate(text: Text, layer: int, head: int, at: int, channels: int) -> list[float]:
    """Return the approximate attention of a head's query at position `at` to the positions up to its own."""
    kv = head // text.group
    queries = text.q[layer, kv * text.group : (kv + 1) * text.group, at].double()
    sizes = [sum(abs(float(query[channel])) for query in queries) for channel in range(queries.shape[1])]
    chosen = sorted(range(len(sizes)), key=lambda channel: -sizes[channel])[:channels]
    query = text.q[layer, head, at].double().tolist()
    coverage = sum(abs(query[channel]) for channel in chosen) / sum(map(abs, query))
    scale = math.sqrt(len(query) * coverage)
    keys = text.k[layer, kv, : at + 1].double().tolist()
    weights = [math.exp(sum(query[channel] * key[channel] for channel in chosen) / scale) for key in keys]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({"budget": 0.2}, 1),
        ({"budget": 0.5, "channels": 3, "recent": 0.5}, 3),
        ({"budget": 7, "channels": 0.5, "recent": 0.0}, 3),
        ({"budget": 1, "channels": 6}, 6),
        ({"budget": 20, "channels": 2, "mean_value": False}, 2),
        ({"budget": 1.0, "channels": 2}, 2),
    ],
)
def test_outputs_and_counts_are_those_of_the_paper(options, channels, group) -> None:
    shape = shape_of(group)
    method = SparQ(dense_layers=1, **options)
    texts = random_texts(shape)
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        for at in range(text.new):
            expected, kept = _step(text, 1, text.prompt + at, method, channels)
            torch.testing.assert_close(found.outputs[1][at], expected, rtol=1e-4, atol=1e-5)
            assert found.attended[1][at] == [len(positions) for positions in kept]


def test_a_budget_of_everything_is_full_attention_with_and_without_the_mean_value() -> None:
    shape = shape_of(2)
    for mean_value in (True, False):
        method = SparQ(budget=1.0, dense_layers=0, mean_value=mean_value)
        check_against(
            lambda text, layer: [[list(range(text.prompt + at))] * 2 for at in range(text.new)],
            method,
            shape,
            random_texts(shape),
        )


def test_a_query_of_zeros_gives_finite_outputs() -> None:
    shape = shape_of(2)
    texts = random_texts(shape)
    for text in texts:
        text.q.zero_()
    for found in run(SparQ(budget=0.3, dense_layers=0), shape, texts):
        assert all(bool(out.isfinite().all()) for outputs in found.outputs for out in outputs)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"channels": 0}, r"^channels=0 must be a share above 0 up to 1, or a whole number of channels\.$"),
        ({"channels": 2.5}, r"^channels=2\.5 must be"),
        ({"channels": math.nan}, "^channels=nan must be"),
        ({"channels": math.inf}, "^channels=inf must be"),
        ({"recent": 1.5}, r"^recent=1\.5 must be a share of the budget, 0 to 1\.$"),
        ({"recent": math.nan}, "^recent=nan must be"),
    ],
)
def test_options_out_of_range_are_refused(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        SparQ(**options)


def test_more_channels_than_a_head_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^channels=65 must be at most 64, the channels of a head of this model\.$"):
        SparQ(channels=65).check(Shape(layers=2, heads=4, kv_heads=2, head_dim=64))
