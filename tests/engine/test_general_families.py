"""Families of transformers beyond ours in the general engine: texts, budgets, speculation, batches and refusals."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.engine.base import Request
from sparsecache.engine.general import CachedModel
from sparsecache.engine.general.attention import AttentionCall, handle_attention, inspect_attention
from sparsecache.engine.general.rope import rotation_of
from sparsecache.engine.reference import TransformersEngine
from sparsecache.errors import UsageError
from sparsecache.methods import method_names
from sparsecache.methods.infinigen.cache import InfiniGenCache
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.families import FAMILIES, REFUSED, WINDOW, Family, make_engine, make_model, refusal, requests
from sparsecache.testing.method_under_test import MethodUnderTest
from tests.engine.general import CPU, NO_RESIDUAL, completions, guess_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

family = cache(Family)


def texts(done: list[Any]) -> list[list[int]]:
    return [token_ids for token_ids, _, _ in done]


@pytest.mark.parametrize(("at", "method"), list(enumerate(method_names())))
def test_every_method_passes_with_a_family_as_the_page_says(at, method) -> None:
    """One family per method; all pairs are checked when the page is written."""
    model_type = list(FAMILIES)[at % len(FAMILIES)]
    page = PAGE.read_text(encoding="utf-8")
    (names,) = re.findall(r"^\| method \| (.*) \|$", page, flags=re.MULTILINE)
    cells = re.findall(rf"^\| `{method}` \| (.*) \|$", page, flags=re.MULTILINE)
    assert names.split(" | ") == list(FAMILIES)
    says = dict(zip(FAMILIES, cells[0].split(" | "), strict=True))[model_type] if cells else "yes"
    if says == "yes":
        family(model_type).check(method)
    else:
        with pytest.raises(UsageError, match="The method needs the rotation of each position"):
            family(model_type).check(method)


@pytest.mark.parametrize("model_type", ["phi3", "gemma3_text", "glm4", "smollm3", "cohere2", "gpt2"])
def test_a_method_gets_the_rotation_of_positions_where_all_layers_have_the_same(model_type) -> None:
    """Parts of a head and one kind of layers, against transformers; pairs of neighbours, layers without RoPE, none."""
    model = family(model_type).model
    layers = inspect_attention(model, WINDOW).layers
    if model_type not in ("phi3", "gemma3_text"):
        with pytest.raises(UsageError, match=f"not known for {type(model).__name__}"):
            rotation_of(model, layers)
        return
    positions = torch.tensor([0, 7, 100])
    kind = {"layer_type": "full_attention"} if model_type == "gemma3_text" else {}
    expected = model.base_model.rotary_emb(torch.zeros(1, 3, 1), positions[None], **kind)
    for found, table in zip(rotation_of(model, layers)(positions), expected, strict=True):
        assert torch.equal(found, table[0]) and found.shape[1] == (8 if model_type == "phi3" else 16)


def _batch() -> list[Request]:
    """Prompts shorter and longer than a window of 8 tokens, which end at different steps."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((40, 9), (3, 14), (6, 5), (25, 12), (12, 1))
    prompts = [(torch.randint(3, 300, (length,), generator=generator).tolist(), new) for length, new in sizes]
    return [Request(at, prompt, new, (7,)) for at, (prompt, new) in enumerate(prompts)]


@pytest.mark.parametrize("model_type", ["gemma3_text", "cohere2", "glm4", "qwen3_moe"])
@pytest.mark.parametrize("method", ["oracle", "infinigen"])
def test_a_batch_gives_the_texts_and_reports_of_one_by_one(model_type, method) -> None:
    subject = MethodUnderTest.of(method)
    options = {**subject.tight, **guess_of(model_type, method)}
    alone, together = (
        completions(make_engine(family(model_type).model, subject.make(options), WINDOW, slots), _batch())
        for slots in (1, 3)
    )
    assert together == alone
    assert len({tuple(text) for text in texts(alone)}) == len(alone)


def test_prompts_are_decoded_one_by_one_where_a_batch_would_change_them() -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}
    model = make_model("llama", {**dynamic, "max_position_embeddings": 16})
    engine = make_engine(model, Vanilla(), WINDOW, 3)
    assert engine.slots == 1 and engine.model.one_slot_reason == "dynamic RoPE depends on the longest sequence"
    assert texts(completions(engine, _batch())) == texts(completions(TransformersEngine(model, CPU), _batch()))
    assert "transformers' own cache" in (family("qwen3_next").served.one_slot_reason or "")


def _infinigen(guess: str) -> Any:
    return MethodUnderTest.of("infinigen").make({"dense_layers": 1, "budget": 6.0, "guess": guess, "skew": False})


def _silence(module: torch.nn.Module) -> None:
    """Let a module put out zeros."""

    def zeros(module: Any, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    module.register_forward_hook(zeros)


@pytest.mark.parametrize("guess", ["input", "residual"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_speculated_query_is_the_true_one_where_nothing_comes_between(model_type, guess, monkeypatch) -> None:
    """The layer before puts nothing out behind the hidden state that is taken, and norms as the last layer does."""
    model = make_model(model_type, FAMILIES[model_type])
    if model_type in NO_RESIDUAL and guess == "residual":
        with pytest.raises(UsageError, match="has no known place for the hidden state"):
            make_engine(model, _infinigen(guess), WINDOW)
        return
    before, last = dict(model.named_modules())["transformer.h" if model_type == "gpt2" else "model.layers"][-2:]
    _silence(before.mlp)
    if guess == "input":
        _silence(next(module for name, module in before.named_children() if "attn" in name))
        for name in ("input_layernorm", "ln_1"):
            if hasattr(last, name):
                getattr(last, name).load_state_dict(getattr(before, name).state_dict())
    speculated, true = [], []
    select, attend = InfiniGenCache._select, InfiniGenCache.attend

    def note_speculated(self: Any, q: Tensor, slots: Tensor) -> Any:
        speculated.append((self, q))
        return select(self, q, slots)

    def note_true(self: Any, q: Tensor, *more: Tensor) -> Tensor:
        true.append((self, q))
        return attend(self, q, *more)

    monkeypatch.setattr(InfiniGenCache, "_select", note_speculated)
    monkeypatch.setattr(InfiniGenCache, "attend", note_true)
    engine = make_engine(model, _infinigen(guess), WINDOW)
    speculated.clear()
    true.clear()
    completions(engine, requests(4)[:1])
    layer = true[-1][0]
    pairs = [(q, own) for (cache, q), (_, own) in zip(speculated, true, strict=True) if cache is layer]
    assert len(pairs) == 3
    for q, own in pairs:
        torch.testing.assert_close(q, own, atol=1e-5, rtol=1e-4)


def test_a_scaling_of_the_models_own_decides_what_top_p_selects() -> None:
    """In the first layer's first step, by the rule itself: tokens of falling probability until they sum to p."""
    model, expected = family("granite").model, family("granite").expected
    request = requests(2)[0]
    needed: list[Tensor] = []

    def note(call: AttentionCall) -> None:
        scores = call.q[0, :, -1:] @ call.k[0].repeat_interleave(2, 0).mT * 0.6  # attention_multiplier
        falling, order = scores[:, 0, :-1].softmax(-1).sort(descending=True)
        is_needed = (falling.cumsum(-1) - falling < 0.6).gather(1, order.argsort(1))  # [H, past tokens]
        needed.append(is_needed.view(2, 2, -1).any(1).sum(1))  # [G]

    with torch.inference_mode(), handle_attention(note):
        model(torch.tensor([[*request.token_ids, expected[0][0]]]))
    method = MethodUnderTest.of("topp").make({"p": 0.6, "budget": 1.0, "dense_layers": 0})
    selected: list[Tensor] = []
    select = method.select

    def note_selected(*arguments: Any) -> Any:
        selection = select(*arguments)
        selected.append(selection[1][0])
        return selection

    engine = make_engine(model, method, WINDOW)
    method.select = note_selected
    completions(engine, [request])
    assert selected[0].tolist() == needed[0].tolist()
    assert needed[0].min() > 0 and needed[0].max() < 40


@pytest.mark.parametrize(
    ("model_type", "problem"),
    [
        ("gemma2", "logit soft-capping"),
        ("gpt_oss", "attention sinks as logits"),
        ("bloom", "does not call transformers' attention interface"),
        ("deepseek_v3", "no full-attention layer"),
        ("gemma3n_text", "layers without keys and values of their own"),
    ],
)
def test_what_no_cache_can_serve_is_refused_by_name(model_type, problem) -> None:
    assert problem in refusal(model_type)
    assert set(REFUSED) == {"gemma2", "gpt_oss", "bloom", "deepseek_v3", "gemma3n_text"}


def test_a_model_with_sliding_windows_alone_is_refused() -> None:
    model = make_model("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4})
    with pytest.raises(UsageError, match=r"Gemma3ForCausalLM has no full-attention layer"):
        CachedModel(model, Vanilla(), WINDOW)


def test_a_sliding_window_as_long_as_the_run_is_full_attention() -> None:
    model = make_model("gemma3_text", {**FAMILIES["gemma3_text"], "sliding_window": 64})
    expected = texts(completions(TransformersEngine(model, CPU), requests()))
    for window, layers in ((65, 3), (64, 6)):
        engine = make_engine(model, Vanilla(), window)
        assert engine.model.shape.layers == layers
        assert texts(completions(engine, requests())) == expected
