"""Texts become the ids that the `tokenizers` library makes of tokenizer.json, under whatever label it comes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from sparsecache.engine.tokenization import find_stop_ids, load_tokenizer
from sparsecache.errors import UsageError
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import load_tasks

LABELS = ("LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast")
TEXTS = (
    "Question: which of the towns has a mill? Don't say I'LL.",
    "the mill", " the mill", "  two  spaces   three", "\n\n12\n \n", "\ttab\r\nx ", "",
    "1234567 at 17:45, 12%", "def add(a, b):\n    return a + b\n\n\n    12345", "请根据下面的文章回答问题。é🙂",
    "<s>[INST] the mill [/INST]</s>", "a<|user|> b <|im_end|>\nc", "getValue of NaOH, JSONDecodeError",
)  # fmt: skip
ROW = {"context": " The mill is old. 请 12345", "input": "Who?", "_id": "a", "answers": ["Ada"]}


def library(folder: Path) -> Tokenizer:
    """The outside truth."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("label", LABELS)
def test_ids_and_texts_are_those_of_tokenizer_json_under_any_label(label, model_type, kind, write) -> None:
    folder = write(kind, model_type, tokenizer_class=label, unk_token="<unk>", add_bos_token=True, legacy=True)
    ours, theirs = load_tokenizer(folder), library(folder)
    for text in TEXTS:
        for added in (True, False):
            ids = theirs.encode(text, add_special_tokens=added).ids
            assert ours(text, add_special_tokens=added)["input_ids"] == ids, text
            assert ours.encode(text, add_special_tokens=added) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids)


@pytest.mark.parametrize("dataset", ["trec", "qasper", "multifieldqa_zh", "lcc"])
@pytest.mark.parametrize("label", LABELS)
def test_raw_prompts_have_the_ids_of_the_library_with_its_special_tokens(label, dataset, kind, write) -> None:
    folder = write(kind, tokenizer_class=label)
    task = load_tasks()[dataset]
    prompt = Prompter(load_tokenizer(folder), 4096).build(task, ROW)
    assert prompt.token_ids == library(folder).encode(task.template.format(**ROW)).ids


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("ab 1 2\n\t'.請é🙂\u200b▁Ġ<s>|/"), max_size=60))
def test_any_text(text: str, byte_and_piece: list[tuple[Any, Tokenizer]]) -> None:
    for ours, theirs in byte_and_piece:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def byte_and_piece(write) -> list[tuple[Any, Tokenizer]]:
    from sparsecache.synthetic.tokenizer import build_tokenizer

    folder = write(build_tokenizer(["the mill 123 請 é"] * 3, 300), tokenizer_class="LlamaTokenizerFast")
    return [(load_tokenizer(folder), library(folder))]


@pytest.mark.parametrize("label", ["T5Tokenizer", "MistralCommonBackend", "NoSuchTokenizer", 5, ["LlamaTokenizer"], {}])
def test_a_class_that_cannot_read_the_file_is_only_a_label(label, kind, write) -> None:
    folder = write(kind, tokenizer_class=label)
    ours = load_tokenizer(folder)
    assert [ours.encode(text) for text in TEXTS] == [library(folder).encode(text).ids for text in TEXTS]
    assert (ours.bos_token, ours.eos_token_id) == ("<s>", kind.token_to_id("</s>"))


def test_truncation_and_padding_that_are_stored_are_not_applied(llama_3, write) -> None:
    want = llama_3.encode(TEXTS[0] * 9).ids
    llama_3.enable_truncation(64)
    llama_3.enable_padding(length=80, pad_id=2, pad_token="</s>")
    ours = load_tokenizer(write(llama_3, model_max_length=64))
    assert ours.encode(TEXTS[0] * 9) == want and ours.encode("x") == want[:1] + llama_3.encode("x").ids[1:2]


def test_a_difference_from_transformers_is_noted_and_only_then(make_tokenizer, sentencepiece, write) -> None:
    assert load_tokenizer(write(make_tokenizer("llama3"))).notes == []
    folder = write(sentencepiece, tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    assert AutoTokenizer.from_pretrained(folder)("  two").input_ids != library(folder).encode("  two").ids
    (note,) = load_tokenizer(folder).notes
    assert "LlamaTokenizer tokenizes some texts differently" in note and "the ids of tokenizer.json" in note


def test_an_end_of_text_token_after_every_text_is_noted(make_tokenizer, write) -> None:
    ours = load_tokenizer(write(make_tokenizer(single="<s> $A </s>")))
    assert ours.encode("x")[-1] == ours.eos_token_id
    assert any("ends every text with the end-of-text token" in note for note in ours.notes)


@pytest.mark.parametrize("fixed", [None, True])
def test_the_regex_that_transformers_takes_for_wrong_is_noted_or_fixed(fixed, make_tokenizer, write) -> None:
    """transformers#42299: checkpoints of the mistral types, with a vocabulary over 100,000."""
    stored = json.loads(make_tokenizer().to_str())
    vocabulary = stored["model"]["vocab"]
    vocabulary["tV"] = len(vocabulary)  # a merge across a border that only the fixed regex sees
    stored["model"]["merges"].append(["t", "V"])
    vocabulary |= {f"<SPECIAL_{at}>": at for at in range(len(vocabulary), 100_200)}
    fields = {} if fixed is None else {"fix_mistral_regex": fixed}
    folder = write(Tokenizer.from_str(json.dumps(stored)), "mistral", **fields)
    ours = load_tokenizer(folder)
    truth = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=True) if fixed else None
    want = truth("ztVz").input_ids if truth else library(folder).encode("ztVz").ids
    assert ours.encode("ztVz") == want
    assert (vocabulary["tV"] in want) == (fixed is None)
    assert any("regex" in note and '"fix_mistral_regex": true' in note for note in ours.notes) == (fixed is None)


def test_the_end_token_is_left_out_of_texts_also_where_tokenizer_json_calls_it_ordinary(write, make_tokenizer) -> None:
    stored = json.loads(make_tokenizer().to_str())
    for added in stored["added_tokens"]:
        added["special"] = added["content"] != "</s>"
    ours = load_tokenizer(write(Tokenizer.from_str(json.dumps(stored))))
    ids = [*ours.encode("the mill", add_special_tokens=False), ours.eos_token_id]
    assert ours.decode(ids, skip_special_tokens=True) == "the mill"
    assert ours.decode(ids) == "the mill</s>"


def test_added_tokens_of_tokenizer_json_are_one_id_each(make_tokenizer, write) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("mill ", lstrip=True)])
    folder = write(tokenizer, tokenizer_class="GPT2Tokenizer")
    for text in ("a<tool>b", "the mill and the  mill ", "<tool><tool> mill"):
        assert load_tokenizer(folder).encode(text) == library(folder).encode(text).ids


def test_a_chat_token_that_only_tokenizer_config_adds_is_refused(make_tokenizer, write) -> None:
    """The other files make it a new id, tokenizer.json reads it as plain text: which the model knows is unknown."""
    added = {"607": {"content": "<|new|>", "special": True}}
    template = "<|new|>{{ messages[0]['content'] }}"
    ours = load_tokenizer(write(make_tokenizer(), added_tokens_decoder=added, chat_template=template))
    with pytest.raises(UsageError, match=r"The chat wrapper holds <\|new\|>, which is one token in"):
        Prompter(ours, 4096, chat="template").capacity(load_tasks()["qasper"])
    assert Prompter(ours, 4096).capacity(load_tasks()["qasper"]) > 0


@pytest.mark.parametrize("length", ["", [], {}])
def test_a_field_that_only_transformers_reads_does_not_end_a_run(length, llama_3, write) -> None:
    ours = load_tokenizer(write(llama_3, model_max_length=length))
    assert ours.encode(TEXTS[0]) == llama_3.encode(TEXTS[0]).ids
    assert isinstance(ours.notes, list)


def test_broken_files_are_one_sentence(llama_3, write) -> None:
    folder = write(llama_3)
    for broken in ("", "{}", '{"model": {"type": "None"}}', "\x00" * 9):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(UsageError, match="Could not load a tokenizer") as refused:
            load_tokenizer(folder)
        assert "\n" not in str(refused.value)


def test_stop_ids_are_ids_of_tokenizer_json(make_tokenizer, write) -> None:
    class Config:
        eos_token_id = 5

        def get_text_config(self) -> "Config":
            return self

    ours = load_tokenizer(write(make_tokenizer(), eos_token="<|end|>"))
    assert find_stop_ids(Path("nowhere"), Config(), ours) == sorted(
        {5, *map(ours.get_vocab().get, ("<|end|>", "<|im_end|>"))}
    )
