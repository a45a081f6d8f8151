"""Checkpoint folders: strict weights in every layout, stop ids, fingerprints, and what is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecache.engine import weights
from sparsecache.engine.families import load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.errors import UsageError

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(make_checkpoint, tmp_path) -> Path:
    """A llama checkpoint that a test may change."""
    return shutil.copytree(make_checkpoint(), tmp_path / "llama")


def _load(folder: Path, allow_pickle: bool = False, dtype: torch.dtype = torch.float32) -> Weights:
    checkpoint = Checkpoint(folder, allow_pickle)
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return checkpoint.load(architecture, CPU, dtype)


def _flat(weights: Weights) -> dict[str, Tensor | None]:
    layers = {
        f"{at}.{field.name}": getattr(layer, field.name)
        for at, layer in enumerate(weights.layers)
        for field in fields(LayerWeights)
    }
    return {"embedding": weights.embedding, "norm": weights.norm, "head": weights.head, **layers}


def _assert_equal(first: Weights, second: Weights) -> None:
    one, two = _flat(first), _flat(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or (tensor.dtype == other.dtype and torch.equal(tensor, other)), name


def _change(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _to_pickle(folder: Path, shards: int = 1) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = {name: f"pytorch_model-{at % shards}.bin" for at, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.fixture
def sharded(folder, tmp_path) -> Path:
    """The same checkpoint in several files, as transformers writes them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    other = shutil.copytree(folder, tmp_path / "sharded")
    (other / WEIGHTS).unlink()
    model.save_pretrained(other, max_shard_size="100KB")
    assert len(list(other.glob("model-*.safetensors"))) > 2
    return other


def test_shards_equal_one_file(folder, sharded) -> None:
    _assert_equal(_load(folder), _load(sharded))


def test_a_missing_shard_or_a_broken_index_is_refused_by_name(sharded) -> None:
    index = sharded / "model.safetensors.index.json"
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    for read in (_load, lambda folder: Checkpoint(folder).fingerprint):
        with pytest.raises(UsageError, match=f"lacks {shard.name}, named in {index.name}"):
            read(sharded)
    for text in ("{", "[]", "{}", '{"weight_map": null}'):
        index.write_text(text)
        with pytest.raises(UsageError, match=f"{index.name} is no index of shards"):
            _load(sharded)


def test_a_shard_with_a_tensor_of_another_is_no_harm_but_one_left_out_is(sharded) -> None:
    first = min(sharded.glob("model-*.safetensors"))
    tensors = load_file(first)
    gone = min(tensors)
    del tensors[gone]
    save_file(tensors, first, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"lacks {re.escape(gone)}"):
        _load(sharded)


PICKED = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PICKED), f"it lacks {PICKED}."),
        (lambda t: t.pop("lm_head.weight"), "it lacks lm_head.weight."),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "it holds unexpected extra.weight."),
        (lambda t: t.update({f"{PICKED[:-6]}bias": torch.zeros(32)}), f"it holds unexpected {PICKED[:-6]}bias."),
        (lambda t: t.update({PICKED: t[PICKED].T.contiguous()}), f"{PICKED} of shape [64, 32] where config.json asks"),
        (lambda t: t.update({PICKED: t[PICKED][:-1].clone()}), "[31, 64] where config.json asks for [32, 64]"),
        (lambda t: t.update({PICKED: t[PICKED].flatten()}), f"{PICKED} of shape [2048]"),
        (lambda t: [t.pop(key) for key in list(t) if "layers.1" in key], " and 4 further differences."),
    ],
    ids=["missing", "head", "unexpected", "bias", "transposed", "short", "flat", "many"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, folder) -> None:
    _change(folder, change)
    with pytest.raises(UsageError) as refused:
        _load(folder)
    assert message in str(refused.value) and str(folder) in str(refused.value)


def test_misfits_are_found_before_any_tensor_is_read(folder, monkeypatch) -> None:
    """Minutes into loading shards is too late to learn of a missing tensor."""

    def read() -> Tensor:
        raise AssertionError("a tensor was read")

    real = weights._open_safetensors
    monkeypatch.setattr(
        weights,
        "_open_safetensors",
        lambda path: {name: replace(stored, read=read) for name, stored in real(path).items()},
    )
    with pytest.raises(AssertionError, match="was read"):
        _load(folder)
    _change(folder, lambda tensors: tensors.pop(PICKED))
    with pytest.raises(UsageError, match="lacks"):
        _load(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1, -5000])
def test_a_truncated_file_is_refused_by_name(kept, folder) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=rf"{WEIGHTS} cannot be read \(.*\)\. Fetch it again\."):
        _load(folder)


def test_a_folder_without_weights_is_refused(folder) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"holds no weights: neither model\.safetensors nor an index of shards"):
        _load(folder)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_unless_allowed_and_then_equal(shards, folder) -> None:
    expected = _load(folder)
    _to_pickle(folder, shards)
    for read in (_load, lambda folder: Checkpoint(folder).fingerprint):
        with pytest.raises(UsageError, match="pickle files.*--allow_pickle"):
            read(folder)
    _assert_equal(_load(folder, allow_pickle=True), expected)
    assert len(Checkpoint(folder, allow_pickle=True).fingerprint) == 64


class _Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_with_code_in_it_is_not_run_even_where_allowed(folder, tmp_path) -> None:
    marker = tmp_path / "ran"
    _to_pickle(folder)
    torch.save({"model.norm.weight": _Bomb(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read"):
        _load(folder, allow_pickle=True)
    assert not marker.exists()


def test_safetensors_are_preferred_to_pickles_beside_them(folder) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    _assert_equal(_load(folder, allow_pickle=True), _load(folder))


def test_tied_embeddings_with_and_without_a_stored_head(make_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(make_checkpoint(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    plain = _load(folder)
    assert plain.head is plain.embedding
    _change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    stored = _load(folder)
    assert stored.head is stored.embedding
    _assert_equal(stored, plain)


def test_a_stored_head_that_differs_is_used_as_in_transformers(
    make_checkpoint, make_engine, reference_texts, our_texts, make_prompts, tmp_path
) -> None:
    folder = shutil.copytree(make_checkpoint(tie_word_embeddings=True), tmp_path / "tied")
    before = our_texts(make_engine(folder), make_prompts(20))
    _change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}))
    after = our_texts(make_engine(folder), make_prompts(20))
    assert after == reference_texts(folder, make_prompts(20))
    assert after != before
    _change(folder, lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}))
    with pytest.raises(UsageError, match=r"lm_head\.weight of shape \[3, 64\]"):
        _load(folder)


def test_rotary_buffers_of_old_files_are_ignored(folder) -> None:
    expected = _load(folder)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    _change(folder, lambda tensors: tensors.update(buffers))
    _assert_equal(_load(folder), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_to_the_dtype_asked_for(dtype, folder) -> None:
    expected = _flat(_load(folder))
    _change(folder, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    for name, tensor in _flat(_load(folder, dtype=dtype)).items():
        assert tensor is None or (tensor.dtype == dtype and torch.equal(tensor, expected[name].half().to(dtype))), name


@pytest.mark.parametrize(
    ("stated", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.bfloat16)]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_stated_dtype(key, stated, dtype, folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps({**config, key: stated}))
    assert Checkpoint(folder).dtype == dtype


def _fingerprint(folder: Path) -> str:
    return Checkpoint(folder).fingerprint


def test_the_fingerprint_is_of_contents_not_of_places_or_times(folder, tmp_path) -> None:
    assert _fingerprint(shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)) == _fingerprint(
        folder
    )
    (folder / "README.md").write_text("words")
    assert _fingerprint(folder) == _fingerprint(tmp_path / "moved")


def test_one_changed_byte_of_a_small_weight_file_changes_the_fingerprint(folder) -> None:
    path, seen = folder / WEIGHTS, {_fingerprint(folder)}
    content = path.read_bytes()
    assert len(content) < 4 * 2**20
    for at in (len(content) // 3, len(content) // 2 + 7, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(_fingerprint(folder))
    assert len(seen) == 4


def test_a_large_weight_file_is_sampled_at_its_table_its_end_and_its_length(folder) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes() + bytes(9 * 2**20)
    path.write_bytes(content)
    seen = {_fingerprint(folder)}
    for at in (10, len(content) - 1):
        path.write_bytes(content[:at] + b"\x07" + content[at + 1 :])
        seen.add(_fingerprint(folder))
    path.write_bytes(content + b"\0")
    seen.add(_fingerprint(folder))
    assert len(seen) == 4


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_the_fingerprint_covers_configuration_and_tokenizer(file, folder) -> None:
    before = _fingerprint(folder)
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert _fingerprint(folder) != before


@pytest.mark.parametrize("file", ["vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja"])
def test_a_new_tokenizer_file_changes_the_fingerprint(file, folder) -> None:
    before = _fingerprint(folder)
    (folder / file).write_text("x")
    assert _fingerprint(folder) != before


def _plant_code(folder: Path, marker: Path) -> None:
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(code + "class Evil:\n    pass\n")
    autos = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    _configure(folder, auto_map=autos)
    _configure(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})


def test_code_in_a_checkpoint_of_a_known_type_is_never_run(folder, tmp_path) -> None:
    expected = _load(folder)
    _plant_code(folder, tmp_path / "ran")
    checkpoint = Checkpoint(folder)
    assert checkpoint.tokenizer("One two").input_ids and checkpoint.stop_ids and checkpoint.fingerprint
    _assert_equal(_load(folder), expected)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_needs_its_own_code_is_refused_and_not_run(folder, tmp_path) -> None:
    _plant_code(folder, tmp_path / "ran")
    _configure(folder, model_type="evil")
    with pytest.raises(UsageError, match=r"config\.json is no configuration .* never done here"):
        Checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "gpt9"}, {"hidden_size": "wide"}, {"hidden_size": 65}, {"num_attention_heads": 0}],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_one_sentence(changes, folder) -> None:
    _configure(folder, **changes)
    with pytest.raises(UsageError, match=r"config\.json is no configuration") as refused:
        Checkpoint(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_half_written_json_is_refused_not_ignored(file, folder) -> None:
    (folder / file).write_text((folder / file).read_text()[:-20])
    with pytest.raises(UsageError, match=str(folder)) as refused:
        _ = Checkpoint(folder).stop_ids
    assert "\n" not in str(refused.value)


def test_a_model_type_without_a_family_is_refused_with_the_families() -> None:
    with pytest.raises(UsageError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3.*--engine transformers"):
        load_family("gpt2")
    with pytest.raises(UsageError, match="'base'"):
        load_family("base")


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_another_activation_is_refused(activation, folder) -> None:
    _configure(folder, hidden_act=activation)
    with pytest.raises(UsageError, match=rf"'{activation}'.*silu"):
        _load(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {"sliding_window": 40}, 40),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}, 40),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 40}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}, 40),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}, None),
        ("llama", {}, None),
    ],
)
def test_layers_with_a_sliding_window_are_noticed(model_type, changes, window, make_checkpoint) -> None:
    config = Checkpoint(make_checkpoint(model_type, **changes)).config
    assert load_family(model_type).sliding_window(config) == window


def _add_token(folder: Path, token: str) -> int:
    tokenizer = Checkpoint(folder).tokenizer
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(token))


def test_stop_ids_are_the_union_of_all_sources(folder) -> None:
    assert Checkpoint(folder).stop_ids == [1]
    _configure(folder, "generation_config.json", eos_token_id=[7, 9])
    assert Checkpoint(folder).stop_ids == [1, 7, 9]
    turns = [_add_token(folder, token) for token in ("<|eot_id|>", "<|im_end|>")]
    assert Checkpoint(folder).stop_ids == [1, 7, 9, *turns]
    _configure(folder, "generation_config.json", eos_token_id=11)
    assert Checkpoint(folder).stop_ids == [1, 11, *turns]


def test_without_a_generation_config_the_configuration_tells(folder) -> None:
    (folder / "generation_config.json").unlink()
    _configure(folder, eos_token_id=[12, 13])
    assert Checkpoint(folder).stop_ids == [1, 12, 13]


def test_a_checkpoint_may_have_no_stop_id_at_all(folder) -> None:
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _configure(folder, file, eos_token_id=None, eos_token=None)
    assert Checkpoint(folder).stop_ids == []


def test_the_window_is_the_configurations(folder) -> None:
    assert Checkpoint(folder).window == 96
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert Checkpoint(folder).window is None
