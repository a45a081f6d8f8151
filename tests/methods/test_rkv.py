"""R-KV against the authors' formula over whole matrices at the prompt, and against sums made anew at every step."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from sparsecache.cache.base import Shape
from sparsecache.methods.rkv import RKV
from tests.methods.presses import HEAD_DIM, LENGTHS, kept_by_method, random_prompt
from tests.methods.stepping import make_cache

WINDOW, KERNEL, WEIGHT = 4, 3, 0.3
OPTIONS = {"window": WINDOW, "kernel": KERNEL, "weight": WEIGHT, "dense_layers": 0}


def _clustered(length: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a prompt whose keys gather around a few directions, so that some are similar."""
    q, k, v = random_prompt(length, group)
    centres = torch.randn(5, HEAD_DIM, generator=torch.Generator().manual_seed(length))
    return q, k + 1.5 * centres[torch.arange(length) * 7 % 5], v


def _cosines(k: Tensor) -> Tensor:
    """Return cosine similarities [G, L, L] in double precision, 0 of a token with itself."""
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    return (unit @ unit.mT).masked_fill(torch.eye(k.shape[1], dtype=torch.bool), 0)


def _sums(cosines: list[list[float]], excused: dict[int, int], tokens: list[int]) -> list[float]:
    return [sum(cosines[j][i] for j in tokens if excused.get(j) != i) for i in tokens]


def _importance(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention of queries [H / G, window, D] to keys [N, D]: the highest head's, mean over queries."""
    return (q.double() @ k.double().T / HEAD_DIM**0.5).amax(0).softmax(-1).mean(0)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_keeps_the_tokens_of_highest_score_and_the_window(length, group) -> None:
    q, k, v = _clustered(length, group)
    cosines, before = _cosines(k), length - WINDOW
    for count in {2, WINDOW + 1, length // 2, length - 1}:
        expected = []
        for head, of_head in enumerate(cosines):
            reduced = of_head.clone()
            for token, row in enumerate(of_head):
                similar = (row > 0.5).nonzero().flatten()
                if len(similar):
                    reduced[token, similar[-1]] = 0
            redundancy = reduced.mean(0).softmax(0)[:before]
            votes = _importance(q[head * group : (head + 1) * group, before:], k[head, :before])
            importance = max_pool1d(votes[None], KERNEL, 1, KERNEL // 2)[0]
            best = (WEIGHT * importance - (1 - WEIGHT) * redundancy).topk(max(0, count - WINDOW)).indices.tolist()
            expected.append(sorted([*best, *range(length - min(count, WINDOW), length)]))
        assert kept_by_method(RKV(budget=count, **OPTIONS), q, k, v) == expected


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("budget", [9, 0.4, 2])
@torch.inference_mode()
def test_a_step_evicts_the_token_of_lowest_score(budget, group) -> None:
    prompt, steps = 30, 40
    q, k, v = _clustered(prompt + steps, group)
    cache = make_cache(RKV(budget=budget, **OPTIONS), Shape(1, 4, 4 // group, HEAD_DIM), 2, 80, 50)
    layer, slot = cache.layers[0], torch.tensor([1])
    layer.prefill(1, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    cache.start_sequence(1, prompt)
    cosines = _cosines(k).tolist()
    held = [layer.positions[1, head, :n].tolist() for head, n in enumerate(layer.num_tokens[1].tolist())]
    excused = [
        {j: latest for j in of_head if (latest := _latest(cosines[g][j], of_head)) is not None}
        for g, of_head in enumerate(held)
    ]
    for at in range(prompt, prompt + steps):
        for head, tokens in enumerate(held):
            for token in tokens:
                if cosines[head][at][token] > 0.5:
                    excused[head][token] = at
            if (latest := _latest(cosines[head][at], tokens)) is not None:
                excused[head][at] = latest
            tokens.append(at)
            if len(tokens) > (int(budget * (at + 1) + 1e-6) if budget <= 1 else budget):
                victim = _victim(head, tokens, cosines[head], excused[head], q[head * group :][:group], k[head], at)
                tokens.remove(victim)
                excused[head] = {j: i for j, i in excused[head].items() if victim not in (i, j)}
        layer.attend(q[None, :, at, None], k[None, :, at, None], v[None, :, at, None], slot)
        cache.end_step(slot)
        for head, count in enumerate(layer.num_tokens[1].tolist()):
            assert sorted(layer.positions[1, head, :count].tolist()) == sorted(held[head])


def _latest(cosines: list[float], tokens: list[int]) -> int | None:
    """Return the most recent of tokens that are similar to the token of these cosine similarities."""
    return max((token for token in tokens if cosines[token] > 0.5), default=None)


def _victim(
    head: int, tokens: list[int], cosines: list[list[float]], excused: dict[int, int], q: Tensor, k: Tensor, at: int
) -> int:
    candidates = [token for token in tokens if token <= at - WINDOW]
    if not candidates:
        return min(tokens)
    importance = _importance(q[:, at - WINDOW + 1 : at + 1], k[candidates]).tolist()
    means = torch.tensor(_sums(cosines, excused, tokens)) / len(tokens)
    redundancy = dict(zip(tokens, means.softmax(0).tolist(), strict=True))
    scores = {
        token: WEIGHT * votes - (1 - WEIGHT) * redundancy[token]
        for token, votes in zip(candidates, importance, strict=True)
    }
    return min(scores, key=scores.__getitem__)


def test_of_many_alike_the_last_stays() -> None:
    q, k, v = random_prompt(64, 1)
    k[:, 10:40] = k[:, 10:11] + 0.01 * k[:, 10:40]
    kept = kept_by_method(RKV(budget=36, window=4, weight=0.0, dense_layers=0), q, k, v)
    assert all(39 in of_head and len(set(of_head) & set(range(10, 39))) < 3 for of_head in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"^window=0 must be 1 token or more\.$"),
        ({"window": 65}, r"^window=65 must be at most 64 tokens\.$"),
        ({"kernel": 2}, r"^kernel=2 must be an odd number of positions, 1 to 1023\.$"),
        ({"weight": 1.5}, r"^weight=1.5 must be 0 to 1\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        RKV(**options)
