"""A tokenizer, the texts that RULER does not generate, and rows of its tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparsecache.longbench.data import load_rows
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import Task, load_ruler_tasks
from sparsecache.ruler.source import RulerSource
from sparsecache.ruler.texts import RulerTexts

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def prompter(repo: Path) -> Prompter:
    """Prompts of the bundled checkpoint's tokenizer, wrapped as a turn."""
    file = repo / "sparsecache" / "demo" / "checkpoint" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    return Prompter(tokenizer, 2**20, chat="User: {prompt}\nModel:")  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> RulerTexts:
    """Essays, and files in the form of SQuAD 2.0 and HotpotQA."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "essays").mkdir()
    for name, word in (("b.txt", "beta"), ("a.txt", "alpha")):
        (folder / "essays" / name).write_text(" ".join(f"The {word} number {at} is\nhere." for at in range(150)))
    (folder / "essays" / "notes.md").write_text("not an essay")
    paragraphs = [f"Paragraph {at}. " + f"Word{at} stands here. " * 8 for at in range(60)]
    articles = [
        {
            "paragraphs": [
                {
                    "context": paragraphs[at],
                    "qas": [
                        {"question": f"What is {at}?", "answers": [{"text": f"Word{at}"}, {"text": "x"}]},
                        {"question": "Nothing?", "answers": [], "is_impossible": True},
                    ],
                }
                for at in range(first, first + 3)
            ]
        }
        for first in range(0, 60, 3)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    asked = [
        {
            "question": f"Who is {at}?",
            "answer": f"Word{at}",
            "context": [[f"Title {at + more}", ["One. ", paragraphs[at + more]]] for more in range(4)],
        }
        for at in range(50)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(asked))
    return RulerTexts(folder / "essays", folder / "squad.json", folder / "hotpotqa.json")


@pytest.fixture(scope="session")
def make_rows(prompter: Prompter, texts: RulerTexts) -> Callable[..., tuple[Task, Rows]]:
    """Return a function that makes rows of a task."""

    def make(name: str, length: int = 4096, rows: int = 2, seed: int = 1) -> tuple[Task, Rows]:
        task = load_ruler_tasks([length])[f"{name}_{length}"]
        source = RulerSource(prompter, rows, seed, texts)
        return task, load_rows(source, task).dataset.to_list()

    return make
