"""InfiniGen once more, slow and obvious: one layer of one sequence, over lists and dicts in float64.

It follows the method's description step by step and shares no code with the package. It is the reference of all
selections.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Positions = list[list[int]]  # per KV head, ascending


class Token(NamedTuple):
    """A token in a KV head: key, value [D] and the partial channels of the skewed key [I], float64.

    With codes, `partial` is what they stand for.
    """

    key: Tensor
    value: Tensor
    partial: Tensor


def slow_select(
    scores: list[list[float]],
    kv_heads: int,
    alpha: float,
    cap: int,
    fetch: str,
    forced: Callable[[int], bool] = lambda position: False,
    bias: Callable[[int, int], float] = lambda kv, position: 0.0,
    join: str = "max",
    top_p: float = 1.0,
) -> Positions:
    """Return the positions that each KV head selects by scores [H][T].

    join, top_p: the options group and top_p.
    forced: positions that come before all others. bias(kv, position): added to a margin, for what rounding may have
    done to it.
    """
    group = len(scores) // kv_heads
    best = [max(of_head) for of_head in scores]
    margins: list[list[float]] = []
    enough: list[int] = []
    for kv in range(kv_heads):
        heads = range(kv * group, (kv + 1) * group)
        margins.append([])
        totals = [sum(math.exp(s - best[h]) for s in scores[h]) for h in heads]
        for t in range(len(scores[0])):
            each = [scores[h][t] - best[h] for h in heads]
            weighted = [math.exp(margin) / total for margin, total in zip(each, totals, strict=True)]
            joined = {
                "max": max(each),
                "softmax": math.log(sum(weighted) / sum(1 / total for total in totals)),
            }
            margins[kv].append(joined[join] + bias(kv, t))
        enough.append(_tokens_of_mass([math.exp(margin) for margin in margins[kv]], top_p))
        margins[kv] = [math.inf if forced(t) else margin for t, margin in enumerate(margins[kv])]
    counts = [
        min(sum(margin > -alpha for margin in of_head), most) for of_head, most in zip(margins, enough, strict=True)
    ]
    if fetch == "mean":
        counts = [math.ceil(sum(counts) / kv_heads)] * kv_heads
    ranked = [sorted(range(len(of_head)), key=lambda t, m=of_head: (-m[t], t)) for of_head in margins]
    return [sorted(order[: min(count, cap)]) for order, count in zip(ranked, counts, strict=True)]


def _tokens_of_mass(masses: list[float], share: float) -> int:
    """Return how many of the largest masses make a share of their sum."""
    found = 0.0
    for count, mass in enumerate(sorted(masses, reverse=True)):
        if share < 1 and found >= share * sum(masses):
            return count
        found += mass
    return len(masses)


@dataclass
class SlowInfiniGen:
    """One layer of one sequence.

    matrices: [D, D] per KV head; group: query heads per KV head; channels: how many speculate; bits: of a partial key's
    channel, codes if less than 16; budget: a share or a count; rounding: how far the scores of another, who computes in
    float32, may be off.
    """

    matrices: list[Tensor]
    group: int
    channels: int
    alpha: float
    budget: float
    fetch: str = "mean"
    sinks: int = 0
    recent: int = 0
    group_rule: str = "max"
    top_p: float = 1.0
    bits: int = 16
    rounding: float = 0.0

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take a prompt; q: [H, L, D]; k, v: [G, L, D]."""
        kv_heads, length, self.head_dim = k.shape
        self.partial_channels = [self._partial_channels(kv, q, k) for kv in range(kv_heads)]
        partial = [torch.stack([self._partial(kv, key) for key in k[kv]]) for kv in range(kv_heads)]  # [L, I] each
        self.ranges = [(of_head.amin(0).float(), of_head.amax(0).float()) for of_head in partial]
        self.tokens = [
            [self._token(kv, k[kv, t], v[kv, t]) for t in range(length)] for kv in range(kv_heads)
        ]  # [G][past]

    def step(self, speculated: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Positions) -> tuple[Positions, Tensor]:
        """Return what is selected and the attention's output [H, D]; speculated, q: [H, D]; k, v: [G, D].

        found: what another selected. Where rounding alone could have made the difference, it is selected here too.
        """
        selected = self._select(speculated, found)
        out = torch.stack([self._attend(h, selected[h // self.group], q[h], k, v) for h in range(len(q))])
        for kv, tokens in enumerate(self.tokens):
            tokens.append(self._token(kv, k[kv], v[kv]))
        return selected, out

    @property
    def past(self) -> int:
        """Tokens by now."""
        return len(self.tokens[0])

    def cap(self, past: int) -> int:
        """Return the most tokens to select of `past`."""
        return max(1, math.floor(self.budget * past + 1e-6)) if self.budget <= 1 else int(self.budget)

    def _partial_channels(self, kv: int, q: Tensor, k: Tensor) -> list[int]:
        sums = [0.0] * self.head_dim
        rows = [k[kv, t] for t in range(k.shape[1])]
        rows += [q[h, t] for h in range(kv * self.group, (kv + 1) * self.group) for t in range(q.shape[1])]
        for row in rows:
            for channel, value in enumerate((row.double() @ self.matrices[kv].double()).abs().tolist()):
                sums[channel] += value
        return sorted(range(self.head_dim), key=lambda channel: (-sums[channel], channel))[: self.channels]

    def _token(self, kv: int, key: Tensor, value: Tensor) -> Token:
        partial = self._partial(kv, key)
        return Token(key.double(), value.double(), partial if self.bits == 16 else self._coded(kv, partial.float()))

    def _partial(self, kv: int, x: Tensor) -> Tensor:
        return (x.double() @ self.matrices[kv].double())[self.partial_channels[kv]]

    def _coded(self, kv: int, partial: Tensor) -> Tensor:
        """Return what the codes of partial channels [I] stand for, in float32 up to the code: as near, as rounded."""
        low, high = self.ranges[kv]
        center, largest = (low + high) / 2, 2**self.bits - 1
        step = ((high - low) * (1 / largest)).clamp(min=torch.finfo(torch.float32).tiny)
        code = ((partial - center) / step + 2 ** (self.bits - 1)).floor().clamp(0, largest)
        return center.double() + (code.double() - largest / 2) * step.double()

    def _select(self, query: Tensor, found: Positions) -> Positions:
        scores = []
        for h in range(len(query)):
            kv = h // self.group
            partial = self._partial(kv, query[h])
            scores.append([float(partial @ token.partial) / math.sqrt(self.head_dim) for token in self.tokens[kv]])
        return slow_select(
            scores,
            len(self.tokens),
            self.alpha,
            self.cap(self.past),
            self.fetch,
            lambda t: t < self.sinks or t >= self.past - self.recent,
            lambda kv, t: self.rounding if t in found[kv] else -self.rounding,
            self.group_rule,
            self.top_p,
        )

    def _attend(self, h: int, selected: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = h // self.group
        keys = [*(self.tokens[kv][t].key for t in selected), k[kv].double()]
        values = [*(self.tokens[kv][t].value for t in selected), v[kv].double()]
        weights = [math.exp(float(q.double() @ key) / math.sqrt(self.head_dim)) for key in keys]
        weighted = [weight * value for weight, value in zip(weights, values, strict=True)]
        return torch.stack(weighted).sum(0) / sum(weights)
