"""Chat prompts have the ids of apply_chat_template(tokenize=True), for the shapes of templates in use."""

import re
from datetime import date
from itertools import cycle
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsecache.engine.tokenization import load_tokenizer
from sparsecache.errors import UsageError
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import Task, load_tasks
from sparsecache.longbench.wrapping import CLOCK, Wrapper

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|user|>' + message['role'] "
    "+ '<|end|>\n\n' + message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}{% set content = bos_token "
    "+ content %}{% endif %}{{ content }}{% endfor %}{{ '<|user|>assistant<|end|>\n\n' }}"
)
LLAMA_3_DATED = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- endif %}\n{%- endif %}\n'
    '{{- "<|user|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n<|im_end|>" }}\n'
    "{%- for message in messages %}\n    {{- '<|user|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim "
    "+ '<|im_end|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|user|>assistant<|end|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ %s }}{% endif %}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{{ '<|user|>' + message['role'] + '\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|user|>model\n'}}{% endif %}"
)
QWEN_3 = (
    "{%- for message in messages %}\n    {%- if message.content is string %}\n        {%- set content = message.content"
    " %}\n    {%- else %}\n        {%- set content = '' %}\n    {%- endif %}\n    {{- '<|im_start|>' + message.role + "
    "'\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    "
    "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n        "
    "{{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
EITHER = (
    "{{ bos_token }}{% for m in messages %}<|user|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>\n"
    "{% endfor %}"
)
NAMESPACE = (
    "{%- set ns = namespace(found=false) -%}{%- for m in messages if m.role == 'user' -%}{%- set ns.found = true -%}"
    "{{ bos_token }}<|user|>{{ m.content.strip() }}{%- endfor -%}{%- if ns.found and add_generation_prompt -%}"
    "<|end|><think>\n{%- endif -%}"
)
INDENTED = "\n  {% for m in messages %}\n  <|user|>{{ m.content }}\n  {% endfor %}\n<|end|>\n"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatML whose bos is <|im_start|>": (CHATML, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "ChatML": (CHATML, {}),
    "Llama 3": (LLAMA_3, {}),
    "Llama 3.2, dated by date_string": (LLAMA_3_DATED, {}),
    "Mistral v1": (MISTRAL.replace("%s", "'[INST] ' + m['content'] + ' [/INST]'"), {}),
    "Mistral tekken": (MISTRAL.replace("%s", "'[INST]' + m['content'] + '[/INST]'"), {}),
    "Gemma": (GEMMA, {}),
    "Phi": ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}<|user|>\n", {}),
    "Qwen 3 without thinking": (QWEN_3, {}),
    "text or list of parts": (EITHER, {}),
    "DeepSeek": (NAMESPACE, {}),
    "Zephyr": ("{% for m in messages %}{{ '<|user|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}<|end|>\n", {}),
    "Vicuna": ("{{ bos_token }}A chat{% for m in messages %}{{ ' USER: ' + m['content'] }}{% endfor %} ASSISTANT:", {}),
    "generation tag": ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", {}),
    "newline and spaces first": (INDENTED, {}),
    "newline, then bos": ("\n{{ bos_token }}" + CHATML, {}),
    "loop controls and tojson": (
        "{% for m in messages %}{{ m.role | tojson }}{{ m.content }}{% break %}{% endfor %}{{ ['<é>'] | tojson }}", {}
    ),
}  # fmt: skip
ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
QASPER, TREC = load_tasks()["qasper"], load_tasks()["trec"]
ROW = {"context": " The mill\n is <old>. 'Quoted' 12345 请  ", "input": "Who?"}
PLAIN = Task("tiny", "{context}", 4, "count", "synthetic", "en", 1)


def prompter(folder: Any, chat: str = "template") -> Prompter:
    return Prompter(load_tokenizer(folder), 4096, chat=chat, chat_template_args=tuple(ARGUMENTS.items()))


@pytest.mark.parametrize(
    ("shape", "single"), list(zip(SHAPES, cycle([None, "<s> $A", "$A </s>", "<s> $A </s>"]), strict=False))
)
def test_a_wrapped_prompt_has_the_ids_of_apply_chat_template(shape, single, make_tokenizer, write) -> None:
    """No template sees the special tokens that the tokenizer puts around a text, so each shape needs one kind only."""
    template, fields = SHAPES[shape]
    folder = write(make_tokenizer("digits", single), chat_template=template, **fields)
    text = QASPER.template.format(**ROW)
    truth = AutoTokenizer.from_pretrained(folder)
    want = truth.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False, **ARGUMENTS
    )
    made = prompter(folder)
    assert made.capacity(QASPER) > 0
    assert made.build(QASPER, ROW).token_ids == want
    raw = made.build(TREC, ROW).token_ids
    assert raw == make_tokenizer("digits", single).encode(TREC.template.format(**ROW)).ids


@pytest.mark.parametrize("broken", ["{{ c.text }}", "{{ c['text'] + '' }}"])
def test_a_template_that_renders_lists_alone_gets_a_list(broken, make_tokenizer, write) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% for c in m.content %}" + broken + "{% endfor %}{% endfor %}<|end|>"
    )
    folder = write(make_tokenizer(), chat_template=template)
    content = [{"type": "text", "text": QASPER.template.format(**ROW)}]
    want = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    made = prompter(folder)
    assert made.build(QASPER, ROW).token_ids == want
    assert made.wrapper.content_is_list and made.wrapper.text == "<s>{prompt}<|end|>"


@pytest.mark.parametrize(
    "wrapper", ["[INST]{prompt}[/INST]", "<s>[INST] {prompt} [/INST]", "\n{prompt}", "USER: {prompt} ASSISTANT:"]
)
@pytest.mark.parametrize("single", [None, "<s> $A", "<s> $A </s>"])
def test_a_hand_made_wrapper_is_raw_text_and_begins_with_one_bos_at_most(
    wrapper, single, make_tokenizer, write
) -> None:
    tokenizer = make_tokenizer("llama3", single)
    ids = prompter(write(tokenizer), wrapper).build(QASPER, ROW).token_ids
    want = tokenizer.encode(wrapper.replace("{prompt}", QASPER.template.format(**ROW))).ids
    assert ids == (want[1:] if want[:2] == [1, 1] else want)
    assert ids.count(1) == (1 if single or wrapper.startswith("<s>") else 0)


REFUSED = {
    "drops": ("<|user|>{{ bos_token }}begin of text x<|end|>", "drops the prompt"),
    "drops, by a wrong key": ("{% for m in messages %}{{ m.contents }}{% endfor %}", "drops the prompt"),
    "repeats": ("{{ messages[0].content }}{{ messages[0].content }}", "repeats the prompt"),
    "upper": ("{{ messages[0].content | upper }}", "changes or cuts the prompt"),
    "title": ("{{ messages[0].content | title }}", "changes or cuts the prompt"),
    "escapes": ("{{ messages[0].content | escape }}", "changes or cuts the prompt"),
    "cuts": ("{{ messages[0].content[:1000] }}", "changes or cuts the prompt"),
    "cuts the start": ("{{ messages[0].content[3:] }}", "changes or cuts the prompt"),
    "words": ("{{ messages[0].content.split() | join(' ') }}", "changes or cuts the prompt"),
    "as JSON": ("{{ messages | tojson }}", "changes or cuts the prompt"),
    "two bos": ("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", "two <s> tokens"),
    "raises": ("{{ raise_exception('a system turn comes first') }}", "a system turn comes first"),
    "unknown name": ("{{ now() }}{{ messages[0].content }}", "'now' is undefined"),
    "syntax": ("{% if %}", "cannot be used"),
    "forbidden": ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "unsafe"),
    "endless text": ("{{ 'long ' * 10 ** 7 }}{{ messages[0].content }}", "it adds 50,000,000 characters to a prompt"),
    "by chance": ("{{ range(90000) | random }}{{ messages[0].content }}", "a different text each time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_in_one_sentence(case, make_tokenizer, write) -> None:
    template, message = REFUSED[case]
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        prompter(write(make_tokenizer(), chat_template=template)).capacity(QASPER)
    assert "\n" not in str(refused.value) and "--chat" in str(refused.value) and len(str(refused.value)) < 400


def test_several_templates_need_a_default(make_tokenizer, write) -> None:
    template = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "R"}]
    assert prompter(write(make_tokenizer(), chat_template=template)).capacity(QASPER) > 0
    with pytest.raises(UsageError, match=r"several chat templates \(rag\), none of them named default"):
        prompter(write(make_tokenizer(), chat_template=template[1:])).capacity(QASPER)


def test_a_template_that_never_ends_is_refused(make_tokenizer, write, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.longbench.wrapping._RENDER_S", 0.5)
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    template = loops + "{% endfor %}" * 3 + "{{ messages[0].content }}"
    with pytest.raises(UsageError, match="takes longer than"):
        prompter(write(make_tokenizer(), chat_template=template)).capacity(QASPER)


@pytest.mark.parametrize("wrapper", ["Read. {promt}", "Read.", "{prompt} {prompt}", ""])
def test_a_hand_made_wrapper_holds_the_prompt_once(wrapper, make_tokenizer, write) -> None:
    with pytest.raises(UsageError, match=r"it must hold \{prompt\} once"):
        prompter(write(make_tokenizer()), wrapper).capacity(QASPER)


def test_a_row_that_the_template_cuts_is_an_error(make_tokenizer, write) -> None:
    made = prompter(write(make_tokenizer(), chat_template="{{ messages[0].content[:60000] }}<|end|>"))
    assert made.build(PLAIN, {"context": "a b" * 99}).token_ids
    with pytest.raises(ValueError, match="changes the text of this prompt"):
        Prompter(made.tokenizer, 99_999, chat="template").build(PLAIN, {"context": "a b " * 20_000})


CLOCKS = ["%Y-%m-%d", "%d %B %Y", "%-d. %b %y", "%A, %H:%M:%S %p", "%j of 100%%, %%d", "%I %U %w %F %T %e", "%x %X %c"]


@pytest.mark.parametrize("form", CLOCKS)
def test_every_way_to_ask_for_the_time_gets_the_pinned_one(form, make_tokenizer, write) -> None:
    template = "{{ strftime_now(" + repr(form) + ") }}|{{ messages[0].content }}{% macro later() %}"
    template += "{{ strftime_now(format='%Y') }}{% endmacro %}|{% for m in messages %}{{ later() | int }}{% endfor %}"
    text = prompter(write(make_tokenizer(), chat_template=template)).wrapper.text
    assert text == f"{CLOCK.strftime(form)}|{{prompt}}|2024"


def test_the_pinned_clock_is_not_today_and_agrees_with_models_toml() -> None:
    assert CLOCK.date() != date.today()
    assert CLOCK.strftime("%d %b %Y") == ARGUMENTS["date_string"]


def test_a_dated_template_without_date_string_gets_the_pinned_date(make_tokenizer, write) -> None:
    tokenizer = load_tokenizer(write(make_tokenizer(), chat_template=LLAMA_3_DATED))
    assert "Today Date: 26 Jul 2024" in Wrapper(tokenizer, "template").text


def test_the_wrapper_is_what_stands_around_a_prompt(make_tokenizer, write) -> None:
    made = prompter(write(make_tokenizer(), chat_template=QWEN_3))
    assert made.wrapper.text == ("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompter(write(make_tokenizer()), "none").wrapper.text == "{prompt}"


def test_the_probe_hash_tells_tokenizers_and_wrappers_apart(make_tokenizer, write) -> None:
    folders = [
        write(make_tokenizer("llama3"), chat_template=CHATML),
        write(make_tokenizer("digits"), chat_template=CHATML),
        write(make_tokenizer("llama3", "<s> $A"), chat_template=CHATML),
        write(make_tokenizer("llama3"), chat_template=CHATML.replace("assistant", "model")),
    ]
    hashes = [prompter(folder).wrapper.probe_sha256() for folder in folders]
    assert len(set(hashes)) == len(folders)
    assert prompter(folders[0]).wrapper.probe_sha256() == hashes[0]


def test_a_tokenizer_that_doubles_the_bos_of_every_text_is_refused(make_tokenizer, write) -> None:
    folder = write(make_tokenizer("llama3", "<s> <s> $A"))
    with pytest.raises(UsageError, match="tokenizer cannot be used: The prompt begins with two <s> tokens"):
        prompter(folder, "none").wrapper.probe_sha256()
