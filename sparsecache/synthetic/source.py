"""The data source of `--data sample`: synthetic rows instead of files."""

from dataclasses import dataclass, field
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.jsonl import dumps
from sparsecache.longbench.tasks import Task
from sparsecache.synthetic.rows import make_rows

MAX_TOKENS = 2**26
"""Tokens of all rows of one dataset together, at most: about 256 MiB of text."""


def check_sample_size(rows: int, tokens: int) -> None:
    """Raises UsageError for a sample that is too large to generate."""
    if rows * tokens > MAX_TOKENS:
        raise UsageError(
            f"A sample of {rows} rows of {tokens} tokens is too large: at most {MAX_TOKENS:,} tokens per dataset are "
            f"generated. Lower the number of rows or of tokens."
        )


@dataclass(frozen=True)
class SampleSource:
    """Generates `rows` rows per dataset, with prompts of about `tokens` tokens, from `seed`.

    The constructor raises UsageError as `check_sample_size`.
    """

    rows: int = 2
    tokens: int = 2048
    seed: int = 0
    published: bool = field(default=False, init=False)
    fills_rows: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_sample_size(self.rows, self.tokens)

    def read(self, task: Task, e: bool) -> tuple[str, bytes]:
        """Return a name for messages, and the rows of one dataset as JSON Lines.

        Raises UsageError for LongBench-E.
        """
        if e:
            raise UsageError("--data sample has no LongBench-E rows. Leave out --e, or choose another --data.")
        rows = make_rows(task.name, self.rows, self.tokens, self.seed)
        return f"sample of {task.name}", "".join(dumps(row) + "\n" for row in rows).encode()

    def describe(self) -> dict[str, Any]:
        """Return the entry of this source in run.json."""
        return {"source": "sample", "rows": self.rows, "tokens": self.tokens, "seed": self.seed}
