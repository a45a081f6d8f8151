"""Reads the prompts of several runs in groups that fit into memory, the longest first.

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
class Job:
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

    prompts: those of the group that was read last. waiting: the groups that are to be read. If memory becomes short
    while a group is read, the rest of it waits, and later groups are as small.
    """

    def __init__(
        self,
        jobs: list[Job],
        model: LoadedModel,
        limit_nbytes: float,
        queries: int | None,
        on_progress: Callable[[str], None],
    ) -> None:
        """jobs: the longest prompt first. limit_nbytes: the most bytes of prompts. queries: as of `PrefillCache`."""
        self.prompts = PrefillCache(queries=queries)
        self._reader = PrefillCachingDecoder(*model, Vanilla(), self.prompts)
        self._limit, self._on_progress = limit_nbytes, on_progress
        self.waiting = self._split(jobs)

    @property
    def plan(self) -> str:
        """How many groups there are, and what may be in memory."""
        kept = "all queries" if self.prompts.queries is None else f"{self.prompts.queries} queries of each"
        return (
            f"{len(self.waiting)} group{'s' * (len(self.waiting) != 1)}; up to {self._limit / _GIB:.3g} GiB for their "
            f"keys and values, and {kept} (--limit_memory)"
        )

    def read_next(self) -> list[Job]:
        """Reads the prompts of the next group; returns its jobs. Runs read the prompts that could not be read."""
        self.prompts.clear(self._limit)
        wanted = self.waiting[0]
        group = self._read(wanted)
        if self.prompts.nbytes and len(group) < len(wanted):
            self._limit = self.prompts.nbytes
        self.prompts.limit_nbytes = self.prompts.nbytes  # keeps none of those that runs read themselves
        done = set(group)
        self.waiting = self._split([job for each in self.waiting for job in each if job not in done])
        return group

    def described(self, group: list[Job], seconds: float) -> str:
        """What of the group that was read last is in memory. seconds: that reading it took."""
        built = [job for job in group if job.prompt]
        read = sum(map(self._is_read, built))
        others = f"; each run reads the other {len(built) - read}" if read < len(built) else ""
        return (
            f"{read} of {len(built)} prompts read, {group[-1].tokens:,} to {group[0].tokens:,} tokens, "
            f"{self.prompts.nbytes / _GIB:.3g} GiB, {seconds:.1f} s{others}"
        )

    def _read(self, group: list[Job]) -> list[Job]:
        """Reads the prompts of a group; returns its jobs, the first ones if memory becomes short meanwhile."""
        jobs = [job for job in group if job.prompt]
        for at, job in enumerate(jobs):
            following = jobs[at + 1].tokens if at + 1 < len(jobs) else None
            try:
                self._reader.cache_prompt(torch.tensor(job.token_ids, device=self._reader.device), following)
                continue
            except torch.OutOfMemoryError:
                pass  # handled below, since the error's frames hold tensors
            except Exception as error:  # each run that reads the prompt itself reports it
                self._on_progress(f"A prompt could not be read: {one_line(error)}")
                continue
            self.prompts.halve()  # what is free changed since the start, and the runs need memory, too
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            left = list(filter(self._is_read, jobs)) or jobs[:1]
            self._on_progress(f"Memory became short: {len(left)} of {len(group)} prompts stay in this group.")
            return left
        return group

    def _is_read(self, job: Job) -> bool:
        return job.token_ids in self.prompts

    def _split(self, jobs: list[Job]) -> list[list[Job]]:
        return list(split_by_size(jobs, lambda job: self._reader.qkv_nbytes(job.tokens), self._limit))


def split_by_size(items: Sequence[Item], nbytes: Callable[[Item], int], limit: float) -> Iterator[list[Item]]:
    """Yields the items in groups of at most `limit` bytes, in their order. A larger one is a group alone."""
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


def memory_for_prompts(reader: PrefillCachingDecoder, slots: int, most_tokens: int) -> float:
    """The bytes of free memory that prompts may take: what the caches of one run leave, but at least half."""
    if reader.device.type != "cuda":
        return (available_nbytes() or 4 * _GIB) / 2
    free = len(reader.devices) * min(map(free_nbytes, reader.devices))
    caches = slots * most_tokens * reader.shape.kv_nbytes(reader.dtype)
    # Methods store up to as much again beside keys and values; graphs and kernels take memory too.
    return max(free / 2, 0.9 * free - 2 * caches - reader.prompt_nbytes(most_tokens))
