"""A transformers model whose full-attention layers keep keys and values in the caches of a method."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsecache.cache.base import CacheMethod, ProjectQuery, SpeculationSource
from sparsecache.cache.model_cache import ModelCache
from sparsecache.engine.devices import current_device
from sparsecache.engine.general.attention import AttentionCall, handle_attention, inspect_attention
from sparsecache.engine.general.cache import SequenceCaches
from sparsecache.engine.general.loading import reset_dynamic_rope, rope_types
from sparsecache.engine.general.rope import LENGTH_DEPENDENT, rotation_of
from sparsecache.engine.general.speculation import SpeculationHooks


class CachedModel:
    """Prefill of a prompt into a slot with attention by sdpa, or one decode step of several slots by the caches.

    Layers are counted among the full-attention ones: layer 0 of the method is the first of them. Other layers keep
    transformers' own caches. shape, dtype: of the full-attention layers. num_layers: all layers of the model. device:
    of token ids. devices: those of the full-attention layers. cache: the method's caches, None before `allocate`.
    on_logits: receives the logits [B, V] of each prefill and step. one_slot_reason: why sequences cannot be decoded
    together; None: they can.
    """

    graphable = False
    shared_prefill_s = 0.0

    def __init__(self, model: PreTrainedModel, method: CacheMethod, window: int | None) -> None:
        """window: most tokens of a sequence, None if unknown. Raises UsageError for a model that does not fit."""
        attention = inspect_attention(model, window)
        self.shape, self.dtype, self.num_layers = attention.shape, attention.dtype, attention.num_layers
        self.device: torch.device = model.device
        self.devices = tuple(dict.fromkeys(layer.device for layer in attention.layers))
        self.cache: ModelCache | None = None
        self.on_logits: Callable[[Tensor], None] | None = None
        self._model, self._method, self._layers = model, method, attention.layers
        if method.uses_rope:
            method.rope = rotation_of(model, attention.layers)
        self._index = {layer.module: index for index, layer in enumerate(attention.layers)}
        self._hooks = SpeculationHooks(model, attention.layers, attention.modules)
        self._sources: dict[int, SpeculationSource] = {}
        self._sequences = self._new_sequences()
        self._arguments = inspect.signature(model.forward).parameters
        self.one_slot_reason = self._find_one_slot_reason()

    def calibrate(self, token_ids: Tensor, on_layer: Callable[[int], None]) -> None:
        """Run a text, token_ids: [L], and give the method each layer's queries and keys; keep nothing.

        on_layer: called with 1 after each layer.
        """

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
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.allocate(1, 2, 1)
        self.prefill(zero, 0)
        self.step(zero, zero + 1, zero)
        self.cache = None

    def allocate(self, slots: int, max_tokens: int, max_new_tokens: int) -> None:
        """Allocate caches for `slots` sequences of at most max_tokens tokens; earlier ones are freed first."""
        self.cache = None
        self._sequences = self._new_sequences()
        devices = [layer.device for layer in self._layers]
        self.cache = ModelCache(self._method, self.shape, devices, slots, max_tokens, max_new_tokens, self.dtype)
        sources = {index: layer.speculation_source for index, layer in enumerate(self.cache.layers)}
        self._sources = {index: source for index, source in sources.items() if source is not None}

    def prompt_nbytes(self, tokens: int) -> int:
        """Return an estimate of the peak bytes of a prefill, without weights and caches."""
        config, shape = self._model.config.get_text_config(), self.shape
        hidden = getattr(config, "hidden_size", 0)
        experts = getattr(config, "num_experts_per_tok", None) or 1
        intermediate = experts * (getattr(config, "intermediate_size", None) or 4 * hidden)
        attention = (7 * shape.heads + 2 * shape.kv_heads) * shape.head_dim  # with q, k and v that are being stored
        return self.dtype.itemsize * tokens * (4 * hidden + 3 * intermediate + attention)

    def warm_attention_plan(self, tokens: int) -> None:
        """Do nothing: transformers' attention needs no plan."""

    def prefill(self, token_ids: Tensor, slot: int) -> Tensor:
        """Prefill a prompt, token_ids: [L], into a free slot; return the last token's logits [V]."""
        reset_dynamic_rope(self._model)
        with self._model_cache().storing_prompt(slot, len(token_ids)), handle_attention(partial(self._store, slot)):
            logits = self._forward(token_ids[None], self._sequences.start(slot))
        return logits[0]

    def step(self, token_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Decode one token per slot: token_ids, positions and slots [B] on the device; return logits [B, V]."""
        slots_on = {device: slots.to(device) for device in self.devices}
        past, mask = self._sequences.of(tuple(slots.tolist()))
        inputs = {"position_ids": positions[:, None]} if "position_ids" in self._arguments else {}
        if mask is not None:
            inputs["attention_mask"] = mask
        with (
            self._hooks.watching(self._sources, partial(self._speculate, slots_on)),
            handle_attention(partial(self._attend, slots_on)),
        ):
            logits = self._forward(token_ids[:, None], past, **inputs)
        self._model_cache().end_step(slots)
        return logits

    def _forward(self, input_ids: Tensor, past: Cache, **inputs: Tensor) -> Tensor:
        """Run the model and return the logits [B, V] of the last token."""
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}
        output = self._model(input_ids=input_ids, past_key_values=past, use_cache=True, **inputs, **last_only)
        logits: Tensor = output.logits[:, -1]
        if self.on_logits is not None:
            self.on_logits(logits)
        return logits

    def _store(self, slot: int, call: AttentionCall) -> None:
        index = self._index.get(call.module)
        if index is not None:
            cache = self._model_cache()
            q, k, v = self._query(index, call.q)[0], call.k[0].contiguous(), call.v[0].contiguous()
            with current_device(q.device), cache.storing_layer(index, q, k, v):
                cache.layers[index].prefill(slot, q, k, v)

    def _attend(self, slots_on: dict[torch.device, Tensor], call: AttentionCall) -> Tensor | None:
        index = self._index.get(call.module)
        if index is None:
            return None
        q, k, v = self._query(index, call.q), call.k.contiguous(), call.v.contiguous()
        with current_device(q.device):
            return self._model_cache().layers[index].attend(q, k, v, slots_on[q.device])

    def _speculate(self, slots_on: dict[torch.device, Tensor], index: int, hidden: Tensor) -> None:
        cache, device = self._model_cache().layers[index], self._layers[index].device
        normed = cache.speculation_source == "input"

        def project(hidden: Tensor, normed: bool) -> Tensor:
            return self._query(index, self._hooks.query(index, hidden[:, None], normed))

        project_query = ProjectQuery(project, self._hooks.inputs(normed))
        hidden = hidden[:, 0].to(device)
        with current_device(device):
            cache.speculate(hidden, project_query, slots_on[device])

    def _query(self, index: int, q: Tensor) -> Tensor:
        """Return queries whose scores, divided by sqrt(D), have the model's own scaling."""
        scale = self._layers[index].query_scale
        return q.contiguous() if abs(scale - 1) < 1e-6 else q * scale

    def _new_sequences(self) -> SequenceCaches:
        return SequenceCaches(self._model.config, [layer.index for layer in self._layers], self.device)

    def _find_one_slot_reason(self) -> str | None:
        if "position_ids" not in self._arguments:
            return f"{type(self._model).__name__} takes no positions"
        if kinds := rope_types(self._model) & LENGTH_DEPENDENT:
            return f"{' and '.join(sorted(kinds))} RoPE depends on the longest sequence"
        if getattr(self._model.config.get_text_config(), "attn_temperature_tuning", False):
            return "it scales queries by the length of the longest sequence"
        if not self._sequences.can_join:
            return "it has layers that keep more than a sliding window in transformers' own cache"
        return None

    def _model_cache(self) -> ModelCache:
        assert self.cache is not None, "call allocate first"
        return self.cache
