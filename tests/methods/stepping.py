"""Run a method on random queries, keys and values, several slots at a time, and compare with a slow reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, ProjectQuery, Shape
from sparsecache.cache.model_cache import ModelCache

CPU = torch.device("cpu")
SLOTS = 3

Kept = list[list[int]]
"""The past positions that each KV head attends to."""


@dataclass(frozen=True)
class Text:
    """A prompt and the tokens after it. q: [layers, H, L + new, D]; k, v: [layers, G, L + new, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt: int

    @property
    def new(self) -> int:
        """Tokens after the prompt."""
        return self.k.shape[2] - self.prompt

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def scores(self) -> list[list[list[list[float]]]]:
        """q . k / sqrt(D) of every query with every key: [layers][H][L + new][L + new]."""
        keys = self.k.double().repeat_interleave(self.group, 1)
        return (self.q.double() @ keys.mT / math.sqrt(self.q.shape[3])).tolist()

    def prompt_of(self, layer: int) -> list[Tensor]:
        """Return the prompt's q, k and v in a layer, as copies."""
        return [part[layer, :, : self.prompt].clone() for part in (self.q, self.k, self.v)]

    def token_of(self, layer: int, at: int) -> list[Tensor]:
        """Return q, k and v of the token at a position: [heads, 1, D]."""
        return [part[layer, :, at : at + 1] for part in (self.q, self.k, self.v)]


@dataclass
class Found:
    """What a method gave for a text.

    outputs: [layers][steps] of [H, D]. attended: [layers][steps] of [G], past tokens attended to; None in dense layers.
    report: what the method reports of the sequence.
    """

    outputs: list[list[Tensor]]
    attended: list[list[list[int]] | None]
    report: dict[str, Any] = field(default_factory=dict)


def shape_of(group: int, layers: int = 2) -> Shape:
    """Return a small shape with `group` query heads per KV head."""
    return Shape(layers=layers, heads=4, kv_heads=4 // group, head_dim=6)


def random_text(shape: Shape, prompt: int, new: int, seed: int) -> Text:
    """Return a text of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    parts = [torch.randn(shape.layers, h, prompt + new, shape.head_dim, generator=generator) for h in heads]
    return Text(*parts, prompt)


def random_texts(shape: Shape) -> list[Text]:
    """Return texts of odd, unsorted lengths, below and above any page, window and block."""
    lengths = ((37, 20), (1, 30), (75, 9), (8, 12), (66, 5), (2, 7))
    return [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate(lengths)]


def make_cache(method: CacheMethod, shape: Shape, slots: int, max_tokens: int, max_new_tokens: int) -> ModelCache:
    """Return the caches of a method on the CPU, in float32."""
    return ModelCache(method, shape, [CPU] * shape.layers, slots, max_tokens, max_new_tokens, torch.float32)


def prefill(cache: ModelCache, slot: int, text: Text) -> None:
    """Store a text's prompt in a slot."""
    for layer, layer_cache in enumerate(cache.layers):
        layer_cache.prefill(slot, *text.prompt_of(layer))
    cache.start_sequence(slot, text.prompt)


def step(cache: ModelCache, slot: int, text: Text, at: int) -> None:
    """Decode the token of a text at a position, in one slot."""
    slots = torch.tensor([slot])
    for layer, layer_cache in enumerate(cache.layers):
        layer_cache.attend(*(part[None] for part in text.token_of(layer, at)), slots)
    cache.end_step(slots)


@torch.inference_mode()
def run(method: CacheMethod, shape: Shape, texts: list[Text]) -> list[Found]:
    """Decode the texts in three slots; every step names all slots, free ones too."""
    longest, most_new = max(text.prompt + text.new for text in texts), max(text.new for text in texts)
    cache = make_cache(method, shape, SLOTS, longest, most_new)
    noise = torch.Generator().manual_seed(99)
    found = [Found([[] for _ in cache.layers], [[] if each.sparse else None for each in cache.layers]) for _ in texts]
    waiting, active = list(range(len(texts))), {}  # slot to [text, steps done]
    free = [2, 0, 1]
    while waiting or active:
        if waiting and len(free) > 1:  # one slot at least is free, each of them at some time
            slot = free.pop(0)
            active[slot] = [waiting.pop(0), 0]
            prefill(cache, slot, texts[active[slot][0]])
        slots = torch.randperm(SLOTS, generator=noise)
        for layer, layer_cache in enumerate(cache.layers):
            rows = [_token(texts, active, slot, layer, shape, noise) for slot in slots.tolist()]
            q, k, v = (torch.stack(part) for part in zip(*rows, strict=True))
            if layer_cache.speculation_source is not None:  # the hidden state is the query
                layer_cache.speculate(q, ProjectQuery(lambda hidden, normed: hidden, ()), slots)
            out = layer_cache.attend(q, k, v, slots)
            for row, slot in enumerate(slots.tolist()):
                if slot in active:
                    of_text = found[active[slot][0]]
                    of_text.outputs[layer].append(out[row, :, 0].clone())
                    counts = of_text.attended[layer]
                    if counts is not None:
                        counts.append(cache.layer_stats[layer].counts[slot].tolist())
        cache.end_step(slots)
        for slot in list(active):
            active[slot][1] += 1
            at, steps = active[slot]
            if steps == texts[at].new:
                found[at].report = cache.report(slot)
                cache.free_slot(slot)
                del active[slot]
                free.append(slot)
    return found


def check_against(
    truth: Callable[[Text, int], list[Kept]], method: CacheMethod, shape: Shape, texts: list[Text]
) -> None:
    """Check outputs and counts against attention over `truth(text, layer)`, a list over steps, and the new token."""
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        for layer, attended in enumerate(found.attended):
            everything = [[list(range(text.prompt + at))] * shape.kv_heads for at in range(text.new)]
            kept = everything if attended is None else truth(text, layer)
            assert len(kept) == text.new
            for at, positions in enumerate(kept):
                expected = attend(text, layer, text.prompt + at, positions)
                torch.testing.assert_close(found.outputs[layer][at], expected, rtol=1e-4, atol=1e-5)
            if attended is not None:
                assert attended == [[len(of_head) for of_head in positions] for positions in kept]
        _check_report(text, found)


def _check_report(text: Text, found: Found) -> None:
    """The report's `kept` is the mean share of past tokens attended to."""
    shares = [
        Fraction(count, text.prompt + at)
        for attended in found.attended
        for at, counts in enumerate(attended or [])
        for count in counts
    ]
    expected = pytest.approx(float(sum(shares) / len(shares)), abs=1e-9) if shares else None
    assert found.report["kept"] == expected
    assert found.report["sparse_steps"] == (text.new if shares else 0)
    assert found.report["dense_layers"] == found.attended.count(None)


def check_budget(method: CacheMethod, shape: Shape, texts: list[Text], budget: Callable[[Text, int], int]) -> None:
    """At every step each KV head attends to 1 to budget(text, past) past tokens."""
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        for attended in found.attended:
            for at, counts in enumerate(attended or []):
                past = text.prompt + at
                assert min(counts) >= 1 and max(counts) <= min(past, budget(text, past))
        _check_report(text, found)


def attend(text: Text, layer: int, at: int, kept: Kept) -> Tensor:
    """Return the attention of the query at position `at` over the kept positions and its own: [H, D]."""
    outputs = []
    for head in range(text.q.shape[1]):
        positions = [*kept[head // text.group], at]
        weights = torch.tensor(probabilities(text, layer, head, at, positions))
        outputs.append(weights @ text.v[layer, head // text.group, positions])
    return torch.stack(outputs)


def probabilities(text: Text, layer: int, head: int, at: int, positions: list[int]) -> list[float]:
    """Return the softmax of the query of `head` at position `at` over these positions."""
    row = text.scores[layer][head][at]
    scores = [row[position] for position in positions]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def budget_tokens(budget: float, past: int) -> int:
    """Return the budget of so many past tokens, computed a second way."""
    return max(1, math.floor(Fraction(str(budget)) * past)) if budget <= 1 else int(budget)


def _token(
    texts: list[Text], active: dict[int, list[int]], slot: int, layer: int, shape: Shape, noise: torch.Generator
) -> list[Tensor]:
    """Return the next q, k and v [heads, 1, D] of a slot; random numbers where it is free."""
    if slot not in active:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        return [torch.randn(h, 1, shape.head_dim, generator=noise) for h in heads]
    at, steps = active[slot]
    return texts[at].token_of(layer, texts[at].prompt + steps)
