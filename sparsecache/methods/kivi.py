"""KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (ICML'24, arXiv 2402.02750).

Every token is kept and attended to, in `bits` bits. Keys are quantised per channel, in groups of `group` consecutive
tokens, since some channels are large in all tokens; values per token, in groups of `group` channels. The last
`residual` tokens are in full precision.

GQA: as in the paper, a KV head is quantised once for all its query heads.

Differences: keys and values leave the full-precision tail together, by whole groups, so it holds `residual` to
`residual + group` - 1 tokens. In the authors' code the tail of the values has exactly `residual` tokens, that of the
keys fewer. Minima and steps have the dtype of the model. The prompt's attention is exact. Defaults are the authors' for
LongBench with Llama-2; 4 and 8 bits are theirs too. For models with GQA the authors recommend 4 bits
(docs/long_bench.md of their code).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, get_args

from sparsecache.cache.base import CacheConfig, CacheMethod, MethodKind
from sparsecache.cache.full import FullCache
from sparsecache.cache.storage import GROUP, RESIDUAL, QuantisedStorage
from sparsecache.kernels.quantisation import Bits

_GROUPS = (16, 32, 64, 128)


@dataclass
class KIVI(CacheMethod):
    """Keeps and attends to everything, in few bits."""

    kind: ClassVar[MethodKind] = "quantised"
    absent_options: ClassVar[Mapping[str, str]] = {"storage": "its option bits sets the storage: 2, 4 or 8."}
    prompt_queries = 0

    bits: Annotated[Bits, "bits per value: 2, 4 or 8"] = 2
    group: Annotated[int, "tokens per group of keys, and channels per group of values: 16, 32, 64 or 128"] = GROUP
    residual: Annotated[int, "fewest last tokens in full precision, 0 or a multiple of group"] = RESIDUAL

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ValueError(f"bits={self.bits} must be 2, 4 or 8.")
        if self.group not in _GROUPS:
            raise ValueError(f"group={self.group} must be 16, 32, 64 or 128.")
        if self.residual < 0 or self.residual % self.group:
            raise ValueError(f"residual={self.residual} must be 0 or a multiple of group={self.group}.")

    def make_cache(self, layer: int, config: CacheConfig) -> FullCache:
        kv = QuantisedStorage(config, config.max_tokens, self.bits, self.group, self.residual)
        return FullCache(config, kv=kv)
