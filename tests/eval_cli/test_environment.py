"""System errors end in one sentence and exit code 2: special files, invalid names, broken stdout."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sparsecache.cli import FlexibleCommand
from tests.eval_cli.runs import Evaluate, one_sentence, row, save

FULL = Path("/dev/full")


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return tuple(
        save(tmp_path / name, "qasper", [row(0, "café \ud83d 请"), row(1, _id="\udcff")]) for name in ("a", "b")
    )


def commands(runs: tuple[Path, Path]) -> list[list[str | Path]]:
    return [
        ["score", runs[0]],
        ["score", runs[0], "--format", "json"],
        ["compare", *runs],
        ["compare", *runs, "--format", "csv"],
        ["gate", runs[0], "--baseline", runs[1], "--allow_unlike"],
        ["show", runs[0]],
        ["show", runs[0], "--changed_from", runs[1]],
        ["--help"],
        ["compare", "--help"],
    ]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_stdout_is_an_error(runs, repo: Path, tmp_path: Path) -> None:
    for arguments in commands(runs):
        with FULL.open("w") as full:
            done = _evaluate(repo, tmp_path, arguments, full)
        assert done.returncode == 2, arguments
        told = "Error: The output cannot be written: No space left on device. Free space, or send it elsewhere.\n"
        *before, last = done.stderr.decode().splitlines(keepends=True)
        assert last == told and all(line.startswith(("Written: ", "Warning: ", "\n")) for line in before)


def test_a_closed_pipe_prints_no_error(runs, repo: Path, tmp_path: Path) -> None:
    for arguments in commands(runs)[:7]:
        reading, writing = os.pipe()
        os.close(reading)
        done = _evaluate(repo, tmp_path, arguments, writing)
        os.close(writing)
        assert done.returncode == 2 and b"rror" not in done.stderr, done.stderr


def test_a_closed_stdout_gives_no_traceback(runs, repo: Path, tmp_path: Path) -> None:
    for arguments in commands(runs)[:7]:
        line = 'exec "$0" "$@" >&-'
        command = ["sh", "-c", line, sys.executable, repo / "longbench_eval.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo)}, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_stdout_escapes_characters_outside_its_encoding(runs, evaluate: Evaluate, evaluate_process: Evaluate) -> None:
    for arguments, encoding in itertools.product(commands(runs), ("ascii", "latin-1")):
        done = evaluate(*arguments, charset=encoding)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout.isascii() or encoding == "latin-1"
    for encoding in ("ascii", "ascii:strict"):
        shown = evaluate_process("show", runs[0], env={"PYTHONIOENCODING": encoding})
        assert shown.returncode == 0 and r"\ud83d \u8bf7" in shown.stdout and r"qasper \udcff" in shown.stdout
        assert r"caf\xe9" in shown.stdout


@pytest.mark.parametrize("name", ["qasper.jsonl", "run.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_special_files_in_a_run_are_refused(name: str, kind: str, evaluate: Evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "qasper", [row(0)])
    path = folder / name
    path.unlink()
    _make(path, kind)
    for command in (["score", folder], ["show", folder], ["compare", folder, folder]):
        assert str(path) in one_sentence(evaluate(*command))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_special_files_as_baselines_are_refused(kind: str, evaluate, tmp_path: Path) -> None:
    folder = save(tmp_path / "run", "qasper", [row(0)])
    path = tmp_path / "base.json"
    _make(path, kind)
    told = one_sentence(evaluate("gate", folder, "--baseline", path))
    assert "base.json" in told or "holds no <dataset>.jsonl file" in told
    if kind != "loop":  # which is replaced
        saved = evaluate("gate", folder, "--save_baseline", path, "--allow_unlike")
        assert saved.returncode == 2 and "base.json" in saved.stderr and "Traceback" not in saved.stderr


def test_invalid_names_are_escaped_and_long_names_refused(evaluate: Evaluate, repo: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"odd\xff\xfe")
    save(tmp_path / odd, "qasper", [row(0)])
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    for arguments in (["score", odd], ["compare", odd, odd], ["show", odd], ["score", odd, "--format", "csv"]):
        command = [sys.executable, repo / "longbench_eval.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0 and b"odd\\udcff\\udcfe" in done.stdout, done.stderr
    long = "x" * 5000
    for arguments in (["score", long], ["compare", long, odd], ["gate", odd, "--baseline", long], ["show", long]):
        told = one_sentence(evaluate(*arguments))
        assert len(told) < 1500
    too_long = evaluate("gate", odd, "--save_baseline", f"{'y' * 300}.json", "--allow_unlike")
    assert too_long.returncode == 2 and "File name too long" in too_long.stderr
    assert json.loads((tmp_path / odd / "summary.json").read_bytes())["folder"] == odd


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y cannot be used: Permission denied"),
        (OSError(5, "Input/output error"), r"\[Errno 5\] Input/output error"),
        (MemoryError(), "memory of this machine does not suffice"),
        (RecursionError("deep"), "nested too deeply"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "A text cannot be converted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_system_errors_are_one_sentence_and_bugs_are_not_hidden(error: Exception, words: str) -> None:
    @click.command(cls=FlexibleCommand)
    @click.option("--own", is_flag=True)
    def fail(own: bool) -> None:
        raise KeyError("bug") if own else error

    done = CliRunner().invoke(fail)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ") and re.search(words, done.stderr)
    assert isinstance(CliRunner().invoke(fail, ["--own"]).exception, KeyError)


def _make(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")


def _evaluate(repo: Path, folder: Path, arguments: list[str | Path], stdout) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, repo / "longbench_eval.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    return subprocess.run(command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=60)
