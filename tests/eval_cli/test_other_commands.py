"""The commands compare, show and plot: exit codes, files and messages."""

import csv
import json
from pathlib import Path

import pytest

from tests.eval_cli.runs import Evaluate, one_sentence, row, save, save_run


def test_runs_are_compared_by_path_or_by_name(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "vanilla", ["yes", "yes", "no"])
    sparse = save_run(tmp_path, "h2o", ["yes", "no", "no"])
    done = evaluate("compare", "m/vanilla", sparse)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "LongBench: h2o against vanilla"
    assert [line.split() for line in lines[3:5]] == [
        "vanilla 66.67* - 10.0% 50.0".split(), "h2o 33.33 -33.3 10.0% 50.0".split()]  # fmt: skip
    detailed = evaluate("compare", "m/vanilla", sparse, "--per_dataset").stdout.splitlines()
    assert "qasper 3 66.67* 33.33 -33.3 - 0 1 1 10.0%".split() in [line.split() for line in detailed]
    titled = evaluate("compare", "m/vanilla", "m/h2o", "--title", "A title", "--label", "m/h2o=H2O, 10 %").stdout
    assert titled.startswith("A title\n") and "\nH2O, 10 %  33.33 " in titled
    assert "--label 'h2o=x' is not RUN=TEXT" in one_sentence(evaluate("compare", "m/vanilla", "m/h2o", "--label=h2o=x"))
    assert evaluate("compare", "vanilla", "h2o", "--pred-dir=pred/m", "--seed", "0").stdout == done.stdout
    three = evaluate("compare", "m/vanilla", "m/h2o", "m/vanilla")
    assert "h2o, vanilla (3) against vanilla (1)" in three.stdout and three.returncode == 0


def test_compare_needs_two_runs(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    assert "compare takes two runs or more, the reference first, not m/a." in one_sentence(evaluate("compare", "m/a"))
    assert "not none. To score a folder named compare, use ./compare." in one_sentence(evaluate("compare"))
    missing = one_sentence(evaluate("compare", "m/a", "m/b"))
    assert "There is no run 'm/b': neither that folder nor pred/m/b exists." in missing
    assert missing.endswith("(pred holds: m/a).\n")


@pytest.mark.parametrize("pattern", ["m/h2o-*", "pred/m/h2o-?"])
def test_a_pattern_in_quotes_is_explained(evaluate: Evaluate, tmp_path: Path, pattern: str) -> None:
    save_run(tmp_path, "h2o-1", ["yes"])
    advice = f"give paths that the shell expands, without quotes: pred/m/h2o-{pattern[-1]}.\n"
    assert one_sentence(evaluate("plot", "m/h2o-1", pattern, "--kind=time", "--out=a.svg")).endswith(advice)


@pytest.mark.parametrize("command", ["score", "compare"])
def test_tables_are_printed_in_every_format(evaluate: Evaluate, tmp_path: Path, command: str) -> None:
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
    assert f"| {'qasper' if command == 'score' else 'a'} |" in found["markdown"].stdout
    assert found["latex"].stdout.count(r"\toprule") == (2 if command == "score" else 1)
    assert found["csv"].stderr and ("Written: " in found["json"].stderr) == (command == "score")
    assert not any("Written" in done.stdout for done in found.values())


def test_rows_are_shown(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "old", ["yes", "yes", "yes"])
    save_run(tmp_path, "new", ["yes", "no \x1b[31m", "yes"])
    done = evaluate("show", "m/new", "--rows", "1", "--dataset", "qasper")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "pred/m/new: 3 rows, worst first; 1 shown",
        "",
        "qasper 1, score 0.00, length 5000, kept 10.0%",
        "  prediction  no \\x1b[31m",
        "  answers     yes",
    ]
    changed = evaluate("show", "m/new", "--changed-from", "m/old")
    assert changed.stdout.startswith("pred/m/new: 1 rows, text differs from old, greatest loss first\n")
    assert "There is no dataset 'lcc'" in one_sentence(evaluate("show", "m/new", "--dataset", "lcc"))
    save(tmp_path / "twice", "qasper", [row(0), row(0)])
    assert evaluate("show", "twice").returncode == 0  # what cannot be scored can be looked at


def test_html_reports_are_written(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, preds in (("old", ["yes", "yes"]), ("new", ["yes", "no"])):
        save_run(tmp_path, name, preds)
    commands = {
        "compare": (["compare", "m/old", "m/new"], 0, "<h1>LongBench: new against old</h1>"),
        "score": (["m/old", "m/new"], 0, "<h1>LongBench: scores of old, new</h1>"),
        "gate": (["gate", "m/new", "--baseline", "m/old"], 1, "<h1>Failed: 1 of 1 checks</h1>"),
    }
    for kind, (arguments, code, heading) in commands.items():
        done = evaluate(*arguments, "--html", f"{kind}.html")
        assert done.returncode == code and done.stderr == f"Written: {kind}.html\n"
        assert done.stdout.count("\n") > 1
        page = (tmp_path / f"{kind}.html").read_text(encoding="utf-8")
        assert heading in page and page.count("<svg") == {"compare": 3, "score": 4, "gate": 0}[kind]
    saving = evaluate("gate", "m/old", "--save_baseline", "base.json", "--html", "a.html")
    assert "--html needs --baseline to report on." in one_sentence(saving)
    before = (tmp_path / "base.json").read_text() if (tmp_path / "base.json").exists() else None
    overwriting = evaluate("gate", "m/old", "--baseline", "m/new", "--html", "base.json")
    assert overwriting.returncode == 2 and "base.json must end in .html or .htm" in overwriting.stderr
    assert before is None or (tmp_path / "base.json").read_text() == before
    (tmp_path / "file").write_text("")
    below = evaluate("compare", "m/old", "m/new", "--html", "file/a.html")
    assert below.returncode == 2 and "file/a.html cannot be written" in below.stderr and "Traceback" not in below.stderr
    refused = evaluate("compare", "m/old", "m/new", "--html", "missing/a.html")
    assert refused.returncode == 2 and "missing/a.html cannot be written: No such file" in refused.stderr


def test_plots_are_files_with_a_caption(evaluate: Evaluate, tmp_path: Path) -> None:
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
            "Score by dataset of old, new; lines are 95% intervals (1.96 standard errors), where there are 20 rows or "
            "more.",
            "Compared on the 2 rows that all runs have (same dataset and _id). Left out: 1 of 3 rows of old.",
            "INCOMPLETE: new. Score each run separately to see the missing rows.",
            f"Written: {name}",
        ]
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1
    assert evaluate("plot", "m/old", "--kind=time", "--out=c.PDF").returncode == 0
    assert (tmp_path / "c.PDF").read_bytes().startswith(b"%PDF")


def test_impossible_plots_are_refused_before_scoring(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    no_run = ["plot", "m/missing", "--kind", "bars", "--out"]
    assert "a.jpg has no suffix of an image format" in one_sentence(evaluate(*no_run, "a.jpg"))
    assert "There is no run 'm/missing'" in one_sentence(evaluate(*no_run, "a.svg"))
    assert "Only LongBench-E has length buckets." in one_sentence(
        evaluate("plot", "m/a", "--kind", "buckets", "--out", "a.svg")
    )
    pie = evaluate("plot", "m/a", "--kind", "pie").stderr
    assert "'pie' is not one of 'bars', 'buckets', 'frontier', 'methods', 'time'" in pie
    assert not list(tmp_path.glob("a.*"))


def test_only_plots_need_matplotlib(evaluate_process: Evaluate, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_run(tmp_path, name, ["yes", "no"])
    guard = tmp_path / "guard" / "matplotlib"
    guard.mkdir(parents=True)
    (guard / "__init__.py").write_text("raise ImportError('none here')\n")
    without = {"path": (tmp_path / "guard",)}
    for arguments in (["m/a"], ["compare", "m/a", "m/b"], ["show", "m/a"]):
        assert evaluate_process(*arguments, **without).returncode == 0
    gate = evaluate_process("gate", "m/a", "--baseline", "m/b", "--html", "gate.html", **without)
    assert gate.returncode == 0 and (tmp_path / "gate.html").exists()
    (tmp_path / "pred" / "m" / "a" / "result.json").unlink()
    report = ["--html", "a.html"]
    for arguments in (["m/a", *report], ["compare", "m/a", "x", *report], ["plot", "x", "--kind=bars", "--out=a.svg"]):
        told = one_sentence(evaluate_process(*arguments, **without))
        assert "need matplotlib, which cannot be imported (none here). Install it: python -m pip install" in told
    assert not (tmp_path / "pred" / "m" / "a" / "result.json").exists()
