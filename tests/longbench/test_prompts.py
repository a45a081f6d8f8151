"""Prompts against a plain implementation of the protocol, with and without BOS and chat template."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsecache.errors import UsageError
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import Task, select_tasks
from sparsecache.synthetic.rows import make_rows

NOT_WRAPPED = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN
LLAMA_2 = "[INST]{prompt}[/INST]"
TASKS = {task.name: task for task in select_tasks("all")}  # the published ones


def make_tokenizer(chat_template: str | None = None, bos: bool = True) -> Any:
    """Return a byte-level tokenizer with a few hundred entries. With `bos` it puts `<s>` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([task.template for task in TASKS.values()], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = chat_template
    return made


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def without_bos() -> Any:
    return make_tokenizer(bos=False)


@pytest.fixture(scope="module")
def chat() -> Any:
    return make_tokenizer(WITH_BOS)


def retold(tokenizer: Any, name: str, row: dict[str, Any], max_length: int, wrap: Callable[[str], str]) -> str:
    """Return a prompt by the first three steps of the protocol."""
    text = TASKS[name].template.format(**row)
    token_ids = tokenizer(text).input_ids
    if len(token_ids) > max_length:
        half = int(max_length / 2)
        first = tokenizer.decode(token_ids[:half], skip_special_tokens=True)
        text = first + tokenizer.decode(token_ids[-half:], skip_special_tokens=True)
    return text if name in NOT_WRAPPED else wrap(text)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tiny_task(template: str = "{context}", chat: bool = True, max_new_tokens: int = 4) -> Task:
    return Task("tiny", template, max_new_tokens, "count", "synthetic", "en", 1, chat=chat)


@pytest.mark.parametrize("max_length", [100_000, 200, 201])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_every_dataset_follow_the_protocol(plain: Any, name: str, max_length: int) -> None:
    row = make_rows(name, 1, 300, 3)[0]
    prompt = Prompter(plain, 100_000, max_length, LLAMA_2).build(TASKS[name], row)
    text = retold(plain, name, row, max_length, lambda raw: f"[INST]{raw}[/INST]")
    assert prompt.token_ids == plain(text).input_ids
    assert prompt.sha256 == sha256(text)
    assert prompt.original_tokens == len(plain(TASKS[name].template.format(**row)).input_ids)
    assert prompt.truncated == (max_length < 300)
    assert prompt.overflow_tokens == 0
    assert prompt.token_ids.count(plain.bos_token_id) == 1


@pytest.mark.parametrize("name", ["qasper", "multifieldqa_zh", "samsum", "lcc"])
def test_a_chat_template_with_the_bos_does_not_double_it(chat: Any, name: str) -> None:
    row = make_rows(name, 1, 300, 3)[0]
    prompt = Prompter(chat, 4096, 150, "template").build(TASKS[name], row)
    text = retold(chat, name, row, 150, lambda raw: f"<s><|user|>{raw}<|a|>")
    assert prompt.token_ids == chat(text, add_special_tokens=name in NOT_WRAPPED).input_ids
    assert prompt.token_ids[0] == chat.bos_token_id
    assert prompt.token_ids.count(chat.bos_token_id) == 1
    assert prompt.sha256 == sha256(text)


def test_a_chat_template_without_the_bos_gets_none() -> None:
    tokenizer = make_tokenizer(PLAIN)
    prompt = Prompter(tokenizer, 4096, chat="template").build(tiny_task(), {"context": "x"})
    assert prompt.token_ids == tokenizer("<|user|>x<|a|>", add_special_tokens=False).input_ids
    assert tokenizer.bos_token_id not in prompt.token_ids


def test_chat_template_arguments_reach_the_template() -> None:
    tokenizer = make_tokenizer("{{ messages[0].content }}|{{ date_string }}|{{ think }}")
    prompter = Prompter(tokenizer, 4096, None, "template", (("date_string", "26 Jul"), ("think", False)))
    prompt = prompter.build(tiny_task(), {"context": "x"})
    assert prompt.sha256 == sha256("x|26 Jul|False")


def test_two_bos_tokens_are_an_error() -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}")
    with pytest.raises(UsageError, match="two <s> tokens.*another `chat`"):
        Prompter(tokenizer, 4096, chat="template").build(tiny_task(), {"context": "x"})


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[5].content }}", "{% if %}"])
def test_a_template_that_raises_is_an_error_before_any_row(template: str) -> None:
    with pytest.raises(UsageError, match="The chat wrapper cannot be used .*another `chat`"):
        Prompter(make_tokenizer(template), 4096, chat="template").capacity(tiny_task())


def test_a_wrapper_that_drops_the_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'nothing' drops or repeats the prompt: it must hold \{prompt\} once"):
        Prompter(make_tokenizer(None), 4096, chat="nothing").capacity(tiny_task())


def test_a_tokenizer_without_bos_gets_none(without_bos: Any) -> None:
    prompt = Prompter(without_bos, 4096).build(tiny_task(), {"context": "one two"})
    assert prompt.token_ids == without_bos("one two").input_ids
    assert without_bos.decode(prompt.token_ids) == "one two"


@pytest.mark.parametrize("max_length", range(2, 22))
def test_the_middle_is_truncated_and_the_first_half_includes_the_bos(plain: Any, max_length: int) -> None:
    context = "\x01".join("0123456789")  # 19 tokens of one character, and the BOS
    assert len(plain(context).input_ids) == 1 + len(context) == 20
    prompt = Prompter(plain, 4096, max_length).build(tiny_task(), {"context": context})
    half = max_length // 2
    expected = context if max_length >= 20 else context[: half - 1] + context[19 - half :]
    assert plain.decode(prompt.token_ids, skip_special_tokens=True) == expected
    assert (prompt.original_tokens, prompt.truncated) == (20, max_length < 20)


@pytest.mark.parametrize(
    ("wrapper", "whole"), [(LLAMA_2, "[INST]{}[/INST]"), ("template", "<s><|user|>{}<|a|>"), ("none", "{}")]
)
def test_the_answer_prefix_follows_the_turn(chat: Any, wrapper: str, whole: str) -> None:
    task = replace(tiny_task("Text: {context}"), answer_prefix=" The {input} is")
    row = {"context": "abc {input}", "input": "answer"}
    text = whole.format("Text: abc {input}") + " The answer is"
    prompter = Prompter(chat, 4096, None, wrapper)
    prompt = prompter.build(task, row)
    assert prompt.token_ids == chat(text, add_special_tokens=wrapper != "template").input_ids
    assert prompt.sha256 == sha256(text) and prompter.num_tokens(task, row) == len(prompt.token_ids)
    assert prompt.original_tokens == len(chat("Text: abc {input}").input_ids)
    cut = Prompter(chat, 60, None, wrapper).build(task, {**row, "context": "word " * 500})
    assert cut.truncated and cut.end.endswith(" The answer is") and len(cut.token_ids) <= 56 and not cut.overflow_tokens


def test_braces_in_rows_are_kept(plain: Any) -> None:
    row = {"context": "f(){ return {prompt} + {input} + {{0}} } {", "input": "}"}
    prompt = Prompter(plain, 4096, chat="<{prompt}>").build(tiny_task("{context}\n{input}"), row)
    assert plain.decode(prompt.token_ids, skip_special_tokens=True) == f"<{row['context']}\n}}>"


@pytest.mark.parametrize("wrapper", [LLAMA_2, "template", "none"])
def test_max_length_defaults_to_the_free_window(chat: Any, wrapper: str) -> None:
    prompter = Prompter(chat, 200, chat=wrapper)
    extra = {LLAMA_2: len(chat("[INST]x[/INST]").input_ids) - 2, "none": 0}.get(wrapper)
    if extra is None:
        extra = len(chat("<|user|>x<|a|>").input_ids) - 2
    assert prompter.cut_length(TASKS["qasper"]) == 200 - 128 - extra
    assert prompter.cut_length(TASKS["trec"]) == 200 - 64
    assert Prompter(chat, 200, 77, wrapper).cut_length(TASKS["qasper"]) == 77


@pytest.mark.parametrize(("window", "wrapper"), [(129, "none"), (130 + 5, "[INST][INST]{prompt}")])
def test_a_window_that_is_too_small_is_refused(plain: Any, window: int, wrapper: str) -> None:
    with pytest.raises(UsageError, match=f"window of {window} tokens.*qasper needs 128 new tokens"):
        Prompter(plain, window, chat=wrapper).build(TASKS["qasper"], make_rows("qasper", 1, 300, 0)[0])


def test_a_prompt_that_overflows_after_wrapping_is_truncated_again(plain: Any) -> None:
    row = {"context": "\x01".join("0123456789")}
    prompt = Prompter(plain, 14, 100).build(tiny_task(), row)  # 20 tokens, and room for 10
    whole = plain(row["context"]).input_ids
    assert prompt.token_ids == whole[:5] + whole[-5:]
    assert (prompt.overflow_tokens, prompt.truncated, prompt.original_tokens) == (10, True, 20)
    text = plain.decode(prompt.token_ids)
    assert (prompt.sha256, prompt.end) == (sha256(text), text[-200:])


TEXT = st.text(st.sampled_from("abé 中{}\n\x00\x85😀<s>"), max_size=120)


@given(
    context=TEXT,
    question=TEXT,
    window=st.integers(32, 160),
    max_length=st.none() | st.integers(2, 200),
    wrapper=st.sampled_from(["none", LLAMA_2, "template"]),
    wrapped=st.booleans(),
    bos=st.booleans(),
)
def test_prompt_and_new_tokens_always_fit_the_window(
    chat: Any,
    without_bos: Any,
    context: str,
    question: str,
    window: int,
    max_length: int | None,
    wrapper: str,
    wrapped: bool,
    bos: bool,
) -> None:
    tokenizer = chat if bos or wrapper == "template" else without_bos
    task = tiny_task("Read: {context}\n\nNow {input}", wrapped)
    prompter = Prompter(tokenizer, window, max_length, wrapper)
    prompt = prompter.build(task, {"context": context, "input": question})
    assert 0 < len(prompt.token_ids) <= window - task.max_new_tokens
    assert prompt.truncated == (prompt.original_tokens > prompter.cut_length(task) or prompt.overflow_tokens > 0)
    if tokenizer is chat:
        assert prompt.token_ids[0] == tokenizer.bos_token_id not in prompt.token_ids[1:2]
