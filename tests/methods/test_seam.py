"""The decoder gives a method the tensors that transformers computes.

These are hidden states to speculate from, log-sum-exps, and queries and keys to calibrate with.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparsecache.cache.base import SpeculationSource
from sparsecache.cache.full import FullCache
from sparsecache.engine import decoder as decoder_module
from sparsecache.engine.base import Request
from sparsecache.engine.families import family_names
from sparsecache.engine.generator import Generator
from sparsecache.kernels.attention import prompt_attention
from sparsecache.methods.vanilla import Vanilla

every_family = pytest.mark.parametrize("model_type", family_names())


class _Speculating(Vanilla):
    """Records the calls of its caches in order, and the queries that they project."""

    def __init__(self, source: SpeculationSource | None = "input") -> None:
        self.source = source
        self.calls: list[tuple[str, int]] = []
        self.queries: dict[int, Tensor] = {}
        self.slots: list[int] = []

    def make_cache(self, layer, config):
        return _SpeculatingCache(self, layer, config)


class _SpeculatingCache(FullCache):
    def __init__(self, method, layer, config) -> None:
        super().__init__(config)
        self.method, self.layer = method, layer
        self.speculation_source = method.source

    def speculate(self, hidden, project_query, slots) -> None:
        assert hidden.shape == (len(slots), 64)
        self.method.slots = slots.tolist()
        self.method.calls.append(("speculate", self.layer))
        self.method.queries[self.layer] = project_query(hidden, normed=self.speculation_source == "input").clone()

    def attend(self, q, k, v, slots):
        self.method.calls.append(("attend", self.layer))
        return super().attend(q, k, v, slots)


class _Calibrating(Vanilla):
    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def calibrate(self, layer, q, k) -> None:
        self.seen.append((layer, q.clone(), k.clone()))

    def make_cache(self, layer, config):
        raise AssertionError("calibration needs no cache")


class _Normalizing(Vanilla):
    """Records what the caches of layers 1 and 2 receive of a prompt."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor, Tensor, Tensor | None]] = []

    def make_cache(self, layer, config):
        return _NormalizingCache(self, layer, config) if layer else FullCache(config)


class _NormalizingCache(FullCache):
    uses_logsumexp = True

    def __init__(self, method, layer, config) -> None:
        super().__init__(config)
        self.method, self.layer = method, layer

    def prefill(self, slot, q, k, v) -> None:
        self.method.calls.append((self.layer, q, k, None))

    def prefill_with_logsumexp(self, slot, q, k, v, logsumexp) -> None:
        self.method.calls.append((self.layer, q, k, logsumexp))


@dataclass(frozen=True)
class _Streams:
    """What transformers computes per layer, [L, hidden]: the attention's normed input, the residual after it."""

    inputs: list[Tensor]
    residual: list[Tensor]


@torch.inference_mode()
def _streams(model: Any, token_ids: list[int]) -> _Streams:
    found = _Streams([], [])
    hooks = []
    for layer in model.model.layers:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        hooks.append(norms[0].register_forward_hook(lambda module, args, out: found.inputs.append(out[0])))
        hooks.append(norms[1].register_forward_hook(lambda module, args, out: found.residual.append(args[0][0])))
    model(torch.tensor([token_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _queries(model: Any, layer: int, hidden: Tensor) -> Tensor:
    """Return transformers' rotated queries [H, L, D] of a layer for attention inputs [L, hidden]."""
    return _heads(model, layer, hidden, "q")


@torch.inference_mode()
def _heads(model: Any, layer: int, hidden: Tensor, name: Literal["q", "k"]) -> Tensor:
    """As `_queries`, or the keys [G, L, D]."""
    attention = model.model.layers[layer].self_attn
    heads = getattr(attention, f"{name}_proj")(hidden).view(len(hidden), -1, attention.head_dim)
    if hasattr(attention, f"{name}_norm"):
        heads = getattr(attention, f"{name}_norm")(heads)
    heads = heads.transpose(0, 1)[None]
    cos, sin = model.model.rotary_emb(hidden[None], torch.arange(len(hidden))[None])
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0]


@every_family
@pytest.mark.parametrize("source", get_args(SpeculationSource))
def test_a_cache_receives_the_hidden_state_that_it_names_of_the_layer_before(
    source, model_type, decoder, transformers_model
) -> None:
    method = _Speculating(source)
    ours = decoder(model_type, method)
    prompts = [[0, *range(40, 60)], [0, *range(400, 407)]]
    tokens = [700, 801]
    with torch.inference_mode():
        ours.allocate(2, 40, 10)
        for slot, prompt in enumerate(prompts):
            ours.prefill(torch.tensor(prompt), slot)
        assert method.calls == []
        ours.step(torch.tensor(tokens), torch.tensor([len(p) for p in prompts]), torch.tensor([0, 1]))
    before = [("speculate", 1), ("attend", 0), ("speculate", 2), ("attend", 1), ("attend", 2)]
    after = [("attend", 0), ("speculate", 1), ("attend", 1), ("speculate", 2), ("attend", 2)]
    assert method.calls == (after if source == "residual" else before)
    assert method.slots == [0, 1]
    model = transformers_model(model_type)
    for row, prompt in enumerate(prompts):
        streams = _streams(model, [*prompt, tokens[row]])
        for layer in (1, 2):
            if source == "input":
                hidden = streams.inputs[layer - 1]
            else:
                hidden = model.model.layers[layer].input_layernorm(streams.residual[layer - 1])
            expected = _queries(model, layer, hidden)[:, -1:]
            true = _queries(model, layer, streams.inputs[layer])[:, -1:]
            assert method.queries[layer].shape == (2, *expected.shape)
            torch.testing.assert_close(method.queries[layer][row], expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, true, rtol=1e-2, atol=1e-2), "the layers could be mixed up"


@every_family
def test_calibration_gives_each_layers_queries_and_keys_once_in_order(model_type, decoder, transformers_model) -> None:
    method = _Calibrating()
    text = [0, *range(100, 150)]
    ticks: list[int] = []
    ours = decoder(model_type, method)
    with torch.inference_mode():
        ours.calibrate(torch.tensor(text), ticks.append)
    assert ticks == [1, 1, 1]
    assert [layer for layer, *_ in method.seen] == [0, 1, 2]
    model = transformers_model(model_type)
    inputs = _streams(model, text).inputs
    for layer, q, k in method.seen:
        group = ours.shape.heads // ours.shape.kv_heads
        assert q.shape == (ours.shape.kv_heads, group, len(text), ours.shape.head_dim)
        torch.testing.assert_close(q.flatten(0, 1), _queries(model, layer, inputs[layer]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(k, _heads(model, layer, inputs[layer], "k"), rtol=1e-4, atol=1e-4)


def test_speculation_changes_no_text_and_without_a_source_there_is_none(decoder) -> None:
    texts = []
    for source in (None, *get_args(SpeculationSource)):
        method = _Speculating(source)
        (done,) = Generator(decoder("qwen3", method), 1).generate([Request(0, [0, 7, 8], 20, ())])
        assert done.error is None and bool(method.queries) == (source is not None)
        texts.append(done.token_ids)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 20


@pytest.mark.parametrize("is_known", [False, True])
def test_a_cache_receives_the_logsumexp_that_its_layers_attention_computes(decoder, monkeypatch, is_known) -> None:
    """On a CPU attention computes none; the last layer attends with one query alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return prompt_attention(q, k, v), _logsumexp(q, k) if is_known else None

    monkeypatch.setattr(decoder_module, "prompt_attention_with_logsumexp", attend)
    method = _Normalizing()
    ours = decoder("llama", method)
    prompt = torch.tensor([0, *range(40, 60)])
    with torch.inference_mode():
        ours.allocate(1, 40, 10)
        logits = ours.prefill(prompt, 0)
        plain = decoder("llama", Vanilla())
        plain.allocate(1, 40, 10)
        torch.testing.assert_close(logits, plain.prefill(prompt, 0))
    (first, q, k, logsumexp), (last, *_, none) = method.calls
    assert (first, last, none) == (1, 2, None)
    if is_known:
        assert logsumexp is not None
        torch.testing.assert_close(logsumexp, _logsumexp(q, k))
    else:
        assert logsumexp is None


def _logsumexp(q: Tensor, k: Tensor) -> Tensor:
    """Return the log-sum-exp [H, L] of the causal scores of q [H, L, D] and k [G, L, D]."""
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT / q.shape[2] ** 0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
