"""The tiny Llama for training: the model with stacked layers, its loss, and the Muon optimizer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Size:
    """The dimensions of a Llama with tied embeddings."""

    layers: int = 10
    hidden: int = 384
    intermediate: int = 768
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 4096
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5


class TinyLlama(nn.Module):
    """A Llama whose matrices are stacked over layers, [L, out, in], so that Muon updates them as one batch."""

    def __init__(self, size: Size, compiled: bool = False):
        super().__init__()
        self.size = size
        q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
        inner, small = 0.7 * size.hidden**-0.5, 0.7 / math.sqrt(2 * size.layers)
        self.embedding = _normal(size.vocabulary, size.hidden, std=0.02)
        self.q = _normal(size.layers, q, size.hidden, std=inner)
        self.k = _normal(size.layers, kv, size.hidden, std=inner)
        self.v = _normal(size.layers, kv, size.hidden, std=inner)
        self.output = _normal(size.layers, size.hidden, q, std=small * q**-0.5)
        self.gate = _normal(size.layers, size.intermediate, size.hidden, std=inner)
        self.up = _normal(size.layers, size.intermediate, size.hidden, std=inner)
        self.down = _normal(size.layers, size.hidden, size.intermediate, std=small * size.intermediate**-0.5)
        self.input_norm = nn.Parameter(torch.ones(size.layers, size.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(size.layers, size.hidden))
        self.norm = nn.Parameter(torch.ones(size.hidden))
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._before, self._after, self._loss = wrap(_before_attention), wrap(_after_attention), wrap(_loss)
        self._rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def matrices(self) -> list[nn.Parameter]:
        """The stacked matrices, which Muon updates."""
        return [self.q, self.k, self.v, self.output, self.gate, self.up, self.down]

    def others(self) -> list[nn.Parameter]:
        """The embedding and the norms, which AdamW updates."""
        return [self.embedding, self.input_norm, self.mlp_norm, self.norm]

    def hidden(self, ids: Tensor, dtype: torch.dtype, queries: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """ids [B, S] to hidden states [B * S, hidden], and the attention entropy [B] in nats if `queries` is given.

        The entropy is the mean over the query positions `queries` [P], all heads, and the layers from the third on.
        """
        batch, length = ids.shape
        size = self.size
        cos, sin = self._rotation(batch, length, ids.device)
        x = embedding(ids.flatten(), self.embedding).to(dtype)
        entropies = []
        stacks = (self.input_norm, self.q, self.k, self.v, self.output, self.mlp_norm, self.gate, self.up, self.down)
        for index, (n1, wq, wk, wv, wo, n2, wg, wu, wd) in enumerate(zip(*stacks, strict=True)):
            q, k, v = self._before(x, n1, wq, wk, wv, cos, sin, size.head_dim, size.norm_eps)
            q, k, v = (part.view(batch, length, -1, size.head_dim).transpose(1, 2) for part in (q, k, v))
            if queries is not None and index >= 2:
                entropies.append(_entropy(q[:, :, queries], k, queries))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._after(x, out.transpose(1, 2).reshape(len(x), -1), wo, n2, wg, wu, wd, size.norm_eps)
        return x, torch.stack(entropies).mean(0) if entropies else None

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean cross entropy, and the cross entropy per position [N] (0 where the weight is not 1)."""
        result: tuple[Tensor, Tensor] = self._loss(
            hidden, self.norm, self.embedding, targets, weights, self.size.norm_eps
        )
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] to logits [N, V]."""
        return linear(_norm(hidden, self.norm, self.size.norm_eps), self.embedding.to(hidden.dtype))

    def state_for_transformers(self) -> dict[str, Tensor]:
        """The weights in bfloat16, named as in LlamaForCausalLM."""
        names = {
            "input_layernorm": self.input_norm,
            "self_attn.q_proj": self.q,
            "self_attn.k_proj": self.k,
            "self_attn.v_proj": self.v,
            "self_attn.o_proj": self.output,
            "post_attention_layernorm": self.mlp_norm,
            "mlp.gate_proj": self.gate,
            "mlp.up_proj": self.up,
            "mlp.down_proj": self.down,
        }
        state = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for index in range(self.size.layers):
            state |= {f"model.layers.{index}.{name}.weight": stack[index] for name, stack in names.items()}  # type: ignore[misc]
        return {name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in state.items()}

    def _rotation(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B * S, 1, D / 2] in float32."""
        if (batch, length) not in self._rotations:
            exponents = torch.arange(0, self.size.head_dim, 2, dtype=torch.float64) / self.size.head_dim
            angles = torch.arange(length, dtype=torch.float64)[:, None] * self.size.rope_theta**-exponents
            cos, sin = (part.float().to(device).repeat(batch, 1)[:, None] for part in (angles.cos(), angles.sin()))
            self._rotations[batch, length] = cos, sin
        return self._rotations[batch, length]


class Muon:
    """Muon for stacked matrices: momentum, then an orthogonalized update.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, stacks: list[nn.Parameter], rate: float, weight_decay: float):
        self._stacks, self._rate, self._decay = stacks, rate, weight_decay
        self.momenta = [torch.zeros_like(stack) for stack in stacks]

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """One update at `factor` times the learning rate."""
        for stack, buffer in zip(self._stacks, self.momenta, strict=True):
            assert stack.grad is not None
            buffer.mul_(momentum).add_(stack.grad, alpha=1 - momentum)
            update = _orthogonal(stack.grad.lerp(buffer, momentum)).float()
            rate = self._rate * factor * max(1.0, stack.shape[-2] / stack.shape[-1]) ** 0.5
            stack.mul_(1 - self._rate * factor * self._decay).add_(update, alpha=-rate)


def _orthogonal(gradient: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest orthogonal matrices by Muon's quintic Newton-Schulz iteration."""
    x = gradient.bfloat16() if gradient.is_cuda else gradient
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


def _normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _before_attention(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = _norm(x, norm, eps)
    q, k, v = (linear(h, w.to(h.dtype)).view(len(h), -1, head_dim) for w in (wq, wk, wv))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _after_attention(
    x: Tensor, heads: Tensor, wo: Tensor, norm: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, eps: float
) -> Tensor:
    x = x + linear(heads, wo.to(x.dtype))
    h = _norm(x, norm, eps)
    return x + linear(silu(linear(h, wg.to(x.dtype))) * linear(h, wu.to(x.dtype)), wd.to(x.dtype))


def _loss(
    hidden: Tensor, norm: Tensor, table: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    logits = linear(_norm(hidden, norm, eps), table.to(hidden.dtype)).float()
    losses = cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), losses.detach() * (weights == 1)


def _entropy(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """The attention entropy [B] of q [B, H, P, D] at `positions` over k [B, G, S, D], mean over H and P."""
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)
    scores = (grouped @ k.mT).float().view(batch, heads, len(positions), -1) * head_dim**-0.5
    future = torch.arange(k.shape[2], device=k.device) > positions[:, None]
    logs = scores.masked_fill(future, -1e9).log_softmax(-1)
    entropy: Tensor = -(logs.exp() * logs).sum(-1).mean((1, 2))
    return entropy
