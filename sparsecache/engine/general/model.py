"""A transformers model whose full-attention layers keep keys and values in the caches of a method."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from sparsecache.cache.base import CacheMethod, ProjectQuery
from sparsecache.cache.memory import CacheMemory
from sparsecache.cache.model_cache import ModelCache
from sparsecache.engine.general.attention import AttentionCall, handle_attention, inspect_attention
from sparsecache.engine.general.cache import DelegatedLayer
from sparsecache.engine.general.speculation import SpeculationHooks
from sparsecache.errors import UsageError

_SLOT = 0  # sequences are decoded one by one


class CachedModel:
    """One sequence at a time: attention over the prompt by sdpa, then each step's by the caches.

    Layers are counted among the full-attention ones: layer 0 of the method is the first of them. Other layers keep
    transformers' own caches. shape, dtype: of the full-attention layers. num_layers: all layers of the model.
    """

    def __init__(self, model: PreTrainedModel, method: CacheMethod, window: int | None) -> None:
        """window: most tokens of a sequence, None if unknown. Raises UsageError for a model that does not fit."""
        attention = inspect_attention(model, window)
        self.shape, self.dtype, self.num_layers = attention.shape, attention.dtype, attention.num_layers
        self.device = model.device
        self._model, self._method, self._layers = model, method, attention.layers
        self._index = {layer.module: index for index, layer in enumerate(attention.layers)}
        self._hooks = SpeculationHooks(model, attention.layers, attention.modules)
        self._devices = [layer.device for layer in attention.layers]
        self._slots = {device: torch.tensor([_SLOT], device=device) for device in self._devices}
        self._cache: ModelCache | None = None
        self._size = (0, 0)  # most tokens, most new tokens
        self._in_prompt = False

    def calibrate(self, token_ids: Tensor, on_layer: Callable[[int], None]) -> None:
        """Run a text, token_ids: [L], and give the method each layer's queries and keys; keep nothing.

        on_layer: called with 1 after each layer. Raises UsageError for a method that needs hidden states.
        """
        if self._method.calibrates_hidden:
            raise UsageError(
                "This engine cannot calibrate the method with hidden states (guess=linear). Run it once with "
                "--engine sparsecache, which stores the calibration, or pass -o guess=residual."
            )

        def show(call: AttentionCall) -> None:
            index = self._index.get(call.module)
            if index is not None:
                q = self._query(index, call.q)[0]
                self._method.calibrate(index, q.reshape(self.shape.kv_heads, -1, *q.shape[1:]), call.k[0].contiguous())
                on_layer(1)

        with handle_attention(show):
            self._model.base_model(input_ids=token_ids[None], use_cache=False)

    @torch.inference_mode()
    def check(self) -> None:
        """Decode one token. Raises UsageError for a method that speculates where the model has no known place."""
        input_ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self.sequence(1, 2) as past:
            for _ in range(2):
                self._model(input_ids=input_ids, past_key_values=past, use_cache=True)

    @contextmanager
    def sequence(self, prompt_tokens: int, max_new_tokens: int) -> Iterator[Cache]:
        """Return the cache to pass to the model for one sequence, which ends with the block."""
        cache = self._allocate(prompt_tokens + max_new_tokens, max_new_tokens)
        past = DynamicCache(config=self._model.config)
        for layer in self._layers:
            past.layers[layer.index] = DelegatedLayer()
        sources = {
            index: layer.speculation_source
            for index, layer in enumerate(cache.layers)
            if layer.speculation_source is not None
        }
        self._in_prompt = True
        try:
            with self._hooks.watching(sources, self._speculate), handle_attention(self._attend):
                yield past
        finally:
            cache.free_slot(_SLOT)

    @property
    def memory(self) -> CacheMemory | None:
        """Return what the caches of the longest sequence so far allocate."""
        return self._cache.memory if self._cache else None

    def report(self) -> dict[str, Any]:
        """Return what the method reports of the sequence, before it ends."""
        return self._model_cache().report(_SLOT)

    def _allocate(self, max_tokens: int, max_new_tokens: int) -> ModelCache:
        """Return caches for sequences of this size; those of an earlier one that was as long are used again."""
        size = max(max_tokens, self._size[0]), max(max_new_tokens, self._size[1])
        if self._cache is None or size != self._size:
            self._cache, self._size = None, (0, 0)
            self._cache = ModelCache(self._method, self.shape, self._devices, 1, *size, self.dtype)
            self._size = size
        return self._cache

    def _attend(self, call: AttentionCall) -> Tensor | None:
        index = self._index.get(call.module)
        if index is None:
            return None
        cache, is_last = self._model_cache(), index == len(self._layers) - 1
        q, k, v = self._query(index, call.q), call.k.contiguous(), call.v.contiguous()
        if self._in_prompt:
            cache.layers[index].prefill(_SLOT, q[0], k[0], v[0])
            if is_last:
                cache.start_sequence(_SLOT, k.shape[2])
                self._in_prompt = False
            return None
        slots = self._slots[q.device]
        out = cache.layers[index].attend(q, k, v, slots)
        if is_last:
            cache.end_step(slots)
            cache.join()
        return out

    def _speculate(self, index: int, hidden: Tensor) -> None:
        if self._in_prompt:
            return
        cache, device = self._model_cache().layers[index], self._layers[index].device
        normed = cache.speculation_source == "input"

        def project(hidden: Tensor, normed: bool) -> Tensor:
            return self._query(index, self._hooks.query(index, hidden[:, None], normed, cache.speculation_map))

        project_query = ProjectQuery(project, self._hooks.inputs(normed))
        cache.speculate(hidden[:, 0].to(device), project_query, self._slots[device])

    def _query(self, index: int, q: Tensor) -> Tensor:
        """Return queries whose scores, divided by sqrt(D), have the model's own scaling."""
        scale = self._layers[index].query_scale
        return q.contiguous() if abs(scale - 1) < 1e-6 else q * scale

    def _model_cache(self) -> ModelCache:
        assert self._cache is not None, "a sequence is under way"
        return self._cache
