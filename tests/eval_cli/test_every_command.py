"""All commands: imports, help, and the distinction from folders."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.eval_cli.runs import Evaluate, one_sentence, row, save

RUN_ALL = """
import json, sys
from longbench_eval import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


def test_no_command_imports_torch(run_python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
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
    commands = [["--help"], scoring, report, drawing, gating, ["show", folder]]
    done = run_python("-c", RUN_ALL, json.dumps(commands, default=str), path=(guard,))
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_takes_under_half_a_second(evaluate_process: Evaluate) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = evaluate_process("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "--allow_partial" in done.stdout
    assert min(seconds) < 0.5


def test_commands_and_folders_are_distinguished(evaluate: Evaluate, tmp_path: Path) -> None:
    for name in ("compare", "shwo", "m/n"):
        save(tmp_path / name, "qasper", [row(0)])
    assert "did you mean 'gate'? Commands: score, compare, plot, gate, show." in one_sentence(evaluate("gaet", "shwo"))
    assert evaluate("shwo").returncode == evaluate("score", "shwo").returncode == evaluate("./compare").returncode == 0
    assert evaluate("m/n", "compare", "--e").returncode == 2
    assert "There is no run 'diff': neither that folder" in one_sentence(evaluate("diff", "shwo"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m").rename(tmp_path / "elsewhere" / "m")
    assert evaluate("m/n", "--pred_dir", "elsewhere").returncode == 0


def test_every_command_has_help(evaluate: Evaluate) -> None:
    text = evaluate("--help").stdout
    for command in ("score", "compare", "plot", "gate", "show"):
        assert f"\n  {command} " in text
        done = evaluate(command, "--help")
        assert done.returncode == 0 and "Exit code: 0" in done.stdout
    assert evaluate("compare", "--no_such_option").returncode == 2
