"""Write what a study of real models needs: scores of runs by part of LongBench, with paired intervals, and costs.

    python scripts/study.py pred/MODEL --out tables/study.csv
    python scripts/study.py pred/MODEL/vanilla pred/MODEL/infinigen-budget=256 --markdown
    python scripts/study.py pred/MODEL --plot study.png --part without_code --label quest-budget=256=Quest
    python scripts/study.py pred/MODEL --budgets --plot budgets.png --part without_code

The baseline is the run `vanilla`, else the first one. The parts are all datasets, those without code, English and
Chinese ones, each category, and two halves of the rows: of each dataset the rows at even and at odd places, in the
order of their `_id`s. A setting can be chosen on one half and reported on the other. --budgets shows a line per method
over its budgets instead of a line per run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy
from numpy.typing import NDArray
from study_output import as_csv, as_markdown, budget_table, draw, draw_budgets

from sparsecache.cli import FlexibleCommand
from sparsecache.errors import UsageError, listed
from sparsecache.files import make_folder, write_atomically
from sparsecache.longbench.costs import cache_costs
from sparsecache.longbench.paired import (
    RESAMPLES,
    bootstrap_means,
    common_rows,
    common_rows_notes,
    confidence_interval,
    failed_rows_notes,
    few_rows_notes,
)
from sparsecache.longbench.plots import check_suffix, require_matplotlib
from sparsecache.longbench.report import decode_speed
from sparsecache.longbench.runs import find_run, parse_labels, run_names
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tasks import CATEGORIES, Task

BASELINE = "vanilla"
Scores = NDArray[numpy.float64]


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


def part_tables(runs: Sequence[RunScore], part: Part) -> list[tuple[str, Scores]]:
    """Return per dataset of a part its name and its scores in percent, [rows, runs]. Runs must have the same rows."""
    tables = [
        (datasets[0].task.name, 100 * numpy.array([[row.score for row in each.rows] for each in datasets]).T)
        for datasets in zip(*(run.datasets for run in runs), strict=True)
        if part.belongs(datasets[0].task)
    ]
    tables = [(name, table[part.start :: part.step]) for name, table in tables]
    return [(name, table) for name, table in tables if len(table)]


def column_scores(tables: Sequence[tuple[str, Scores]], seed: int = 0) -> list[dict[str, float | None]]:
    """Return per column of `part_tables` the mean over the datasets and its difference to the first column.

    Keys: score, difference, low and high: the 95 % bootstrap interval of the difference, rows resampled within
    datasets. No interval if each dataset has a single row.
    """
    means = numpy.mean([table.mean(axis=0) for _, table in tables], axis=0)
    resampled = numpy.mean(
        [bootstrap_means(table - table[:, :1], name, seed, RESAMPLES) for name, table in tables], axis=0
    )
    found: list[dict[str, float | None]] = []
    for at in range(len(means)):
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


def part_scores(runs: Sequence[RunScore], part: Part, seed: int = 0) -> list[dict[str, float | None]]:
    """Return `column_scores` of runs, which must have the same rows; None for each key without a dataset."""
    tables = part_tables(runs, part)
    if not tables:
        return [dict.fromkeys(("score", "difference", "low", "high")) for _ in runs]
    return column_scores(tables, seed)


def study(folders: Sequence[Path], e: bool = False) -> list[dict[str, Any]]:
    """Return a record per run: name, method, options, budget, rows, costs, and the scores of all parts.

    e: whether the runs are of LongBench-E. Notes on rows that are left out go to stderr. Raises UsageError for runs
    without common rows.
    """
    scored = [score_run(folder, e) for folder in folders]
    if failed := [run for run in scored if run.failed]:
        names = listed((str(run.folder) for run in failed), whole=True)
        if scored[0].failed or len(scored) - len(failed) < 2:
            raise UsageError(f"All rows failed in {names}, so there is nothing to compare. Predict again.")
        click.echo(f"Left out, since all rows failed: {names}.", err=True)
        scored = [run for run in scored if not run.failed]
    reduced = common_rows(scored)
    common = reduced.runs
    for note in (*common_rows_notes(scored, reduced), *failed_rows_notes(common), *few_rows_notes(common[0])):
        click.echo(note, err=True)
    if len(checkpoints(scored)) > 1:
        click.echo("The runs are of different checkpoints, so differences are not those of methods alone.", err=True)
    records: list[dict[str, Any]] = []
    for run, name in zip(common, run_names(common), strict=True):
        costs, kept = cache_costs(run), run.headline.kept
        options = run.run.identity.options or {}
        records.append(
            {
                "run": name,
                "method": run.run.identity.method,
                "options": " ".join(f"{key}={value}" for key, value in options.items()),
                "budget": options.get("budget"),
                "rows": run.num_rows,
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


def checkpoints(runs: Sequence[RunScore]) -> set[str]:
    """Return the checkpoints of runs that state theirs."""
    return {run.run.identity.checkpoint for run in runs if run.run.identity.checkpoint}


def _run_folders(paths: Sequence[Path], pred_dir: Path) -> list[Path]:
    """Return the runs in paths, each of which is a run or a folder of runs; `vanilla` comes first, if there is one.

    A path that does not exist is looked for below pred_dir.

    A sweep that was stopped leaves folders without predictions, which are left out with a note on stderr. Raises
    UsageError for a path without a run, for fewer than two runs, and for folders of runs without the baseline.
    """
    runs: list[Path] = []
    paths = [find_run(str(path), pred_dir) for path in paths]
    for path in paths:
        found = [path] if (path / "run.json").exists() else sorted(each.parent for each in path.glob("*/run.json"))
        if not found:
            raise UsageError(f"{path} is no run and holds none: a run is a folder with run.json. Correct the path.")
        started = [run for run in found if run == path or any(file.stat().st_size for file in run.glob("*.jsonl"))]
        if len(started) < len(found):
            names = listed(run.name for run in found if run not in started)
            click.echo(f"{path}: left out, without predictions: {names}", err=True)
        runs += started
    if len(runs) < 2:
        raise UsageError(f"{', '.join(map(str, paths))} holds fewer than two runs. Give folders with run.json.")
    from_folder = not (paths[0] / "run.json").exists()
    if from_folder and not any(run.name == BASELINE for run in runs):
        raise UsageError(
            f"{paths[0]} has no run {BASELINE} with predictions, the baseline. Predict it, or name runs, the baseline "
            f"first."
        )
    return sorted(runs, key=lambda run: run.name != BASELINE)


@click.command(cls=FlexibleCommand)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True, help="Folder of all runs."
)
@click.option("--out", type=click.Path(path_type=Path), help="CSV file to write.")
@click.option("--markdown", is_flag=True, help="Print the main columns as a Markdown table.")
@click.option("--e", is_flag=True, help="The runs are of LongBench-E.")
@click.option("--budgets", is_flag=True, help="Print, and draw, a line per method over its budgets, for --part.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the differences to write (.png, .svg, .pdf).")
@click.option("--part", type=click.Choice([part.name for part in parts()]), default="all", help="Part that is shown.")
@click.option("--title", help="Title of the plot.  [default: names the baseline]")
@click.option("--label", "labels", multiple=True, metavar="RUN=TEXT", help="Call a run TEXT; repeatable.")
def main(
    runs: tuple[Path, ...],
    pred_dir: Path,
    out: Path | None,
    markdown: bool,
    e: bool,
    budgets: bool,
    plot: Path | None,
    part: str,
    title: str | None,
    labels: tuple[str, ...],
) -> None:
    """Score RUNS, folders of predictions or of such folders, by part of LongBench. Without options, print CSV.

    Differences are to the run vanilla, else to the first one.
    """
    folders = _run_folders(runs, pred_dir)
    if plot is not None:
        check_suffix(plot)
        require_matplotlib()
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None:
            make_folder(path.parent, option)
    records = study(folders, e)
    if records[0]["run"] != BASELINE:
        click.echo(f"Differences are to {records[0]['run']}, the first run.", err=True)
    if (budgets or plot) and all(record[part] is None for record in records):
        raise UsageError(f"No dataset of the runs belongs to the part {part}. Give another --part.")
    named = parse_labels(labels, [record["run"] for record in records])
    records = [{**record, "run": named.get(record["run"], record["run"])} for record in records]
    if out is not None:
        write_atomically(out, as_csv(records))
    if plot is not None:
        baseline = records[0]["run"]
        title = title or f"Differences to {'the full cache' if baseline == BASELINE else baseline}"
        (draw_budgets if budgets else draw)(records, part, title).save(plot)
    if budgets:
        click.echo(budget_table(records, part), nl=False)
    if markdown:
        click.echo(as_markdown(records), nl=False)
    if not (markdown or budgets or out or plot):
        click.echo(as_csv(records), nl=False)


if __name__ == "__main__":
    main()
