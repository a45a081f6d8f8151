"""Runs longbench_eval.py in this process, or in a process of its own."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from click.testing import CliRunner

from longbench_eval import main
from tests.eval_cli.runs import Evaluate

TIMEOUT_S = 120


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Evaluate]:
    """Run a command in this process, in an empty working folder. Fails after TIMEOUT_S seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def stop(*_: Any) -> None:
        raise AssertionError(f"the test took more than {TIMEOUT_S} s")

    def run(*arguments: str | Path, charset: str = "utf-8") -> CompletedProcess[str]:
        command = [str(argument) for argument in arguments]
        result = CliRunner(charset=charset).invoke(main, command, prog_name="longbench_eval.py")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CompletedProcess(command, result.exit_code, result.stdout, result.stderr)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT_S)
    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def evaluate_process(run_python: Callable[..., CompletedProcess[str]], repo: Path, tmp_path: Path) -> Evaluate:
    """Run a command in a new process, in an empty working folder."""

    def run(*arguments: str | Path, **options: Any) -> CompletedProcess[str]:
        return run_python(repo / "longbench_eval.py", *arguments, cwd=tmp_path, **options)

    return run
