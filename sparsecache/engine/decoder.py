"""The forward pass of a model: prefill of a prompt into a slot, or one decode step of several slots.

The caches of a ModelCache hold keys and values. Nothing here depends on the cache method.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsecache.cache.base import CacheMethod, ProjectQuery, SpeculationSource
from sparsecache.cache.model_cache import ModelCache
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.kernels._triton import uses_kernels
from sparsecache.kernels.attention import (
    padded_prompt_length,
    prompt_attention,
    prompt_attention_with_logsumexp,
    warm_attention_plan,
)
from sparsecache.kernels.fp8 import Matrix, to_tensor
from sparsecache.kernels.linear import add_linear, linear, linear_rope, norm_for, swiglu
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.rotation import Rotation, rotate, split_and_rotate

_CHUNK = 8192  # tokens of a prompt in one SwiGLU
OnQKV = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]
"""A callback that receives a layer, its q [H, L, D], k and v [G, L, D] of a prompt, and the log-sum-exp of its
attention [H, L], None where it was not asked for or is not computed."""


class Decoder:
    """A model: its architecture, weights and RoPE, and the cache method of its layers.

    device: of the embedding and of token ids. devices: those of the layers, in order; logits are on the last. cache:
    the caches, None before `allocate`. shared_prefill_s: seconds of the latest prompt's prefill if a
    prefill cache already held it, else 0.
    """

    shared_prefill_s = 0.0

    def __init__(self, architecture: Architecture, weights: Weights, rope: Rope, method: CacheMethod):
        self.layer_devices = [layer.qkv.device for layer in weights.layers]
        self.devices = tuple(dict.fromkeys(self.layer_devices))
        self.shape = architecture.shape
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.cache: ModelCache | None = None
        self._eps = architecture.norm_eps
        self._weights = weights
        self._rope = rope
        self._method = method
        if method.uses_rope:
            method.rope = rope.rotation_of()
        rows = self.shape.heads * self.shape.head_dim
        self._query_weights = [_query_rows(layer, rows) for layer in weights.layers]

    @property
    def graphable(self) -> bool:
        """Return whether a step may be captured in a CUDA graph. Requires `allocate`."""
        on_one_gpu = self.device.type == "cuda" and len(self.devices) == 1
        return on_one_gpu and uses_kernels(self.device) and self._rope.graphable and self._model_cache().graphable

    def allocate(self, slots: int, max_tokens: int, max_new_tokens: int) -> None:
        """Allocate caches for `slots` sequences of at most max_tokens tokens; earlier ones are freed first."""
        self.cache = None
        self.cache = ModelCache(
            self._method, self.shape, self.layer_devices, slots, max_tokens, max_new_tokens, self.dtype
        )

    def prefill(self, token_ids: Tensor, slot: int) -> Tensor:
        """Prefill a prompt, token_ids: [L], into a free slot; return the last token's logits [V].

        Attention over the prompt is dense and exact. No L x L tensor is built.
        """
        cache = self._model_cache()

        def store(layer: int, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor | None) -> None:
            if logsumexp is None:
                with cache.storing_layer(layer, q, k, v):
                    cache.layers[layer].prefill(slot, q, k, v)
            else:
                with cache.storing_layer(layer, q, k, v, logsumexp):
                    cache.layers[layer].prefill_with_logsumexp(slot, q, k, v, logsumexp)

        logsumexp_layers = [index for index, layer in enumerate(cache.layers) if layer.uses_logsumexp]
        with cache.storing_prompt(slot, len(token_ids)):
            hidden = self._forward_prompt(token_ids, store, logsumexp_layers)
            return self._lm_head(hidden)[0]

    def warm_attention_plan(self, tokens: int) -> None:
        """Let cuDNN plan the attention over a prompt of this length on the host, unless it is planned.

        Requires `allocate`. It runs the attention of one layer once, over arbitrary values.
        """
        for with_logsumexp in {layer.uses_logsumexp for layer in self._model_cache().layers}:
            self._warm_attention_plan(tokens, with_logsumexp)

    def _warm_attention_plan(self, tokens: int, with_logsumexp: bool) -> None:
        shape = self.shape
        for device in self.devices:
            warm_attention_plan(tokens, shape.heads, shape.kv_heads, shape.head_dim, device, self.dtype, with_logsumexp)

    def calibrate(self, token_ids: Tensor, on_layer: Callable[[int], None]) -> None:
        """Run a text, token_ids: [L], and pass each layer's queries and keys to the method. Caches nothing.

        on_layer: called with 1 after each layer.
        """

        def calibrate_layer(layer: int, q: Tensor, k: Tensor, *_: Tensor | None) -> None:
            self._method.calibrate(layer, q.view(self.shape.kv_heads, -1, *q.shape[1:]), k)
            on_layer(1)

        self._forward_prompt(token_ids, calibrate_layer)

    def step(self, token_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Decode one token per slot: token_ids, positions and slots [B] on the device; return logits [B, V]."""
        caches, all_slots = self._model_cache(), slots
        x = self._weights.embedding[token_ids]  # [B, hidden]
        rotation = self._rope.cos_sin(positions, positions + 1, self.dtype)
        for index, (layer, cache) in enumerate(zip(self._weights.layers, caches.layers, strict=True)):
            x, cos, sin, slots = _to_layer_device(layer, x, *rotation, slots)
            rotation = Rotation(cos, sin)
            normed = norm_for(layer.qkv, x, layer.input_norm, self._eps)
            self._speculate(index + 1, "input", normed, rotation, slots)
            q, k, v = self._qkv(normed, layer, rotation)  # [B, H or G, 1, D]
            out = cache.attend(q, k, v, slots)
            x = linear(out.flatten(1), layer.output, layer.output_bias, residual=x)
            self._speculate(index + 1, "residual", x, rotation, slots)
            x = linear(self._mlp_hidden(x, layer), layer.down, layer.down_bias, residual=x)
        caches.end_step(all_slots, wait=False)  # on a side stream, while the head runs
        try:
            logits = self._lm_head(x)
        finally:  # the capture of a failed step cannot end while a stream is not joined
            caches.join()
        return logits

    def _speculate(
        self, index: int, source: SpeculationSource, hidden: Matrix, rotation: Rotation, slots: Tensor
    ) -> None:
        """Pass a hidden state of the previous layer to layer `index`'s cache, if it speculates from `source`."""
        caches = self._model_cache().layers
        if index == len(caches) or caches[index].speculation_source != source:
            return
        layer, query_weights = self._weights.layers[index], self._query_weights[index]
        hidden, cos, sin, slots = _to_layer_device(layer, to_tensor(hidden), *rotation, slots)

        def project(hidden: Tensor, normed: bool) -> Tensor:
            x = hidden if normed else norm_for(query_weights.qkv, hidden, layer.input_norm, self._eps)
            return self._qkv_rope(x, query_weights, Rotation(cos, sin))[:, :, None]

        caches[index].speculate(hidden, ProjectQuery(project, (cos, sin)), slots)
        _to_layer_device(self._weights.layers[index - 1])  # the previous layer continues on its device

    def query_nbytes(self, layer: int) -> int:
        """Return the bytes of a layer's query weights, which speculation reads a second time per step."""
        return self._query_weights[layer].qkv.nbytes

    def _model_cache(self) -> ModelCache:
        assert self.cache is not None, "call allocate first"
        return self.cache

    def _qkv(self, normed: Matrix, layer: LayerWeights, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's q [B, H, 1, D] and k, v [B, G, 1, D], rotated."""
        shape = self.shape
        heads = self._qkv_rope(normed, layer, rotation)
        q, k, v = heads[:, :, None].tensor_split((shape.heads, shape.heads + shape.kv_heads), dim=1)
        return q, k, v

    def _qkv_rope(self, normed: Matrix, layer: LayerWeights, rotation: Rotation) -> Tensor:
        """Project [N, hidden] as `_heads`, and rotate queries and keys."""
        num_rotated = self.shape.heads + self.shape.kv_heads
        if layer.q_norm is None:
            return linear_rope(normed, layer.qkv, layer.qkv_bias, rotation, num_rotated)
        heads = self._heads(normed, layer)
        return torch.cat((rotate(heads[:, :num_rotated], rotation), heads[:, num_rotated:]), dim=1)

    def _heads(self, normed: Matrix, layer: LayerWeights) -> Tensor:
        """Project [N, hidden] to the heads of q, k and v, or of q alone: [N, heads, D]."""
        shape = self.shape
        heads = linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, shape.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            return heads
        q, k, v = heads.tensor_split((shape.heads, shape.heads + shape.kv_heads), dim=1)
        return torch.cat((self._normed(q, layer.q_norm), self._normed(k, layer.k_norm), v), dim=1)

    def prompt_nbytes(self, tokens: int) -> int:
        """Return an estimate of the peak bytes of a prefill, without weights and caches."""
        shape = self.shape
        hidden, intermediate = self._weights.embedding.shape[1], len(self._weights.layers[0].gate_up)
        # q, k and v three times: as projected, rotated, and those of the previous layer while they are stored.
        per_token = 2 * hidden + 3 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        return self.dtype.itemsize * (tokens * per_token + 2 * min(tokens, _CHUNK) * (intermediate + 2 * hidden))

    def _forward_prompt(self, token_ids: Tensor, on_qkv: OnQKV, logsumexp_layers: Sequence[int] = ()) -> Tensor:
        """Return the last token's hidden state [1, hidden].

        on_qkv: receives each layer's q, k and v, and the log-sum-exp of `logsumexp_layers`. The last layer has none,
        since its attention is computed for the last token alone.
        """
        positions = torch.arange(len(token_ids), device=self.device)
        rotation = self._rope.cos_sin(positions, positions[-1:] + 1, self.dtype)
        x = self._weights.embedding[token_ids]  # [L, hidden]
        for index, layer in enumerate(self._weights.layers):
            x, cos, sin = _to_layer_device(layer, x, *rotation)
            rotation = Rotation(cos, sin)
            is_last = index == len(self._weights.layers) - 1
            with_logsumexp = index in logsumexp_layers and not is_last
            heads = self._prompt_attention(index, x, rotation, on_qkv, 1 if is_last else len(x), with_logsumexp)
            x = x[-len(heads) :]
            # In chunks, since the hidden layer of the SwiGLU takes several times the memory of x.
            for rows, head_rows in zip(torch.split(x, _CHUNK), torch.split(heads, _CHUNK), strict=True):
                add_linear(rows, head_rows, layer.output, layer.output_bias)
                add_linear(rows, self._mlp_hidden(rows, layer), layer.down, layer.down_bias)
        return x

    def _prompt_attention(
        self, index: int, x: Tensor, rotation: Rotation, on_qkv: OnQKV, num_queries: int, with_logsumexp: bool
    ) -> Tensor:
        """Return a layer's attention over a prompt x [L, hidden] for its last 1 or L tokens: [num_queries, H * D].

        with_logsumexp: pass the log-sum-exp to `on_qkv`, if the attention computes it. Requires num_queries == L.
        """
        length, layer = len(x), self._weights.layers[index]
        heads = self._heads(norm_for(layer.qkv, x, layer.input_norm, self._eps), layer)
        q, k, v = split_and_rotate(heads, rotation, self.shape.kv_heads, padded_prompt_length(x))  # [H or G, L', D]
        del heads
        prompt = q[:, :length], k[:, :length], v[:, :length]
        if with_logsumexp:
            out, logsumexp = prompt_attention_with_logsumexp(q, k, v)
            on_qkv(index, *prompt, None if logsumexp is None else logsumexp[:, :length])
            return out[:, :length].transpose(0, 1).flatten(1)
        on_qkv(index, *prompt, None)
        if num_queries < length:
            q, k, v = q[:, length - num_queries : length], k[:, :length], v[:, :length]
        return prompt_attention(q, k, v)[:, :num_queries].transpose(0, 1).flatten(1)

    def _mlp_hidden(self, x: Tensor, layer: LayerWeights) -> Matrix:
        """Return the hidden layer of the SwiGLU over x [N, hidden]: [N, intermediate]."""
        normed = norm_for(layer.gate_up, x, layer.mlp_norm, self._eps)
        return swiglu(normed, layer.gate_up, layer.gate_up_bias)

    def _lm_head(self, x: Tensor) -> Tensor:
        return linear(self._normed(x, self._weights.norm), self._weights.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps)


def _query_rows(layer: LayerWeights, rows: int) -> LayerWeights:
    """Return a layer that projects to queries alone: the first `rows` rows of the projection."""
    return replace(layer, qkv=layer.qkv[:rows], qkv_bias=None if layer.qkv_bias is None else layer.qkv_bias[:rows])


def _to_layer_device(layer: LayerWeights, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors on the layer's device, copied if the model is split there; make it the current device."""
    device = layer.qkv.device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return [tensor.to(device) for tensor in tensors]
