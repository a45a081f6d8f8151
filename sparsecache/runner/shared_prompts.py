"""Prefill the prompts of several runs in groups that fit into memory, the longest first.

A prompt's keys and values are kept while the runs decode the group's rows, and the last queries that their methods
read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sparsecache.cache.host import available_nbytes
from sparsecache.engine.generator import free_nbytes
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.errors import one_line
from sparsecache.longbench.prompts import Prompt
from sparsecache.methods.vanilla import Vanilla
from sparsecache.runner.context import LoadedModel
from sparsecache.runner.pending import Row, WantedDataset

Item = TypeVar("Item")
_GIB = 2**30


@dataclass(frozen=True, eq=False)
class PromptRow:
    """A row that some run misses, with its prompt, or the error of building it."""

    dataset: WantedDataset
    row: Row
    prompt: Prompt | None
    error: Exception | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.dataset.stem, self.row["_id"]

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.token_ids if self.prompt else []

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


class PromptGroups:
    """The rows that some run misses, in groups whose prompts are in memory together.

    prompts: those of the latest group. waiting: the groups that are not prefilled yet. If memory becomes short while a
    group is prefilled, the rest of it waits, and later groups are as small.
    """

    def __init__(
        self,
        prompt_rows: list[PromptRow],
        model: LoadedModel,
        limit_nbytes: float,
        queries: int | None,
        on_progress: Callable[[str], None],
    ) -> None:
        """Split the rows into groups.

        prompt_rows: the longest prompt first. limit_nbytes: the most bytes of prompts. queries: as of `PrefillCache`.
        """
        self.prompts = PrefillCache(queries=queries)
        self._prefiller = PrefillCachingDecoder(*model, Vanilla(), self.prompts)
        self._limit, self._on_progress = limit_nbytes, on_progress
        self.waiting = self._split(prompt_rows)

    @property
    def plan(self) -> str:
        """Return how many groups there are, and what may be in memory."""
        kept = "all queries" if self.prompts.queries is None else f"{self.prompts.queries} queries of each"
        return (
            f"{len(self.waiting)} group{'s' * (len(self.waiting) != 1)}; up to {self._limit / _GIB:.3g} GiB for their "
            f"keys and values, and {kept} (--limit_memory)"
        )

    def prefill_next_group(self) -> list[PromptRow]:
        """Prefill the prompts of the next group; return its rows.

        Each run prefills by itself the prompts for which that failed.
        """
        self.prompts.clear(self._limit)
        wanted = self.waiting[0]
        group = self._prefill(wanted)
        if self.prompts.nbytes and len(group) < len(wanted):
            self._limit = self.prompts.nbytes
        self.prompts.limit_nbytes = self.prompts.nbytes  # caches none of those that runs prefill themselves
        done = set(group)
        self.waiting = self._split(
            [prompt_row for each in self.waiting for prompt_row in each if prompt_row not in done]
        )
        return group

    def described(self, group: list[PromptRow], seconds: float) -> str:
        """Describe what is cached of the latest group. seconds: duration of its prefill."""
        built = [prompt_row for prompt_row in group if prompt_row.prompt]
        cached = sum(map(self._is_cached, built))
        others = f"; each run prefills the other {len(built) - cached}" if cached < len(built) else ""
        return (
            f"{cached} of {len(built)} prompts prefilled, {group[-1].tokens:,} to {group[0].tokens:,} tokens, "
            f"{self.prompts.nbytes / _GIB:.3g} GiB, {seconds:.1f} s{others}"
        )

    def _prefill(self, group: list[PromptRow]) -> list[PromptRow]:
        """Prefill the prompts of a group; return its rows, the first ones if memory becomes short meanwhile."""
        prompt_rows = [prompt_row for prompt_row in group if prompt_row.prompt]
        for at, prompt_row in enumerate(prompt_rows):
            following = prompt_rows[at + 1].tokens if at + 1 < len(prompt_rows) else None
            try:
                self._prefiller.cache_prompt(
                    torch.tensor(prompt_row.token_ids, device=self._prefiller.device), following
                )
                continue
            except torch.OutOfMemoryError:
                pass  # handled below, since the error's frames hold tensors
            except Exception as error:  # each run that prefills the prompt itself reports it
                self._on_progress(f"A prompt could not be prefilled: {one_line(error)}")
                continue
            self.prompts.halve()  # what is free changed since the start, and the runs need memory, too
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            left = list(filter(self._is_cached, prompt_rows)) or prompt_rows[:1]
            self._on_progress(f"Memory became short: {len(left)} of {len(group)} prompts stay in this group.")
            return left
        return group

    def _is_cached(self, prompt_row: PromptRow) -> bool:
        return prompt_row.token_ids in self.prompts

    def _split(self, prompt_rows: list[PromptRow]) -> list[list[PromptRow]]:
        return list(
            split_by_size(prompt_rows, lambda prompt_row: self._prefiller.qkv_nbytes(prompt_row.tokens), self._limit)
        )


def split_by_size(items: Sequence[Item], nbytes: Callable[[Item], int], limit: float) -> Iterator[list[Item]]:
    """Yield the items in groups of at most `limit` bytes, in their order. A larger one is a group alone."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + nbytes(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += nbytes(item)
    if group:
        yield group


def memory_for_prompts(prefiller: PrefillCachingDecoder, slots: int, most_tokens: int) -> float:
    """Return the bytes of free memory that prompts may take: what the caches of one run leave, but at least half."""
    if prefiller.device.type != "cuda":
        return (available_nbytes() or 4 * _GIB) / 2
    free = len(prefiller.devices) * min(map(free_nbytes, prefiller.devices))
    caches = slots * most_tokens * prefiller.shape.kv_nbytes(prefiller.dtype)
    # Methods store up to as much again beside keys and values; graphs and kernels take memory too.
    return max(free / 2, 0.9 * free - 2 * caches - prefiller.prompt_nbytes(most_tokens))
