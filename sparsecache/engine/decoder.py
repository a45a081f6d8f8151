"""One forward pass: a prompt into a slot, or one token for each of several slots.

Knows weights and tokens; what becomes of keys and values is the method's business, and there is no branch on
which method it is.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.kernels._triton import in_kernels
from sparsecache.kernels.attention import plan_prompt, prompt_attention, prompt_room
from sparsecache.kernels.linear import add_linear, linear, rotated, swiglu
from sparsecache.kernels.norm import rms_norm
from sparsecache.kernels.rotation import Rotation, rotate, split_and_rotate
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
        rows = self.shape.heads * self.shape.head_dim
        self._asking = [_queries(layer, rows) for layer in weights.layers]
        # Whether a step may be captured in a CUDA graph.
        alone = self.device.type == "cuda" and len(self.devices) == 1
        self.graphable = alone and in_kernels(self.device) and method.graphable and rope.graphable

    def prefill(self, token_ids: Tensor, slot: int, max_new_tokens: int) -> Tensor:
        """Runs a prompt, token_ids: [L], into an empty slot; returns the last token's logits [V].

        Attention over the prompt is dense and exact, and no L x L tensor is built.
        """

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            self._method.prefill(layer, slot, q, k, v, max_new_tokens)

        return self._head(self._prompt(token_ids, keep))[0]

    def expect(self, tokens: int) -> None:
        """Has cuDNN plan the attention of a prompt of so many tokens, on the host, unless it has: for the next prompt.

        That runs the attention of one layer once, over anything.
        """
        shape = self.shape
        for device in self.devices:
            plan_prompt(tokens, shape.heads, shape.kv_heads, shape.head_dim, device, self.dtype)

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
        rotation = self._rope.cos_sin(positions, positions + 1, self.dtype)
        guesses_from = self._method.guesses_from
        for index, layer in enumerate(self._weights.layers):
            x, *turning, slots = _beside(layer, x, *rotation, slots)
            rotation = Rotation(*turning)
            normed = self._normed(x, layer.input_norm)
            if guesses_from == "input":
                self._anticipate(index + 1, normed, rotation, slots)
            elif guesses_from == "own_norm":
                self._anticipate_normed(index + 1, x, rotation, slots)
            q, k, v = self._qkv(normed, layer, rotation)  # [B, H or G, 1, D]
            out = self._method.attend(index, q, k, v, slots)
            x = linear(out.flatten(1), layer.output, layer.output_bias, residual=x)
            if guesses_from == "residual":
                self._anticipate_normed(index + 1, x, rotation, slots)
            x = linear(self._middle(x, layer), layer.down, layer.down_bias, residual=x)
        return self._head(x)

    def _anticipate_normed(self, index: int, x: Tensor, rotation: Rotation, slots: Tensor) -> None:
        """As `_anticipate`, of x as layer `index` would norm it."""
        if self._is_guessed(index):
            norm = self._weights.layers[index].input_norm.to(x.device)
            self._anticipate(index, self._normed(x, norm), rotation, slots)

    def _anticipate(self, index: int, normed: Tensor, rotation: Rotation, slots: Tensor) -> None:
        """Tells the method what layer `index`, if it is guessed, would ask of an input."""
        if not self._is_guessed(index):
            return
        normed, *turning, slots = _beside(self._weights.layers[index], normed, *rotation, slots)
        with self._method.beside(normed, *turning, slots):
            q = self._turned(normed, self._asking[index], Rotation(*turning))
            self._method.anticipate(index, q[:, :, None], slots)
        _beside(self._weights.layers[index - 1])  # kernels run there again

    def _is_guessed(self, index: int) -> bool:
        return index < len(self._weights.layers) and self._method.guesses(index)

    def _qkv(self, normed: Tensor, layer: LayerWeights, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's q [B, H, 1, D] and k, v [B, G, 1, D], rotated."""
        shape = self.shape
        heads = self._turned(normed, layer, rotation)
        q, k, v = heads[:, :, None].tensor_split((shape.heads, shape.heads + shape.kv_heads), dim=1)
        return q, k, v

    def _turned(self, normed: Tensor, layer: LayerWeights, rotation: Rotation) -> Tensor:
        """As `_heads`, and queries and keys rotated."""
        turning = self.shape.heads + self.shape.kv_heads
        if layer.q_norm is None:
            return rotated(normed, layer.qkv, layer.qkv_bias, rotation, turning)
        heads = self._heads(normed, layer)
        return torch.cat((rotate(heads[:, :turning], rotation), heads[:, turning:]), dim=1)

    def _heads(self, normed: Tensor, layer: LayerWeights) -> Tensor:
        """The heads of q, k and v, or of q alone, that a layer projects of [N, hidden]: [N, heads, D]."""
        shape = self.shape
        heads = linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, shape.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            return heads
        q, k, v = heads.tensor_split((shape.heads, shape.heads + shape.kv_heads), dim=1)
        return torch.cat((self._normed(q, layer.q_norm), self._normed(k, layer.k_norm), v), dim=1)

    def prompt_nbytes(self, tokens: int) -> int:
        """About how many bytes a prompt's pass takes at its peak, beside weights and cache."""
        shape = self.shape
        hidden, middle = self._weights.embedding.shape[1], len(self._weights.layers[0].gate_up)
        of_each = 2 * hidden + 2 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        return self.dtype.itemsize * (tokens * of_each + 2 * min(tokens, _PIECE) * (middle + 2 * hidden))

    def _prompt(self, token_ids: Tensor, take: TakeLayer) -> Tensor:
        """The last token's hidden state [1, hidden] of token_ids [L]; `take` is given each layer's q, k, v."""
        positions = torch.arange(len(token_ids), device=self.device)
        rotation = self._rope.cos_sin(positions, positions[-1:] + 1, self.dtype)
        x = self._weights.embedding[token_ids]  # [L, hidden]
        for index, layer in enumerate(self._weights.layers):
            x, *turning = _beside(layer, x, *rotation)
            rotation = Rotation(*turning)
            last = index == len(self._weights.layers) - 1
            heads = self._attended_prompt(index, x, rotation, take, asked=1 if last else len(x))
            x = x[-len(heads) :]
            # In pieces, since the middle of a SwiGLU is several times as wide as everything else.
            for rows, of_rows in zip(torch.split(x, _PIECE), torch.split(heads, _PIECE), strict=True):
                add_linear(rows, of_rows, layer.output, layer.output_bias)
                add_linear(rows, self._middle(rows, layer), layer.down, layer.down_bias)
        return x

    def _attended_prompt(self, index: int, x: Tensor, rotation: Rotation, take: TakeLayer, asked: int) -> Tensor:
        """A layer's attention over a prompt x [L, hidden], for its last `asked` tokens, all or one: [asked, H * D]."""
        length, layer = len(x), self._weights.layers[index]
        heads = self._heads(self._normed(x, layer.input_norm), layer)
        q, k, v = split_and_rotate(heads, rotation, self.shape.kv_heads, prompt_room(x))  # [H or G, room, D]
        del heads
        take(index, q[:, :length], k[:, :length], v[:, :length])
        if asked < length:
            q, k, v = q[:, length - asked : length], k[:, :length], v[:, :length]
        return prompt_attention(q, k, v)[:, :asked].transpose(0, 1).flatten(1)

    def _middle(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """What a layer projects down, of x [N, hidden] after attention: [N, intermediate]."""
        return swiglu(self._normed(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)

    def _head(self, x: Tensor) -> Tensor:
        return linear(self._normed(x, self._weights.norm), self._weights.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps)


def _queries(layer: LayerWeights, rows: int) -> LayerWeights:
    """A layer that projects to queries alone: the first `rows` rows."""
    return replace(layer, qkv=layer.qkv[:rows], qkv_bias=None if layer.qkv_bias is None else layer.qkv_bias[:rows])


def _beside(layer: LayerWeights, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the layer's device, where kernels then run: copies where a model is split before it."""
    device = layer.qkv.device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return [tensor.to(device) for tensor in tensors]
