"""GGUF files: weights, configuration and tokenizer against transformers' reading of the same file."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from longbench_pred import main
from sparsecache.engine.families import load_family
from sparsecache.engine.gguf_file import open_tensors, read_header
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.model_registry import find_model
from sparsecache.engine.reference import TransformersEngine
from sparsecache.errors import UsageError
from sparsecache.synthetic.tokenizer import BOS, EOS, PAD

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a rotated projection's rows."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)


def write_gguf(folder: Path, target: Path, kind: str = "F32", **metadata: int) -> Path:
    """Write a checkpoint folder as a GGUF file, as llama.cpp's converter does."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    vocabulary[vocabulary.index(PAD)] = "<|endoftext|>"  # which transformers adds to a gpt2 vocabulary without it
    special = {token["content"] for token in tokenizer["added_tokens"]} | {"<|endoftext|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocabulary.index(BOS))
    writer.add_eos_token_id(vocabulary.index(EOS))
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if architecture == "llama" and ".q_proj" in name:
            tensor = _permute(tensor, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj" in name:
            tensor = _permute(tensor, config["num_key_value_heads"])
        values = tensor.float().numpy()
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(_name(name), np.ascontiguousarray(values))
        else:
            writer.add_tensor(_name(name), gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def make_gguf(make_checkpoint, tmp_path):
    def make(model_type: str = "llama", kind: str = "F32", **metadata: int) -> Path:
        folder = make_checkpoint(model_type, tie_word_embeddings=False, hidden_size=64, intermediate_size=96)
        return write_gguf(folder, tmp_path / f"{model_type}-{kind.lower()}.gguf", kind, **metadata)

    return make


def _state(path: Path) -> dict[str, torch.Tensor]:
    return TransformersEngine.load(path, torch.device("cpu"), torch.float32).model.state_dict()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_weights_equal_those_that_transformers_reads(model_type, kind, make_gguf) -> None:
    path = make_gguf(model_type, kind)
    checkpoint = Checkpoint(path)
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    weights = checkpoint.load(architecture, torch.device("cpu"), torch.float32)
    expected = _state(path)
    for index, layer in enumerate(weights.layers):
        names = [f"model.layers.{index}.self_attn.{part}_proj.weight" for part in "qkv"]
        assert torch.equal(layer.qkv, torch.cat([expected[name] for name in names]))
        assert torch.equal(layer.down, expected[f"model.layers.{index}.mlp.down_proj.weight"])
    assert torch.equal(weights.embedding, expected["model.embed_tokens.weight"])
    assert torch.equal(weights.head, expected["lm_head.weight"])


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_text_and_tokens_equal_transformers(model_type, make_gguf, make_engine, make_prompts, our_texts) -> None:
    path = make_gguf(model_type, "Q8_0")
    prompts = make_prompts(30, 7)
    reference = TransformersEngine.load(path, torch.device("cpu"), torch.float32)
    ours = our_texts(make_engine(path, 2), prompts, 12)
    assert ours == our_texts(reference, prompts, 12)
    assert Checkpoint(path).tokenizer.encode("Two words") == _reference_ids(path, "Two words")


def test_only_our_engine_refuses_another_architecture(make_gguf) -> None:
    checkpoint = Checkpoint(make_gguf())
    assert checkpoint.gguf is not None
    metadata = {**checkpoint.gguf.metadata, "general.architecture": "gemma3"}
    checkpoint.gguf = replace(checkpoint.gguf, metadata=metadata)
    checkpoint.check_weights(None)
    with pytest.raises(UsageError, match=r"architecture 'gemma3'\. Supported: llama, qwen2, qwen3\."):
        checkpoint.check_weights(load_family("llama").architecture(checkpoint.config))


def _reference_ids(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).encode(text)


def test_a_folder_with_one_file_is_that_file_and_its_stem_names_the_model(make_gguf) -> None:
    path = make_gguf()
    for text in (str(path), str(path.parent)):
        model = find_model(text)
        assert (model.name, model.path) == ("llama-f32", path)
    (path.parent / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="holds 2 GGUF files"):
        find_model(str(path.parent))


def test_the_fingerprint_depends_on_metadata_and_weights(make_gguf) -> None:
    prints = {Checkpoint(make_gguf("llama", kind)).fingerprint for kind in ("F32", "F16", "Q8_0")}
    assert len(prints) == 3
    path = make_gguf("llama", "F32", llama__context_length_2=7)
    assert Checkpoint(path).fingerprint not in prints


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 200, 0.5, 0.99])
def test_a_damaged_file_is_refused_in_one_sentence(keep, make_gguf) -> None:
    path = make_gguf()
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UsageError, match="damaged|no GGUF file"):
        Checkpoint(path)


def test_random_damage_to_the_header_never_raises_anything_else(make_gguf) -> None:
    path = make_gguf()
    data = path.read_bytes()
    drawn = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for at in drawn.integers(4, 2000, 4):
            broken[at] = int(drawn.integers(0, 256))
        path.write_bytes(bytes(broken))
        with suppress(UsageError):
            Checkpoint(path)


def test_split_files_and_unknown_architectures_are_refused_by_name(make_gguf, tmp_path) -> None:
    path = make_gguf()
    part = path.rename(path.with_name("model-00001-of-00002.gguf"))
    with pytest.raises(UsageError, match="split"):
        Checkpoint(part)
    with pytest.raises(UsageError, match=r"'rwkv9'.*Supported architectures: .*llama.*qwen2"):
        Checkpoint(_without_fields(tmp_path / "rwkv.gguf", "rwkv9"))


def test_a_missing_field_is_not_taken_from_another_model(tmp_path) -> None:
    """transformers fills it with a default of the class: another epsilon, another window."""
    with pytest.raises(UsageError, match=r"does not state .*llama\.attention\.layer_norm_rms_epsilon.*context_length"):
        Checkpoint(_without_fields(tmp_path / "llama.gguf", "llama"))


def test_a_field_or_a_tensor_of_a_type_that_cannot_be_used_is_named(make_gguf, tmp_path) -> None:
    path = make_gguf("llama", "F32")
    data = path.read_bytes()
    field = b"llama.attention.head_count"
    at = data.index(field) + len(field)
    text = gguf.GGUFValueType.STRING.to_bytes(4, "little") + (2).to_bytes(8, "little") + b"ab"
    broken = tmp_path / "field.gguf"
    broken.write_bytes(data[:at] + text + data[at + 8 :])
    with pytest.raises(UsageError, match=r"states llama\.attention\.head_count = ab\. It must be a number"):
        Checkpoint(broken)
    writer = gguf.GGUFWriter(tmp_path / "type.gguf", "llama")
    writer.add_tensor("output.weight", np.zeros((2, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="type I8, which the package gguf does not dequantise"):
        open_tensors(read_header(tmp_path / "type.gguf"))


def _without_fields(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_command_line_predicts_and_verifies_with_a_gguf_file(make_gguf, tmp_path) -> None:
    path = make_gguf("llama", "Q8_0")
    command = ["--model", str(path), "--data", "sample", "--datasets", "trec", "--sample_rows", "1"]
    command += ["--sample_tokens", "256", "--verify", "1", "--pred_dir", str(tmp_path / "pred"), "--device", "cpu"]
    told = CliRunner().invoke(main, command)
    assert "1 of 1 prompts give the text of transformers" in told.stdout, told.output
    record = json.loads((tmp_path / "pred" / "llama-q8_0" / "vanilla" / "run.json").read_text())
    assert record["model"]["format"] == "gguf"
