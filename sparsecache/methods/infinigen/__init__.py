"""InfiniGen: speculate one layer ahead which past tokens matter, and attend to those (OSDI'24, arXiv 2406.19707).

The next layer's query is speculated from this layer's hidden state, and scored against partial keys of the next layer:
all channels of its keys in 4 bits, or a few in 16. Tokens with the highest scores are selected, and fetched if the
cache is in host memory.

A channel of a partial key has 16 bits, or a code of 8 or 4 bits (`partial_bits`). Where all channels speculate, partial
keys are the keys or their codes: nothing is skewed, and no calibration is needed.

GQA: the paper has one KV head per query head. Here a KV head selects the tokens of largest score margin, as `oracle`,
or with `group=softmax` those of largest mean probability over its query heads. It has one skewing matrix and one set of
partial channels.

Differences:

- Keys are rotated by RoPE, so the skewing matrix is made and applied after it.
- The whole query is computed and then projected. The paper multiplies by partial query weights.
- By default the query is speculated from the residual stream after attention, not from the attention input; the budget
  alone limits the selection; all channels speculate in 4 bits, which takes the bytes of a quarter of them in 16 bits.
  `preset=paper` sets the paper's values.
- Not in the paper: `gpu_cache`, `top_p`, `sinks`, `recent`, `partial_bits` below 16, `fetch=per_head`,
  `group=softmax`, `guess=residual`.
- Not implemented: the paper's pool of keys and values in host memory, which has a limit and evicts victims. Every token
  stays.
- Keys and values stay on the device without `offload`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, MethodKind, Shape, SpeculationSource
from sparsecache.cache.calibration import read_calibration_text
from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.host import check_host_memory
from sparsecache.cache.sparse import SparseMethod
from sparsecache.cache.stats import SequenceStats
from sparsecache.kernels.selection import CountRule, GroupRule
from sparsecache.methods.infinigen.cache import DeviceStreams, InfiniGenCache
from sparsecache.methods.infinigen.skewing import check_skewing_matrices, skewing_matrix
from sparsecache.options import FilePath

_MAX_TOKENS = 2**31 - 1  # kernels count in int32

PAPER: dict[str, Any] = {
    "alpha": 5.0,
    "top_p": 1.0,
    "partial_weight_ratio": 0.3,
    "partial_bits": 16,
    "budget": 0.2,
    "fetch": "mean",
    "group": "max",
    "dense_layers": 2,
    "skew": True,
    "guess": "input",
    "sinks": 0,
    "recent": 0,
}
"""The paper's settings for Llama-2; OPT has alpha=4. The authors measure speed with speculation from layer 1 on, so
layer 2 is the first sparse one."""


@dataclass
class InfiniGen(SparseMethod):
    """Speculates on partial keys and attends to the tokens of largest score margin."""

    kind: ClassVar[MethodKind] = "selection"
    absent_options: ClassVar[Mapping[str, str]] = {
        "storage": "it fetches keys and values in the model's dtype. Use offload=true to save GPU memory, or a method "
        "that selects from quantised keys, such as loki or quest."
    }
    min_dense_layers: ClassVar[int] = 1  # layer 0 has no predecessor
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

    preset: Annotated[
        Literal["none", "paper"], "paper: the paper's values of all options of the selection; -o options override them"
    ] = "none"
    alpha: Annotated[float, "how far below the best speculated score a selected token may be, 0 to inf"] = math.inf
    top_p: Annotated[
        float, "select at most as many tokens as make this share of the speculated attention, above 0 to 1"
    ] = 1.0
    partial_weight_ratio: Annotated[
        float | None, "share of the channels that speculate, above 0 to 1; none: all channels"
    ] = None
    partial_bits: Annotated[
        Literal[16, 8, 4], "bits of a partial key's channel: 16 in the model's dtype, 8 or 4 as a code"
    ] = 4
    budget: Annotated[float, "most past tokens selected: a share of them up to 1, else a count"] = 0.05
    fetch: Annotated[CountRule, "one count per layer, the mean over its KV heads, or a count per head"] = "mean"
    group: Annotated[
        GroupRule, "how a KV head joins its query heads: the largest score margin, or the mean probability"
    ] = "max"
    dense_layers: Annotated[int, "first layers that attend to all past tokens, 1 or more"] = 2
    skew: Annotated[
        bool, "rotate queries and keys so that few channels carry more of the score; without effect on all channels"
    ] = True
    guess: Annotated[
        SpeculationSource,
        "what the query is speculated from: the attention input of the previous layer (the paper), or its residual "
        "stream after attention",
    ] = "residual"
    sinks: Annotated[int, "first tokens that are always selected, within the budget, 0 or more"] = 0
    recent: Annotated[int, "last tokens that are always selected, within the budget, 0 or more"] = 0
    offload: Annotated[bool, "keep keys and values of the sparse layers in pinned host memory"] = False
    gpu_cache: Annotated[int, "with offload: fetched tokens kept on the GPU per layer and KV head, 0 or more"] = 0
    calibration_file: Annotated[FilePath | None, "text file that skewing matrices are made of; none: bundled"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._matrices: list[Tensor] = []
        self._streams: dict[torch.device, DeviceStreams] = {}
        self._caches: list[InfiniGenCache] = []
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} must be 0 or more (inf: no limit but the budget).")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1: no limit).")
        if self.group != "max" and not math.isinf(self.alpha):
            raise ValueError(
                f"alpha={self.alpha} limits the distance to a query head's best score, which group={self.group} does "
                f"not know: give alpha=inf too, and limit tokens by budget or top_p."
            )
        if self.partial_weight_ratio is not None and not 0 < self.partial_weight_ratio <= 1:
            raise ValueError(f"partial_weight_ratio={self.partial_weight_ratio} must be above 0 and at most 1.")
        if self.partial_bits not in (16, 8, 4):
            raise ValueError(f"partial_bits={self.partial_bits} must be 16, 8 or 4.")
        check_token_counts(sinks=self.sinks, recent=self.recent, gpu_cache=self.gpu_cache)
        for name in ("sinks", "recent", "gpu_cache"):
            setattr(self, name, min(getattr(self, name), _MAX_TOKENS))
        if self.gpu_cache and not self.offload:
            raise ValueError(f"gpu_cache={self.gpu_cache} keeps offloaded tokens on the GPU: give offload=true too.")

    @property
    def prompt_queries(self) -> int | None:
        return 0 if self.partial_weight_ratio in (None, 1.0) else None  # all choose the channels

    def check(self, shape: Shape) -> None:
        super().check(shape)
        channels = self.channels(shape)
        if channels < 1:
            raise ValueError(
                f"partial_weight_ratio={self.partial_weight_ratio} leaves none of {shape.head_dim} channels; give "
                f"{1 / shape.head_dim:g} to 1."
            )
        if self.partial_bits == 4 and channels % 2:
            raise ValueError(
                f"partial_bits=4 stores two channels in a byte, but {channels} of {shape.head_dim} channels speculate. "
                f"Give a partial_weight_ratio of an even number of channels, or partial_bits=8."
            )

    def channels(self, shape: Shape) -> int:
        """Return how many channels of a key speculate."""
        if self.partial_weight_ratio is None:
            return shape.head_dim
        return math.floor(self.partial_weight_ratio * shape.head_dim + 1e-6)

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> InfiniGenCache:
        if layer == self.dense_layers:
            self._caches, self._streams = [], {}
            if self.offload:
                layers = config.shape.layers - layer
                check_host_memory(layers * config.slots * config.max_tokens * config.token_nbytes)
        if config.device not in self._streams:
            self._streams[config.device] = DeviceStreams(config.device, self.offload)
        streams = self._streams[config.device]
        matrices, budgets = self._skewing_matrices(layer, config.shape), self.budget_table(layer, config)
        cache = InfiniGenCache(self, config, matrices, budgets, streams)
        streams.last_cache = cache
        self._caches.append(cache)
        return cache

    def _skewing_matrices(self, layer: int, shape: Shape) -> Tensor | None:
        """Return the matrices of a layer, [G, D, D]; None if all channels speculate."""
        if self.channels(shape) == shape.head_dim:
            return None
        if not self.skew:
            return torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1)
        if len(self._matrices) != shape.layers:
            raise RuntimeError("InfiniGen with skew=true must be calibrated before it takes a prompt.")
        return self._matrices[layer]

    def calibration_text(self) -> str | None:
        is_needed = self.skew and self.partial_weight_ratio not in (None, 1.0)
        return read_calibration_text(self.calibration_file) if is_needed else None

    def calibrate(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._matrices[layer:] = [skewing_matrix(q).cpu()]

    def calibration(self) -> dict[str, Tensor]:
        return {"skewing_matrix": torch.stack(self._matrices)}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:
        self._matrices = list(check_skewing_matrices(calibration.get("skewing_matrix"), shape))

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        report = super().report(stats)
        if not self.offload:
            return report
        hits = sum(cache.cache_hits(stats.slot, stats.last_step_discarded) for cache in self._caches)
        head_nbytes = self._caches[0].head_nbytes if self._caches else 0
        return {
            **report,
            "fetched_bytes": (stats.attended - hits) * head_nbytes,
            "gpu_cache_hit": hits / stats.attended if stats.attended else None,
        }
