"""Write paired differences between runs of a study, with intervals: the table docs/data/paired-differences.csv.

    python scripts/study_pairs.py docs/data/paired-differences.toml --run_dir qwen=pred/MODEL ... --out pairs.csv

The TOML file has a table [run_dirs], which gives each folder of runs a name and states its model, and [[pairs]]:

    run, baseline      names of runs in their folders; a list makes a pair for each
    run_dir            name of the folder of the runs; a list makes a pair for each
    baseline_dir       name of the folder of the baselines; without it, run_dir
    budget             budgets, each of which makes a pair; it takes the place of {budget} in names of runs
    mean_over_budgets  budgets, over which the scores of the runs, and of the baselines, are averaged row by row
    name               what the run is called in the table, if not `run`
    parts              parts of LongBench as of study.py; without them, without_code and all

{run} in `baseline` and `name` stands for the run. Pairs are written in the order of the file.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy
from study import checkpoints, column_scores, part_tables, parts
from study_output import Record, as_csv

from sparsecache.cli import FlexibleCommand
from sparsecache.configs import read_toml
from sparsecache.errors import UsageError, listed, short
from sparsecache.files import make_folder, write_atomically
from sparsecache.longbench.paired import common_rows, common_rows_notes, failed_rows_notes
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.options import show

_PARTS = ["without_code", "all"]
_TEXTS = ("run", "baseline", "run_dir", "parts")
_TEXT = ("baseline_dir", "name")
_BUDGETS = ("budget", "mean_over_budgets")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_EXAMPLE = 'run = "quest-budget={budget}", baseline = "vanilla", run_dir = "qwen", budget = [256, 1024]'


@dataclass(frozen=True)
class Pair:
    """A difference: the mean of some runs minus that of others. A run is the name of a folder of runs, and its own."""

    model: str
    run: str
    baseline: str
    runs: tuple[tuple[str, str], ...]
    baselines: tuple[tuple[str, str], ...]
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model}: {self.run} minus {self.baseline}"


def read_pairs(file: Path) -> tuple[dict[str, str], list[Pair]]:
    """Read a file of pairs: the models of its folders by their names, and the pairs in order.

    Raises UsageError for a bad file.
    """
    tables = read_toml(file)
    models, pairs = tables.get("run_dirs"), tables.get("pairs")
    if set(tables) != {"run_dirs", "pairs"} or not _is_list(pairs, dict):
        raise UsageError(f"{file} has {listed(tables)}. It needs a table [run_dirs], tables [[pairs]], and no more.")
    if not isinstance(models, dict) or not all(isinstance(model, str) for model in models.values()):
        raise UsageError(f'{file}: [run_dirs] states a model per name of a folder of runs (qwen = "qwen2.5-7b").')
    found = [pair for table in pairs for pair in _pairs(table, models, file)]
    rows = Counter((pair.model, pair.run, pair.baseline, part) for pair in found for part in pair.parts)
    if repeated := [", ".join(row) for row, count in rows.items() if count > 1]:
        raise UsageError(f"{file} states a difference twice: {listed(repeated, 3, whole=True)}. Leave one of them out.")
    return models, found


def _pairs(table: dict[str, Any], models: Mapping[str, str], file: Path) -> Iterator[Pair]:
    """Yield the pairs of a table of [[pairs]]."""
    values = _checked(table, file)
    of_parts = tuple(values.get("parts", _PARTS))
    for kind, named, known in (
        ("run_dir", [*values["run_dir"], *values.get("baseline_dir", [])], list(models)),
        ("part", of_parts, [part.name for part in parts()]),
    ):
        if unknown := [name for name in named if name not in known]:
            raise UsageError(
                f"{file}: there is no {kind} {unknown[0]!r} in {short(table, 200)}. Allowed: {listed(known, 20)}."
            )
    averaged, single = ([show(budget) for budget in values.get(key, [])] for key in ("mean_over_budgets", "budget"))
    groups = [averaged] if averaged else [[budget] for budget in single] or [[""]]
    for run_dir, baseline, budgets, run in itertools.product(
        values["run_dir"], values["baseline"], groups, values["run"]
    ):
        baseline_dir = values.get("baseline_dir", [run_dir])[0]
        baseline, name = (text.replace("{run}", run) for text in (baseline, values.get("name", ["{run}"])[0]))
        yield Pair(
            model=models[run_dir],
            run=_title(name, budgets, is_mean=bool(averaged)),
            baseline=_title(baseline, budgets, is_mean=bool(averaged)),
            runs=tuple((run_dir, each) for each in _filled(run, budgets)),
            baselines=tuple((baseline_dir, each) for each in _filled(baseline, budgets)),
            parts=of_parts,
        )


def _checked(table: dict[str, Any], file: Path) -> dict[str, list[Any]]:
    """Return the values of a table of [[pairs]], each as a list. Raises UsageError for a bad table."""
    where, example = f"{file}: in {short(table, 200)}", f"An example: {_EXAMPLE}."
    if unknown := [key for key in table if key not in (*_TEXTS, *_TEXT, *_BUDGETS)]:
        raise UsageError(f"{where} there is no key {unknown[0]!r}. Keys: {', '.join((*_TEXTS, *_TEXT, *_BUDGETS))}.")
    if missing := [key for key in _TEXTS[:3] if key not in table]:
        raise UsageError(f"{where} `{missing[0]}` is missing. {example}")
    values = {key: value if isinstance(value, list) and key not in _TEXT else [value] for key, value in table.items()}
    for key, value in values.items():
        if not _is_list(value, *((int, float) if key in _BUDGETS else (str,))):
            kind = "a number" if key in _BUDGETS else "a text"
            raise UsageError(f"{where} {key} must be {kind}{'' if key in _TEXT else ', or a list of some'}.")
        if len(set(value)) < len(value):
            raise UsageError(f"{where} {key} has a value twice. Leave one of them out.")
    given = [key for key in _BUDGETS if key in values]
    if len(given) > 1:
        raise UsageError(f"{where} both {' and '.join(given)} are given. Leave one of them out.")
    named = [name for key in ("run", "baseline", "name") for name in values.get(key, []) if "{budget}" in name]
    if given and (fixed := [run for run in values["run"] if run not in named]):
        raise UsageError(f"{where} {given[0]} needs {{budget}} in each `run`; {fixed[0]!r} lacks it. {example}")
    if named and not given:
        raise UsageError(f"{where} {named[0]!r} needs one of {' and '.join(_BUDGETS)}. {example}")
    return values


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) in kinds for each in value)


def _filled(name: str, budgets: Sequence[str]) -> list[str]:
    """Return the runs that a name stands for: one per budget, or a single one without {budget}."""
    return list(dict.fromkeys(name.replace("{budget}", budget) for budget in budgets))


def _title(name: str, budgets: Sequence[str], is_mean: bool) -> str:
    """Return what the runs of a name are called in the table."""
    if not is_mean or "{budget}" not in name:
        return name.replace("{budget}", budgets[0])
    number = _NUMBERS[len(budgets)] if len(budgets) < len(_NUMBERS) else str(len(budgets))
    line = name.replace("-budget={budget}", "").replace("{budget}", "*")
    return f"{line}, mean of {number} budget{'s' * (len(budgets) != 1)}"


def run_dirs_of(named: Sequence[str], models: Mapping[str, str], file: Path) -> dict[str, Path]:
    """Return the folders of --run_dir by name. Raises UsageError unless `named` gives each name of `models` once."""
    found: dict[str, Path] = {}
    for text in named:
        name, _, folder = text.partition("=")
        if name not in models or not folder:
            raise UsageError(
                f"--run_dir {short(text, 200)!r} is not NAME=FOLDER with a name of {file}: {listed(models, 20)}."
            )
        if name in found:
            raise UsageError(f"--run_dir gives {name} twice, {found[name]} and {folder}. Leave one of them out.")
        found[name] = Path(folder)
    if missing := [f"--run_dir {name}=FOLDER (runs of {models[name]})" for name in models if name not in found]:
        raise UsageError(f"{file} names folders that are not given. Add {listed(missing, 20, whole=True)}.")
    return found


def pair_folders(pairs: Sequence[Pair], run_dirs: Mapping[str, Path]) -> dict[tuple[str, str], Path]:
    """Return the folder of each run that pairs name. Raises UsageError for folders that are missing."""
    runs = dict.fromkeys(run for pair in pairs for run in (*pair.runs, *pair.baselines))
    folders = {(run_dir, run): run_dirs[run_dir] / run for run_dir, run in runs}
    if missing := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        raise UsageError(
            f"{len(missing)} of {len(folders)} runs are missing: {listed(missing, whole=True)}. Predict them, correct "
            f"--run_dir, or take their pairs out of the file."
        )
    for pair in pairs:
        runs_of, baselines = ({folders[run].resolve() for run in side} for side in (pair.runs, pair.baselines))
        if same := sorted(map(str, runs_of & baselines)):
            raise UsageError(f"{pair}: {same[0]} is a run and its own baseline. Correct --run_dir or the file.")
    return folders


def differences(pair: Pair, score: Callable[[tuple[str, str]], RunScore]) -> list[Record]:
    """Return a record per part: model, run, baseline, part, difference, and low and high of its 95 % interval.

    Numbers are texts with sign and four decimals, in points. Notes on rows that are left out go to stderr. Raises
    UsageError for runs without common rows, and for a part without a row.
    """
    scored = [score(run) for run in (*pair.baselines, *pair.runs)]
    if len(checkpoints(scored)) > 1:
        raise UsageError(f"{pair}: the runs are of different checkpoints. Correct --run_dir.")
    common = common_rows(scored)
    for note in (*common_rows_notes(scored, common), *failed_rows_notes(common.runs)):
        click.echo(f"{pair}: {note}", err=True)
    known, count, records = {part.name: part for part in parts()}, len(pair.baselines), []
    for name in pair.parts:
        tables = [
            (dataset, numpy.stack([table[:, :count].mean(axis=1), table[:, count:].mean(axis=1)], axis=1))
            for dataset, table in part_tables(common.runs, known[name])
        ]
        if not tables:
            raise UsageError(
                f"{pair}: its runs have no common row of the part {name}. Predict datasets of this part, or state "
                f"other `parts` for the pair."
            )
        record = {"model": pair.model, "run": pair.run, "baseline": pair.baseline, "part": name}
        found = column_scores(tables)[1]
        numbers = {key: found[key] for key in ("difference", "low", "high")}
        records.append(record | {key: None if each is None else f"{each:+.4f}" for key, each in numbers.items()})
    return records


@click.command(cls=FlexibleCommand)
@click.argument("file", metavar="PAIRS.toml", type=click.Path(path_type=Path))
@click.option("--run_dir", "named", multiple=True, metavar="NAME=FOLDER", help="A folder of runs; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="CSV file to write.")
def main(file: Path, named: tuple[str, ...], out: Path) -> None:
    """Write the paired differences that PAIRS.toml lists, with 95 % bootstrap intervals, as CSV."""
    models, pairs = read_pairs(file)
    folders = pair_folders(pairs, run_dirs_of(named, models, file))
    make_folder(out.parent, "--out")
    score = cache(lambda run: score_run(folders[run]))
    write_atomically(out, as_csv([record for pair in pairs for record in differences(pair, score)]))


if __name__ == "__main__":
    main()
