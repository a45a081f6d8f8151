"""The tables of a study, against the scorer's own comparison."""

import csv
import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from sparsecache.longbench.compare import compare
from sparsecache.longbench.scores import score_run

DATASETS = {"qasper": 7, "hotpotqa": 6, "dureader": 5, "lcc": 4}


@pytest.fixture(scope="module")
def study(load_script) -> ModuleType:
    return load_script("study")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs with random answers of four datasets."""
    draw = random.Random(4)
    for name in ("a-sparse", "vanilla"):
        folder = tmp_path / "pred" / "model" / name
        folder.mkdir(parents=True)
        for stem, count in DATASETS.items():
            rows = [
                {
                    "pred": draw.choice(["red fox", "blue", "a red fox ran", ""]), "answers": ["red fox"],
                    "all_classes": None, "length": 10, "_id": f"{stem}{at}",
                }
                for at in range(count)
            ]  # fmt: skip
            (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected = {stem: {"expected_rows": count} for stem, count in DATASETS.items()}
        (folder / "run.json").write_text(json.dumps({"datasets": expected}))
    return [tmp_path / "pred/model/vanilla", tmp_path / "pred/model/a-sparse"]


def test_the_part_of_all_datasets_is_what_compare_gives(study, runs) -> None:
    record = study.study(runs)[1]
    means = {group.name: group for group in compare([score_run(run) for run in runs]).groups}
    entry = means["flat_mean"].entries[1]
    assert record["all"] == pytest.approx(entry.score, abs=0.01)  # the official scores are rounded
    assert record["all_difference"] == pytest.approx(entry.difference.mean)
    assert (record["all_low"], record["all_high"]) == pytest.approx(entry.difference.interval)


def test_runs_of_a_stopped_sweep_are_left_out(study, runs) -> None:
    empty = runs[0].parent / "waiting"
    shutil.copytree(runs[1], empty, ignore=lambda folder, names: [name for name in names if name.endswith("jsonl")])
    (empty / "qasper.jsonl").touch()
    done = CliRunner().invoke(study.main, [str(runs[0].parent)])
    assert done.exit_code == 0, done.output
    assert [row["run"] for row in csv.DictReader(done.stdout.splitlines())] == ["vanilla", "a-sparse"]
    assert "the first run" not in done.stderr
    assert f"{runs[0].parent}: left out, without predictions: waiting\n" in done.stderr


def test_a_folder_without_the_baseline_is_refused(study, runs) -> None:
    """Another run must not take its place."""
    for file in runs[0].glob("*.jsonl"):
        file.unlink()
    shutil.copytree(runs[1], runs[0].parent / "b-sparse")
    done = CliRunner().invoke(study.main, [str(runs[0].parent)])
    assert done.exit_code == 2 and "has no run vanilla with predictions, the baseline" in done.stderr


def test_a_path_without_a_run_is_refused(study, runs, tmp_path) -> None:
    done = CliRunner().invoke(study.main, [str(runs[0]), str(runs[1]), str(tmp_path / "mistyped")])
    assert done.exit_code == 2 and "There is no run" in done.stderr and "mistyped" in done.stderr
    (tmp_path / "mistyped").mkdir()
    done = CliRunner().invoke(study.main, [str(runs[0]), str(runs[1]), str(tmp_path / "mistyped")])
    assert done.exit_code == 2 and "mistyped is no run and holds none" in done.stderr


def test_runs_are_found_below_pred_dir_by_name(study, runs) -> None:
    pred_dir, model = runs[0].parent.parent, runs[0].parent.name
    by_name = [f"{model}/{run.name}" for run in runs]
    for names in ([model], by_name):
        done = CliRunner().invoke(study.main, [*names, "--pred_dir", str(pred_dir)])
        assert done.exit_code == 0 and len(done.stdout.splitlines()) == 3, done.output


def test_different_checkpoints_are_noted(study, runs) -> None:
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"identity": {"checkpoint": run.name}}))
    done = CliRunner().invoke(study.main, [str(run) for run in runs])
    assert done.exit_code == 0 and "The runs are of different checkpoints" in done.stderr


def test_rows_that_a_stopped_run_lacks_are_noted(study, runs) -> None:
    lines = (runs[1] / "qasper.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "qasper.jsonl").write_text("".join(lines[:3]))
    done = CliRunner().invoke(study.main, [str(runs[0].parent)])
    assert done.exit_code == 0 and "Compared on the 18 rows that all runs have" in done.stderr
    assert "INCOMPLETE: a-sparse" in done.stderr


def test_runs_of_longbench_e_are_studied(study, runs) -> None:
    for run in runs:
        (run / "dureader.jsonl").unlink()
        for file in list(run.glob("*.jsonl")):
            file.rename(file.with_name(f"{file.stem}_e.jsonl"))
        record = json.loads((run / "run.json").read_text())["datasets"]
        del record["dureader"]
        (run / "run.json").write_text(json.dumps({"datasets": {f"{stem}_e": value for stem, value in record.items()}}))
    done = CliRunner().invoke(study.main, [str(runs[0].parent), "--e"])
    assert done.exit_code == 0, done.output
    assert [row["rows"] for row in csv.DictReader(done.stdout.splitlines())] == ["17", "17"]


def test_parts_are_means_over_their_datasets(study, runs) -> None:
    record = study.study(runs)[1]
    found = {dataset.task.name: [100 * row.score for row in dataset.rows] for dataset in score_run(runs[1]).datasets}
    mean = {name: sum(scores) / len(scores) for name, scores in found.items()}
    assert record["english"] == pytest.approx((mean["qasper"] + mean["hotpotqa"]) / 2)
    assert record["chinese"] == pytest.approx(mean["dureader"])
    assert record["code"] == pytest.approx(mean["lcc"])
    for half, start in (("even", 0), ("odd", 1)):
        halves = [found[name][start::2] for name in ("qasper", "hotpotqa", "dureader")]
        assert record[f"{half}_without_code"] == pytest.approx(sum(sum(each) / len(each) for each in halves) / 3)
    assert record["few_shot"] is None and record["few_shot_low"] is None


def test_command_puts_the_baseline_first_and_writes_every_form(study, runs, tmp_path) -> None:
    out, picture = tmp_path / "study.csv", tmp_path / "study.svg"
    arguments = [str(runs[0].parent), "--out", str(out), "--markdown", "--plot", str(picture), "--label", "a-sparse=S"]
    done = CliRunner().invoke(study.main, arguments)
    assert done.exit_code == 0, done.output
    assert [row["run"] for row in csv.DictReader(out.open())] == ["vanilla", "S"]
    assert done.stdout.count("\n") == 4 and "`S`" in done.stdout
    assert picture.read_text().startswith("<?xml") and "Differences to the full cache" in picture.read_text()
    assert "Too few rows for reliable intervals" in done.stderr


def test_vanilla_is_the_baseline_of_listed_runs_and_else_the_first_run(study, runs, tmp_path) -> None:
    """As the shell lists them: by name."""
    done = CliRunner().invoke(study.main, [str(run) for run in reversed(runs)])
    assert [row["run"] for row in csv.DictReader(done.stdout.splitlines())] == ["vanilla", "a-sparse"]
    assert "the first run" not in done.stderr
    other, picture = runs[1].with_name("b-sparse"), tmp_path / "study.svg"
    shutil.copytree(runs[1], other)
    done = CliRunner().invoke(study.main, [str(other), str(runs[1]), "--plot", str(picture)])
    assert done.exit_code == 0 and "Differences to b-sparse" in picture.read_text()
    assert "Differences are to b-sparse, the first run." in done.stderr


def test_budgets_have_a_line_per_method_and_options(study, runs, tmp_path) -> None:
    folder = runs[0].parent
    budgets = {"quest-budget=64": 64.0, "quest-budget=0.05": 0.05, "quest-page=4-budget=64": 64.0, "my-quest": 256.0}
    named = {**budgets, "own-budget=auto": "auto"}  # an own method's budget that is no number has no column
    for name, budget in named.items():
        shutil.copytree(runs[1], folder / name)
        record = json.loads((folder / name / "run.json").read_text())
        options = {"budget": budget, "page": 4 if "page" in name else 16, "removed_since": 0.5}
        record["identity"] = {"method": "quest", "options": options}
        (folder / name / "run.json").write_text(json.dumps(record))
        for file in (folder / name).glob("*.jsonl"):
            rows = [json.loads(line) | {"kept": 0.1} for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "budgets.svg"
    done = CliRunner().invoke(study.main, [str(folder), "--budgets", "--part", "chinese", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    difference = next(each for each in study.study(runs) if each["run"] == "a-sparse")["chinese_difference"]
    cell = f"{difference:+.1f}"
    assert done.stdout.splitlines() == [
        "| run | 64 tokens | 256 tokens | 5 % |",
        "| :--- | ---: | ---: | ---: |",
        f"| `quest` | {cell} | {cell} | {cell} |",
        f"| `quest-page=4` | {cell} |  |  |",
    ]
    assert picture.read_text().count("kept share of past tokens in sparse layers") == 2


def test_budgets_without_a_run_that_has_one_are_refused(study, runs, tmp_path) -> None:
    done = CliRunner().invoke(study.main, [str(runs[0].parent), "--budgets", "--plot", str(tmp_path / "budgets.svg")])
    assert done.exit_code == 2 and "No run has a budget" in done.output and not (tmp_path / "budgets.svg").exists()


@pytest.mark.parametrize(("option", "name"), [("--out", "file/study.csv"), ("--plot", "study.doc")])
def test_a_file_that_cannot_be_written_is_refused_before_scoring(
    study, runs, tmp_path, monkeypatch, option, name
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(study, "score_run", lambda *_: pytest.fail("scored"))
    done = CliRunner().invoke(study.main, [*map(str, runs), option, str(tmp_path / name)])
    assert done.exit_code == 2 and name.split("/")[0] in done.output


def _fail(run: Path, rows: int) -> None:
    for file in run.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        failed = [{**row, "pred": "", "error": "Odd: no"} for row in lines[:rows]]
        file.write_text("".join(json.dumps(row) + "\n" for row in (*failed, *lines[rows:])))


def test_failed_rows_are_told_and_failed_runs_left_out(study, runs) -> None:
    other = runs[1].with_name("b-sparse")
    shutil.copytree(runs[1], other)
    _fail(runs[1], 1)
    done = CliRunner().invoke(study.main, [str(runs[0].parent), "--markdown"])
    files = len([*runs[1].glob("*.jsonl")])
    assert done.exit_code == 0, done.output
    assert f"{files} of these rows failed in a-sparse and count 0.0." in done.stderr
    _fail(runs[1], 10**6)
    done = CliRunner().invoke(study.main, [str(runs[0].parent), "--markdown"])
    assert done.exit_code == 0 and f"Left out, since all rows failed: {runs[1]}." in done.stderr
    assert "a-sparse" not in done.stdout and "b-sparse" in done.stdout
    _fail(runs[0], 10**6)
    done = CliRunner().invoke(study.main, [str(runs[0].parent), "--markdown"])
    assert done.exit_code == 2 and "All rows failed in" in done.stderr


def test_a_part_without_a_dataset_is_refused(study, runs) -> None:
    done = CliRunner().invoke(study.main, [*map(str, runs), "--budgets", "--part", "synthetic"])
    assert done.exit_code == 2 and "No dataset of the runs belongs to the part synthetic" in done.stderr


def test_the_folder_of_a_file_is_made(study, runs, tmp_path) -> None:
    out = tmp_path / "new" / "study.csv"
    done = CliRunner().invoke(study.main, [*map(str, runs), "--out", str(out), "--part", "without_code"])
    assert done.exit_code == 0 and out.read_text().startswith("run,"), done.output


def test_a_single_run_is_refused(study, runs) -> None:
    done = CliRunner().invoke(study.main, [str(runs[0])])
    assert done.exit_code == 2 and "fewer than two runs" in done.output
