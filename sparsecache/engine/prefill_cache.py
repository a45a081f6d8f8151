"""A decoder that prefills each prompt once, for studies that decode the same prompts with many methods.

The queries, keys and values of a prompt are the same for every method, so they are cached for the next one.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.devices import synchronize
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights

LayerQKV = list[tuple[Tensor, Tensor, Tensor]]
_PADDING = 512  # tokens that a tensor of a prompt may be longer than the prompt on a GPU


@dataclass(frozen=True)
class CachedPrompt:
    """A prompt's last queries, q [H, N, D] with N <= L, and all keys and values, k and v [G, L, D], per layer.

    logits: of its last token, [V]. seconds: duration of its prefill.
    """

    layers: LayerQKV
    logits: Tensor
    seconds: float

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors, padding included."""
        storages = [tensor.untyped_storage() for qkv in self.layers for tensor in qkv]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + self.logits.nbytes


class PrefillCache:
    """Prompts by token ids, for decoders of one checkpoint and dtype.

    limit_nbytes: the most bytes of all prompts. queries: the last queries of each prompt that are kept; None: all. A
    prompt of L tokens takes layers * (H * min(L, queries) + 2 G * L) * D values.
    """

    def __init__(self, limit_nbytes: float = math.inf, queries: int | None = None) -> None:
        self.limit_nbytes, self.queries = limit_nbytes, queries
        self.nbytes = 0
        self._prompts: dict[tuple[int, ...], CachedPrompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        return tuple(token_ids) in self._prompts

    def get(self, token_ids: Tensor) -> CachedPrompt | None:
        """Return a prompt, None if it is not there."""
        return self._prompts.get(_key(token_ids))

    def add(self, token_ids: Tensor, prompt: CachedPrompt) -> None:
        """Keep a prompt."""
        self._prompts[_key(token_ids)] = prompt
        self.nbytes += prompt.nbytes

    def halve(self) -> None:
        """Drop the latest prompts until at most half of the bytes are left, but not the first one. Set the limit."""
        half = self.nbytes / 2
        while self.nbytes > half and len(self._prompts) > 1:
            self.nbytes -= self._prompts.popitem()[1].nbytes
        self.limit_nbytes = self.nbytes

    def clear(self, limit_nbytes: float = math.inf) -> None:
        """Drop all prompts, and set the limit."""
        self._prompts.clear()
        self.nbytes, self.limit_nbytes = 0, limit_nbytes


class PrefillCachingDecoder(Decoder):
    """A Decoder that prefills a prompt only if it is not in its prefill cache, which decoders may share.

    A prompt for which the cache has no room is prefilled each time. The cache must keep the queries that the method
    reads (its `prompt_queries`).
    """

    def __init__(
        self, architecture: Architecture, weights: Weights, rope: Rope, method: CacheMethod, prompts: PrefillCache
    ):
        super().__init__(architecture, weights, rope, method)
        read, kept = method.prompt_queries, prompts.queries
        if kept is not None and (read is None or read > kept):
            count = "all" if read is None else read
            raise ValueError(f"The method reads {count} queries of a prompt, but only {kept} are kept.")
        self._prompts = prompts

    def warm_attention_plan(self, tokens: int) -> None:
        """Do nothing: most prompts are not prefilled again."""

    def qkv_nbytes(self, tokens: int) -> int:
        """Return the most bytes that a prompt takes in a prefill cache."""
        shape, padded = self.shape, tokens + (_PADDING if self.device.type == "cuda" else 0)
        kept = self._prompts.queries
        queries = padded if kept is None else min(padded, kept)
        values = shape.layers * (shape.heads * queries + 2 * shape.kv_heads * padded) * shape.head_dim
        return self.dtype.itemsize * (values + len(self._weights.head))

    @torch.inference_mode()
    def cache_prompt(self, token_ids: Tensor, next_tokens: int | None = None) -> CachedPrompt | None:
        """Return a prompt, prefilled unless it is in the cache; None if the cache has no room for it.

        next_tokens: the length of the next prompt, whose attention the host plans while the device works.
        """
        found = self._prompts.get(token_ids)
        if found is not None or self._prompts.nbytes + self.qkv_nbytes(len(token_ids)) > self._prompts.limit_nbytes:
            return found
        synchronize(self.devices)
        began, layers = time.perf_counter(), LayerQKV()
        kept = self._prompts.queries
        hidden = self._forward_prompt(token_ids, lambda layer, q, k, v, _: layers.append(_last_queries(q, k, v, kept)))
        logits = self._lm_head(hidden)[0]
        if next_tokens is not None:
            with suppress(Exception):  # the prefill of that prompt reports the error
                self._warm_attention_plan(next_tokens, with_logsumexp=False)
        synchronize(self.devices)
        prompt = CachedPrompt(layers, logits, time.perf_counter() - began)
        self._prompts.add(token_ids, prompt)
        return prompt

    def prefill(self, token_ids: Tensor, slot: int) -> Tensor:
        known = self._prompts.get(token_ids)
        self.shared_prefill_s = 0.0 if known is None else known.seconds
        prompt = known or self.cache_prompt(token_ids)
        if prompt is None:
            return super().prefill(token_ids, slot)
        cache = self._model_cache()
        with cache.storing_prompt(slot, len(token_ids)):
            for layer, (last, k, v) in enumerate(prompt.layers):
                q = _all_queries(last, k.shape[1])
                with cache.storing_layer(layer, q, k, v):
                    cache.layers[layer].prefill(slot, q, k, v)
        return prompt.logits.clone()  # the generator masks stop ids in place


def _last_queries(q: Tensor, k: Tensor, v: Tensor, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a prompt's last `count` queries and all keys and values, without the memory of the other queries."""
    if count is None:
        return q, k, v
    keys, values = torch.cat([k, v]).chunk(2)  # copies, since q, k and v may be views of one tensor
    return q[:, max(0, q.shape[1] - count) :].clone(), keys, values


def _all_queries(last: Tensor, length: int) -> Tensor:
    """Return queries [H, L, D] of a prompt, NaN for those that were dropped."""
    heads, count, head_dim = last.shape
    if count == length:
        return last
    queries = last.new_full((heads, length, head_dim), torch.nan)
    queries[:, length - count :] = last
    return queries


def _key(token_ids: Tensor) -> tuple[int, ...]:
    return tuple(token_ids.tolist())
