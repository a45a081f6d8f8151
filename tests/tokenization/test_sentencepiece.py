"""A tokenizer.model without a tokenizer.json, and a GGUF file's sentencepiece vocabulary, give sentencepiece's ids."""

import io
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from sparsecache.engine.gguf_tokenizer import _splitter, sentencepiece_model
from sparsecache.engine.tokenization import load_tokenizer
from sparsecache.errors import UsageError

spm = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

LINES = (
    "The harbour master counted 1234 crates and 56 barrels before the ships left at 17:45 on the 3rd of May.",
    "Question: which of the towns has a mill? Answer: Oakfield has a mill, Riverton has a bridge and a market.",
    "def add(first, second):\n    total = first + second\n    return total\n",
    "请根据下面的文章回答问题。 河边的小镇有一座桥和一个集市。",
)
TEXTS = (
    "Question: which of the towns has a mill?", " hello", "  two  spaces\n\nand", "▁x", " ", "", "x 请 1234\t\r\n",
    "def add(a):\n    return", "ﬁn é １２ 🙂", "a <b> c",
)  # fmt: skip
PLAIN: dict[str, Any] = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "split_digits": True},
    "no space first": {**PLAIN, "add_dummy_prefix": False},
    "normalized": {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "symbols": {**PLAIN, "user_defined_symbols": ["<b>", "\n\n"]},
    "unigram": {**PLAIN, "model_type": "unigram", "vocab_size": 350},
}


@cache
def train(name: str) -> bytes:
    written = io.BytesIO()
    common = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 10), model_writer=written, **{**common, **ids, **MODELS[name]}
    )
    return written.getvalue()


@pytest.fixture
def write_model(tmp_path) -> Callable[..., Path]:
    """Write a folder with a tokenizer.model: `write_model("llama", legacy=True)`; None leaves a field out."""

    def write(name: str, **fields: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(train(name))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        stated = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        given = {key: value for key, value in {**stated, **fields}.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        return tmp_path

    return write


@pytest.mark.parametrize("label", ["LlamaTokenizer", "GemmaTokenizer", None])
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_texts_are_those_of_sentencepiece_under_any_label(name, label, write_model) -> None:
    truth = spm.SentencePieceProcessor(model_proto=train(name))
    ours = load_tokenizer(write_model(name, tokenizer_class=label, legacy=None if label is None else True))
    for text in TEXTS:
        ids = truth.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours(text)["input_ids"] == [1, *ids]
        assert ours.decode(ids) == ours.decode([1, *ids, 2], skip_special_tokens=True) == truth.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id, ours.get_vocab()["<s>"]) == (1, 2, 1)


@pytest.mark.parametrize("legacy", [True, False])
def test_special_tokens_are_recognised_as_by_transformers(legacy, write_model) -> None:
    folder = write_model("llama", legacy=legacy, add_bos_token=False, add_eos_token=True)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("<s>[INST] the mill [/INST]", "a</s>\nb", "a <s>b", "</s></s><unk>"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == [*ids, 2]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode([10**6, 1]) == "<s>"


def test_a_difference_from_transformers_is_noted(write_model) -> None:
    (note,) = load_tokenizer(write_model("llama")).notes
    assert "LlamaTokenizer tokenizes some texts differently" in note and "the ids of tokenizer.model" in note


@pytest.mark.parametrize("blocked", ["sentencepiece", "google.protobuf"])
def test_without_its_packages_one_sentence_says_what_to_install(blocked, write_model, monkeypatch) -> None:
    class Blocked:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            if name == blocked or name.startswith(f"{blocked}."):
                raise ModuleNotFoundError(name)
            return None

    folder = write_model("llama")
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    for name in [name for name in sys.modules if name == blocked or name.startswith(f"{blocked}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match="pip install sentencepiece protobuf"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"IQ== 0\n", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_broken_model_is_one_sentence(content, write_model) -> None:
    folder = write_model("llama")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(UsageError, match="Could not load a tokenizer") as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("add_bos", "unknown"), [(None, 2), (False, 2), (None, 3)])
def test_the_vocabulary_of_a_gguf_file_gives_the_ids_of_sentencepiece(add_bos, unknown, tmp_path) -> None:
    """unknown: the type of <unk>. Files of Gemma 3 state 3, that of a control token."""
    gguf = pytest.importorskip("gguf")
    truth = spm.SentencePieceProcessor(model_proto=train("llama"))
    size = truth.get_piece_size()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([truth.id_to_piece(at) for at in range(size)])
    writer.add_token_scores([truth.get_score(at) for at in range(size)])
    writer.add_token_types([unknown, 3, 3, *(6 if truth.is_byte(at) else 1 for at in range(3, size))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_tokenizer(tmp_path / "a.gguf")
    for text in TEXTS:
        ids = truth.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == (ids if add_bos is False else [1, *ids])
        assert ours.decode(ids) == truth.decode(ids)
    assert ours.encode("<unk>", add_special_tokens=False) == [0] and ours.decode([0, 0]) == "<unk><unk>"


@pytest.mark.parametrize(("kinds", "expected"), [([3, 3, 1], [3, 2, 1]), ([3, 3, 2], [3, 3, 2])])
def test_the_unknown_token_of_a_gguf_file_has_the_type_that_sentencepiece_needs(kinds, expected) -> None:
    stated = {"tokens": ["<s>", "<unk>", "a"], "scores": [0.0] * 3, "token_type": kinds, "unknown_token_id": 1}
    assert [piece.type for piece in sentencepiece_model(stated).pieces] == expected


def test_byte_level_splits_of_gguf_files_are_those_of_the_published_tokenizers() -> None:
    """Digits one by one (SmolLM, Qwen 2) or up to three together (Llama 3); spaces before a digit stay apart."""
    for name, text, pieces in (
        ("smollm", "x  7 12%", ["x", "ĠĠ", "7", "Ġ", "1", "2", "%"]),
        ("qwen2", "x  7 12%", ["x", "Ġ", "Ġ", "7", "Ġ", "1", "2", "%"]),
        ("llama-bpe", "I'LL 12345\n\n x", ["I", "'LL", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
    ):
        assert [piece for piece, _ in _splitter(name).pre_tokenize_str(text)] == pieces
    assert _splitter("gpt-2") is None and isinstance(_splitter("smollm"), pre_tokenizers.Sequence)
