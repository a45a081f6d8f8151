"""Says which model and data runs are about, for the titles of tables, plots and reports."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from sparsecache.longbench.score_types import GROUP_NAMES, RunScore

_MOST = 3  # names in a title
_PATHS = ("folder", "file", "zip")  # sources that --data names by their path


def subject(runs: Sequence[RunScore]) -> str:
    """Return the models and the data of runs, as in `llama on LongBench`; the data alone if no model is recorded."""
    models = list(dict.fromkeys(run.run.model.name for run in runs if run.run.model.name))
    data = list(dict.fromkeys(name for run in runs for name in _data(run)))
    return " on ".join(filter(None, (_joined(models), _joined(data))))


def against(names: Sequence[str]) -> str:
    """Return a phrase for a comparison of runs with the first of them."""
    first, *others = names
    return f"{', '.join(others) if len(others) <= _MOST else f'{len(others)} runs'} against {first}"


def data_options(run: RunScore) -> dict[str, Any]:
    """Return the options that say which rows a run decodes, as far as its latest session records them."""
    data = next((session.data for session in reversed(run.run.sessions) if session.data), {})
    keys = {"tokens": "--sample_tokens", "seed": "--sample_seed"}
    where = data.get("path") if data.get("source") in _PATHS else data.get("source")
    return ({"--data": where} if where else {}) | {flag: data[key] for key, flag in keys.items() if key in data}


def _data(run: RunScore) -> Iterator[str]:
    """Yield the benchmarks of a run, and where its rows came from unless that is the hub."""
    groups = dict.fromkeys(dataset.task.group for dataset in run.datasets if dataset.rows) or {"longbench": None}
    benchmarks = " and ".join(GROUP_NAMES.get(group, group) for group in groups)
    if run.e:
        benchmarks += "-E"
    sources = list(dict.fromkeys(_source(session.data) for session in run.run.sessions if session.data))
    for source in sources or [""]:
        yield source.replace("{}", benchmarks.replace("own tasks", "own-task")) or benchmarks


def _source(data: dict[str, Any]) -> str:
    """Return a pattern for the benchmark's name; empty for the hub's rows and unknown sources."""
    if data.get("source") == "sample":
        return "synthetic rows"
    path = data.get("path")
    if data.get("source") in _PATHS and isinstance(path, str):
        return f"{{}} rows of {PurePath(path).name.replace('{}', '')}"
    return ""


def _joined(names: Sequence[str]) -> str:
    more = [f"{len(names) - _MOST} more"] if len(names) > _MOST else []
    return " and ".join([*names[:_MOST], *more])
