"""Decode rows in steps: the next request of a row may depend on the completion before it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from sparsecache.engine.base import Completion, Engine, OnTokens, Request, ignore_tokens
from sparsecache.longbench.prompts import Prompt
from sparsecache.runner.pending import PendingDataset, Row

ROWS_TOGETHER = 64
"""Rows of a task in two steps that are decoded together. A kill loses their first steps."""


@dataclass(frozen=True)
class RowStep:
    """The key of a request: its row and dataset, the first prompt, and the first step if this is the second."""

    row: Row
    prompt: Prompt
    dataset: PendingDataset
    reasoning: Completion | None = None


def generate_steps(
    engine: Engine,
    requests: Iterable[Request],
    next_step: Callable[[Completion], Request | Completion],
    on_tokens: OnTokens = ignore_tokens,
) -> Iterator[Completion]:
    """Yield the last completion of each row.

    next_step: returns the row's next request, or after its last step the completion to yield.
    """
    rest: Iterable[Request] = requests
    while rest:
        requests_left: list[Request] = []
        for completion in engine.generate(rest, on_tokens):
            step = next_step(completion)
            if isinstance(step, Request):
                requests_left.append(step)
            else:
                yield step
        rest = requests_left


def in_batches(requests: Iterable[Request], datasets: Iterable[PendingDataset]) -> Iterator[Iterable[Request]]:
    """Yield all requests at once, or ROWS_TOGETHER of them at a time if a dataset has two steps."""
    if not any(dataset.task.answer_template for dataset in datasets):
        yield requests
        return
    left = iter(requests)
    while batch := list(islice(left, ROWS_TOGETHER)):
        yield batch
