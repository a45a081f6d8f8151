"""The command gate, and predictions of other programs: exit codes, files and messages."""

import json
from pathlib import Path

from tests.eval_cli.runs import Evaluate, one_sentence, row, save, save_run


def test_gate_passes_fails_and_saves(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, preds in (("good", ["yes"] * 4), ("bad", ["yes", "yes", "yes", "no"])):
        save_run(tmp_path, name, preds)
    done = evaluate("gate", "m/good", "--save-baseline", "base.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Written: base.json\n", "")
    before = (tmp_path / "base.json").read_bytes()
    done = evaluate("gate", "m/bad", "--baseline", "base.json", "--save_baseline", "base.json")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "pred/m/bad (bad) against base.json (good)",
        "FAILED  mean of 1 datasets: 75.00, baseline 100.00, down 25.00, allowed drop 1: 24 over the limit; largest "
        "drops: qasper 25.00",
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


def test_gate_takes_several_runs_and_writes_reports_for_ci(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, wrong in (("good", 0), ("same", 0), ("bad", 10)):
        save_run(tmp_path, name, ["no"] * wrong + ["yes"] * (20 - wrong))
    reports = ["--junit", "gate.xml", "--markdown", "gate.md", "--html", "gate.html"]
    done = evaluate("gate", "m/same", "m/bad", "--baseline", "m/good", "--non_inferior", "1.0", *reports)
    assert done.returncode == 1 and done.stdout.endswith("\nFailed: 1 of 2 runs.\n")
    assert "\nFAILED  non-inferiority of the mean of 1 datasets: 50.00, baseline 100.00, 95% interval" in done.stdout
    assert "allowed drop" not in done.stdout  # the interval judges alone
    assert 'tests="2" failures="1"' in (tmp_path / "gate.xml").read_text()
    assert "## Gate: Failed: 1 of 2 runs" in (tmp_path / "gate.md").read_text()
    assert "<h1>Failed: 1 of 2 runs</h1>" in (tmp_path / "gate.html").read_text()
    one = evaluate("gate", "m/same", "--baseline", "m/good", "--non-inferior=1", "--max_drop=0")
    assert (one.returncode, one.stdout.count("passed  ")) == (0, 2)
    assert "--save_baseline takes one run, not 2" in one_sentence(
        evaluate("gate", "m/good", "m/bad", "--save_baseline", "base.json")
    )
    assert "run.json must end in .xml" in evaluate("gate", "m/bad", "--baseline=m/good", "--junit=run.json").stderr


def test_predictions_of_another_program_are_compared_gated_and_drawn(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, preds in (("full", ["yes", "yes"]), ("sparse", ["yes", "no"])):
        (tmp_path / name).mkdir()
        rows = [{"pred": pred, "answers": ["yes"], "all_classes": None, "length": at} for at, pred in enumerate(preds)]
        (tmp_path / name / "qasper.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    told = (
        "Rows without an `_id` were matched by their order, because number of rows, answers and lengths agree: qasper."
    )
    compared = evaluate("compare", "full", "sparse")
    assert compared.returncode == 0 and told in compared.stdout and "sparse   50.00" in compared.stdout
    gated = evaluate("gate", "sparse", "--baseline", "full", "--allow_unlike", "--allow_partial")
    assert gated.returncode == 1 and f"Warning: {told}\n" in gated.stderr and "down 50.00" in gated.stdout
    drawn = evaluate("plot", "full", "sparse", "--kind", "bars", "--out", "a.svg")
    assert drawn.returncode == 0 and told in drawn.stdout
    shown = evaluate("show", "sparse", "--changed_from", "full").stdout
    assert shown.startswith("sparse: 1 rows, text differs from full") and "\nqasper line 2 " in shown


def test_gate_exits_with_2_for_incomparable_runs(evaluate: Evaluate, tmp_path: Path) -> None:
    save_run(tmp_path, "a", ["yes"])
    other = save_run(tmp_path, "b", ["yes"])
    (other / "run.json").write_text(
        (other / "run.json").read_text().replace('"checkpoint": "abc"', '"checkpoint": "d"')
    )
    assert "Give --baseline (a run, or a saved file), or --save_baseline" in one_sentence(evaluate("gate", "m/a"))
    assert "the checkpoint's files. Predict" in one_sentence(evaluate("gate", "m/b", "--baseline", "m/a"))
    assert "There is no run 'base.json'" in one_sentence(evaluate("gate", "m/b", "--baseline", "base.json"))
    assert "--max_drop is nan; it must be a number" in one_sentence(
        evaluate("gate", "m/a", "--baseline", "m/a", "--max_drop", "nan")
    )
    allowed = evaluate("gate", "m/b", "--baseline", "m/a", "--allow_unlike")
    assert (allowed.returncode, allowed.stderr) == (
        0,
        "Warning: the checkpoint's files; allowed by --allow_unlike.\n",
    )
    save_run(tmp_path, "zero", ["no"])
    assert "pred/m/zero scores 0 in all compared rows" in one_sentence(evaluate("gate", "m/a", "--baseline", "m/zero"))
    save(other, "qasper", [row(0, error="x", pred="")])
    (other / "run.json").write_text((tmp_path / "pred" / "m" / "a" / "run.json").read_text())
    assert "b is incomplete (qasper 0 of 1 rows, 1 failed)" in one_sentence(
        evaluate("gate", "m/b", "--baseline", "m/a")
    )
