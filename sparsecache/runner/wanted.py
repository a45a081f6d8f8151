"""Load the rows that a run asks for. Runs of one checkpoint may share them."""

from dataclasses import dataclass
from typing import Any

from sparsecache.errors import UsageError
from sparsecache.longbench.data import Source, load_rows, open_source
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.scores import load_metric
from sparsecache.longbench.tasks import Task
from sparsecache.ruler.source import RulerSource
from sparsecache.runner.context import RunContext
from sparsecache.runner.pending import WantedDataset
from sparsecache.runner.settings import Settings
from sparsecache.synthetic.source import SampleSource


@dataclass(frozen=True)
class WantedRows:
    """The rows that a run asks for. tasks: in their own limits of new tokens; sources: of the rows, by benchmark."""

    tasks: list[Task]
    sources: dict[str, Source]
    datasets: list[WantedDataset]

    def describe_sources(self) -> dict[str, Any]:
        """Return the entry of the sources in run.json: that of RULER beside the other one, if the run has both."""
        found = [self.sources[benchmark] for benchmark in sorted(self.sources, key=lambda name: name == "ruler")]
        *first, last = (source.describe() for source in found)
        return {**first[0], "ruler": last} if first and "ruler" in self.sources else last


def load_wanted(settings: Settings, context: RunContext) -> WantedRows:
    """Load the rows of all datasets, and check that each can be predicted and scored. Raises UsageError."""
    own = settings.wanted_tasks()
    sources, e, limit = _sources(settings, context, own), settings.e, settings.max_samples
    datasets = []
    tasks = [settings.limited(task) for task in own]
    for task in tasks:
        _check_ruler_length(task, context.window)
    for task in tasks:
        rows = load_rows(sources[task.benchmark], task, e)
        available = len(rows.dataset)
        datasets.append(WantedDataset(task, task.file_stem(e), rows, min(limit or available, available)))
    for dataset in datasets:
        load_metric(dataset.task.metric, dataset.task.source)
        _check_max_length(dataset.task, settings.max_length, context.prompter)
    return WantedRows(own, sources, datasets)


def _check_ruler_length(task: Task, window: int) -> None:
    """Raise UsageError for a task of RULER that is longer than the window."""
    if task.length is not None and task.length > window:
        raise UsageError(
            f"--ruler_length {task.length} is longer than the window of {window} tokens. Pass at most "
            f"--ruler_length {window}, or a larger --window if the checkpoint has one."
        )


def _check_max_length(task: Task, max_length: int | None, prompter: Prompter) -> None:
    """Raise UsageError if the window leaves no tokens for a prompt of this dataset, or fewer than --max_length."""
    capacity = prompter.capacity(task)
    if max_length is not None and max_length > capacity and task.length is None:
        raise UsageError(
            f"--max_length {max_length} is too long: of the window of {prompter.window} tokens, {task.name} leaves "
            f"{capacity} for the raw prompt, after {task.max_new_tokens} new tokens and the chat wrapper. Pass at "
            f"most --max_length {capacity}, or a larger --window."
        )


def _sources(settings: Settings, context: RunContext, tasks: list[Task]) -> dict[str, Source]:
    """Open the source of the rows of each benchmark. Raises UsageError for an invalid one."""
    sources: dict[str, Source] = {}
    if files := list(dict.fromkeys(task.benchmark for task in tasks if task.benchmark != "ruler")):
        source = open_source(
            settings.data_source,
            revision=settings.data_revision,
            offline=settings.offline,
            sample=SampleSource(settings.sample_rows, settings.sample_tokens, settings.sample_seed),
            benchmarks=files,
        )
        sources |= dict.fromkeys(files, source)
    if len(files) < len({task.benchmark for task in tasks}):
        texts = settings.ruler_texts
        sources["ruler"] = RulerSource(context.prompter, settings.ruler_rows, settings.ruler_seed, texts)
    return sources
