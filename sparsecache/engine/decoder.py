"""One forward pass: a prompt into a slot, or one token for each of several slots.

Knows weights and tokens; what becomes of keys and values is the method's business, and there is no branch on
which method it is.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope, rotate
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.kernels.attention import attention
from sparsecache.methods.base import Method

_PIECE = 8192  # tokens
TakeLayer = Callable[[int, Tensor, Tensor, Tensor], None]


class Decoder:
    """A model: an architecture, its weights and its rotations, over a method's cache.

    device takes token ids in; devices are all that the layers lie on, in order, and logits come from the last.
    """

    def __init__(self, architecture: Architecture, weights: Weights, rope: Rope, method: Method):
        places = tuple(layer.qkv.device for layer in weights.layers)
        self.devices = tuple(dict.fromkeys(places))
        self.shape = replace(architecture.shape, devices=places) if len(self.devices) > 1 else architecture.shape
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self._eps = architecture.norm_eps
        self._weights = weights
        self._rope = rope
        self._method = method

    def prefill(self, token_ids: Tensor, slot: int, max_new_tokens: int) -> Tensor:
        """Runs a prompt, token_ids: [L], into an empty slot; returns the last token's logits [V].

        Attention over the prompt is dense and exact, and no L x L tensor is built.
        """

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            self._method.prefill(layer, slot, q, k, v, max_new_tokens)

        return self._head(self._prompt(token_ids, keep)[-1])

    def calibrate(self, token_ids: Tensor, tick: Callable[[int], None]) -> None:
        """Runs a text, token_ids: [L], and shows the method each layer's queries; keeps nothing.

        `tick` is called with 1 after each layer.
        """

        def show(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            self._method.calibrate(layer, q.view(self.shape.kv_heads, -1, *q.shape[1:]))
            tick(1)

        self._prompt(token_ids, show)

    def step(self, token_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Decodes one token in each slot: token_ids, positions and slots [B] on the device; logits [B, V]."""
        x = self._weights.embedding[token_ids]  # [B, hidden]
        cos, sin = self._rope.cos_sin(positions, positions + 1, self.dtype)
        cos, sin = cos[:, None, None], sin[:, None, None]  # [B, 1, 1, D]
        guesses_from = self._method.guesses_from
        for index, layer in enumerate(self._weights.layers):
            x, cos, sin, slots = _beside(layer, x, cos, sin, slots)
            h = self._norm(x, layer.input_norm)
            if guesses_from in ("input", "own_norm"):
                self._anticipate(index + 1, x, h, (cos, sin), slots)
            q, k, v = self._qkv(h[:, None], layer)  # [B, H or G, 1, D]
            out = self._method.attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v, slots)
            x = x + linear(out.flatten(1), layer.output, layer.output_bias)
            if guesses_from == "residual":
                self._anticipate(index + 1, x, h, (cos, sin), slots)
            x = self._feed_forward(x, layer)
        return self._head(x)

    def _anticipate(self, index: int, x: Tensor, h: Tensor, rotation: tuple[Tensor, Tensor], slots: Tensor) -> None:
        """Tells the method what layer `index`, if there is one, would ask of x or of h, the layer before's input."""
        if index == len(self._weights.layers):
            return
        layer = self._weights.layers[index]
        x, h, cos, sin, slots = _beside(layer, x, h, *rotation, slots)
        if self._method.guesses_from != "input":
            h = self._norm(x, layer.input_norm)
        q, _, _ = self._qkv(h[:, None], layer)
        self._method.anticipate(index, rotate(q, cos, sin), slots)

    def _prompt(self, token_ids: Tensor, take: TakeLayer) -> Tensor:
        length = len(token_ids)
        x = self._weights.embedding[token_ids]  # [L, hidden]
        positions = torch.arange(length, device=self.device)
        cos, sin = self._rope.cos_sin(positions, positions[-1:] + 1, self.dtype)  # [L, D]
        for index, layer in enumerate(self._weights.layers):
            x, cos, sin = _beside(layer, x, cos, sin)
            q, k, v = self._qkv(self._norm(x, layer.input_norm)[None], layer)  # [1, H or G, L, D]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            take(index, q[0], k[0], v[0])
            out = attention(q, k, v, causal=True)  # [1, H, L, D]
            heads = out[0].transpose(0, 1).flatten(1)
            # In pieces, since the middle of a SwiGLU is several times as wide as everything else.
            pieces = zip(torch.split(x, _PIECE), torch.split(heads, _PIECE), strict=True)
            x = torch.cat([self._finish(*piece, layer) for piece in pieces])
        return x

    def _qkv(self, h: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] to q [B, H, L, D] and k, v [B, G, L, D], not yet rotated."""
        shape = self.shape
        heads = linear(h, layer.qkv, layer.qkv_bias).view(*h.shape[:2], -1, shape.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return q, k, v

    def _finish(self, x: Tensor, heads: Tensor, layer: LayerWeights) -> Tensor:
        """The rest of a layer after attention. x: [N, hidden], heads: [N, H * D]."""
        return self._feed_forward(x + linear(heads, layer.output, layer.output_bias), layer)

    def _feed_forward(self, x: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = linear(self._norm(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, layer.down, layer.down_bias)

    def _head(self, x: Tensor) -> Tensor:
        return linear(self._norm(x, self._weights.norm), self._weights.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension, in float32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return weight * wide.to(x.dtype)


def _beside(layer: LayerWeights, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the layer's device: copies where a model is split before it, else themselves."""
    return [tensor.to(layer.qkv.device) for tensor in tensors]
