"""A decoder that reads each prompt once, for studies that decode the same prompts with many methods.

What a prompt's own attention computes is the same for every method, so it is kept and shown to the next one.
"""

from torch import Tensor

from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.methods.base import Method

Layers = list[tuple[Tensor, Tensor, Tensor]]


class Memory(dict[tuple[int, ...], tuple[Layers, Tensor]]):
    """By prompt: q [H, L, D], k and v [G, L, D] of every layer, and the last token's logits [V].

    For one checkpoint at one dtype. A prompt of L tokens takes layers * (H + 2 G) * D * L values.
    """


class RememberingDecoder(Decoder):
    """A Decoder that reads only prompts that are not in its memory, which other decoders may share."""

    def __init__(self, architecture: Architecture, weights: Weights, rope: Rope, method: Method, memory: Memory):
        super().__init__(architecture, weights, rope, method)
        self._memory = memory

    def expect(self, tokens: int) -> None:
        """Does nothing: most prompts are not read again."""

    def prefill(self, token_ids: Tensor, slot: int, max_new_tokens: int) -> Tensor:
        key = tuple(token_ids.tolist())
        if key not in self._memory:
            seen: Layers = []
            x = self._prompt(token_ids, lambda layer, q, k, v: seen.append((q, k, v)))
            self._memory[key] = seen, self._head(x)[0]
        layers, logits = self._memory[key]
        for layer, (q, k, v) in enumerate(layers):
            self._method.prefill(layer, slot, q, k, v, max_new_tokens)
        return logits.clone()  # the generator masks stop ids in it
