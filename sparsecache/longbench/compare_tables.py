"""A comparison as tables: scores side by side, differences to the first run, what each run cost."""

from collections.abc import Iterator

from sparsecache.longbench.comparison import Comparison, Line, Versus
from sparsecache.longbench.score_tables import AVERAGE_NAMES, average_label, share
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, words

_DETAILS = ["difference", "95% interval", "wins", "losses", "changed", "kept"]


def compare_document(comparison: Comparison) -> Document:
    """Two runs make one table, more of them one of scores and one of differences for each; then costs and remarks.

    The records hold a line for each dataset, category or average of each run.
    """
    names = [run.name for run in comparison.runs]
    head = ["dataset", "n", *names]
    rows = [_scores(line) for line in comparison.lines]
    if len(names) == 2:
        details = [_details(line, 1) for line in comparison.lines]
        rows = [[*row, *more] for row, more in zip(rows, details, strict=True)]
        tables = [_table("", [*head, *_DETAILS], rows, comparison)]
    else:
        tables = [_table("", head, rows, comparison)]
        for at, name in enumerate(names[1:], 1):
            details = [[_label(line), *_details(line, at)] for line in comparison.lines]
            tables.append(_table(f"{name} against {names[0]}", ["dataset", *_DETAILS], details, comparison))
    return Document(
        tables=[*tables, _costs(comparison)],
        records=records("", _records(comparison)),
        title=f"{', '.join(names[1:])} against {names[0]}",
        lead=[f"Note on {run.name}: {run.note}" for run in comparison.runs if run.note],
        notes=[*comparison.notes, *_options(comparison), _explained(comparison)],
    )


def _table(title: str, head: list[str], rows: list[list[Cell]], comparison: Comparison) -> Table:
    """A table of the comparison's lines, with a rule between datasets, categories and averages."""
    ruled: list[list[Cell]] = []
    kinds = [line.kind for line in comparison.lines]
    for row, kind, before in zip(rows, kinds, [kinds[0], *kinds], strict=False):
        ruled += [row] if kind == before else [[], row]
    return Table(title, head, ruled)


def _label(line: Line) -> Cell:
    name = line.name if line.kind != "average" else AVERAGE_NAMES[line.name]
    return words(average_label(name, line.datasets, line.of))


def _scores(line: Line) -> list[Cell]:
    return [_label(line), number(line.n, 0), *(number(entry.score, 2, entry.best) for entry in line.entries)]


def _details(line: Line, at: int) -> list[Cell]:
    entry = line.entries[at]
    versus = entry.versus
    assert versus is not None
    counts = [number(count, 0) for count in (versus.wins, versus.losses, versus.changed)]
    return [*_difference(versus), *counts, share(entry.kept)]


def _difference(versus: Versus) -> list[Cell]:
    """One digit, as the noise allows; two where the interval is narrower than a point."""
    low, high = versus.interval or (None, None)
    digits = 1 if low is None or high is None or high - low >= 1 else 2
    bounds = "-" if low is None or high is None else f"{signed(low, digits)} to {signed(high, digits)}"
    return [Cell(signed(versus.difference, digits), versus.difference), words(bounds)]


def signed(value: float, digits: int) -> str:
    """A difference with its sign; zero has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _costs(comparison: Comparison) -> Table:
    head = ["run", "method", "kept", "decode tokens/s", "prefill tokens/s", "peak GPU GiB", "device"]
    rows = []
    for run in comparison.runs:
        speed = run.decode or {}
        peak = speed.get("peak_gpu_bytes")
        rows.append(
            [
                words(run.name),
                words(run.method or "-"),
                share(run.kept),
                number(speed.get("tokens_per_s"), 1),
                number(speed.get("prefill_tokens_per_s"), 1),
                number(peak / 2**30 if peak else None, 1),
                words(", ".join(run.devices) or "-"),
            ]
        )
    return Table("what each run cost, over all of its rows", head, rows, "llrrrrl")


def _options(comparison: Comparison) -> Iterator[str]:
    yield from (f"Options of {run.name}: {run.options}." for run in comparison.runs if run.options)


def _explained(comparison: Comparison) -> str:
    return (
        f"Differences are to {comparison.runs[0].name}, their intervals a paired bootstrap over rows "
        f"({comparison.resamples:,} resamples, seed {comparison.seed}); wins, losses and changed count rows."
    )


def _records(comparison: Comparison) -> Iterator[dict[str, Value]]:
    for line in comparison.lines:
        for run, entry in zip(comparison.runs, line.entries, strict=True):
            versus, speed = entry.versus, run.decode or {}
            low, high = versus.interval if versus and versus.interval else (None, None)
            yield {
                "run": run.name,
                "kind": line.kind,
                "name": line.name,
                "n": line.n,
                "datasets": line.datasets,
                "of_datasets": line.of,
                "score": entry.score,
                "stderr": entry.stderr,
                "best": entry.best,
                "difference": versus.difference if versus else None,
                "low": low,
                "high": high,
                "wins": versus.wins if versus else None,
                "losses": versus.losses if versus else None,
                "ties": versus.ties if versus else None,
                "changed": versus.changed if versus else None,
                "errors": entry.errors,
                "kept": entry.kept,
                "tokens_per_s": entry.tokens_per_s,
                "run_tokens_per_s": speed.get("tokens_per_s"),
                "run_peak_gpu_bytes": speed.get("peak_gpu_bytes"),
                "method": run.method,
                "options": run.options,
                "folder": str(run.folder),
            }
