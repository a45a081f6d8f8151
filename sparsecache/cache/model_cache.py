"""The caches of all layers of a model, and the sequence lengths and statistics that they share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, CacheMethod, LayerCache, Shape
from sparsecache.cache.memory import measure_memory
from sparsecache.cache.stats import DeviceStats, SequenceStats, mean_share
from sparsecache.cache.streams import PromptStream, SideStream


class ModelCache:
    """A LayerCache per layer for `slots` sequences of at most `max_tokens` tokens.

    layers: the caches, in order. memory: what they allocate. layer_stats: the counters of each, which a sparse cache
    writes. A layer's tensors are on its device; layers share one tensor per device.
    """

    def __init__(
        self,
        method: CacheMethod,
        shape: Shape,
        devices: Sequence[torch.device],
        slots: int,
        max_tokens: int,
        max_new_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        """devices: of each layer. max_new_tokens: most generated tokens of a sequence."""
        self._method = method
        self._stats = {
            device: DeviceStats(devices.count(device), slots, shape.kv_heads, max_tokens, device)
            for device in dict.fromkeys(devices)
        }
        self._prompt_tokens: dict[int, int] = {}
        self._ending_slots: list[Tensor] = []
        self._devices = list(devices)
        self.layers: list[LayerCache] = []
        self._streams = {device: SideStream(device, high_priority=True) for device in self._stats}
        self._prompt_streams = {device: PromptStream(device) for device in self._stats}
        self.layer_stats = [self._stats[device].layers[devices[:at].count(device)] for at, device in enumerate(devices)]
        for layer, device in enumerate(devices):
            config = CacheConfig(
                shape, slots, max_tokens, max_new_tokens, device, dtype,
                self._stats[device].seq_lens, self.layer_stats[layer], self._streams[device],
            )  # fmt: skip
            self.layers.append(method.make_cache(layer, config))
        self.memory = measure_memory(self.layers, devices, shape, slots, max_tokens, dtype)
        self._sparse = {
            device: [cache.sparse for cache, place in zip(self.layers, devices, strict=True) if place == device]
            for device in self._stats
        }

    @property
    def graphable(self) -> bool:
        """Return whether a decode step of the caches may be captured in a CUDA graph."""
        return all(cache.graphable for cache in self.layers)

    @contextmanager
    def storing_prompt(self, slot: int, tokens: int) -> Iterator[None]:
        """Run the block, which stores a prompt in every layer, and start the sequence after it.

        slot: a free one. tokens: of the prompt. The block stores each layer inside `storing_layer`. On an error no
        sequence starts, and the current streams wait for what was stored.
        """
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # after an error that ends CUDA for the process, which is raised below
                self._join_prompt()
            raise
        self.start_sequence(slot, tokens)

    @contextmanager
    def storing_layer(self, layer: int, *tensors: Tensor) -> Iterator[None]:
        """Run the block, which stores a layer's prompt, on a side stream; it reads the tensors, q, k and v.

        It runs in parallel with the model until the next layer of the device is stored, or the sequence starts.
        """
        with self._prompt_streams[self._devices[layer]].storing(*tensors):
            yield

    def start_sequence(self, slot: int, prompt_tokens: int) -> None:
        """Start a sequence in a free slot, after the prefill of every layer's cache and the work it deferred."""
        self._join_prompt()
        self._prompt_tokens[slot] = prompt_tokens
        for stats in self._stats.values():
            stats.start_sequence(slot, prompt_tokens)

    def end_step(self, slots: Tensor, wait: bool = True) -> None:
        """End a decode step of slots [B], after every layer. The work is on side streams.

        wait: let the current streams wait for it. If False, call `join` before anything reads the caches.
        """
        for device, stats in self._stats.items():
            self._ending_slots.append(slots.to(device))  # a copy's memory must not be reused before `join`
            with self._streams[device].after():
                stats.end_step(self._ending_slots[-1], any(self._sparse[device]))
        if wait:
            self.join()

    def join(self) -> None:
        """Let the current streams wait for the end of the step."""
        for stream in self._streams.values():
            stream.join()
        self._ending_slots.clear()

    def _join_prompt(self) -> None:
        """Let the current streams wait for the storing of a prompt, and drop the tensors that it read."""
        for stream in self._prompt_streams.values():
            stream.join()
        self.join()

    def report(self, slot: int, discard_last_step: bool = False) -> dict[str, Any]:
        """Return what the method reports of a sequence, before `free_slot`.

        discard_last_step: whether the slot's latest step came after the end of the sequence, and does not count.
        """
        prompt_tokens = self._prompt_tokens[slot]
        shares: list[int] = []
        attended = seq_len = 0
        for device, stats in self._stats.items():
            seq_len, layer_shares, layer_counts = stats.read(slot, discard_last_step)
            for sparse, of_shares, of_counts in zip(self._sparse[device], layer_shares, layer_counts, strict=True):
                if sparse:
                    shares += of_shares
                    attended += sum(of_counts)
        sparse_layers = sum(map(sum, self._sparse.values()))
        steps = seq_len - prompt_tokens
        return self._method.report(
            SequenceStats(
                prompt_tokens=prompt_tokens,
                steps=steps,
                kept=mean_share(shares, steps),
                attended=attended,
                sparse_layers=sparse_layers,
                dense_layers=len(self.layers) - sparse_layers,
                slot=slot,
                last_step_discarded=discard_last_step,
            )
        )

    def free_slot(self, slot: int) -> None:
        """Remove the sequence from a slot. Does nothing for a free slot."""
        self._prompt_tokens.pop(slot, None)
        for stats in self._stats.values():
            stats.start_sequence(slot, 0)
        for cache in self.layers:
            cache.free_slot(slot)
