"""InfiniGen once more, slowly and from INFINIGEN.md alone, and random sequences to play through both."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.methods.infinigen import InfiniGen

CPU = torch.device("cpu")
Positions = list[list[int]]  # of each KV head, ascending
Draw = Callable[..., Tensor]  # numbers of a size
ROUNDING = 1e-5  # scores nearer to each other than this may change places in float32


def slow_select(
    scores: list[dict[int, float]],
    kv_heads: int,
    alpha: float,
    cap: int,
    fetch: str,
    always: Callable[[int], bool] = lambda position: False,
    lean: Callable[[int, int], float] = lambda kv, position: 0.0,
) -> Positions:
    """Steps 3 to 5: from each query head's scores by position to the positions that each KV head fetches.

    `lean` is added to the distance of a position: what rounding may have done to it.
    """
    group = len(scores) // kv_heads
    best = [max(of_head.values()) for of_head in scores]
    r: list[dict[int, float]] = []
    for kv in range(kv_heads):
        heads = range(kv * group, (kv + 1) * group)
        r.append({t: max(scores[h][t] - best[h] for h in heads) + lean(kv, t) for t in scores[kv * group]})
        for t in r[kv]:
            if always(t):
                r[kv][t] = math.inf
    counts = [sum(1 for t in r[kv] if r[kv][t] > -alpha) for kv in range(kv_heads)]
    if fetch == "mean":
        counts = [math.ceil(sum(counts) / kv_heads)] * kv_heads
    ranked = [sorted(r[kv], key=lambda t, kv=kv: (-r[kv][t], t)) for kv in range(kv_heads)]
    return [sorted(ranked[kv][: min(counts[kv], cap)]) for kv in range(kv_heads)]


@dataclass
class _Token:
    key: Tensor
    value: Tensor
    partial: Tensor
    last_selected: int
    selections: int = 0


@dataclass
class SlowInfiniGen:
    """One layer of one sequence, over lists and dicts in float64, token by token.

    matrices: one of [d, d] for each KV head; columns: how many speculate; budget: a share or a count; capacity: tokens;
    rounding: how far the scores of another, who computes in float32, may be off.
    """

    matrices: list[Tensor]
    group: int
    columns: int
    alpha: float
    budget: float
    fetch: str = "mean"
    sinks: int = 0
    recent: int = 0
    capacity: int = 10**9
    eviction: str = "counter"
    rounding: float = 0.0
    past: int = 0
    evicted: list[set[int]] = field(default_factory=list)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q: [H, L, d]; k, v: [G, L, d]."""
        kv_heads, length, self.d = k.shape
        self.evicted = [set() for _ in range(kv_heads)]
        self.index = [self._partial_index(kv, q, k) for kv in range(kv_heads)]
        self.tokens: list[dict[int, _Token]] = [{} for _ in range(kv_heads)]
        for kv in range(kv_heads):
            for t in range(length):
                self.tokens[kv][t] = self._token(kv, t, k, v)
        if length > self.capacity:
            for at in range(max(1, length - 32), length):
                self._note(self._select(q[:, at], at), at)
            for kv in range(kv_heads):
                while len(self.tokens[kv]) > self.capacity:
                    self._evict(kv)
        self.past = length

    def step(self, guess: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Positions) -> tuple[Positions, Tensor]:
        """guess, q: [H, d]; k, v: [G, d]; returns what was selected and the attention's output [H, d].

        `found` is what another selected: where rounding alone could have made the difference, it is selected here too.
        """
        selected = self._select(guess, self.past, found)
        out = torch.stack([self._attend(h, selected[h // self.group], q[h], k, v) for h in range(len(q))])
        self._note(selected, self.past)
        for kv in range(len(self.tokens)):
            if len(self.tokens[kv]) == self.capacity:
                self._evict(kv)
            self.tokens[kv][self.past] = self._token(kv, self.past, k[:, None], v[:, None], 0)
        self.past += 1
        return selected, out

    def cap(self, past: int) -> int:
        return max(1, math.floor(self.budget * past + 1e-6)) if self.budget <= 1 else int(self.budget)

    def _partial_index(self, kv: int, q: Tensor, k: Tensor) -> list[int]:
        sums = [0.0] * self.d
        rows = [k[kv, t] for t in range(k.shape[1])]
        rows += [q[h, t] for h in range(kv * self.group, (kv + 1) * self.group) for t in range(q.shape[1])]
        for row in rows:
            for column, value in enumerate((row.double() @ self.matrices[kv].double()).abs().tolist()):
                sums[column] += value
        return sorted(range(self.d), key=lambda column: (-sums[column], column))[: self.columns]

    def _token(self, kv: int, t: int, k: Tensor, v: Tensor, at: int | None = None) -> _Token:
        key, value = (x[kv, t if at is None else at].double() for x in (k, v))
        return _Token(key, value, (key @ self.matrices[kv].double())[self.index[kv]], last_selected=t)

    def _select(self, query: Tensor, past: int, found: Positions | None = None) -> Positions:
        scores = []
        for h in range(len(query)):
            kv = h // self.group
            partial = (query[h].double() @ self.matrices[kv].double())[self.index[kv]]
            held = {t: token for t, token in self.tokens[kv].items() if t < past}
            scores.append({t: float(partial @ token.partial) / math.sqrt(self.d) for t, token in held.items()})
        return slow_select(
            scores,
            len(self.tokens),
            self.alpha,
            self.cap(past),
            self.fetch,
            lambda t: t < self.sinks or t >= past - self.recent,
            lambda kv, t: 0.0 if found is None else self.rounding if t in found[kv] else -self.rounding,
        )

    def _attend(self, h: int, selected: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = h // self.group
        keys = [*(self.tokens[kv][t].key for t in selected), k[kv].double()]
        values = [*(self.tokens[kv][t].value for t in selected), v[kv].double()]
        weights = [math.exp(float(q.double() @ key) / math.sqrt(self.d)) for key in keys]
        return sum((w * value for w, value in zip(weights, values, strict=True)), torch.zeros(self.d)) / sum(weights)

    def _note(self, selected: Positions, at: int) -> None:
        for tokens, positions in zip(self.tokens, selected, strict=True):
            for t in positions:
                tokens[t].selections += 1
                tokens[t].last_selected = at
            if any(token.selections >= 255 for token in tokens.values()):
                for token in tokens.values():
                    token.selections //= 2

    def _evict(self, kv: int) -> None:
        worth: dict[str, Callable[[int], int]] = {
            "fifo": lambda t: t,
            "lru": lambda t: self.tokens[kv][t].last_selected,
            "counter": lambda t: self.tokens[kv][t].selections,
        }
        victim = min(self.tokens[kv], key=lambda t: (worth[self.eviction](t), t))
        del self.tokens[kv][victim]
        assert victim not in self.evicted[kv]
        self.evicted[kv].add(victim)


@dataclass(frozen=True)
class Step:
    """What one step of one sparse layer gave: chosen positions and outputs [H, 1, d] of each row of the batch."""

    selected: list[Positions]
    out: Tensor


class Play:
    """An InfiniGen over random tensors, every step of its sparse layers beside the slow one's.

    `draw(*size)` makes tensors that are exact in every dtype, so that ties are ties; random ones by default. Prompts
    go into slots 1, 2, ..; slot 0 stays empty. A `method` that is given has been played with before, under the same
    options. Without `compare` the slow one rests.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: tuple[int, ...],
        options: dict[str, Any],
        *,
        new_tokens: int = 8,
        draw: Draw | None = None,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        method: InfiniGen | None = None,
        compare: bool = True,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.rounding = ROUNDING if draw is None else 0.0
        self.draw = draw or (lambda *size: 2 * torch.randn(*size, generator=self._generator))
        self.shape, self.lengths, self.device, self.dtype = shape, lengths, device, dtype
        self.options: dict[str, Any] = {"dense_layers": 1, **options}
        self.method = method or InfiniGen(**self.options)
        self.method.check(shape)
        self._calibrate()
        if method is None:
            self.method.allocate(shape, len(lengths) + 1, max(lengths) + new_tokens, device, dtype)
        self._slots = torch.arange(1, len(lengths) + 1)
        self.slow: dict[tuple[int, int], SlowInfiniGen] = {}  # by layer and row
        if compare:
            for layer in self.sparse_layers:
                self.slow |= {(layer, row): self._slow(layer, n + new_tokens) for row, n in enumerate(lengths)}
        self._prefill(new_tokens)

    @property
    def sparse_layers(self) -> range:
        return range(self.options["dense_layers"], self.shape.layers)

    def _calibrate(self) -> None:
        shape, group = self.shape, self.shape.heads // self.shape.kv_heads
        if self.method.calibration_text() is not None:
            for layer in range(shape.layers):
                queries = torch.randn(shape.kv_heads, group, 70, shape.head_dim, generator=self._generator)
                self.method.calibrate(layer, queries)

    def _slow(self, layer: int, most: int) -> SlowInfiniGen:
        shape, options = self.shape, self.options
        if options.get("skew", True):
            matrices = list(self.method.calibration()["skewing_matrix"][layer])
        else:
            matrices = [torch.eye(shape.head_dim)] * shape.kv_heads
        ratio = options.get("partial_weight_ratio") or 32 / shape.head_dim
        share = options.get("capacity", 1.0)
        named = {key: options[key] for key in ("fetch", "sinks", "recent", "eviction") if key in options}
        return SlowInfiniGen(
            matrices=matrices,
            group=shape.heads // shape.kv_heads,
            columns=min(shape.head_dim, int(ratio * shape.head_dim + 1e-6)),
            alpha=options.get("alpha", 5.0),
            budget=options.get("budget", 0.2),
            rounding=self.rounding,
            capacity=math.ceil(Fraction(str(share)) * most) if share <= 1 else int(share),
            **named,
        )

    def _prefill(self, new_tokens: int) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        for row, length in enumerate(self.lengths):
            for layer in range(shape.layers):
                prompt = [self.draw(heads, length, shape.head_dim) for heads in (shape.heads, *[shape.kv_heads] * 2)]
                self.method.prefill(layer, row + 1, *(x.to(device, dtype) for x in prompt), new_tokens)
                if (layer, row) in self.slow:
                    self.slow[layer, row].prefill(*prompt)

    def step(self, order: list[int] | None = None) -> list[Step]:
        """One token for all rows (those of `order`, in that order): every sparse layer's own step, compared."""
        rows = list(range(len(self.lengths))) if order is None else order
        slots = self._slots[rows].to(self.device)
        shape, steps = self.shape, []
        for layer in range(shape.layers):
            batch = [
                self.draw(len(rows), heads, 1, shape.head_dim) for heads in (*[shape.heads] * 2, *[shape.kv_heads] * 2)
            ]
            guess, q, k, v = (x.to(self.device, self.dtype) for x in batch)
            if self.method.guesses(layer):
                self.method.anticipate(layer, guess, slots)
            if layer not in self.sparse_layers:
                self.method.attend(layer, q, k, v, slots)
                continue
            selected = chosen_positions(self.method, layer, slots)
            out = self.method.attend(layer, q, k, v, slots).cpu()
            steps.append(Step(selected, out))
            if self.slow:
                self._compare(layer, rows, [x[:, :, 0] for x in batch], steps[-1])
        return steps

    def _compare(self, layer: int, rows: list[int], batch: list[Tensor], found: Step) -> None:
        for at, row in enumerate(rows):
            slow = self.slow[layer, row]
            expected, out = slow.step(*(x[at] for x in batch), found.selected[at])
            assert found.selected[at] == expected, f"layer {layer}, row {row}, {slow.past - 1} past tokens"
            tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found.out[at, :, 0].double(), out, rtol=tolerance, atol=tolerance)


def chosen_positions(method: InfiniGen, layer: int, slots: Tensor) -> list[Positions]:
    """What a method is about to attend to in `layer`, beside the new token: for each of `slots` and each KV head."""
    if method._unbounded is not None:
        chosen = method._unbounded.selected(layer - method.first).tolist()
        return [[[p for p in head if p >= 0] for head in slot] for slot in chosen]
    rows = method._selected[layer - method.first]
    positions = method._pool.positions[layer - method.first, slots].gather(2, rows.clamp(min=0))
    pairs = zip(rows.tolist(), positions.tolist(), strict=True)
    return [[[p for r, p in zip(*head, strict=True) if r >= 0] for head in zip(*slot, strict=True)] for slot in pairs]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def slow_selection() -> Callable[..., Positions]:
    """Steps 3 to 5 as a loop."""
    return slow_select


@pytest.fixture(scope="session")
def play() -> type[Play]:
    """Plays random sequences through InfiniGen and the slow one, which must agree at every step."""
    return Play


@pytest.fixture(scope="session")
def small_numbers() -> Callable[[int], Draw]:
    """Draws -1, 0 and 1 by a seed: with 16 or 64 columns all scores are exact, and many are equal."""

    def drawing(seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        return lambda *size: torch.randint(-1, 2, size, generator=generator).float()

    return drawing


@pytest.fixture(scope="session")
def positions_of() -> Callable[..., list[Positions]]:
    """What a method is about to attend to in a layer."""
    return chosen_positions
