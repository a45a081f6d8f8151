"""The interface between the engine and a cache method.

An engine has one method, which makes one cache per layer. A cache holds the keys and values of its layer for all slots.
A slot holds one sequence in flight. The engine handles weights and tokens, a cache handles keys and values. A cache
uses the device of its layer only, so a method needs no code for models that are split over several devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsecache.cache.stats import LayerStats, SequenceStats
from sparsecache.cache.streams import SideStream
from sparsecache.kernels.rotation import RotationOf

SpeculationSource = Literal["input", "residual"]
MethodKind = Literal["full", "selection", "eviction", "quantised"]


@dataclass(frozen=True)
class Shape:
    """The attention shape of a model: `layers`; H query heads share G KV heads of D channels."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def kv_nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class CacheConfig:
    """The configuration of one layer's cache.

    slots: the most sequences in flight. max_tokens: the most tokens of a sequence, with its prompt. max_new_tokens: the
    most generated tokens. device, dtype: of the layer's q, k and v. seq_lens: [slots] int64 on the device, the past
    tokens of each slot; the engine sets it after a prompt and adds one after each step. stats: a sparse cache records
    there how many past tokens each step attended to. deferred: a stream for work of a step or a prefill that only the
    next step needs. It runs in parallel with later layers, and the next step waits for it.
    """

    shape: Shape
    slots: int
    max_tokens: int
    max_new_tokens: int
    device: torch.device
    dtype: torch.dtype
    seq_lens: Tensor
    stats: LayerStats
    deferred: SideStream

    @property
    def token_nbytes(self) -> int:
        """Return the bytes of one token's keys and values in one layer."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.dtype.itemsize

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros [slots, G, *size] on the device, in the cache's dtype unless another one is given."""
        size = (self.slots, self.shape.kv_heads, *size)
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class StepBytes:
    """The fewest bytes that a step must read from the layer's device and from host memory."""

    device: float
    host: float = 0.0


class LayerCache(ABC):
    """The keys and values of one layer for all slots.

    sparse: whether steps attend to fewer tokens than all; a sparse cache records every step in `config.stats`.
    graphable: whether `attend` and `speculate` may be captured in a CUDA graph: fixed addresses and sizes, no
        synchronisation with the host.
    speculation_source: which hidden state of the previous layer `speculate` receives; None: it is not called.
        "input": that layer's normed attention input. "residual": its residual stream after attention.
    estimates_rest: whether the output includes one estimate for all tokens that are not attended to.
    uses_logsumexp: whether `prefill_with_logsumexp` needs less time than `prefill`. An engine calls it instead if its
        attention over the prompt computes the log-sum-exp.
    """

    sparse: ClassVar[bool] = True
    graphable: bool = True
    estimates_rest: bool = False
    speculation_source: SpeculationSource | None = None
    uses_logsumexp: ClassVar[bool] = False

    @abstractmethod
    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store a prompt in a free slot.

        q: [H, L, D]; k, v: [G, L, D], rotated, not to be modified. The engine computes the attention over the prompt,
        which is dense and exact. On a GPU that runs in parallel: a side stream is current here. So write into the
        cache's tensors instead of replacing them, and join streams of your own before returning.
        """

    def prefill_with_logsumexp(self, slot: int, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor) -> None:
        """Store a prompt as `prefill` does, given the log-sum-exp of its attention.

        logsumexp: [H, L] float32, the logarithm of each query's sum of exp(q k / sqrt(D)) over the tokens up to its
        own.
        """
        self.prefill(slot, q, k, v)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        """Append one token to each slot and return the attention over what the slot keeps: [B, H, 1, D].

        q: [B, H, 1, D]; k, v: [B, G, 1, D], rotated; slots: [B] int64 on the device, no slot twice. Elements that pad a
        batch name free slots. Their length may exceed the capacity: the call must not fail. Their output is not read.
        """

    def speculate(  # noqa: B027 (a no-op unless speculation_source is set)
        self, hidden: Tensor, project_query: "ProjectQuery", slots: Tensor
    ) -> None:
        """Receive the hidden state [B, hidden] of the previous layer, on this layer's device, before `attend`.

        project_query: this layer's query of a hidden state. slots: as in `attend`.
        """

    def free_slot(self, slot: int) -> None:  # noqa: B027 (a no-op where `prefill` overwrites a slot's state)
        """Remove the sequence from a slot. Does nothing for a free slot."""

    @abstractmethod
    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        """Return the fewest bytes of keys and values that a step must read, per sequence.

        seq_len: past tokens; attended: past tokens that a KV head attended to, on average; cache_hit: the share of
        them that a GPU cache of the host memory held. The benchmark computes its roofline from these bytes.
        """


@dataclass(frozen=True)
class ProjectQuery:
    """Computes a layer's query from a hidden state, rotated for the current positions.

    project: from hidden [B, hidden], and whether it is already normed, to [B, H, 1, D]. inputs: the tensors that a call
    reads besides the hidden state; a call on another stream must keep them alive.
    """

    project: Callable[[Tensor, bool], Tensor]
    inputs: tuple[Tensor, ...]

    def __call__(self, hidden: Tensor, *, normed: bool) -> Tensor:
        """Return the rotated query [B, H, 1, D]; without `normed` the layer's input norm is applied before."""
        return self.project(hidden, normed)


class CacheMethod(ABC):
    """A method of storing and attending to the keys and values of past tokens. An engine has one instance.

    The constructor's annotated arguments are the options of `-o key=value`; all need defaults. It raises ValueError, in
    a full sentence, for a value out of range. Layers share state through the instance.

    kind: what the method does with past tokens; --list_methods groups by it. absent_options: options that other methods
    have and this one lacks, each with the reason and the alternative; the error for such an option says both.
    calibration_version: increase it when `calibrate` computes something else from the same text.
    uses_rope: whether the method needs `rope`, the rotation of a position. The engine sets `rope` before `make_cache`,
    and refuses a model whose rotation depends on more than the position, or is not known.
    """

    kind: ClassVar[MethodKind] = "full"
    absent_options: ClassVar[Mapping[str, str]] = {}
    calibration_version: ClassVar[int] = 1
    uses_rope = False
    rope: RotationOf

    @property
    def prompt_queries(self) -> int | None:
        """How many of a prompt's last queries `prefill` reads; None: all. See `queries_read`."""
        return None

    def check(self, shape: Shape) -> None:  # noqa: B027 (a no-op unless options depend on the shape)
        """Raise ValueError, in a full sentence, if the options do not fit a model of this shape."""

    @abstractmethod
    def make_cache(self, layer: int, config: CacheConfig) -> LayerCache:
        """Return the cache of one layer. Called once per layer, in order, at each allocation."""

    @property
    def calibration_name(self) -> str:
        """The name of the calibration. Methods of one name share results, per checkpoint and text."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.calibration_version}"

    def calibration_text(self) -> str | None:
        """Return a text whose queries and keys the method needs before the first prompt; None: it needs none.

        The text is run once, before `make_cache`, unless `restore` receives the result of an earlier run.
        """
        return None

    def calibrate(self, layer: int, q: Tensor, k: Tensor) -> None:  # noqa: B027 (a no-op unless a method needs it)
        """Receive a layer's q [G, H / G, L, D] and k [G, L, D], rotated, over the calibration text.

        Called once per layer, in order. The result must not depend on options.
        """

    def calibration(self) -> dict[str, Tensor]:
        """Return the result of `calibrate` as tensors by name, for `restore`."""
        return {}

    def restore(self, calibration: dict[str, Tensor], shape: Shape) -> None:  # noqa: B027 (as calibrate)
        """Set what `calibration` returned in an earlier run, instead of calling `calibrate`.

        Raises ValueError, naming the problem, if it does not fit a model of this shape.
        """

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        """Return what a finished sequence's record says of the cache: JSON values by field.

        Called before the slot is freed. A field that the record already has, or a value that is not JSON, is an error.
        """
        return {}


def queries_read(method: CacheMethod) -> int | None:
    """Return how many of a prompt's last queries a method reads; None: all.

    A sweep that keeps prompts in memory drops the others, and `prefill` gets NaN in their place. A number that is too
    small would change results, so that of a method outside this package, which may not have passed the contract, is
    not used.
    """
    return method.prompt_queries if type(method).__module__.startswith("sparsecache.") else None


def most_queries_read(methods: Iterable[CacheMethod]) -> int | None:
    """Return how many of a prompt's last queries one of the methods reads at most; None: all."""
    read = [queries_read(method) for method in methods]
    return None if None in read else max(filter(None, read), default=0)
