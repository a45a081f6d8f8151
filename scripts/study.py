"""Writes what a study of real models needs: scores of runs by part of LongBench, with paired intervals, and costs.

    python scripts/study.py pred/MODEL --out tables/study.csv
    python scripts/study.py pred/MODEL/vanilla pred/MODEL/infinigen-budget=256 --markdown
    python scripts/study.py pred/MODEL --plot study.png --part without_code --label quest-budget=256=Quest

The first run is the baseline: `vanilla`, where a folder of runs is given. The parts are all datasets, those without
code, English and Chinese ones, each category, and two halves of the rows: of each dataset the rows at even and at odd
places. A setting can be chosen on one half and reported on the other.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy

from sparsecache.cli import report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.costs import cache_costs
from sparsecache.longbench.paired import RESAMPLES, bootstrap_means, common_rows, confidence_interval
from sparsecache.longbench.report import decode_speed
from sparsecache.longbench.runs import parse_labels, run_names
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tasks import CATEGORIES, Task

BASELINE = "vanilla"
_HEAD = ["run", "kept", "all", "difference", "95% interval", "without code", "even rows", "odd rows", "tokens/s"]


@dataclass(frozen=True)
class Part:
    """Some datasets, and of each the rows from `start` on, every `step`-th."""

    name: str
    belongs: Callable[[Task], bool]
    start: int = 0
    step: int = 1


def parts() -> list[Part]:
    """Return the parts by which scores are given."""
    no_code = [
        Part("without_code", lambda task: task.category != "code"),
        Part("english", lambda task: task.language == "en" and task.category != "code"),
        Part("chinese", lambda task: task.language == "zh"),
    ]
    halves = [Part(f"{name}_without_code", no_code[0].belongs, start, 2) for start, name in enumerate(("even", "odd"))]
    categories = [Part(name, lambda task, name=name: task.category == name) for name in CATEGORIES]  # type: ignore[misc]
    return [Part("all", lambda task: True), *no_code, *halves, *categories]


def part_scores(runs: Sequence[RunScore], part: Part, seed: int = 0) -> list[dict[str, float | None]]:
    """Return per run, which must have the same rows, the mean over a part's datasets and its difference to the first.

    Keys: score, difference, low and high: the 95 % bootstrap interval of the difference, rows resampled within
    datasets. None without a dataset; no interval if each dataset has a single row.
    """
    tables = [
        (datasets[0].task.name, 100 * numpy.array([[row.score for row in each.rows] for each in datasets]).T)
        for datasets in zip(*(run.datasets for run in runs), strict=True)
        if part.belongs(datasets[0].task)
    ]
    tables = [(name, table[part.start :: part.step]) for name, table in tables]
    tables = [(name, table) for name, table in tables if len(table)]
    if not tables:
        return [dict.fromkeys(("score", "difference", "low", "high")) for _ in runs]
    means = numpy.mean([table.mean(axis=0) for _, table in tables], axis=0)
    resampled = numpy.mean(
        [bootstrap_means(table - table[:, :1], name, seed, RESAMPLES) for name, table in tables], axis=0
    )
    found: list[dict[str, float | None]] = []
    for at in range(len(runs)):
        low, high = confidence_interval(resampled[:, at])
        has_interval = at > 0 and any(len(table) > 1 for _, table in tables)
        found.append(
            {
                "score": float(means[at]),
                "difference": float(means[at] - means[0]) if at else None,
                "low": low if has_interval else None,
                "high": high if has_interval else None,
            }
        )
    return found


def study(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a record per run: name, method, options, rows, costs, and the scores of all parts.

    Raises UsageError for runs without common rows.
    """
    common = common_rows([score_run(folder) for folder in folders]).runs
    records: list[dict[str, Any]] = []
    for run, name in zip(common, run_names(common), strict=True):
        costs, kept = cache_costs(run), run.headline.kept
        options = run.run.identity.options or {}
        records.append(
            {
                "run": name,
                "method": run.run.identity.method,
                "options": " ".join(f"{key}={value}" for key, value in options.items()),
                "rows": sum(len(dataset.rows) for dataset in run.datasets),
                "kept": kept,
                "model_share": costs.model_share(kept),
                "cache_bytes_per_token": costs.nbytes,
                "decode_tokens_per_s": (decode_speed(run.run) or {}).get("tokens_per_s"),
            }
        )
    for part in parts():
        for record, scores in zip(records, part_scores(common, part), strict=True):
            record[part.name] = scores["score"]
            record |= {f"{part.name}_{key}": scores[key] for key in ("difference", "low", "high")}
    return records


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV, numbers with four decimals."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: round(each, 4) if isinstance(each, float) else each for key, each in record.items()})
    return out.getvalue()


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return the columns that a page shows."""
    lines = [f"| {' | '.join(_HEAD)} |", f"| :--- |{' ---: |' * (len(_HEAD) - 1)}"]
    for record in records:
        low, high = record["all_low"], record["all_high"]
        cells = [
            f"`{record['run']}`",
            "" if record["kept"] is None else f"{record['kept']:.1%}",
            _number(record["all"], ".1f"),
            _number(record["all_difference"], "+.1f"),
            "" if low is None else f"{low:+.1f} to {high:+.1f}",
            *(
                _number(record[f"{part}_difference"], "+.1f")
                for part in ("without_code", "even_without_code", "odd_without_code")
            ),
            _number(record["decode_tokens_per_s"], ",.0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[dict[str, Any]], part: str, title: str) -> Any:
    """Return a plot of each run's difference to the first, with its interval, in order of the difference.

    part: a name of `parts`. Raises UsageError if matplotlib is missing.
    """
    from sparsecache.longbench.plots._figure import INK, MUTED, PAGE, SERIES, Plot, new_figure, with_style

    drawn = sorted(
        (record for record in records if record[f"{part}_difference"] is not None),
        key=lambda record: float(record[f"{part}_difference"]),
    )

    def figure() -> Plot:
        figure, axis = new_figure(0.5 + 0.17 * len(drawn), width=PAGE * 0.8)
        axis.axvline(0, color=MUTED, linewidth=0.8)
        for place, record in enumerate(drawn):
            difference, low, high = (record[f"{part}_{key}"] for key in ("difference", "low", "high"))
            color = SERIES[1] if record["method"] == "infinigen" else SERIES[0]
            if low is not None:
                axis.plot((low, high), (place, place), color=color)
            axis.plot(difference, place, "o", color=color)
        axis.set_yticks(range(len(drawn)), [_label(record) for record in drawn])
        axis.set_ylim(-0.6, len(drawn) - 0.4)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.grid(axis="x")
        axis.set_xlabel(f"points more than {records[0]['run']}, with 95 % intervals; in parentheses the share kept")
        return Plot(title, f"{title}: differences to {records[0]['run']}", figure)

    return with_style(figure)()


def _label(record: dict[str, Any]) -> str:
    return record["run"] + ("" if record["kept"] is None else f" ({record['kept']:.1%})")


def _number(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _run_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the runs in paths, each of which is a run or a folder of runs; the baseline comes first."""
    runs = [
        run
        for path in paths
        for run in ([path] if (path / "run.json").exists() else sorted(each.parent for each in path.glob("*/run.json")))
    ]
    if len(runs) < 2:
        raise UsageError(f"{', '.join(map(str, paths))} holds fewer than two runs. Give folders with run.json.")
    from_folder = not (paths[0] / "run.json").exists()
    return sorted(runs, key=lambda run: run.name != BASELINE) if from_folder else runs


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="CSV file to write.")
@click.option("--markdown", is_flag=True, help="Print the main columns as a Markdown table.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the differences to write (.png, .svg, .pdf).")
@click.option("--part", type=click.Choice([part.name for part in parts()]), default="all", help="Part that is drawn.")
@click.option("--title", default="Differences to the full cache", help="Title of the picture.")
@click.option("--label", "labels", multiple=True, metavar="RUN=TEXT", help="Call a run TEXT; repeatable.")
def main(
    runs: tuple[Path, ...],
    out: Path | None,
    markdown: bool,
    plot: Path | None,
    part: str,
    title: str,
    labels: tuple[str, ...],
) -> None:
    """Score RUNS, folders of predictions or of such folders, by part of LongBench. Without options, print CSV."""
    with report_usage_errors():
        records = study(_run_folders(runs))
        named = parse_labels(labels, [record["run"] for record in records])
        records = [{**record, "run": named.get(record["run"], record["run"])} for record in records]
        if out is not None:
            write_atomically(out, as_csv(records))
        if plot is not None:
            draw(records, part, title).save(plot)
        if markdown:
            click.echo(as_markdown(records), nl=False)
        elif out is None and plot is None:
            click.echo(as_csv(records), nl=False)


if __name__ == "__main__":
    main()
