"""What describes a checkpoint: dtype, fingerprint, configuration, stop ids, window; and what is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparsecache.engine.families import load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.errors import UsageError


def _configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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
    path, seen = folder / "model.safetensors", {_fingerprint(folder)}
    content = path.read_bytes()
    assert len(content) < 4 * 2**20
    for at in (len(content) // 3, len(content) // 2 + 7, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(_fingerprint(folder))
    assert len(seen) == 4


def test_a_large_weight_file_is_sampled_at_its_table_its_end_and_its_length(folder) -> None:
    path = folder / "model.safetensors"
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
    _plant_code(folder, tmp_path / "ran")
    checkpoint = Checkpoint(folder)
    assert checkpoint.tokenizer("One two").input_ids and checkpoint.stop_ids and checkpoint.fingerprint
    checkpoint.load(load_family("llama").architecture(checkpoint.config), torch.device("cpu"), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_needs_its_own_code_is_refused_and_not_run(folder, tmp_path) -> None:
    _plant_code(folder, tmp_path / "ran")
    _configure(folder, model_type="evil")
    with pytest.raises(UsageError, match=r"'evil', which needs code from the checkpoint.* never run here"):
        Checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt9"}, "'gpt9', which transformers .* does not know"),
        ({"model_type": ["llama"]}, "does not know"),
        ({"hidden_size": "wide"}, "describes no model .*hidden_size"),
        ({"hidden_size": 65}, "describes no model .*65"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_one_sentence(changes, message, folder) -> None:
    _configure(folder, **changes)
    with pytest.raises(UsageError, match=rf"config\.json .*{message}") as refused:
        Checkpoint(folder)
    assert "\n" not in str(refused.value) and "trust_remote_code" not in str(refused.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_half_written_json_is_refused_not_ignored(file, folder) -> None:
    (folder / file).write_text((folder / file).read_text()[:-20])
    with pytest.raises(UsageError, match=str(folder)) as refused:
        _ = Checkpoint(folder).stop_ids
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_broken_link_in_place_of_a_file_is_refused_not_ignored(name, folder) -> None:
    """transformers would read the prompt without its chat template, or the answer without its stop tokens."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("blobs/gone")
    with pytest.raises(UsageError, match=rf"{name} is not a regular file, nor a link to one"):
        Checkpoint(folder)


def test_a_model_type_without_a_family_is_refused_with_the_families() -> None:
    with pytest.raises(UsageError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3.*--engine transformers"):
        load_family("gpt2")
    with pytest.raises(UsageError, match="'base'"):
        load_family("base")


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_another_activation_is_refused(activation, folder) -> None:
    _configure(folder, hidden_act=activation)
    with pytest.raises(UsageError, match=rf"'{activation}'.*silu"):
        load_family("llama").architecture(Checkpoint(folder).config)


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
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
