"""The transformers engine: equal to ours, greedy whatever the checkpoint says, for any architecture."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, GPT2Config

from sparsecache.engine.base import Completion, Request
from sparsecache.engine.families import family_names
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.reference import TransformersEngine
from sparsecache.errors import UsageError

CPU = torch.device("cpu")
NEW_TOKENS = 20


def _reference(folder: Path) -> TransformersEngine:
    return TransformersEngine.load(folder, CPU, torch.float32)


def _requests(prompts: list[list[int]], stops: tuple[int, ...] = (), minimum: int = 0) -> list[Request]:
    return [Request(key, prompt, NEW_TOKENS, stops, minimum) for key, prompt in enumerate(prompts)]


def _texts(engine, requests: list[Request]) -> dict[int, tuple[list[int], str]]:
    done: list[Completion] = list(engine.generate(requests))
    assert [completion.error for completion in done] == [None] * len(requests)
    return {completion.key: (completion.token_ids, completion.finish_reason) for completion in done}


@pytest.mark.parametrize("model_type", family_names())
def test_equals_ours_with_stop_ids_and_minimum(model_type, make_checkpoint, make_engine, make_prompts) -> None:
    folder = make_checkpoint(model_type)
    prompts, reference = make_prompts(30, 4, 120), _reference(folder)
    free = _texts(reference, _requests(prompts))
    assert {reason for _, reason in free.values()} == {"length"}
    first, tenth = free[0][0][0], free[1][0][10]
    for stops, minimum in (((), 0), ((first, tenth), 0), ((first, tenth), 1), ((first, tenth), 12)):
        requests = _requests(prompts, stops, minimum)
        assert _texts(reference, requests) == _texts(make_engine(folder), requests)


def test_the_checkpoints_own_sampling_settings_do_not_leak_in(make_checkpoint, make_prompts, tmp_path) -> None:
    plain = make_checkpoint()
    spiced = shutil.copytree(plain, tmp_path / "spiced")
    own = {
        "do_sample": True,
        "temperature": 9.0,
        "top_p": 0.9,
        "top_k": 50,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "max_length": 3,
        "max_new_tokens": 2,
        "suppress_tokens": list(range(500)),
        "eos_token_id": list(range(1024)),
    }
    path = spiced / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    path = spiced / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 5.0}))
    requests = _requests(make_prompts(30, 4))
    assert _texts(_reference(spiced), requests) == _texts(_reference(plain), requests)
    model = AutoModelForCausalLM.from_pretrained(spiced)  # the settings would have shown
    out = model.generate(torch.tensor([requests[0].token_ids]), do_sample=False, max_new_tokens=NEW_TOKENS)
    assert out[0, 30:].tolist() != _texts(_reference(plain), requests)[0][0]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 40,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rows_do_not_depend_on_the_rows_before(rope, make_checkpoint, make_engine, make_prompts) -> None:
    folder = make_checkpoint("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    requests = _requests(make_prompts(200, 120, 20, 96, 60))
    alone = {request.key: _texts(_reference(folder), [request])[request.key] for request in requests}
    engine = _reference(folder)
    assert _texts(engine, requests) == alone
    assert _texts(engine, requests[::-1]) == alone
    assert _texts(make_engine(folder), requests) == alone


def test_the_stats_and_the_callback_count_tokens(make_checkpoint, make_prompts) -> None:
    engine, counts = _reference(make_checkpoint()), []
    done = list(engine.generate(_requests(make_prompts(30, 4)), counts.append))
    assert sum(counts) == sum(len(completion.token_ids) for completion in done) == 2 * NEW_TOKENS
    assert (engine.stats.prefill_tokens, engine.stats.decode_tokens) == (34, 2 * NEW_TOKENS - 2)
    assert engine.stats.prefill_s == pytest.approx(sum(completion.prefill_s for completion in done))
    assert engine.stats.decode_s == pytest.approx(sum(completion.decode_s for completion in done))
    assert min(completion.prefill_s for completion in done) > 0


def test_a_failing_row_is_an_error_and_the_others_go_on(make_checkpoint, make_prompts) -> None:
    good, other = make_prompts(5, 6)
    done = {c.key: c for c in _reference(make_checkpoint()).generate(_requests([good, [5, 999999], other]))}
    assert done[1].error and not done[0].error and not done[2].error


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2, n_positions=128),
        BloomConfig(vocab_size=200, hidden_size=32, n_layer=1, n_head=2),
        Gemma3TextConfig(
            vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_any_architecture_of_transformers_runs(config, tmp_path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    done = _texts(_reference(tmp_path), _requests([[5, 6, 7], list(range(20, 60))]))
    assert [len(text) for text, _ in done.values()] == [NEW_TOKENS] * 2


def test_weights_that_do_not_fit_are_refused_not_made_up(make_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(make_checkpoint(), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"it lacks model\.norm\.weight\."):
        _reference(folder)
    save_file(
        {**tensors, "model.norm.weight": norm[:5].clone()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UsageError, match="transformers cannot load"):
        _reference(folder)
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    whole = {**tensors, "model.norm.weight": norm, **scale}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight_scale, which transformers does not"
    ):
        _reference(folder)
    (folder / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(UsageError, match="transformers cannot load"):
        _reference(folder)


def test_pickles_need_permission_here_too(make_checkpoint, make_prompts, tmp_path) -> None:
    folder = shutil.copytree(make_checkpoint(), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="transformers cannot load"):
        _reference(folder)
    requests = _requests(make_prompts(9))
    allowed = TransformersEngine.load(folder, CPU, torch.float32, allow_pickle=True)
    assert _texts(allowed, requests) == _texts(_reference(make_checkpoint()), requests)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_of_the_hub_that_config_json_names_is_not_used(name, folder) -> None:
    """transformers would download code from there and run it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: "owner/kernel"}))
    model = TransformersEngine.load(folder, CPU, torch.float32, config=Checkpoint(folder).config).model
    assert model.config._attn_implementation == "sdpa"
