"""Families of transformers beyond ours: what is lossless gives transformers' own text, the rest keeps to its budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from sparsecache.engine.base import Request
from sparsecache.engine.general.attention import AttentionCall, handle_attention
from sparsecache.engine.general.model import CachedModel
from sparsecache.engine.reference import TransformersEngine
from sparsecache.errors import UsageError
from sparsecache.methods import method_names
from sparsecache.methods.infinigen.cache import InfiniGenCache
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.contract import MethodUnderTest
from tests.engine.general import CPU, completions, general_engine

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = 256
HALF_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "phi3": (Phi3Config, {"partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "gemma2": (Gemma2Config, {"attn_logit_softcapping": None, **HALF_SLIDING}),
    "gemma3": (
        Gemma3TextConfig,
        {**HALF_SLIDING, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "glm4": (Glm4Config, {"partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "granite": (GraniteConfig, {"attention_multiplier": 0.6, "residual_multiplier": 0.5}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "olmo2": (Olmo2Config, {}),
    "qwen3_moe": (Qwen3MoeConfig, EXPERTS),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "cohere2": (Cohere2Config, HALF_SLIDING),
    "gpt2": (
        GPT2Config,
        {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
MLA = {
    "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
SHARED = {
    **HALF_SLIDING, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16,
    "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
FULL_LAYERS = {"gemma2": 2, "gemma3": 3, "cohere2": 2}
NO_RESIDUAL = ("cohere2", "gpt2")  # attention and MLP side by side; other names than the known ones


def make_model(config: type, fields: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones would hide one that is left out
                parameter += torch.randn(parameter.shape) * 0.2
        model.get_input_embeddings().weight.normal_()
    return model


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, list[Any]]]:
    """Return a model by type, made once, and its own completions of the requests."""
    made: dict[str, tuple[Any, list[Any]]] = {}

    def make(model_type: str) -> tuple[Any, list[Any]]:
        if model_type not in made:
            model = make_model(*CONFIGS[model_type])
            made[model_type] = model, completions(TransformersEngine(model, CPU), requests())
        return made[model_type]

    return make


def requests(new_tokens: int = 10) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (40, 3)]
    return [Request(at, prompt, new_tokens, ()) for at, prompt in enumerate(prompts)]


def texts(done: list[Any]) -> list[list[int]]:
    return [token_ids for token_ids, _, _ in done]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_lossless_options_give_the_text_of_transformers(model_type, models) -> None:
    model, expected = models(model_type)
    assert len(set(texts(expected)[0])) > 3  # a text that repeats a token would show little
    methods = [
        Vanilla(),
        *(MethodUnderTest.of(name).make(MethodUnderTest.of(name).lossless) for name in ("oracle", "snapkv", "h2o")),
    ]
    for method in methods:
        engine = general_engine(model, method, WINDOW)
        assert texts(completions(engine, requests())) == texts(expected)
        assert engine.cached.shape.layers == FULL_LAYERS.get(model_type, 4)
        assert engine.session()["full_attention_layers"] == FULL_LAYERS.get(model_type, 4)


def _infinigen(guess: str) -> Any:
    return MethodUnderTest.of("infinigen").make({"dense_layers": 1, "budget": 6.0, "guess": guess, "skew": False})


def _silence(module: torch.nn.Module) -> None:
    """Let a module put out zeros."""

    def zeros(module: Any, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    module.register_forward_hook(zeros)


@pytest.mark.parametrize("guess", ["input", "residual"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_speculated_query_is_the_true_one_where_nothing_comes_between(model_type, guess, monkeypatch) -> None:
    """The layer before puts nothing out behind the hidden state that is taken, and norms as the last layer does."""
    model = make_model(*CONFIGS[model_type])
    if model_type in NO_RESIDUAL and guess == "residual":
        with pytest.raises(UsageError, match="has no known place for the hidden state"):
            general_engine(model, _infinigen(guess), WINDOW)
        return
    before, last = dict(model.named_modules())["transformer.h" if model_type == "gpt2" else "model.layers"][-2:]
    _silence(before.mlp)
    if guess == "input":
        _silence(before.attn if model_type == "gpt2" else before.self_attn)
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
    engine = general_engine(model, _infinigen(guess), WINDOW)
    speculated.clear()
    true.clear()
    completions(engine, requests(4)[:1])
    layer = true[-1][0]
    pairs = [(q, own) for (cache, q), (_, own) in zip(speculated, true, strict=True) if cache is layer]
    assert len(pairs) == 3
    for q, own in pairs:
        torch.testing.assert_close(q, own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", method_names())
def test_every_method_keeps_to_its_budget(method, models) -> None:
    subject = MethodUnderTest.of(method)
    for model_type in ("phi3", "gemma3", "qwen3_moe"):
        engine = general_engine(models(model_type)[0], subject.make(subject.tight), WINDOW)
        (_, _, report), _ = completions(engine, requests())
        if subject.tight.get("budget") == 4.0:
            sparse_layers = FULL_LAYERS.get(model_type, 4) - report["dense_layers"]
            assert sparse_layers > 0 and report["sparse_steps"] == report["capped_steps"] == 9
            most = (4 + 9) if subject.make({}).budget_excludes_generated else 4
            assert 0 < report["kept"] <= most / 40


def test_a_scaling_of_the_models_own_decides_what_top_p_selects(models) -> None:
    """In the first layer's first step, by the rule itself: tokens of falling probability until they sum to p."""
    model, expected = models("granite")
    request = requests(2)[0]
    needed: list[Tensor] = []

    def note(call: AttentionCall) -> None:
        scores = call.q[0, :, -1:] @ call.k[0].repeat_interleave(2, 0).mT * 0.6  # attention_multiplier
        falling, order = scores[:, 0, :-1].softmax(-1).sort(descending=True)
        is_needed = (falling.cumsum(-1) - falling < 0.6).gather(1, order.argsort(1))  # [H, past tokens]
        needed.append(is_needed.view(2, 2, -1).any(1).sum(1))  # [G]

    with torch.inference_mode(), handle_attention(note):
        model(torch.tensor([[*request.token_ids, texts(expected)[0][0]]]))
    method = MethodUnderTest.of("topp").make({"p": 0.6, "budget": 1.0, "dense_layers": 0})
    selected: list[Tensor] = []
    select = method.select

    def note_selected(*arguments: Any) -> Any:
        selection = select(*arguments)
        selected.append(selection[1][0])
        return selection

    engine = general_engine(model, method, WINDOW)
    method.select = note_selected
    completions(engine, [request])
    assert selected[0].tolist() == needed[0].tolist()
    assert needed[0].min() > 0 and needed[0].max() < 40


@pytest.mark.parametrize(
    ("config", "fields", "problem"),
    [
        (Gemma2Config, HALF_SLIDING, "logit soft-capping"),
        (GptOssConfig, {"num_local_experts": 4, **HALF_SLIDING}, "attention sinks as logits"),
        (BloomConfig, {"n_layer": 2, "n_head": 2}, "does not call transformers' attention interface"),
        (Gemma3TextConfig, {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, "no full-attention layer"),
        (DeepseekV3Config, MLA, "no full-attention layer"),
        (Gemma3nTextConfig, SHARED, "layers without keys and values of their own"),
    ],
    ids=["softcap", "sinks", "no interface", "sliding", "mla", "shared"],
)
def test_what_no_cache_can_serve_is_refused_by_name(config, fields, problem) -> None:
    model = make_model(config, fields)
    with pytest.raises(UsageError, match=f"{type(model).__name__} .*{problem}"):
        CachedModel(model, Vanilla(), WINDOW)


def test_a_sliding_window_as_long_as_the_run_is_full_attention() -> None:
    model = make_model(Gemma3TextConfig, {**HALF_SLIDING, "sliding_window": 64})
    expected = texts(completions(TransformersEngine(model, CPU), requests()))
    for window, layers in ((65, 2), (64, 4)):
        engine = general_engine(model, Vanilla(), window)
        assert engine.cached.shape.layers == layers
        assert texts(completions(engine, requests())) == expected
