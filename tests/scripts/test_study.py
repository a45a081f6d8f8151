"""The tables of a study, against the scorer's own comparison."""

import csv
import json
import random
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
    assert done.output.count("\n") == 4 and "`S`" in done.output
    assert picture.read_text().startswith("<?xml")


def test_a_single_run_is_refused(study, runs) -> None:
    done = CliRunner().invoke(study.main, [str(runs[0])])
    assert done.exit_code == 2 and "fewer than two runs" in done.output
