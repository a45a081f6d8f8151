"""Workloads: random prompts of given lengths, or of a sample of the lengths of a benchmark or a run."""

import csv
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparsecache.engine.base import Request
from sparsecache.errors import UsageError, one_line, short
from sparsecache.files import open_regular
from sparsecache.longbench.records import read_rows
from sparsecache.runner.pending import STEP_BYTES

_TOKEN_BYTES = 4  # of a prompt's text, about
_MAX_TOKENS = 2**24  # of a prompt or an answer in a file


@dataclass(frozen=True)
class Workload:
    """Sequences to decode: prompt tokens and new tokens of each, and how many are decoded together."""

    tokens: int
    new_tokens: int
    batch: int = 1

    @property
    def total_tokens(self) -> int:
        """Prompt and new tokens of a sequence."""
        return self.tokens + self.new_tokens

    @property
    def mean_past(self) -> int:
        """Past tokens of a decode step, on average."""
        return self.tokens + self.new_tokens // 2

    def requests(self, vocab_size: int, seed: int = 0) -> list[Request]:
        """Return `batch` requests with random prompts and no stop ids."""
        generator = random.Random(seed)
        prompts = [[generator.randrange(3, vocab_size) for _ in range(self.tokens)] for _ in range(self.batch)]
        return [Request(key, prompt, self.new_tokens, ()) for key, prompt in enumerate(prompts)]


def sample_requests(file: Path, rows: int, vocab_size: int) -> list[Request]:
    """Return random prompts with the lengths of `sample_lengths`, in its order."""
    return [
        Request(key, workload.requests(vocab_size, key)[0].token_ids, workload.new_tokens, ())
        for key, workload in enumerate(sample_lengths(file, rows))
    ]


def sample_lengths(file: Path, rows: int) -> list[Workload]:
    """Return a stratified sample of about `rows` rows of a workload.

    file: a CSV, or the folder of a run, whose finished rows have their lengths. A dataset keeps its share of the rows.
    They are spread evenly over its prompt lengths.

    The order is that of a run with workers (runner/pending.py): longest first by prompt and max_new_tokens, since a run
    does not know the answers' lengths. Rows of a run have no max_new_tokens: their prompts alone decide. A small file
    gives fewer rows. A file with more datasets than `rows` gives one row per dataset. Raises UsageError for a file
    without the columns, and for a prediction without its lengths.
    """
    by_dataset: dict[str, list[_Row]] = {}
    try:
        for dataset, row in _read_run(file) if file.is_dir() else _read(file):
            by_dataset.setdefault(dataset, []).append(row)
    except (UsageError, OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        problem = f"it has no column {error}" if isinstance(error, KeyError) else one_line(error).rstrip(".")
        raise UsageError(
            f"{file} is not a workload ({short(problem, 200)}). Give a CSV with the columns dataset, prompt_tokens, "
            f"new_tokens, or the folder of a run."
        ) from error
    total = sum(map(len, by_dataset.values()))
    if not total and file.is_dir():
        raise UsageError(f"{file} has no finished predictions. Give the folder of a run, which holds DATASET.jsonl.")
    if not total or not all(row.is_valid() for part in by_dataset.values() for row in part):
        raise UsageError(
            f"{file} needs rows with prompt_tokens of 1 or more and new_tokens of 0 or more, both up to "
            f"{_MAX_TOKENS:,}."
        )
    chosen: list[_Row] = []
    before = 0.0  # the unrounded rows of the datasets so far, so that rounding errors do not add up
    for part in by_dataset.values():
        part.sort()
        after = before + rows * len(part) / total
        count = min(len(part), max(1, round(after) - round(before)))
        before = after
        chosen += [part[(2 * at + 1) * len(part) // (2 * count)] for at in range(count)]
    chosen.sort(key=lambda row: -(row.prompt_tokens + STEP_BYTES / _TOKEN_BYTES * row.max_new_tokens))
    return [Workload(row.prompt_tokens, max(1, row.new_tokens)) for row in chosen]


class _Row(NamedTuple):
    """A row of a workload file."""

    prompt_tokens: int
    new_tokens: int
    max_new_tokens: int

    def is_valid(self) -> bool:
        return 1 <= self.prompt_tokens <= _MAX_TOKENS and 0 <= self.new_tokens <= _MAX_TOKENS


def _read(file: Path) -> Iterator[tuple[str, _Row]]:
    with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as text:
        for row in csv.DictReader(text):
            max_new_tokens = int(row.get("max_new_tokens") or 0)
            yield row["dataset"], _Row(int(row["prompt_tokens"]), int(row["new_tokens"]), max_new_tokens)


def _read_run(folder: Path) -> Iterator[tuple[str, _Row]]:
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_rows(file), 1):
            if "error" in row:  # it has no answer, so no lengths
                continue
            prompt_tokens, new_tokens = row.get("prompt_tokens"), row.get("new_tokens")
            if type(prompt_tokens) is not int or type(new_tokens) is not int:
                raise UsageError(f"{file}, row {number}: prompt_tokens and new_tokens must be whole numbers")
            yield file.stem, _Row(prompt_tokens, new_tokens, 0)
