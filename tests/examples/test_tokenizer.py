"""The demo checkpoint's tokenizer is deterministic and equals its cached encoder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lesson_tokenizer import Encoder
from sparsecache.longbench.tasks import select_tasks
from sparsecache.synthetic.rows import make_rows

TASKS = {task.name: task for task in select_tasks("all")}  # the published ones
CHINESE = [name for name, task in TASKS.items() if task.language == "zh"]


def test_it_has_the_requested_size_and_adds_one_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<pad>")] == [0, 1, 2]
    assert tokenizer.encode("One two").ids.count(0) == 1


def test_it_is_the_tokenizer_of_the_bundled_checkpoint(tokenizer: Tokenizer, repo: Path) -> None:
    bundled = repo / "sparsecache" / "demo" / "checkpoint" / "tokenizer.json"
    assert json.loads(tokenizer.to_str()) == json.loads(bundled.read_text(encoding="utf-8"))


def test_it_is_the_same_in_another_process(tokenizer: Tokenizer) -> None:
    code = "from lesson_tokenizer import train_tokenizer; print(train_tokenizer().to_str())"
    environment = os.environ | {"PYTHONHASHSEED": "54321", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert hashlib.sha256(printed.strip()).digest() == hashlib.sha256(tokenizer.to_str().encode()).digest()


@pytest.mark.parametrize("dataset", TASKS)
def test_the_encoder_equals_the_tokenizer(dataset: str, tokenizer: Tokenizer, encode: Encoder) -> None:
    for row in make_rows(dataset, 5, 1024, 2):
        text = TASKS[dataset].template.format(**row)
        assert tokenizer.encode(text).ids == [0, *encode(text)]
        assert tokenizer.decode(encode(text)) == text


@pytest.mark.parametrize("text", ["", " é😀\x00\r\n<b>", "\tdef f(x):  # two  blanks\n\n", "2\xa0000\x85\u2028…  —"])
def test_decoding_restores_any_text(text: str, tokenizer: Tokenizer, encode: Encoder) -> None:
    assert tokenizer.decode(encode(text)) == text
    assert tokenizer.encode(text, add_special_tokens=False).ids == encode(text)


def test_the_encoder_loads_a_file(tokenizer: Tokenizer, encode: Encoder, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Encoder(tmp_path / "tokenizer.json")("Ida plays the lute.") == encode("Ida plays the lute.")


@pytest.mark.parametrize("dataset", CHINESE)
def test_a_chinese_character_is_one_token(dataset: str, encode: Encoder) -> None:
    text = "".join(row["context"] + row["input"] for row in make_rows(dataset, 40, 1024, 0))
    assert [character for character in sorted(set(text)) if len(encode(character)) > 1] == []


@pytest.mark.parametrize("dataset", TASKS)
def test_answers_fit_the_generation_limit(dataset: str, encode: Encoder) -> None:
    rows = [*make_rows(dataset, 40, 512, 0), *make_rows(dataset, 5, 8192, 0)]
    longest = max(len(encode(f" {row['answers'][0]}")) for row in rows)
    assert longest + 1 <= TASKS[dataset].max_new_tokens
