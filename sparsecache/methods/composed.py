"""Composed: one method evicts after the prompt; another selects from the remaining tokens at each step.

`evict` names a method that evicts once, such as `snapkv`. `select` names a method that selects at each step, such as
`quest`. The options of each follow its name after commas:

    --method composed -o evict=snapkv,budget=0.5 -o select=quest,budget=256,storage=int4

The kept and the generated tokens form one shorter text for the selection. A share in its budget is a share of this
text. Positions, and so pages, are counted in it. In a layer that is dense for one of the two methods, only the other
acts. Storage and calibration are those of the selection. Runs of the selection alone use the same calibration files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import (
    CacheConfig,
    CacheMethod,
    LayerCache,
    MethodKind,
    ProjectQuery,
    Shape,
    StepBytes,
    most_queries_read,
)
from sparsecache.cache.eviction import EvictionMethod
from sparsecache.cache.sparse import SparseMethod
from sparsecache.cache.stats import SequenceStats
from sparsecache.errors import UsageError
from sparsecache.methods import MethodText, check_method_name, load_method, make_method, parse_options


@dataclass
class Composed(CacheMethod):
    """Evicts prompt tokens by one method, and selects among the remaining tokens by another."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options: ClassVar[Mapping[str, str]] = {
        "storage": "give it to `select`, as in select=quest,budget=256,storage=int4."
    }

    evict: Annotated[MethodText, "method that evicts after the prompt, with its options, as in name,key=value"] = (
        "snapkv,budget=0.5"
    )
    select: Annotated[MethodText, "method that selects at each step, with its options, as in name,key=value"] = (
        "quest,budget=0.2"
    )

    def __post_init__(self) -> None:
        evict, select = _make("evict", self.evict), _make("select", self.select)
        self._eviction = _checked_eviction(self.evict, evict)
        self._selection = _checked_selection(self.select, select)
        self._eviction.storage = getattr(select, "storage", "full")  # for layers that are dense in `select` only
        self.uses_rope = evict.uses_rope

    @property
    def prompt_queries(self) -> int | None:
        return most_queries_read((self._eviction, self._selection))

    def check(self, shape: Shape) -> None:
        with _part_named("evict", self.evict):
            self._eviction.check(shape)
        with _part_named("select", self.select):
            self._selection.check(shape)

    @property
    def calibration_name(self) -> str:
        return self._selection.calibration_name

    def calibration_text(self) -> str | None:
        with _part_named("select", self.select):
            return self._selection.calibration_text()

    def calibrate(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._selection.calibrate(layer, q, k)

    def calibration(self) -> dict[str, Tensor]:
        return self._selection.calibration()

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:
        self._selection.restore(calibration, shape)

    def make_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        if self.uses_rope:
            self._eviction.rope = self.rope
        if layer < self._eviction.dense_layers:
            return self._selection.make_cache(layer, config)
        if layer < self._selection.dense_layers:
            return self._eviction.make_cache(layer, config)
        return ComposedCache(self._eviction, self._selection, layer, config)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        report = self._selection.report(stats)
        # If the eviction dropped tokens, all steps are capped; else the selection counts over the whole text.
        report["capped_steps"] = max(report["capped_steps"], self._eviction.report(stats)["capped_steps"])
        return report


class ComposedCache(LayerCache):
    """The cache of a selection method that holds the kept tokens of the prompt and all generated ones.

    selection: that cache. num_evicted: [slots] int64, evicted tokens of each prompt. num_tokens: [slots] int64, past
    tokens in `selection`, which reads them as its sequence lengths.
    """

    def __init__(self, evict: EvictionMethod, select: SparseMethod, layer: int, config: CacheConfig) -> None:
        self._eviction, self.config = evict, config
        self._budget = evict.layer_budget(layer, config.shape)
        self._rows = min(config.max_tokens, self._budget.maximum(config.max_tokens) + config.max_new_tokens)
        self.num_evicted, self.num_tokens = (torch.zeros_like(config.seq_lens) for _ in range(2))
        inner = replace(config, seq_lens=self.num_tokens, max_tokens=self._rows)
        self.selection = select.make_sparse_cache(layer, inner)
        self.graphable, self.estimates_rest = self.selection.graphable, self.selection.estimates_rest
        self.speculation_source = self.selection.speculation_source

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = k.shape[1]
        count = min(self._budget.tokens(length), length)
        kept, _ = self._eviction.select_prompt(q, k, v, count, count)
        index = kept[..., None].expand(-1, -1, k.shape[2])
        self.selection.prefill(slot, q[:, length - count :], k.gather(1, index), v.gather(1, index))
        self.num_evicted[slot].fill_(length - count)

    def speculate(self, hidden: Tensor, project_query: ProjectQuery, slots: Tensor) -> None:
        self._count_tokens()
        self.selection.speculate(hidden, project_query, slots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        if self.speculation_source is None:  # else `speculate` counted them, and a side stream may still read the count
            self._count_tokens()
        return self.selection.attend(q, k, v, slots)

    def _count_tokens(self) -> None:
        """Update `num_tokens`, in place: `selection` holds the same tensor."""
        torch.sub(self.config.seq_lens, self.num_evicted, out=self.num_tokens).clamp_(0, self._rows)

    def free_slot(self, slot: int) -> None:
        self.num_evicted[slot].zero_()
        self.selection.free_slot(slot)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        kept = min(seq_len, self._budget.tokens(int(seq_len)))
        return self.selection.step_nbytes(kept, attended, cache_hit)


@contextmanager
def _part_named(option: str, text: str) -> Iterator[None]:
    """Name the option in a method's ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}={text}: {error}") from error


def _checked_eviction(text: str, method: CacheMethod) -> EvictionMethod:
    """Return the method of the option `evict`. Raises ValueError if it does not fit."""
    if not isinstance(method, EvictionMethod) or type(method).keep is not EvictionMethod.keep:
        raise ValueError(
            f"evict={text} must evict once after the prompt and keep equally many tokens in all KV heads, as snapkv "
            f"does."
        )
    if method.storage != "full":
        raise ValueError(
            f"evict={text} has a storage, but `select` stores the tokens. Give storage={method.storage} to `select`."
        )
    if method.calibration_text() is not None:
        raise ValueError(
            f"evict={text} needs a calibration, but only `select` can have one. Give a method without one, such as "
            f"snapkv."
        )
    return method


def _checked_selection(text: str, method: CacheMethod) -> SparseMethod:
    """Return the method of the option `select`. Raises ValueError if it does not fit."""
    if not isinstance(method, SparseMethod) or method.kind != "selection":
        raise ValueError(f"select={text} must select tokens at each step, as quest does.{_hint(method)}")
    if getattr(method, "shares_selection", False):
        raise ValueError(
            f"select={text} lets a layer select for later layers, but layers keep different tokens after an eviction. "
            f"Give a method that selects in every layer, as quest does."
        )
    if method.uses_rope:
        raise ValueError(
            f"select={text} needs each token's position in the text, but KV heads keep different tokens after an "
            f"eviction. Give a method that needs no positions, such as quest."
        )
    return method


def _hint(select: CacheMethod) -> str:
    """Return what to give instead of a method that does not select."""
    return " Quantise with storage=int2 of such a method." if select.kind == "quantised" else ""


def _make(option: str, text: str) -> CacheMethod:
    """Return the method that an option names. Raises ValueError if it does not exist or refuses its options."""
    name, *pairs = text.split(",")
    try:
        check_method_name(name)
        if issubclass(load_method(name), Composed):
            raise UsageError("composed cannot be a part of itself.")
        given: dict[str, str] = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key in given:
                raise UsageError(f"{key} is given twice. Leave one of them out.")
            given[key] = value
        return make_method(name, parse_options(name, given))
    except UsageError as error:
        raise ValueError(f"{option}={text}: {error}") from error
