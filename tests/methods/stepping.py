"""Runs a method on random queries, keys and values, several slots at a time, beside the slow obvious truth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.sparse import SparseMethod

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
        return self.k.shape[2] - self.prompt

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def scores(self) -> list[list[list[list[float]]]]:
        """q . k / sqrt(D) of every query with every key: [layers][H][L + new][L + new]."""
        keys = self.k.double().repeat_interleave(self.group, 1)
        return (self.q.double() @ keys.mT / math.sqrt(self.q.shape[3])).tolist()


@dataclass
class Found:
    """What a method gave for a text: [layers][steps] outputs [H, D] and counts [G] of past tokens attended to."""

    outputs: list[list[Tensor]]
    attended: list[list[list[int]]]


def shape_of(group: int, layers: int = 2) -> Shape:
    return Shape(layers=layers, heads=4, kv_heads=4 // group, head_dim=6)


def random_text(shape: Shape, prompt: int, new: int, seed: int) -> Text:
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    parts = [torch.randn(shape.layers, h, prompt + new, shape.head_dim, generator=generator) for h in heads]
    return Text(*parts, prompt)


def random_texts(shape: Shape) -> list[Text]:
    """Of lengths that are odd, not sorted, and below and above any page, window and block."""
    lengths = ((37, 20), (1, 30), (75, 9), (8, 12), (66, 5), (2, 7))
    return [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate(lengths)]


@torch.inference_mode()
def run(method: SparseMethod, shape: Shape, texts: list[Text]) -> list[Found]:
    """Decodes the texts in three slots; every step names all slots, whether something is in flight there or not."""
    seen = _spy(method)
    longest = max(text.prompt + text.new for text in texts)
    method.allocate(shape, SLOTS, longest, CPU, torch.float32)
    noise = torch.Generator().manual_seed(99)
    found = [Found([[] for _ in range(shape.layers)], [[] for _ in range(shape.layers)]) for _ in texts]
    waiting, active = list(range(len(texts))), {}  # slot to [text, steps done]
    free = [2, 0, 1]
    while waiting or active:
        if waiting and len(free) > 1:  # one slot is idle at least, each in its turn
            slot = free.pop(0)
            active[slot] = [waiting.pop(0), 0]
            _prefill(method, slot, texts[active[slot][0]])
        order = torch.randperm(SLOTS, generator=noise)
        for layer in range(shape.layers):
            rows = [_token(texts, active, slot, layer, shape, noise) for slot in order.tolist()]
            out = method.attend(layer, *(torch.stack(part) for part in zip(*rows, strict=True)), order)
            for row, slot in enumerate(order.tolist()):
                if slot in active:
                    at = found[active[slot][0]]
                    at.outputs[layer].append(out[row, :, 0].clone())
                    if layer >= method.first:
                        at.attended[layer].append(seen[-1][row].tolist())
        for slot in list(active):
            active[slot][1] += 1
            if active[slot][1] == texts[active[slot][0]].new:
                method.release(slot)
                del active[slot]
                free.append(slot)
    return found


def check_against(
    truth: Callable[[Text, int], list[Kept]], method: SparseMethod, shape: Shape, texts: list[Text]
) -> None:
    """The method gives what attention over `truth(text, layer)`, a list over steps, and the new token gives."""
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        for layer in range(shape.layers):
            everything = [[list(range(text.prompt + step))] * shape.kv_heads for step in range(text.new)]
            kept = truth(text, layer) if layer >= method.first else everything
            assert len(kept) == text.new
            for step in range(text.new):
                expected = attend(text, layer, text.prompt + step, kept[step])
                torch.testing.assert_close(found.outputs[layer][step], expected, rtol=1e-4, atol=1e-5)
                if layer >= method.first:
                    assert found.attended[layer][step] == [len(positions) for positions in kept[step]]


def check_cap(method: SparseMethod, shape: Shape, texts: list[Text], cap: Callable[[Text, int], int]) -> None:
    """At every step each KV head attends to one past token at least and to cap(text, past) at most."""
    for text, found in zip(texts, run(method, shape, texts), strict=True):
        for layer in range(method.first, shape.layers):
            for step, counts in enumerate(found.attended[layer]):
                past = text.prompt + step
                assert max(counts) <= min(past, cap(text, past))
                assert min(counts) >= 1


def attend(text: Text, layer: int, at: int, kept: Kept) -> Tensor:
    """Attention of the query at position `at` over the kept positions and its own: [H, D]."""
    outputs = []
    for head in range(text.q.shape[1]):
        positions = [*kept[head // text.group], at]
        weights = torch.tensor(probabilities(text, layer, head, at, positions))
        outputs.append(weights @ text.v[layer, head // text.group, positions])
    return torch.stack(outputs)


def probabilities(text: Text, layer: int, head: int, at: int, positions: list[int]) -> list[float]:
    """The softmax of the query of `head` at position `at` over these positions."""
    scores = [text.scores[layer][head][at][p] for p in positions]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def cap_of(budget: float, past: int) -> int:
    """The cap of so many past tokens, worked out once more."""
    return max(1, math.floor(budget * past + 1e-6)) if budget <= 1 else int(budget)


def _spy(method: SparseMethod) -> list[Tensor]:
    """Notes how many tokens every call of attend_past says were attended to."""
    seen: list[Tensor] = []
    original = method.attend_past

    def attend_past(layer, q, k, v, slots, past, cap):
        out, attended = original(layer, q, k, v, slots, past, cap)
        seen.append(attended.clone())
        return out, attended

    method.attend_past = attend_past
    return seen


def _prefill(method: SparseMethod, slot: int, text: Text) -> None:
    for layer in range(len(text.q)):
        parts = [part[layer, :, : text.prompt].clone() for part in (text.q, text.k, text.v)]
        method.prefill(layer, slot, *parts, text.new)


def _token(
    texts: list[Text], active: dict[int, list[int]], slot: int, layer: int, shape: Shape, noise: torch.Generator
) -> list[Tensor]:
    """The next q, k and v [heads, 1, D] of a slot; noise where nothing is in flight."""
    if slot not in active:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        return [torch.randn(h, 1, shape.head_dim, generator=noise) for h in heads]
    text, at = texts[active[slot][0]], texts[active[slot][0]].prompt + active[slot][1]
    return [part[layer, :, at : at + 1] for part in (text.q, text.k, text.v)]
