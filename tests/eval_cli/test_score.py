"""The command score: exit codes, files and messages."""

import json
import shutil
from pathlib import Path

import pytest

from tests.eval_cli.runs import Evaluate, one_sentence, row, save


def test_a_complete_run_exits_with_0_and_writes_both_files(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "pred" / "m" / "n", "qasper", [row(0), row(1, "no")])
    done = evaluate("--model", "m", "--name", "n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()][3] == ["qasper", "50.00", "50.0", "2", "2"]
    assert "Written: pred/m/n/result.json, pred/m/n/summary.json\n" in done.stdout
    assert json.loads((folder / "result.json").read_text()) == {"qasper": 50.0}
    assert json.loads((folder / "summary.json").read_text())["complete"] is True


def test_the_kept_share_is_shown_and_written(evaluate: Evaluate, tmp_path: Path) -> None:
    sparse = {"sparse_steps": 9, "capped_steps": 9, "dense_layers": 2}
    folder = save(tmp_path / "run", "qasper", [row(0, kept=0.021, **sparse), row(1, kept=None, **sparse)])
    done = evaluate(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()][3] == ["qasper", "100.00", "0.0", "2", "2", "2.1%"]
    assert "Kept: mean share of past tokens attended to, over 18 sparse steps of 1 rows (1 more" in done.stdout
    assert json.loads((folder / "summary.json").read_text())["datasets"]["qasper"]["kept"] == 0.021
    assert json.loads((folder / "result.json").read_text()) == {"qasper": 100.0}


def test_a_partial_run_exits_with_1_unless_allowed(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "qasper", [row(0)], expected=3)
    done = evaluate(folder)
    assert done.returncode == 1
    assert "INCOMPLETE: qasper 1 of 3 rows." in done.stdout
    assert evaluate(folder, "--allow_partial").returncode == 0
    assert json.loads((folder / "summary.json").read_text())["complete"] is False


def test_error_rows_exit_with_1(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate(save(tmp_path / "run", "qasper", [row(0), row(1, "", error="x")])).returncode == 1


def test_several_folders_are_scored_one_by_one(evaluate: Evaluate, tmp_path: Path) -> None:
    folders = [save(tmp_path / name, "qasper", [row(0)], expected) for name, expected in (("a", 1), ("b", 2), ("c", 1))]
    done = evaluate(*folders)
    assert done.returncode == 1
    assert [done.stdout.count(f"{folder}\n") for folder in folders] == [1, 1, 1]
    assert all((folder / "summary.json").exists() for folder in folders)
    assert evaluate(folders[0], folders[2]).returncode == 0


def test_longbench_e_gives_buckets(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "trec_e", [row(0, all_classes=["yes"])])
    done = evaluate("--e", folder)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[5:] == ["0-4k", "n", "4-8k", "n", "8k+", "n"]
    assert done.stdout.splitlines()[3].split() == "trec_e 100.00 - 1 1 - 0 100.00 1 - 0".split()
    assert json.loads((folder / "result_e.json").read_text()) == {"trec": {"0-4k": None, "4-8k": 100.0, "8k+": None}}
    assert "add --e" in one_sentence(evaluate(folder))


def test_option_names_take_dashes_and_underscores(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "elsewhere" / "m" / "n-1", "qasper", [row(0), row(0)], expected=3)
    for dash in ("-", "_"):
        options = [f"--pred{dash}dir={tmp_path / 'elsewhere'}", f"--allow{dash}partial", f"--allow{dash}duplicates"]
        done = evaluate("--model", "m", "--name", "n-1", *options, f"--rouge{dash}score", f"--official{dash}recursion")
        assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["backends"]["official_recursion"] is True


def test_the_edit_backend_is_recorded(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "lcc", [row(0)])
    for name in ("difflib", "fuzzywuzzy"):
        assert evaluate(folder, "--edit_backend", name).returncode == 0
        assert json.loads((folder / "summary.json").read_text())["backends"]["edit_similarity"] == name
    wrong = evaluate(folder, "--edit_backend", "levenshtein")
    assert wrong.returncode == 2
    assert "'levenshtein' is not one of 'difflib', 'fuzzywuzzy'" in wrong.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["--model", "m"], ["--name", "n"], ["--model", "m", "--name", "n", "x"], ["x", "--name", "n"]]
)
def test_folders_and_model_exclude_each_other(evaluate: Evaluate, arguments: list[str]) -> None:
    assert "either --model and --name, or the paths of prediction folders" in one_sentence(evaluate(*arguments))


def test_unscorable_folders_exit_with_2(evaluate: Evaluate, tmp_path: Path) -> None:
    assert "There is no folder pred/m/n." in one_sentence(evaluate("--model", "m", "--name", "n"))
    assert "no <dataset>.jsonl file" in one_sentence(evaluate(tmp_path))
    unknown = save(tmp_path / "unknown", "qaspar", [row(0)])
    assert "unknown datasets: qaspar.jsonl" in one_sentence(evaluate(unknown))
    repeated = save(tmp_path / "repeated", "qasper", [row(0), row(0)])
    assert "--allow_duplicates" in one_sentence(evaluate(repeated))
    half = save(tmp_path / "half", "qasper", [row(0)])
    (half / "qasper.jsonl").write_text('{"pred": "ye')
    assert "qasper.jsonl, line 1: line contains invalid json" in one_sentence(evaluate(half))
    record = save(tmp_path / "record", "qasper", [row(0)])
    (record / "run.json").write_text("{")
    assert "run.json is not valid JSON" in one_sentence(evaluate(record))
    assert evaluate(half, "--no_such_option").returncode == 2


def test_scores_are_shown_even_if_they_cannot_be_written(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "qasper", [row(0)])
    (folder / "result.json").mkdir()
    done = evaluate(folder)
    assert done.returncode == 2
    assert "100.00" in done.stdout
    assert "result.json cannot be written: Is a directory" in done.stderr


def test_real_predictions_of_another_program(evaluate: Evaluate, fixtures_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quest"
    source = fixtures_dir / "pred" / "llama2-7b-chat-quest-1024"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    done = evaluate(folder)
    expected = json.loads((fixtures_dir / "expected_official.json").read_bytes())
    assert json.loads((folder / "result.json").read_text()) == expected["pred/llama2-7b-chat-quest-1024"]
    assert done.returncode == 1
    assert "Warning: every dataset: 10 rows have no _id" in done.stdout


def test_no_write_leaves_the_folder_as_it_is(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", "qasper", [row(0)])
    before = sorted(folder.iterdir())
    done = evaluate(folder, "--no_write")
    assert done.returncode == 0 and "qasper" in done.stdout and "Written" not in done.stdout + done.stderr
    assert sorted(folder.iterdir()) == before
