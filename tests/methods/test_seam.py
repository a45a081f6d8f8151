"""What the decoder hands to a method: queries to anticipate and to calibrate with, worked out a second way."""

from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparsecache.cache.base import GuessFrom
from sparsecache.engine.base import Request
from sparsecache.engine.families import family_names
from sparsecache.engine.generator import Generator
from sparsecache.methods.vanilla import Vanilla

every_family = pytest.mark.parametrize("model_type", family_names())


class _Guessing(Vanilla):
    """Notes what it is told, in order."""

    def __init__(self, guesses_from: GuessFrom = "input") -> None:
        self.guesses_from = guesses_from
        self.calls: list[tuple[str, int]] = []
        self.told: dict[int, Tensor] = {}
        self.slots: list[int] = []

    def anticipate(self, layer: int, q: Tensor, slots: Tensor) -> None:
        self.slots = slots.tolist()
        self.calls.append(("anticipate", layer))
        self.told[layer] = q.clone()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        self.calls.append(("attend", layer))
        return super().attend(layer, q, k, v, slots)


class _Calibrating(Vanilla):
    def __init__(self) -> None:
        self.shown: list[tuple[int, Tensor]] = []

    def calibrate(self, layer: int, q: Tensor) -> None:
        self.shown.append((layer, q.clone()))

    def prefill(self, *arguments: Any) -> None:
        raise AssertionError("calibration keeps nothing")


@dataclass(frozen=True)
class _Streams:
    """What transformers computes in every layer: [L, hidden] a layer."""

    entering: list[Tensor]  # the residual stream
    inputs: list[Tensor]  # of the attention, after the layer's norm
    middle: list[Tensor]  # the residual stream after the attention


@torch.inference_mode()
def _streams(model: Any, token_ids: list[int]) -> _Streams:
    found = _Streams([], [], [])

    def hear_norm(module: Any, args: Any, out: Tensor) -> None:
        found.entering.append(args[0][0])
        found.inputs.append(out[0])

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.input_layernorm.register_forward_hook(hear_norm))
        middle = layer.post_attention_layernorm
        hooks.append(middle.register_forward_hook(lambda module, args, out: found.middle.append(args[0][0])))
    model(torch.tensor([token_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def _queries(model: Any, layer: int, h: Tensor) -> Tensor:
    """Rotated queries [H, L, D] that transformers' layer would ask of the attention inputs h [L, hidden]."""
    attention = model.model.layers[layer].self_attn
    q = attention.q_proj(h).view(len(h), -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        q = attention.q_norm(q)
    q = q.transpose(0, 1)[None]
    cos, sin = model.model.rotary_emb(h[None], torch.arange(len(h))[None])
    return apply_rotary_pos_emb(q, q, cos, sin)[0][0]


@every_family
@pytest.mark.parametrize("guesses_from", get_args(GuessFrom))
def test_the_next_layers_query_is_guessed_from_what_the_method_names(
    guesses_from, model_type, decoder, transformers_model
) -> None:
    method = _Guessing(guesses_from)
    ours = decoder(model_type, method)
    prompts = [[0, *range(40, 60)], [0, *range(400, 407)]]
    tokens = [700, 801]
    with torch.inference_mode():
        method.allocate(ours.shape, 2, 40, ours.device, ours.dtype)
        for slot, prompt in enumerate(prompts):
            ours.prefill(torch.tensor(prompt), slot, 5)
        assert method.calls == []
        ours.step(torch.tensor(tokens), torch.tensor([len(p) for p in prompts]), torch.tensor([0, 1]))
    before = [("anticipate", 1), ("attend", 0), ("anticipate", 2), ("attend", 1), ("attend", 2)]
    after = [("attend", 0), ("anticipate", 1), ("attend", 1), ("anticipate", 2), ("attend", 2)]
    assert method.calls == (after if guesses_from == "residual" else before)
    assert method.slots == [0, 1]
    model = transformers_model(model_type)
    for row, prompt in enumerate(prompts):
        streams = _streams(model, [*prompt, tokens[row]])
        for layer in (1, 2):
            norm = model.model.layers[layer].input_layernorm
            source = {
                "input": streams.inputs[layer - 1],
                "own_norm": norm(streams.entering[layer - 1]),
                "residual": norm(streams.middle[layer - 1]),
            }[guesses_from]
            expected = _queries(model, layer, source)[:, -1:]
            own = _queries(model, layer, streams.inputs[layer])[:, -1:]
            assert method.told[layer].shape == (2, *expected.shape)
            torch.testing.assert_close(method.told[layer][row], expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, own, rtol=1e-2, atol=1e-2), "else the layers could be mixed up"


@every_family
def test_calibration_shows_each_layers_rotated_queries_once_in_order(model_type, decoder, transformers_model) -> None:
    method = _Calibrating()
    text = [0, *range(100, 150)]
    ticks: list[int] = []
    ours = decoder(model_type, method)
    with torch.inference_mode():
        ours.calibrate(torch.tensor(text), ticks.append)
    assert ticks == [1, 1, 1]
    assert [layer for layer, _ in method.shown] == [0, 1, 2]
    model = transformers_model(model_type)
    inputs = _streams(model, text).inputs
    for layer, q in method.shown:
        group = ours.shape.heads // ours.shape.kv_heads
        assert q.shape == (ours.shape.kv_heads, group, len(text), ours.shape.head_dim)
        torch.testing.assert_close(q.flatten(0, 1), _queries(model, layer, inputs[layer]), rtol=1e-4, atol=1e-4)


def test_a_method_that_guesses_nothing_is_never_told(decoder, monkeypatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("anticipate was called")

    monkeypatch.setattr(Vanilla, "anticipate", refuse)
    method = Vanilla()
    (done,) = Generator(decoder("llama", method), method, 1).generate([Request(0, [0, 7, 8], 4, ())])
    assert done.error is None


def test_guessing_changes_no_text(decoder) -> None:
    texts = []
    for method in (Vanilla(), _Guessing()):
        (done,) = Generator(decoder("qwen3", method), method, 1).generate([Request(0, [0, 7, 8], 20, ())])
        texts.append(done.token_ids)
    assert texts[0] == texts[1] and len(texts[0]) == 20
