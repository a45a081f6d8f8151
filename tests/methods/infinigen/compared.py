"""Random sequences decoded by InfiniGen, every step of its sparse layers compared with the slow reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels.selection import CountRule, count_within, score_margin, topk_indices
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.infinigen.cache import InfiniGenCache
from tests.methods.infinigen.slow import Positions, SlowInfiniGen

CPU = torch.device("cpu")
ROUNDING = 1e-5  # scores closer to each other than this may change places in float32
Draw = Callable[..., Tensor]  # numbers of a size
SHAPES = {
    "mha-32": Shape(layers=3, heads=2, kv_heads=2, head_dim=32),
    "gqa2-64": Shape(layers=3, heads=4, kv_heads=2, head_dim=64),
    "gqa4-128": Shape(layers=2, heads=8, kv_heads=2, head_dim=128),
    "gqa8-64": Shape(layers=2, heads=8, kv_heads=1, head_dim=64),
    "gqa3-32": Shape(layers=2, heads=9, kv_heads=3, head_dim=32),
}


class GivenQuery:
    """A projection that returns the hidden state, which is the query itself."""

    inputs: tuple[Tensor, ...] = ()

    def __call__(self, hidden: Tensor, *, normed: bool) -> Tensor:
        return hidden


@dataclass(frozen=True)
class Step:
    """What one step of a sparse layer gave: per row of the batch the selected positions, and outputs [B, H, 1, D]."""

    selected: list[Positions]
    out: Tensor


class ComparedRun:
    """InfiniGen over random tensors. Prompts go into slots 1, 2, ...; slot 0 stays free.

    Options that are not given are the defaults, but 32 channels in 16 bits. Their scores of whole numbers are exact.
    draw(*size): makes tensors; if given, they are exact in every dtype and so are ties. cache: a ModelCache of the same
    options to use instead of a new one. compare: whether to compare with the slow reference.
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
        cache: ModelCache | None = None,
        compare: bool = True,
    ) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.draw = draw or (lambda *size: 2 * torch.randn(*size, generator=self._generator))
        self.shape, self.lengths, self.device, self.dtype = shape, lengths, device, dtype
        channels = min(1.0, 32 / shape.head_dim)
        exact = {"partial_bits": 16, "partial_weight_ratio": channels}
        self.options: dict[str, Any] = {"dense_layers": 1, **exact, **options}
        method = InfiniGen(**self.options)
        method.check(shape)
        self._calibrate(method)
        self.cache = cache or ModelCache(
            method, shape, [device] * shape.layers, len(lengths) + 1, max(lengths) + new_tokens, new_tokens, dtype
        )
        self.slow: dict[tuple[int, int], SlowInfiniGen] = {}  # by layer and row
        if compare:
            matrices = method.calibration()["skewing_matrix"] if method.skew else None
            rounding = ROUNDING if draw is None else 0.0
            for layer in self.sparse_layers:
                for row in range(len(lengths)):
                    self.slow[layer, row] = self._slow(None if matrices is None else matrices[layer], rounding)
        self._prefill()

    @property
    def sparse_layers(self) -> range:
        """The layers after the dense ones."""
        return range(self.options["dense_layers"], self.shape.layers)

    def layer(self, index: int) -> InfiniGenCache:
        """Return the cache of a sparse layer."""
        cache = self.cache.layers[index]
        assert isinstance(cache, InfiniGenCache)
        return cache

    def report(self, row: int) -> dict[str, Any]:
        """Return the report of a row's sequence."""
        return self.cache.report(row + 1)

    def _calibrate(self, method: InfiniGen) -> None:
        shape, group = self.shape, self.shape.heads // self.shape.kv_heads
        for layer in range(shape.layers if method.skew else 0):
            q = torch.randn(shape.kv_heads, group, 70, shape.head_dim, generator=self._generator)
            method.calibrate(layer, q, torch.empty(0))  # keys are not used

    def _slow(self, matrices: Tensor | None, rounding: float) -> SlowInfiniGen:
        shape, options = self.shape, self.options
        channels = int((options["partial_weight_ratio"] or 1.0) * shape.head_dim + 1e-6)
        alpha = options.get("alpha", math.inf)
        if matrices is None or channels == shape.head_dim:  # all channels are not skewed
            matrices = torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1)
        return SlowInfiniGen(
            matrices=list(matrices),
            group=shape.heads // shape.kv_heads,
            channels=channels,
            bits=options["partial_bits"],
            alpha=alpha,
            budget=options.get("budget", 0.05),
            rounding=rounding,
            group_rule=options.get("group", "max"),
            **{key: options[key] for key in ("fetch", "sinks", "recent", "top_p") if key in options},
        )

    def _prefill(self) -> None:
        shape = self.shape
        for row, length in enumerate(self.lengths):
            for layer, cache in enumerate(self.cache.layers):
                prompt = [self.draw(heads, length, shape.head_dim) for heads in (shape.heads, *[shape.kv_heads] * 2)]
                cache.prefill(row + 1, *(x.to(self.device, self.dtype) for x in prompt))
                if (layer, row) in self.slow:
                    self.slow[layer, row].prefill(*prompt)
            self.cache.start_sequence(row + 1, length)

    def step(self, rows: list[int] | None = None) -> list[Step]:
        """Decode one token of all rows, or of some in an order; return the step of each sparse layer, compared."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        shape, steps = self.shape, []
        slots = torch.tensor(rows, device=self.device) + 1
        for layer, cache in enumerate(self.cache.layers):
            heads = (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads)
            batch = [self.draw(len(rows), count, 1, shape.head_dim) for count in heads]
            speculated, q, k, v = (x.to(self.device, self.dtype) for x in batch)
            if not isinstance(cache, InfiniGenCache):
                cache.attend(q, k, v, slots)
                continue
            cache.speculate(speculated, GivenQuery(), slots)
            selected = [[[p for p in head if p >= 0] for head in row] for row in cache.selected().tolist()]
            steps.append(Step(selected, cache.attend(q, k, v, slots).cpu()))
            if self.slow:
                self._compare(layer, rows, [x[:, :, 0] for x in batch], steps[-1])
        self.cache.end_step(slots)
        return steps

    def _compare(self, layer: int, rows: list[int], batch: list[Tensor], found: Step) -> None:
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        for at, row in enumerate(rows):
            slow = self.slow[layer, row]
            past = slow.past
            expected, out = slow.step(*(x[at] for x in batch), found.selected[at])
            assert found.selected[at] == expected, f"layer {layer}, row {row}, {past} past tokens"
            torch.testing.assert_close(found.out[at, :, 0].double(), out, rtol=tolerance, atol=tolerance)


def small_numbers(seed: int) -> Draw:
    """Return a draw of -1, 0 and 1: with 16 or 64 channels all scores are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randint(-1, 2, size, generator=generator).float()


def select_tokens(scores: Tensor, kv_heads: int, alpha: float, budget: Tensor, rule: CountRule) -> Tensor:
    """Select past tokens by scores [B, H, T]: positions [B, G, N], ascending, then -1; arguments of `count_within`."""
    margin = score_margin(scores, kv_heads)
    return topk_indices(margin, count_within(margin, alpha, budget, rule))
