"""The paired differences of a study, against numbers made by hand from synthetic predictions."""

import csv
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from click.testing import CliRunner, Result

DATASETS = {"qasper": 31, "hotpotqa": 24, "lcc": 9}
RUNS = ("vanilla", "quest-budget=64", "quest-budget=256", "loki-budget=64", "loki-budget=256")
MODEL = '[run_dirs]\nsmall = "a-model"\n'
QUEST = 'run_dir = "small"\nrun = "quest-budget={budget}"\n'
PAIR = f'{MODEL}[[pairs]]\n{QUEST}baseline = "vanilla"\n'

Scores = dict[str, dict[str, numpy.ndarray]]


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("study_pairs")


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    """The scores, 0 or 100, of the rows of five runs in the folder `pred`, by run and dataset."""
    draw = numpy.random.default_rng(5)
    found: Scores = {}
    for name in RUNS:
        folder = tmp_path / "pred" / name
        folder.mkdir(parents=True)
        found[name] = {stem: 100.0 * draw.integers(2, size=count) for stem, count in DATASETS.items()}
        for stem, values in found[name].items():
            rows = [
                {
                    "pred": "red fox" if score else "", "answers": ["red fox"], "all_classes": None, "length": 10,
                    "_id": f"{stem}{at:03}",
                }
                for at, score in enumerate(values)
            ]  # fmt: skip
            (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected = {stem: {"expected_rows": count} for stem, count in DATASETS.items()}
        (folder / "run.json").write_text(json.dumps({"datasets": expected}))
    return found


def _write(script: ModuleType, folder: Path, text: str, *arguments: str) -> Result:
    (folder / "pairs.toml").write_text(text)
    given = arguments or ("--run_dir", f"small={folder / 'pred'}")
    return CliRunner().invoke(script.main, [str(folder / "pairs.toml"), *given, "--out", str(folder / "out.csv")])


def _rows(script: ModuleType, folder: Path, text: str, *arguments: str) -> list[dict[str, str]]:
    done = _write(script, folder, text, *arguments)
    assert done.exit_code == 0, done.output
    with open(folder / "out.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_mean_over_budgets_is_that_of_the_rows_differences(script, scores, tmp_path) -> None:
    text = f'{MODEL}[[pairs]]\n{QUEST}baseline = "loki-budget={{budget}}"\nmean_over_budgets = [64, 256]\n'
    rows = _rows(script, tmp_path, text)
    names = ("quest, mean of two budgets", "loki, mean of two budgets")
    assert [(row["model"], row["run"], row["baseline"]) for row in rows] == [("a-model", *names)] * 2
    differences = {
        stem: sum(
            scores[f"quest-budget={budget}"][stem] - scores[f"loki-budget={budget}"][stem] for budget in (64, 256)
        )
        / 2
        for stem in DATASETS
    }
    draw = numpy.random.default_rng(11)
    for row, stems in zip(rows, (["qasper", "hotpotqa"], list(DATASETS)), strict=True):
        assert row["part"] == ("all" if "lcc" in stems else "without_code")
        assert row["difference"] == f"{numpy.mean([differences[stem].mean() for stem in stems]):+.4f}"
        resampled = numpy.mean(
            [draw.choice(differences[stem], (20_000, DATASETS[stem])).mean(axis=1) for stem in stems], axis=0
        )
        low, high = numpy.quantile(resampled, (0.025, 0.975))
        assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_a_pair_a_mean_over_one_budget_and_the_study_agree(script, load_script, scores, tmp_path) -> None:
    table = f'[[pairs]]\n{QUEST}baseline = "vanilla"\nparts = ["english", "even_without_code", "code"]\n'
    rows = _rows(script, tmp_path, f"{MODEL}{table}budget = 64\n{table}mean_over_budgets = [64]\n")
    assert [row["run"] for row in rows] == ["quest-budget=64"] * 3 + ["quest, mean of one budget"] * 3
    for pair, mean in zip(rows[:3], rows[3:], strict=True):
        assert pair | {"run": ""} == mean | {"run": ""}
    record = load_script("study").study([tmp_path / "pred" / name for name in ("vanilla", "quest-budget=64")])[1]
    for row in rows[:3]:
        for key in ("difference", "low", "high"):
            assert row[key] == f"{record[row['part'] + '_' + key]:+.4f}"


def test_lists_make_pairs_and_runs_of_another_folder_get_a_name(script, scores, tmp_path) -> None:
    shutil.copytree(tmp_path / "pred" / "loki-budget=64", tmp_path / "fp8" / "vanilla")
    shutil.copytree(tmp_path / "pred" / "loki-budget=256", tmp_path / "fp8" / "quest-budget=64")
    text = f"""{MODEL}fp8 = "a-model"
[[pairs]]
run_dir = "fp8"
baseline_dir = "small"
run = ["vanilla", "quest-budget=64"]
baseline = "{{run}}"
name = "{{run}} (fp8)"
parts = "all"
[[pairs]]
run_dir = "small"
run = ["quest-budget={{budget}}", "loki-budget={{budget}}"]
baseline = "vanilla"
budget = [256, 64]
parts = "all"
"""
    folders = [f"--run_dir={name}={tmp_path / folder}" for name, folder in (("small", "pred"), ("fp8", "fp8"))]
    rows = _rows(script, tmp_path, text, *folders)
    assert [(row["run"], row["baseline"]) for row in rows] == [
        ("vanilla (fp8)", "vanilla"),
        ("quest-budget=64 (fp8)", "quest-budget=64"),
        ("quest-budget=256", "vanilla"),
        ("loki-budget=256", "vanilla"),
        ("quest-budget=64", "vanilla"),
        ("loki-budget=64", "vanilla"),
    ]
    means = {run: numpy.mean([values.mean() for values in of_run.values()]) for run, of_run in scores.items()}
    assert rows[0]["difference"] == f"{means['loki-budget=64'] - means['vanilla']:+.4f}"
    assert rows[1]["difference"] == f"{means['loki-budget=256'] - means['quest-budget=64']:+.4f}"
    assert rows[0]["difference"] == rows[5]["difference"]


def test_a_mean_has_no_placeholder_in_its_name(script) -> None:
    named = [
        script._title(name, ["64", "256"], is_mean=True) for name in ("a-budget={budget}-b=1", "a-select=b,c={budget}")
    ]
    assert named == ["a-b=1, mean of two budgets", "a-select=b,c=*, mean of two budgets"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pairs", "is not valid TOML"),
        (f"{PAIR}budget = 0x{'f' * 5000}\n", "is not valid TOML (Exceeds the limit"),
        (f"{PAIR}mean_over_budgets = [64, 64]\n", "mean_over_budgets has a value twice"),
        ("[run_dirs]\nsmall = 'a'\n", "It needs a table [run_dirs], tables [[pairs]], and no more"),
        (f"{PAIR}budget = 64\n[more]\n", "has run_dirs, pairs, more"),
        (f"[run_dirs]\nsmall = 1\n[[pairs]]\n{QUEST}baseline = 'vanilla'\nbudget = 64", "states a model per name"),
        (f"{MODEL}[[pairs]]\n{QUEST}budget = 64", "`baseline` is missing"),
        (f"{PAIR}budgets = [64]", "there is no key 'budgets'"),
        (f"{PAIR}budget = ['64']", "budget must be a number, or a list"),
        (f"{MODEL}[[pairs]]\n{QUEST}baseline = []\nbudget = 64", "baseline must be a text, or a list"),
        (f"{PAIR}budget = 64\nname = ['a']", "name must be a text."),
        (f"{PAIR}budget = 64\nmean_over_budgets = [64]", "Leave one of them"),
        (f"{PAIR}", "'quest-budget={budget}' needs one of budget and mean_over_budgets. An example: "),
        (
            f"{MODEL}[[pairs]]\nrun_dir = 'small'\nrun = 'quest'\nbaseline = 'vanilla'\nbudget = 64",
            "budget needs {budget} in each `run`; 'quest' lacks it. An example: ",
        ),
        (f"{PAIR}budget = 64\nparts = 'cod'", "there is no part 'cod'"),
        (f"{PAIR}budget = 64\nbaseline_dir = 'big'", "no run_dir 'big'"),
        (f"{PAIR}budget = 64\n[[pairs]]\n{QUEST}baseline = 'vanilla'\nbudget = 64\n", "a difference twice: a-model"),
        (f"{PAIR}budget = [64, 128]", "1 of 3 runs are missing"),
        (f"{PAIR}budget = 64\nparts = 'chinese'", "no common row of the part"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(script, scores, tmp_path, text, message) -> None:
    done = _write(script, tmp_path, text)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not (tmp_path / "out.csv").exists()


def _state_checkpoint(run: Path, checkpoint: str) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"identity": {"checkpoint": checkpoint}}))


def test_runs_of_another_checkpoint_are_refused(script, scores, tmp_path) -> None:
    _state_checkpoint(tmp_path / "pred" / "vanilla", "one")
    assert _write(script, tmp_path, f"{PAIR}budget = 64\n").exit_code == 0  # the other run does not state its own
    _state_checkpoint(tmp_path / "pred" / "quest-budget=64", "two")
    done = _write(script, tmp_path, f"{PAIR}budget = 64\n")
    assert done.exit_code == 2 and "the runs are of different checkpoints" in done.stderr


def test_a_run_is_not_its_own_baseline(script, scores, tmp_path) -> None:
    """Also if two names stand for one folder."""
    text = '[run_dirs]\nsmall = "a-model"\nother = "a-model"\n[[pairs]]\nrun_dir = "small"\nrun = "vanilla"\n'
    text += 'baseline = "vanilla"\nbaseline_dir = "other"\nname = "vanilla (other)"\n'
    folders = [part for name in ("small", "other") for part in ("--run_dir", f"{name}={tmp_path / 'pred'}")]
    done = _write(script, tmp_path, text, *folders)
    assert done.exit_code == 2 and "is a run and its own baseline" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run_dir", "small"], "'small' is not NAME=FOLDER with a name of"),
        (["--run_dir", "small="], "'small=' is not NAME=FOLDER with a name of"),
        (["--run_dir", "big=pred"], "pairs.toml: small, other."),
        (["--run_dir", "small=pred", "--run_dir", "small=more"], "gives small twice, pred and more"),
        (["--run_dir", "small=pred"], "Add --run_dir other=FOLDER (runs of a-model)."),
        (["--run_dir", "small=nowhere", "--run_dir", "other=pred"], "2 of 2 runs are missing: nowhere/"),
    ],
)
def test_bad_folders_are_refused(script, scores, tmp_path, arguments, message) -> None:
    text = f'{MODEL}other = "a-model"\n[[pairs]]\n{QUEST}baseline = "vanilla"\nbudget = 64\n'
    done = _write(script, tmp_path, text, *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_runs_without_common_rows_are_refused_and_left_out_rows_noted(script, scores, tmp_path) -> None:
    text = f"{PAIR}budget = 64\n"
    file = tmp_path / "pred" / "quest-budget=64" / "qasper.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    done = _write(script, tmp_path, text)
    assert done.exit_code == 0, done.output
    assert "a-model: quest-budget=64 minus vanilla: Compared on the 42 rows that all runs have" in done.stderr
    for file in (tmp_path / "pred" / "quest-budget=64").glob("*.jsonl"):
        file.write_text("")
    done = _write(script, tmp_path, text)
    assert done.exit_code == 2 and "have no rows in common" in done.stderr


def test_the_pairs_of_the_project_are_those_of_its_data(script, repo) -> None:
    """The runs of an earlier sweep have the names of the study's."""
    data = repo / "docs" / "data"

    def column(file: str, *keys: str) -> list[tuple[str, ...]]:
        with open(data / file, newline="") as lines:
            return [tuple(row[key] for key in keys) for row in csv.DictReader(lines)]

    models, pairs = script.read_pairs(data / "paired-differences.toml")
    stated = [(pair.model, pair.run, pair.baseline, part) for pair in pairs for part in pair.parts]
    assert stated == column("paired-differences.csv", "model", "run", "baseline", "part")
    for run_dir, run in {run for pair in pairs for run in (*pair.runs, *pair.baselines)}:
        table = "fp8" if run_dir.endswith("fp8") else "study"
        assert (run,) in column(f"{models[run_dir]}-{table}.csv", "run"), (run_dir, run)
