"""The cache of a sparse layer: partial keys to speculate with, and the keys and values that are fetched.

A layer's selection and fetch run on a side stream during the attention and MLP of the previous layer. The current
token is stored on another side stream. Nothing waits for the host, so a step can be a CUDA graph.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, ProjectQuery, StepBytes
from sparsecache.cache.host import allocate, copy_into
from sparsecache.cache.streams import SideStream, record_event, wait_event
from sparsecache.kernels.append_speculated import append_speculated
from sparsecache.kernels.decode import attend_selected
from sparsecache.kernels.gather import GatheredRows, gather_rows
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Selection, SelectionParams, threshold_select
from sparsecache.methods.infinigen.gpu_cache import clear_slot, make_gpu_cache
from sparsecache.methods.infinigen.partial_keys import PartialKeys

if TYPE_CHECKING:
    from sparsecache.methods.infinigen import InfiniGen


class DeviceStreams:
    """The side streams of one device, which its layers share.

    Rows may still be fetched, and current tokens stored, when the next speculation begins. With offload all have
    priority, since the link is the bottleneck. Otherwise they share the GPU with the current stream.
    """

    def __init__(self, device: torch.device, offload: bool) -> None:
        self.offload = offload
        self.speculation, self.storing = (SideStream(device, high_priority=offload) for _ in range(2))
        self.transfer = SideStream(device, high_priority=True)
        # The projections of one sequence are thousands of small programs. A selection without priority would wait
        # until all have begun.
        self.selection = SideStream(device, high_priority=True)
        self.gpu_cache_event: Any = None  # recorded once the latest layer's rows are in the GPU cache
        self.rows_in_transfer: Tensor | None = None  # a prompt's rows that are being copied to the host
        self.last_cache: LayerCache | None = None  # the device's last layer, after which the streams join

    def end_transfer(self) -> None:
        """Let the current stream wait for the rows of a prompt that are being copied to the host, and drop them."""
        if self.rows_in_transfer is not None:
            self.transfer.join()
            self.rows_in_transfer = None

    def join(self) -> None:
        """Let the current stream wait for all side streams that were used; a graph must not wait for another one."""
        for stream in (self.speculation, self.storing, *([self.transfer] if self.offload else [])):
            stream.join()


@dataclass(frozen=True)
class _Speculated:
    """What `attend` needs: the selection, its rows with offload, and on a GPU the event recorded after both."""

    selection: Selection
    rows: GatheredRows | None
    event: Any


class InfiniGenCache(LayerCache):
    """Keys and values of one layer, its partial keys, and the selection of the current step.

    store: [slots, G, T, 2, D], key and value side by side, on the device or in pinned host memory.
    """

    def __init__(
        self, method: "InfiniGen", config: CacheConfig, matrices: Tensor | None, budgets: Tensor, streams: DeviceStreams
    ) -> None:
        """matrices: [G, D, D], the layer's skewing matrices, or None; budgets: [max_tokens + 1] int64."""
        self.config = config
        self.speculation_source = method.guess
        self._offload, self._streams = method.offload, streams
        self._params = SelectionParams(
            method.alpha, budgets, method.fetch == "mean", method.sinks, method.recent, method.group, method.top_p
        )
        self._width = min(config.max_tokens, int(budgets[-1]))
        self._partial = PartialKeys(matrices, method.channels(config.shape), config, method.partial_bits)
        size = (config.slots, config.shape.kv_heads, config.max_tokens, 2, config.shape.head_dim)
        self.store = allocate(size, config.dtype, config.device, method.offload)
        self._gpu_cache = make_gpu_cache(method.gpu_cache, config) if method.gpu_cache else None
        self._speculated: _Speculated | None = None

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._partial.prefill(slot, q, k)
        if self._gpu_cache is not None:
            clear_slot(self._gpu_cache, slot)
        rows = self.store[slot]
        if not self._offload:
            copy_into(rows[:, :, 0], k)
            copy_into(rows[:, :, 1], v)
            return
        # Only one layer's rows are on the device at a time, however far the host is ahead.
        streams = self._streams
        streams.end_transfer()
        streams.rows_in_transfer = torch.stack((k, v), 2)  # [G, L, 2, D]
        with streams.transfer.after():  # copied while the next layer computes
            copy_into(rows, streams.rows_in_transfer)
        if streams.last_cache is self:
            streams.end_transfer()

    def free_slot(self, slot: int) -> None:
        self._streams.end_transfer()  # of a prompt that failed before the last layer

    def speculate(self, hidden: Tensor, project_query: ProjectQuery, slots: Tensor) -> None:
        """Select past tokens by the speculated query; with offload, fetch them."""
        with self._streams.speculation.reading(hidden, *project_query.inputs, slots):
            self._speculated = self._select(project_query(hidden, normed=self.speculation_source == "input"), slots)

    def _select(self, q: Tensor, slots: Tensor) -> _Speculated:
        streams, seq_lens, device = self._streams, self.config.seq_lens, q.device
        partial = self._partial
        scores = speculated_scores(
            q, partial.projection, partial.keys, seq_lens, slots, self._offload, self._params.group == "softmax"
        )
        if len(slots) == 1:
            with streams.selection.in_turn():
                selection = threshold_select(scores, seq_lens, slots, self._params, self._width)
        else:
            selection = threshold_select(scores, seq_lens, slots, self._params, self._width)
        if not self._offload:
            return _Speculated(selection, None, record_event(device))
        with streams.transfer.reading(slots, *selection):
            wait_event(streams.gpu_cache_event, device)  # the new rows may take the memory of the latest layer's
            rows = gather_rows(self.store, slots, *selection, self._gpu_cache)
            return _Speculated(selection, rows, record_event(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        speculated, streams, store = self._speculated, self._streams, self.store
        assert speculated is not None, "speculate comes before attend"
        self._speculated = None
        wait_event(speculated.event, q.device)
        positions, counts = speculated.selection
        if speculated.rows is not None:
            out = speculated.rows.attend(q, k, v, counts)
        else:
            out = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], slots, positions, counts)
        with streams.storing.reading(q, k, v, slots, positions, counts):  # only the next step reads what is stored here
            partial = self._partial
            append_speculated(k, v, partial.projection, partial.keys, store, self.config.seq_lens, slots)
            self.config.stats.record(counts, slots)
            if speculated.rows is not None and self._gpu_cache is not None:
                speculated.rows.insert(slots, positions, counts)
                streams.gpu_cache_event = record_event(q.device)
        if streams.last_cache is self:
            streams.gpu_cache_event = None
            streams.join()
        return out

    def selected(self) -> Tensor:
        """Return the past positions of the current step, before `attend`: [B, G, N], ascending, then -1."""
        assert self._speculated is not None, "call speculate before"
        if self._speculated.event is not None:
            self._speculated.event.synchronize()
        positions, counts = self._speculated.selection
        beyond = self.config.max_tokens
        is_selected = torch.arange(positions.shape[2], device=counts.device) < counts[..., None]
        positions = positions.masked_fill(~is_selected, beyond).sort(dim=2).values
        return positions.masked_fill(positions == beyond, -1)

    def cache_hits(self, slot: int, discard_last_step: bool) -> int:
        """Return how many of a slot's selected tokens were in the GPU cache."""
        if self._gpu_cache is None:
            return 0
        total, latest = self._gpu_cache.hits[:, slot].sum(1).tolist()
        return int(total - latest if discard_last_step else total)

    @property
    def head_nbytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return 2 * self.config.shape.head_dim * self.config.dtype.itemsize

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        kv_heads = self.config.shape.kv_heads
        partial = seq_len * kv_heads * self._partial.token_nbytes
        read = attended * self.config.token_nbytes
        return StepBytes(partial + read, (1 - cache_hit) * read if self._offload else 0.0)
