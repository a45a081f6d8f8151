"""The texts that RULER's tasks need and that nothing here generates: essays, question sets, English words."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsecache.errors import UsageError
from sparsecache.files import list_folder, read_file
from sparsecache.longbench.tasks import Task
from sparsecache.ruler.words import check_words

ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
WORD_TASKS = (*ESSAY_TASKS, "niah_single_1", "niah_multikey_2", "cwe")
_MAX_BYTES = 2**28
MAX_TOKENS = 2**27
"""Tokens of all rows of one task and length together, at most: about 512 MiB of text."""


@dataclass(frozen=True)
class RulerTexts:
    """The texts that the user names; None where there is none.

    essays: a folder of .txt files. squad, hotpotqa: JSON files of these datasets.
    """

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise UsageError, naming the tasks, if a text that they need is not given or not installed."""
        names = list(dict.fromkeys(task.base_name for task in tasks))
        needs = [
            (self.essays, ESSAY_TASKS, "--ruler_essays FOLDER (essays as .txt files)"),
            (self.squad, ("qa_1",), "--ruler_squad FILE (dev-v2.0.json)"),
            (self.hotpotqa, ("qa_2",), "--ruler_hotpotqa FILE (hotpot_dev_distractor_v1.json)"),
        ]
        lacking = {
            what: found
            for given, by, what in needs
            if given is None and (found := [name for name in names if name in by])
        }
        if lacking:
            without = [name for name in names if not any(name in found for found in lacking.values())]
            rest = f" The others need none of these: --datasets {','.join(without)}." if without else ""
            missing = "; ".join(f"{what} for {', '.join(by)}" for what, by in lacking.items())
            raise UsageError(f"Texts of RULER are missing: {missing}.{rest}")
        if with_words := [name for name in names if name in WORD_TASKS]:
            check_words(", ".join(with_words))


def check_ruler_size(rows: int, length: int) -> None:
    """Raise UsageError for rows that are too many to generate."""
    if rows * length > MAX_TOKENS:
        raise UsageError(
            f"RULER with {rows} rows of {length} tokens is too large: at most {MAX_TOKENS:,} tokens per task are "
            f"generated. Lower --ruler_rows or --ruler_length."
        )


def read_essays(folder: Path) -> tuple[str, ...]:
    """Return the words of all .txt files of a folder, in the order of their names.

    Raises UsageError for a folder without such text, and for a file that is not UTF-8.
    """
    text = "\n".join(_read_essay(path) for path in list_folder(folder) if path.suffix == ".txt")
    words = tuple(re.sub(r"\s+", " ", text).strip().split(" "))
    if words == ("",):
        raise UsageError(f"--ruler_essays {folder} holds no text in .txt files. Name a folder of essays.")
    return words


def _read_essay(path: Path) -> str:
    try:
        return read_file(path, _MAX_BYTES).decode("utf-8-sig")
    except ValueError as error:
        raise UsageError(f"{path} is not UTF-8 text. Convert it, or take it out of --ruler_essays.") from error
