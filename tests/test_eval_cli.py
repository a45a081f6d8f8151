"""longbench_eval.py as it is typed: exit codes, files, messages, and what it must not import."""

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Evaluate = Callable[..., CompletedProcess[str]]


@pytest.fixture
def evaluate(run_python: Callable[..., CompletedProcess[str]], repo: Path, tmp_path: Path) -> Evaluate:
    """Runs longbench_eval.py in an empty working folder."""

    def run(*arguments: str | Path, **options: Any) -> CompletedProcess[str]:
        return run_python(repo / "longbench_eval.py", *arguments, cwd=tmp_path, **options)

    return run


def row(number: int, pred: str = "yes", **more: Any) -> dict[str, Any]:
    return {"pred": pred, "answers": ["yes"], "all_classes": None, "length": 5000, "_id": str(number), **more}


def save(folder: Path, stem: str, rows: list[dict[str, Any]], expected: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    record = {"datasets": {stem: {"expected_rows": len(rows) if expected is None else expected}}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def one_sentence(done: CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_complete_run_exits_with_0_and_leaves_both_files(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "pred" / "m" / "n", "qasper", [row(0), row(1, "no")])
    done = evaluate("--model", "m", "--name", "n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()][3] == ["qasper", "50.00", "50.0", "2", "2"]
    assert "Written: pred/m/n/result.json, pred/m/n/summary.json\n" in done.stdout
    assert json.loads((folder / "result.json").read_text()) == {"qasper": 50.0}
    assert json.loads((folder / "summary.json").read_text())["complete"] is True


def test_what_a_sparse_method_kept_is_shown_and_written(evaluate: Evaluate, tmp_path: Path) -> None:
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
def test_what_to_score_is_named_in_one_way(evaluate: Evaluate, arguments: list[str]) -> None:
    assert "either --model and --name, or the paths of prediction folders" in one_sentence(evaluate(*arguments))


def test_what_cannot_be_scored_is_one_sentence_and_exit_code_2(evaluate: Evaluate, tmp_path: Path) -> None:
    assert "There is no folder pred/m/n." in one_sentence(evaluate("--model", "m", "--name", "n"))
    assert "no <dataset>.jsonl file" in one_sentence(evaluate(tmp_path))
    unknown = save(tmp_path / "unknown", "qaspar", [row(0)])
    assert "no known dataset: qaspar.jsonl" in one_sentence(evaluate(unknown))
    repeated = save(tmp_path / "repeated", "qasper", [row(0), row(0)])
    assert "--allow_duplicates" in one_sentence(evaluate(repeated))
    half = save(tmp_path / "half", "qasper", [row(0)])
    (half / "qasper.jsonl").write_text('{"pred": "ye')
    assert "qasper.jsonl, line 1: line contains invalid json" in one_sentence(evaluate(half))
    record = save(tmp_path / "record", "qasper", [row(0)])
    (record / "run.json").write_text("{")
    assert "run.json is not valid JSON" in one_sentence(evaluate(record))
    assert evaluate(half, "--no_such_option").returncode == 2


def test_scores_are_shown_even_where_they_cannot_be_written(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "qasper", [row(0)])
    (folder / "result.json").mkdir()
    done = evaluate(folder)
    assert done.returncode == 2
    assert "100.00" in done.stdout
    assert "result.json cannot be written: Is a directory" in done.stderr


def test_real_predictions_of_elsewhere(evaluate: Evaluate, fixtures_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quest"
    source = fixtures_dir / "pred" / "llama2-7b-chat-quest-1024"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    done = evaluate(folder)
    expected = json.loads((fixtures_dir / "expected_official.json").read_bytes())
    assert json.loads((folder / "result.json").read_text()) == expected["pred/llama2-7b-chat-quest-1024"]
    assert done.returncode == 1
    assert "Warning: every dataset: 10 rows have no _id" in done.stdout


def test_no_command_imports_torch(evaluate: Evaluate, tmp_path: Path) -> None:
    guard = tmp_path / "guard"
    for name in ("torch", "transformers", "datasets"):
        (guard / name).mkdir(parents=True)
        (guard / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
    folder = save(tmp_path / "run", "lcc", [row(0)])
    save(folder, "vcsum", [row(0, "会议")])
    (folder / "run.json").unlink()
    scoring = [folder, "--allow_partial", "--rouge_score", "--edit_backend", "fuzzywuzzy"]
    gating = ["gate", folder, "--baseline", folder, "--allow_partial", "--allow_unlike"]
    report = ["compare", folder, folder, "--html", tmp_path / "report.html"]
    drawing = ["plot", folder, "--kind", "bars", "--out", tmp_path / "a.svg"]
    for arguments in (["--help"], scoring, report, drawing, gating, ["show", folder]):
        done = evaluate(*arguments, path=(guard,))
        assert done.returncode == 0, done.stdout + done.stderr


def test_help_comes_in_under_half_a_second(evaluate: Evaluate) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = evaluate("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "--allow_partial" in done.stdout
    assert min(seconds) < 0.5


# The commands beside score


def save_run(tmp_path: Path, name: str, preds: list[str], **more: Any) -> Path:
    """A run of qasper as longbench_pred.py records it, with a tenth of the past tokens kept."""
    rows = [row(at, pred, kept=0.1, prompt_sha256=f"{at:064}", **more) for at, pred in enumerate(preds)]
    folder = save(tmp_path / "pred" / "m" / name, "qasper", rows)
    record = json.loads((folder / "run.json").read_text())
    same = {key: {"qasper": key} for key in ("templates", "protocol", "data")}
    record["identity"] = {"checkpoint": "abc", "method": name, "options": {}, "dtype": "float32", **same}
    clock = {"prefill_s": 1, "prefill_tokens": 9, "decode_s": 2, "decode_tokens": 100, "peak_gpu_bytes": None}
    record["sessions"] = [{"id": "1-host", "device": "cpu", "gpu": None, "batch_size": 1, "clock": clock}]
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_runs_are_compared_by_path_or_by_name(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "vanilla", ["yes", "yes", "no"])
    sparse = save_run(tmp_path, "h2o", ["yes", "no", "no"])
    done = evaluate("compare", "m/vanilla", sparse)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "h2o against vanilla"
    assert lines[4].split() == "qasper 3 66.67* 33.33 -33.3 -100.0 to 0.0 0 1 1 10.0%".split()
    assert evaluate("compare", "vanilla", "h2o", "--pred-dir=pred/m", "--seed", "0").stdout == done.stdout
    three = evaluate("compare", "m/vanilla", "m/h2o", "m/vanilla")
    assert "h2o against vanilla (1)" in three.stdout and three.returncode == 0


def test_compare_says_what_it_needs(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    assert "compare takes two runs or more, the one to compare with first, not m/a." in one_sentence(
        evaluate("compare", "m/a")
    )
    assert "not none. To score a folder that is named compare, give ./compare." in one_sentence(evaluate("compare"))
    missing = one_sentence(evaluate("compare", "m/a", "m/b"))
    assert "There is no run 'm/b': neither a folder of that path nor pred/m/b." in missing
    assert "(pred holds: m/a)" in missing


@pytest.mark.parametrize("command", ["score", "compare"])
def test_tables_come_in_every_format(evaluate: Evaluate, tmp_path: Path, command: str) -> None:
    runs = [save_run(tmp_path, name, ["yes", "no"]) for name in ("a", "b")]
    start = ([] if command == "score" else [command]) + [str(run) for run in runs]
    found = {format: evaluate(*start, "--format", format) for format in ("markdown", "csv", "latex", "json")}
    assert [done.returncode for done in found.values()] == [0, 0, 0, 0]
    assert all("Traceback" not in done.stderr for done in found.values())
    rows = json.loads(found["json"].stdout)["rows"]
    lines = list(csv.DictReader(found["csv"].stdout.splitlines()))
    assert [line["name"] for line in lines] == [line["name"] for line in rows]
    assert [float(line["score"]) for line in lines] == [line["score"] for line in rows]
    assert {(line["kind"], line["name"], line["score"]) for line in rows if line["kind"] == "dataset"} == {
        ("dataset", "qasper", 50.0)
    }
    assert "| qasper |" in found["markdown"].stdout and "\n### " in found["markdown"].stdout
    assert found["latex"].stdout.count(r"\toprule") == 2
    assert found["csv"].stderr and ("Written: " in found["json"].stderr) == (command == "score")
    assert not any("Written" in done.stdout for done in found.values())


def test_a_gate_passes_fails_and_saves(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, preds in (("good", ["yes"] * 4), ("bad", ["yes", "yes", "yes", "no"])):
        save_run(tmp_path, name, preds)
    done = evaluate("gate", "m/good", "--save-baseline", "base.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Written: base.json\n", "")
    before = (tmp_path / "base.json").read_bytes()
    done = evaluate("gate", "m/bad", "--baseline", "base.json", "--save_baseline", "base.json")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "pred/m/bad (bad) against base.json (good)",
        "FAILED  mean of 1 datasets: 75.00, baseline 100.00, down 25.00, allowed 1: 24 too much (95% interval of the "
        "change: -75.00 to 0.00); most in qasper 25.00",
        "FAILED: 1 of 1 checks.",
        "Not written: base.json",
    ]
    assert (tmp_path / "base.json").read_bytes() == before
    limits = ["--max_drop", "25", "--max-drop-dataset", "25", "--max-kept", "0.1", "--min-speedup", "1"]
    for baseline in ("base.json", "m/good", tmp_path / "pred" / "m" / "good"):
        done = evaluate("gate", "m/bad", "--baseline", baseline, *limits)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line[:6] for line in done.stdout.splitlines()[1:]] == ["passed"] * 4 + ["Passed"]
    assert evaluate("gate", "m/bad", "--baseline", "m/good", *limits[:-1], "1.01").returncode == 1
    assert evaluate("gate", "m/good", "--baseline", "m/bad", "--save_baseline", "base.json").returncode == 0
    assert json.loads((tmp_path / "base.json").read_text())["name"] == "pred/m/good"


def test_a_gate_without_an_answer_exits_with_2(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    other = save_run(tmp_path, "b", ["yes"])
    (other / "run.json").write_text(
        (other / "run.json").read_text().replace('"checkpoint": "abc"', '"checkpoint": "d"')
    )
    assert "Give --baseline (a run, or a saved file), or --save_baseline" in one_sentence(evaluate("gate", "m/a"))
    assert "the checkpoint (d, baseline abc)" in one_sentence(evaluate("gate", "m/b", "--baseline", "m/a"))
    assert "There is no run 'base.json'" in one_sentence(evaluate("gate", "m/b", "--baseline", "base.json"))
    assert "--max_drop nan is no limit" in one_sentence(
        evaluate("gate", "m/a", "--baseline", "m/a", "--max_drop", "nan")
    )
    allowed = evaluate("gate", "m/b", "--baseline", "m/a", "--allow_unlike")
    assert (allowed.returncode, allowed.stderr) == (0, "Warning: unlike: the checkpoint (d, baseline abc).\n")
    save(other, "qasper", [row(0, error="x", pred="")])
    (other / "run.json").write_text((tmp_path / "pred" / "m" / "a" / "run.json").read_text())
    assert "b is not whole (qasper 0 of 1 rows, 1 failed)" in one_sentence(evaluate("gate", "m/b", "--baseline", "m/a"))


def test_rows_are_shown(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "old", ["yes", "yes", "yes"])
    save_run(tmp_path, "new", ["yes", "no \x1b[31m", "yes"])
    done = evaluate("show", "m/new", "--rows", "1", "--dataset", "qasper")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "pred/m/new: 3 rows, worst first; 1 of them",
        "",
        "qasper 1, score 0.00, length 5000, kept 10.0%",
        "  prediction  no \\x1b[31m",
        "  answers     yes",
    ]
    changed = evaluate("show", "m/new", "--changed-from", "m/old")
    assert changed.stdout.startswith("pred/m/new: 1 rows, those whose text differs from old, greatest loss first\n")
    assert "There is no dataset 'lcc'" in one_sentence(evaluate("show", "m/new", "--dataset", "lcc"))
    save(tmp_path / "twice", "qasper", [row(0), row(0)])
    assert evaluate("show", "twice").returncode == 0  # what cannot be scored can be looked at


def test_a_report_is_written_beside_the_tables(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, preds in (("old", ["yes", "yes"]), ("new", ["yes", "no"])):
        save_run(tmp_path, name, preds)
    commands = {
        "compare": (["compare", "m/old", "m/new"], 0, "<h1>new against old</h1>"),
        "score": (["m/old", "m/new"], 0, "<h1>Scores of old, new</h1>"),
        "gate": (["gate", "m/new", "--baseline", "m/old"], 1, "<h1>Failed: 1 of 1 checks</h1>"),
    }
    for kind, (arguments, code, heading) in commands.items():
        done = evaluate(*arguments, "--html", f"{kind}.html")
        assert done.returncode == code and done.stderr == f"Written: {kind}.html\n"
        assert done.stdout.count("\n") > 1
        page = (tmp_path / f"{kind}.html").read_text(encoding="utf-8")
        assert heading in page and page.count("<svg") == {"compare": 3, "score": 4, "gate": 0}[kind]
    saving = evaluate("gate", "m/old", "--save_baseline", "base.json", "--html", "a.html")
    assert "--html writes a verdict, for which --baseline is missing." in one_sentence(saving)
    before = (tmp_path / "base.json").read_text() if (tmp_path / "base.json").exists() else None
    overwriting = evaluate("gate", "m/old", "--baseline", "m/new", "--html", "base.json")
    assert overwriting.returncode == 2 and "base.json must end in .html or .htm" in overwriting.stderr
    assert before is None or (tmp_path / "base.json").read_text() == before
    (tmp_path / "file").write_text("")
    below = evaluate("compare", "m/old", "m/new", "--html", "file/a.html")
    assert below.returncode == 2 and "file/a.html cannot be written" in below.stderr and "Traceback" not in below.stderr
    refused = evaluate("compare", "m/old", "m/new", "--html", "missing/a.html")
    assert refused.returncode == 2 and "missing/a.html cannot be written: No such file" in refused.stderr


def test_pictures_are_files_with_a_caption(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "old", ["yes", "yes", "yes"])
    part = save_run(tmp_path, "new", ["yes", "no"])
    record = json.loads((part / "run.json").read_text())
    record["datasets"]["qasper"]["expected_rows"] = 9
    (part / "run.json").write_text(json.dumps(record))
    contents = set()
    for name in ("a.svg", "b.svg"):
        done = evaluate("plot", "m/old", "m/new", "--kind", "bars", "--out", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "Score by dataset of old, new; lines are 95% intervals (1.96 standard errors).",
            "Compared on the 2 rows that all runs have (same dataset, same _id); left out: 1 of 3 rows of old.",
            "INCOMPLETE: new; score them alone to see what is missing.",
            f"Written: {name}",
        ]
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1
    assert evaluate("plot", "m/old", "--kind=time", "--out=c.PDF").returncode == 0
    assert (tmp_path / "c.PDF").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_said_before_anything_is_scored(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    no_run = ["plot", "m/missing", "--kind", "bars", "--out"]
    assert "a.jpg is no file name for a picture" in one_sentence(evaluate(*no_run, "a.jpg"))
    assert "There is no run 'm/missing'" in one_sentence(evaluate(*no_run, "a.svg"))
    assert "Length buckets are LongBench-E's." in one_sentence(
        evaluate("plot", "m/a", "--kind", "buckets", "--out", "a.svg")
    )
    assert (
        "'pie' is not one of 'bars', 'buckets', 'frontier', 'time'" in evaluate("plot", "m/a", "--kind", "pie").stderr
    )
    assert not list(tmp_path.glob("a.*"))


def test_tables_need_no_matplotlib_and_pictures_say_that_they_do(evaluate: Evaluate, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_run(tmp_path, name, ["yes", "no"])
    guard = tmp_path / "guard" / "matplotlib"
    guard.mkdir(parents=True)
    (guard / "__init__.py").write_text("raise ImportError('none here')\n")
    without = {"path": (tmp_path / "guard",)}
    for arguments in (["m/a"], ["compare", "m/a", "m/b"], ["show", "m/a"]):
        assert evaluate(*arguments, **without).returncode == 0
    gate = evaluate("gate", "m/a", "--baseline", "m/b", "--html", "gate.html", **without)
    assert gate.returncode == 0 and (tmp_path / "gate.html").exists()
    (tmp_path / "pred" / "m" / "a" / "result.json").unlink()
    report = ["--html", "a.html"]
    for arguments in (["m/a", *report], ["compare", "m/a", "x", *report], ["plot", "x", "--kind=bars", "--out=a.svg"]):
        told = one_sentence(evaluate(*arguments, **without))
        assert "need matplotlib, which cannot be imported (none here). Install it: python -m pip install" in told
    assert not (tmp_path / "pred" / "m" / "a" / "result.json").exists()


def test_a_command_is_told_from_a_folder(evaluate: Evaluate, tmp_path: Path) -> None:
    for name in ("compare", "shwo", "m/n"):
        save(tmp_path / name, "qasper", [row(0)])
    assert "did you mean 'gate'? Commands: score, compare, plot, gate, show." in one_sentence(evaluate("gaet", "shwo"))
    assert evaluate("shwo").returncode == evaluate("score", "shwo").returncode == evaluate("./compare").returncode == 0
    assert evaluate("m/n", "compare", "--e").returncode == 2
    assert "There is no run 'diff': neither a folder" in one_sentence(evaluate("diff", "shwo"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m").rename(tmp_path / "elsewhere" / "m")
    assert evaluate("m/n", "--pred_dir", "elsewhere").returncode == 0


def test_every_command_explains_itself(evaluate: Evaluate) -> None:
    text = evaluate("--help").stdout
    for command in ("score", "compare", "plot", "gate", "show"):
        assert f"\n  {command} " in text
        done = evaluate(command, "--help")
        assert done.returncode == 0 and "Exit code: 0" in done.stdout
    assert evaluate("compare", "--no_such_option").returncode == 2
