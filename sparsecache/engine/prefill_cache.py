"""A decoder that computes each prompt once, for studies that decode the same prompts with many methods.

The queries, keys and values of a prompt are the same for every method, so they are kept for the next one.
"""

from torch import Tensor

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights

LayerQKV = list[tuple[Tensor, Tensor, Tensor]]


class PrefillCache(dict[tuple[int, ...], tuple[LayerQKV, Tensor]]):
    """A dict from token ids to q [H, L, D], k and v [G, L, D] per layer, and the last token's logits [V].

    It belongs to one checkpoint and dtype. A prompt of L tokens takes layers * (H + 2 G) * D * L values.
    """


class PrefillCachingDecoder(Decoder):
    """A Decoder that computes only prompts that are not in its prefill cache, which decoders may share."""

    def __init__(
        self, architecture: Architecture, weights: Weights, rope: Rope, method: CacheMethod, prompts: PrefillCache
    ):
        super().__init__(architecture, weights, rope, method)
        self._prompts = prompts

    def warm_attention_plan(self, tokens: int) -> None:
        """Do nothing: most prompts are not computed again."""

    def prefill(self, token_ids: Tensor, slot: int) -> Tensor:
        key = tuple(token_ids.tolist())
        if key not in self._prompts:
            computed: LayerQKV = []
            hidden = self._prompt(token_ids, lambda layer, q, k, v: computed.append((q, k, v)))
            self._prompts[key] = computed, self._lm_head(hidden)[0]
        layers, logits = self._prompts[key]
        cache = self._layers_cache()
        for layer_cache, (q, k, v) in zip(cache.layers, layers, strict=True):
            layer_cache.prefill(slot, q, k, v)
        cache.start_sequence(slot, len(token_ids))
        return logits.clone()  # the generator masks stop ids in place
