"""Formats a comparison as tables: a line per run, and in detail scores and differences per dataset, and costs."""

from collections.abc import Iterator

from sparsecache.longbench.comparison import ComparedRun, Comparison, Entry, Group
from sparsecache.longbench.identity import method_labels
from sparsecache.longbench.score_tables import AVERAGE_NAMES, average_label, share
from sparsecache.longbench.score_types import GROUP_NAMES, MEANS
from sparsecache.longbench.subjects import against
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, words

_KIB = 2**10
_SUMMARY = [
    "run", "score", "difference", "95% interval", "dtype",
    "kept", "whole model", "cache KiB/token", "on host", "tokens/s",
]  # fmt: skip
_FIXED = 3  # columns that are always shown; others are left out if they are empty
_DETAILS = ["difference", "95% interval", "wins", "losses", "changed", "kept"]


def compare_document(comparison: Comparison) -> Document:
    """Return the tables and notes of a comparison.

    The first table has a line per run, over the mean of LongBench; LongBench v2, RULER and own tasks have one each. In
    detail, two runs give one table of datasets; more runs give a table of scores and one of differences per run. A
    table of costs follows. The flat table has a row per run and dataset, stratum, category or average.
    """
    names = [run.name for run in comparison.runs]
    header = ["dataset", "n", *names]
    rows = [_scores(group) for group in comparison.groups]
    if len(names) == 2:
        details = [_details(group, 1) for group in comparison.groups]
        rows = [[*row, *more] for row, more in zip(rows, details, strict=True)]
        tables = [_table("", [*header, *_DETAILS], rows, comparison)]
    else:
        tables = [_table("", header, rows, comparison)]
        for at, name in enumerate(names[1:], 1):
            details = [[_label(group), *_details(group, at)] for group in comparison.groups]
            tables.append(_table(f"{name} against {names[0]}", ["dataset", *_DETAILS], details, comparison))
    return Document(
        tables=list(_summaries(comparison)),
        details=[*tables, _costs(comparison)],
        records=records("", _records(comparison)),
        title=f"{comparison.subject}: {against(names)}",
        preamble=[f"Note on {run.name}: {run.note}" for run in comparison.runs if run.note],
        notes=[*comparison.notes, *_legend(comparison)],
    )


def _summaries(comparison: Comparison) -> Iterator[Table]:
    """Yield a table with a line per run for each mean that stands for a benchmark."""
    dtypes_differ = len({run.record.identity.dtype for run in comparison.runs}) > 1
    averages = {group.name: group for group in comparison.groups if group.kind == "average"}
    found = {group: averages[name] for group, name in MEANS.items() if name in averages}
    for name, mean in found.items():
        entries = zip(comparison.runs, mean.entries, strict=True)
        rows = [_summary(run, entry, mean.n, dtypes_differ) for run, entry in entries]
        shown = [at for at in range(len(_SUMMARY)) if at < _FIXED or any(row[at].value for row in rows)]
        title = f"{GROUP_NAMES[name]}: {_extent(mean)}" if len(found) > 1 else ""
        yield Table(title, [_SUMMARY[at] for at in shown], [[row[at] for at in shown] for row in rows])


def _summary(run: ComparedRun, entry: Entry, rows: int, with_dtype: bool) -> list[Cell]:
    return [
        words(run.name),
        number(entry.score, 2, entry.best),
        *_difference(entry, rows),
        words(run.record.identity.dtype or "-") if with_dtype else Cell(""),
        share(entry.kept),
        share(entry.model_share),
        number(_kib(run.cache.nbytes), 1),
        number(_kib(run.cache.host_nbytes), 1),
        number((run.decode or {}).get("tokens_per_s"), 1),
    ]


def _extent(mean: Group) -> str:
    return f"mean of {mean.datasets} dataset{'s' * (mean.datasets != 1)}, {mean.n} row{'s' * (mean.n != 1)}"


def _kib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / _KIB


def _table(title: str, header: list[str], rows: list[list[Cell]], comparison: Comparison) -> Table:
    """Return a table with a row per group, and rules between datasets, strata, categories and averages."""
    ruled: list[list[Cell]] = []
    kinds = [group.kind for group in comparison.groups]
    for row, kind, before in zip(rows, kinds, [kinds[0], *kinds], strict=False):
        ruled += [row] if kind == before else [[], row]
    return Table(title, header, ruled)


def _label(group: Group) -> Cell:
    name = group.name if group.kind != "average" else AVERAGE_NAMES[group.name]
    return words(average_label(name, group.datasets, group.of_datasets))


def _scores(group: Group) -> list[Cell]:
    return [_label(group), number(group.n, 0), *(number(entry.score, 2, entry.best) for entry in group.entries)]


def _details(group: Group, at: int) -> list[Cell]:
    entry = group.entries[at]
    difference = entry.difference
    assert difference is not None
    counts = [number(count, 0) for count in (difference.wins, difference.losses, difference.changed)]
    return [*_difference(entry, group.n), *counts, share(entry.kept)]


def _difference(entry: Entry, rows: int) -> list[Cell]:
    """Return the cells of a difference and its interval, with two decimals below one point.

    The first run has none. A run in which all `rows` failed has the word `failed`.
    """
    difference = entry.difference
    if difference is None or entry.errors == rows:
        return [Cell("failed" if entry.errors == rows else "-"), Cell("-")]
    low, high = difference.interval or (None, None)
    digits = 1 if low is None or high is None or high - low >= 1 else 2
    bounds = Cell("-") if low is None or high is None else words(f"{signed(low, digits)} to {signed(high, digits)}")
    return [Cell(signed(difference.mean, digits), difference.mean), bounds]


def signed(value: float, digits: int) -> str:
    """Return a difference with its sign; zero has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _costs(comparison: Comparison) -> Table:
    header = ["run", "method", "options", "kept", "decode tokens/s", "prefill tokens/s", "peak GPU GiB", "device"]
    rows = []
    labels = method_labels([run.method or "-" for run in comparison.runs])
    for run, label in zip(comparison.runs, labels, strict=True):
        speed = run.decode or {}
        peak = speed.get("peak_gpu_bytes")
        rows.append(
            [
                words(run.name),
                words(label),
                words(run.options or "-"),
                share(run.kept),
                number(speed.get("tokens_per_s"), 1),
                number(speed.get("prefill_tokens_per_s"), 1),
                number(peak / 2**30 if peak else None, 1),
                words(", ".join(run.devices) or "-"),
            ]
        )
    return Table("speed and memory of each run, over all of its rows", header, rows, "lllrrrrl")


def _legend(comparison: Comparison) -> Iterator[str]:
    """Yield what the columns that are shown mean, a line each."""
    means = [group for group in comparison.groups if group.kind == "average" and group.name in MEANS.values()]
    extent = f"{_extent(means[0])}; " if len(means) == 1 else ""
    marked = any(entry.best for group in comparison.groups for entry in group.entries)
    highest = "the highest is marked" if marked else "all are equal"
    yield f"score: {extent}{highest}. difference: to {comparison.runs[0].name}, in points."
    if any(entry.difference and entry.difference.interval for group in comparison.groups for entry in group.entries):
        yield f"95% interval: paired bootstrap over rows, {comparison.resamples:,} resamples, seed {comparison.seed}."
    if any(run.kept for run in comparison.runs):
        whole = any(run.cache.layers for run in comparison.runs)
        same = "; whole model: the same over all layers" if whole else ""
        yield f"kept: share of past tokens that sparse layers attended to{same}."
    if any(run.cache.nbytes for run in comparison.runs):
        yield "cache KiB/token: what the caches of all layers allocate per token of a sequence."


def _records(comparison: Comparison) -> Iterator[dict[str, Value]]:
    for group in comparison.groups:
        for run, entry in zip(comparison.runs, group.entries, strict=True):
            difference, speed = entry.difference, run.decode or {}
            low, high = difference.interval if difference and difference.interval else (None, None)
            yield {
                "run": run.name,
                "kind": group.kind,
                "name": group.name,
                "n": group.n,
                "datasets": group.datasets,
                "of_datasets": group.of_datasets,
                "score": entry.score,
                "stderr": entry.stderr,
                "best": entry.best,
                "difference": difference.mean if difference else None,
                "low": low,
                "high": high,
                "wins": difference.wins if difference else None,
                "losses": difference.losses if difference else None,
                "ties": difference.ties if difference else None,
                "changed": difference.changed if difference else None,
                "errors": entry.errors,
                "kept": entry.kept,
                "model_share": entry.model_share,
                "cache_bytes_per_token": run.cache.nbytes,
                "host_bytes_per_token": run.cache.host_nbytes,
                "full_cache_bytes_per_token": run.cache.full_nbytes,
                "tokens_per_s": entry.tokens_per_s,
                "run_tokens_per_s": speed.get("tokens_per_s"),
                "run_peak_gpu_bytes": speed.get("peak_gpu_bytes"),
                "method": run.method,
                "options": run.options,
                "folder": str(run.folder),
            }
