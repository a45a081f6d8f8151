"""All commands: imports, help, and the distinction from folders."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import click
from click.testing import CliRunner

from longbench_eval import main
from longbench_pred import main as predict
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


def test_help_has_groups_that_hold_every_option_once() -> None:
    for command in (predict, *main.commands.values()):
        text = CliRunner().invoke(command, ["--help"]).stdout
        for heading, names in command.groups.items():
            known = [name for name in names if name in {parameter.name for parameter in command.params}]
            assert (f"\n{heading}:\n" in text) == bool(known)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert len(re.findall(rf"^  {re.escape(parameter.opts[0])}\b", text, re.MULTILINE)) == 1, parameter.name
    commands = (predict, *main.commands.values())
    named = {name for command in commands for group in command.groups.values() for name in group}
    assert named <= {parameter.name for command in commands for parameter in command.params}
    other = CliRunner().invoke(predict, ["--help"]).stdout.partition("\nOther options:\n")[2]
    assert other.split()[0] == "--help", "an option of longbench_pred.py is in no group"


def test_a_misspelled_option_names_the_right_one() -> None:
    for command, arguments, meant in (
        (predict, ["--modle", "x"], "--model"),
        (main, ["compare", "--per_datset"], "--per_dataset"),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2 and re.search(rf"Did you mean .*'{meant}'", done.stderr)
