"""The base class of model families, and the architecture that a family reads from a configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsecache.cache.base import Shape
from sparsecache.errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """What the decoder needs of a model beside its weights and its RoPE. tied: the head is the embedding."""

    shape: Shape
    hidden: int
    intermediate: int
    vocabulary: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor in a checkpoint of this architecture."""
        shape = self.shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        expected: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            expected["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            expected[f"{prefix}input_layernorm.weight"] = (self.hidden,)
            expected[f"{prefix}post_attention_layernorm.weight"] = (self.hidden,)
            for name, rows, columns, bias in self._linears(q, kv):
                expected[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    expected[f"{prefix}{name}.bias"] = (rows,)
            if self.qk_norm:
                expected[f"{prefix}self_attn.q_norm.weight"] = (shape.head_dim,)
                expected[f"{prefix}self_attn.k_norm.weight"] = (shape.head_dim,)
        return expected

    def _linears(self, q: int, kv: int) -> Iterator[tuple[str, int, int, bool]]:
        yield "self_attn.q_proj", q, self.hidden, self.qkv_bias
        yield "self_attn.k_proj", kv, self.hidden, self.qkv_bias
        yield "self_attn.v_proj", kv, self.hidden, self.qkv_bias
        yield "self_attn.o_proj", self.hidden, q, self.output_bias
        yield "mlp.gate_proj", self.intermediate, self.hidden, self.mlp_bias
        yield "mlp.up_proj", self.intermediate, self.hidden, self.mlp_bias
        yield "mlp.down_proj", self.hidden, self.intermediate, self.mlp_bias


class Family:
    """Llama-like models: pre-norm decoders with RMS norms, RoPE, grouped-query attention and a SwiGLU.

    A subclass overrides what differs. config: transformers' configuration of a checkpoint.
    """

    qk_norm = False

    def qkv_bias(self, config: Any) -> bool:
        """Return whether the query, key and value projections have a bias."""
        return False

    def output_bias(self, config: Any) -> bool:
        """Return whether the attention's output projection has a bias."""
        return False

    def mlp_bias(self, config: Any) -> bool:
        """Return whether the three projections of the SwiGLU have a bias."""
        return False

    def sliding_window(self, config: Any) -> int | None:
        """Return the window of sliding-window layers in tokens; None if there are none."""
        return None

    def architecture(self, config: Any) -> Architecture:
        """Return the architecture of a checkpoint. Raises UsageError for an activation other than SiLU."""
        if config.hidden_act not in ("silu", "swish"):
            raise UsageError(f"The checkpoint's activation {config.hidden_act!r} is not supported. Supported: silu.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim)
        return Architecture(
            shape=shape,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=self.qkv_bias(config),
            output_bias=self.output_bias(config),
            mlp_bias=self.mlp_bias(config),
            qk_norm=self.qk_norm,
        )
