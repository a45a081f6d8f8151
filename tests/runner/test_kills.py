"""Runs that are killed, interrupted, or share their folder with another process."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longbench_pred import main
from sparsecache.longbench.records import PredictionFile


@pytest.fixture(scope="session")
def tiny(endless) -> Path:
    """The runs must last until they are killed."""
    return endless


DRIVER = """
import json, os, pathlib, sys, traceback
import torch
torch.set_num_threads(1)
import longbench_pred, sparsecache.synthetic.rows, sparsecache.runner.run
from sparsecache.engine.loading import Checkpoint

args = json.loads(sys.argv[1])
Checkpoint(pathlib.Path(args[0])).tokenizer  # all is imported once; every child starts with it

def start(arguments):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 70
    try:
        longbench_pred.main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
"""


def _drive(script: str, model: Path, *arguments: Any, repo: Path) -> Any:
    """Runs DRIVER and then `script`, which prints one line of JSON; `args` are the model and the arguments."""
    told = subprocess.run(
        [sys.executable, "-c", DRIVER + script, json.dumps([str(model), *arguments])],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_two_processes_fill_one_run_at_once(command, folder, predict, tiny, repo, read_untimed, read_record) -> None:
    commands = [command("--datasets", dataset, "--sample_rows", "8") for dataset in ("qasper", "trec,lcc")]
    codes = _drive(
        """
children = [start(arguments) for arguments in args[1]]
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
""",
        tiny,
        commands,
        repo=repo,
    )
    assert codes == [0, 0]
    record = read_record(folder)
    assert record["datasets"] == {name: {"expected_rows": 8} for name in ("qasper", "trec", "lcc")}
    assert record["identity"]["data"].keys() == {"qasper", "trec", "lcc"}
    first, second = sorted(record["sessions"], key=lambda session: session["started"])
    assert first["ended"] and second["ended"] and first["id"] != second["id"]
    assert predict("--datasets", "qasper,trec,lcc", "--sample_rows", "8", "--name", "alone").exit_code == 0
    for dataset in ("qasper", "trec", "lcc"):
        assert read_untimed(folder / f"{dataset}.jsonl") == read_untimed(folder.parent / "alone" / f"{dataset}.jsonl")


def test_a_run_killed_at_random_times_ends_in_the_file_of_an_uninterrupted_one(
    command, folder, predict, tiny, repo, read_rows, read_untimed, read_record
) -> None:
    arguments = ("--datasets", "qasper,samsum,lcc", "--sample_rows", "10")
    seed = random.randrange(10**6)
    code, kills, seen = _drive(
        """
import random, signal, time
_, arguments, seed, folder = args
draw, kills, seen = random.Random(seed), 0, []
while True:
    child, began = start(arguments), time.monotonic()
    patience = draw.uniform(0.02, 0.15) * 1.15**kills
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() - began > patience:
            break
        time.sleep(0.002)
    if done:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    files = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    seen.append(sum(open(path, "rb").read().count(b"\\n") for path in files if path.endswith(".jsonl")))
print(json.dumps([os.waitstatus_to_exitcode(status), kills, seen]))
""",
        tiny,
        command(*arguments),
        seed,
        str(folder),
        repo=repo,
    )
    assert code == 0 and kills >= 3, (seed, seen)
    assert seen == sorted(seen) and any(0 < rows < 30 for rows in seen), (seed, seen)
    assert predict(*arguments, "--name", "whole").exit_code == 0
    for dataset in ("qasper", "samsum", "lcc"):
        assert read_untimed(folder / f"{dataset}.jsonl") == read_untimed(
            folder.parent / "whole" / f"{dataset}.jsonl"
        ), seed
        assert len({row["_id"] for row in read_rows(folder / f"{dataset}.jsonl")}) == 10
    record = read_record(folder)
    assert record["identity"] == read_record(folder.parent / "whole")["identity"]
    assert record["datasets"] == read_record(folder.parent / "whole")["datasets"]
    assert len([session for session in record["sessions"] if session["ended"]]) <= 1  # the last, or it had no rows left


def test_an_interrupt_keeps_finished_rows_and_says_how_to_go_on(command, folder, predict, repo, read_rows) -> None:
    arguments = ("--sample_rows", "400")
    path = folder / "qasper.jsonl"
    process = subprocess.Popen(
        [sys.executable, repo / "longbench_pred.py", *command(*arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (path.exists() and path.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Stopped. Finished rows are kept" in stderr and "Traceback" not in stderr
    kept = read_rows(path)
    assert 2 < len(kept) < 400
    assert predict(*arguments, "--max_samples", str(len(kept) + 2)).exit_code == 0
    assert read_rows(path)[: len(kept)] == kept and len(read_rows(path)) == len(kept) + 2


def _press_ctrl_c() -> None:
    """Ctrl-C inside code of a library that raises another error, without a cause, for it."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ValueError("could not determine the shape of an object")


@pytest.mark.parametrize("where", ["longbench.prompts.Prompter.build", "engine.loading.Checkpoint.load"])
def test_ctrl_c_stops_a_run_also_where_a_library_hides_it(where, predict, folder, monkeypatch) -> None:
    """A prompt that cannot be built, and so an error row, is what the run would take it for."""
    monkeypatch.setattr(f"sparsecache.{where}", lambda *arguments, **names: _press_ctrl_c())
    done = predict()
    assert done.exit_code == 130 and done.stderr.splitlines()[-1].startswith("Stopped.")
    assert not any(file.read_bytes() for file in folder.glob("*.jsonl"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert predict().exit_code == 0


def test_ctrl_c_while_arguments_are_read_stops_a_command(monkeypatch) -> None:
    """Click would exit with 1, which is for rows that failed."""
    monkeypatch.setattr("sparsecache.cli.FlexibleCommand.parse_args", lambda *arguments: signal.raise_signal(2))
    assert CliRunner().invoke(main, []).exit_code == 130


def test_a_run_that_is_killed_has_its_clock_so_far_on_record(
    predict, folder, monkeypatch, read_rows, read_record
) -> None:
    monkeypatch.setattr("sparsecache.runner.run._SAVE_EVERY_S", 0.0)
    whole = PredictionFile.append
    calls = iter(range(100))

    def append(self: PredictionFile, record: dict[str, Any]) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        whole(self, record)

    monkeypatch.setattr(PredictionFile, "append", append)
    assert predict().exit_code == 130
    rows = read_rows(folder / "qasper.jsonl")
    (session,) = read_record(folder)["sessions"]
    assert len(rows) == 2 and session["ended"] is None
    assert session["clock"]["prefill_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)
