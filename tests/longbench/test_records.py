"""Prediction files and run.json after kills, full disks and concurrent processes.

In one file because every test writes to the same kind of run folder.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.records import PredictionFile, RunFolder, read_rows

RunPython = Callable[..., CompletedProcess[str]]


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"pred": f'odd "é中\x85\u2028\r\n{{\x00 {number}', "answers": ["a"], "_id": f"row-{number}", **more}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with PredictionFile(path) as file:
        for item in rows:
            if item["_id"] not in file.done:
                file.append(item)


def test_rows_are_read_back_as_written_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "qasper.jsonl"
    rows = [row(number) for number in range(3)]
    write(path, rows)
    assert list(read_rows(path)) == rows
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows


def test_each_row_is_in_the_file_once_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    with PredictionFile(path) as file:
        for number in range(3):
            file.append(row(number))
            assert len(list(read_rows(path))) == number + 1
        assert file.done == {"row-0", "row-1", "row-2"}


def test_a_kill_at_any_byte_loses_only_the_row_it_hits(tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    rows = [row(number) for number in range(4)]
    write(path, rows)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with PredictionFile(path) as file:
            assert file.done == {f"row-{number}" for number in range(whole[:cut].count(b"\n"))}
            for item in rows:
                if item["_id"] not in file.done:
                    file.append(item)
        assert path.read_bytes() == whole


def test_a_killed_process_leaves_whole_rows_and_no_lock(tmp_path: Path, repo: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from sparsecache.longbench.records import PredictionFile\n"
        "with PredictionFile(Path(sys.argv[1])) as file:\n"
        "    done = len(file.done)\n"
        "    print('open', flush=True)\n"
        "    for number in range(done, done + 20_000):\n"
        "        file.append({'pred': 'x' * 5000, 'answers': [], '_id': str(number)})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    for _ in range(3):
        command = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == b"open\n"
                with pytest.raises(UsageError, match=r"qasper\.jsonl is being written by another process"):
                    PredictionFile(path)
                time.sleep(0.02)
            finally:
                process.send_signal(signal.SIGKILL)
    with PredictionFile(path) as file:
        ids = [item["_id"] for item in read_rows(path)]
        assert ids == [str(number) for number in range(len(ids))]
        assert file.done == set(ids) != set()


def test_the_same_dataset_twice_is_refused_another_is_not(tmp_path: Path) -> None:
    with PredictionFile(tmp_path / "qasper.jsonl"):
        with pytest.raises(UsageError, match="Wait for it, or choose other --datasets or --name"):
            PredictionFile(tmp_path / "qasper.jsonl")
        with PredictionFile(tmp_path / "trec.jsonl") as other:
            other.append(row(0))
    write(tmp_path / "qasper.jsonl", [row(0)])


def test_a_file_that_cannot_be_opened_is_not_left_locked(tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    path.write_text("no json\n")
    for _ in range(2):
        with pytest.raises(UsageError, match="line 1: line contains invalid json"):
            PredictionFile(path)
    path.unlink()
    write(path, [row(0)])


def test_error_rows_are_dropped_and_retried(tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    failed = row(1, error="OutOfMemoryError: 3 GiB")
    write(path, [row(0), failed, row(2)])
    assert list(read_rows(path)) == [row(0), failed, row(2)]
    with PredictionFile(path) as file:
        assert file.done == {"row-0", "row-2"}
        file.append(failed)
        assert file.done == {"row-0", "row-2"}
    write(path, [row(0), row(1), row(2)])
    assert list(read_rows(path)) == [row(0), row(2), row(1)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"_id": "a"}\nhalf\n{"_id": "b"}\n', "line 2: line contains invalid json"),
        (b'{"_id": "a"}\n[]\n', "line 2: line does not match requested type"),
        (b'{"_id": "a"}\n{"_id": "b"}\n{"_id": "a"}\n', "row 3 repeats an _id"),
        (b'{"_id": "a"}\n{"pred": "x"}\n', "row 2 has no _id"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "qasper.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as failure:
        PredictionFile(path)
    assert f"{path}" in str(failure.value) and problem in str(failure.value)
    advice = (
        "Repair or delete that line, or give the run's own command again: it cuts off a last line that was left half "
        "written, and starts afresh with --overwrite."
    )
    assert str(failure.value).endswith(advice)
    assert path.read_bytes() == content


# Appends rows until the file cannot grow; prints the error and exits with 2 as a run does.
FILL = """
import resource, sys
from pathlib import Path
from sparsecache.cli import report_usage_errors
from sparsecache.longbench.records import PredictionFile
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
with report_usage_errors(), PredictionFile(Path(sys.argv[1])) as file:
    for number in range(20):
        if str(number) not in file.done:
            file.append({"pred": "x" * 7000, "answers": [], "_id": str(number)})
"""


def check_full(path: Path, done: CompletedProcess[str], reason: str) -> int:
    assert done.returncode == 2, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"pred": "x" * 7000, "answers": [], "_id": str(number)} for number in range(len(rows))]
    assert 0 < len(rows) < 20
    assert done.stderr == (
        f"Error: {path} cannot grow: {reason}. Its {len(rows)} finished rows are kept. "
        "Free space or raise the limit, then rerun the command without --overwrite to resume.\n"
    )
    return len(rows)


def check_finished(path: Path, done: CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert [item["_id"] for item in read_rows(path)] == [str(number) for number in range(20)]


def test_a_file_size_limit_ends_the_run_and_loses_no_row(tmp_path: Path, run_python: RunPython) -> None:
    path = tmp_path / "qasper.jsonl"
    assert check_full(path, run_python("-c", FILL, path, 50_000), "File too large") == 7
    assert check_full(path, run_python("-c", FILL, path, 100_000), "File too large") == 14
    check_finished(path, run_python("-c", FILL, path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_loses_no_row(small_disk: Path, run_python: RunPython) -> None:
    path = small_disk / "pred" / "qasper.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 20_000)
    check_full(path, run_python("-c", FILL, path), "No space left on device")
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    check_finished(path, run_python("-c", FILL, path))


def test_a_full_disk_leaves_the_record_as_it_was(small_disk: Path) -> None:
    folder = RunFolder(small_disk / "run")
    folder.update(lambda record: record.update(kept=1))
    before = (folder.path / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"run\.json cannot be written: No space left on device"):
        folder.update(lambda record: record.update(large="x" * 100_000))
    assert (folder.path / "run.json").read_bytes() == before
    assert sorted(path.name for path in folder.path.iterdir()) == [".run.lock", "run.json"]


def test_another_failure_of_the_system_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with PredictionFile(tmp_path / "qasper.jsonl") as file:
        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(OSError, match="Input/output error"):
            file.append(row(0))
        monkeypatch.undo()
        assert file.done == set()


def test_a_system_that_writes_in_pieces_gets_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    write(tmp_path / "qasper.jsonl", [row(0), row(1)])
    assert list(read_rows(tmp_path / "qasper.jsonl")) == [row(0), row(1)]


def test_run_json_is_merged_by_processes_at_once(tmp_path: Path, run_python: RunPython, repo: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from sparsecache.longbench.records import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "for number in range(40):\n"
        "    folder.update(lambda record: record.setdefault('seen', []).append(f'{sys.argv[2]}-{number}'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], env=environment) for name in "abc"]
    while any(process.poll() is None for process in processes):
        RunFolder(tmp_path).read()  # whole at any time
    assert [process.returncode for process in processes] == [0, 0, 0]
    expected = sorted(f"{name}-{number}" for name in "abc" for number in range(40))
    assert sorted(RunFolder(tmp_path).read()["seen"]) == expected


IDENTITY = {
    "checkpoint": "abc",
    "method": "vanilla",
    "max_length": None,
    "templates": {"qasper": "t1"},
    "data": {"qasper": "d1"},
}


def test_the_same_identity_may_claim_again_and_adds_datasets(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.read() == {}
    folder.claim(IDENTITY)
    folder.claim(IDENTITY)
    folder.claim({**IDENTITY, "templates": {"trec": "t2"}, "data": {"trec": "d2"}})
    assert folder.read()["identity"] == {
        **IDENTITY,
        "templates": {"qasper": "t1", "trec": "t2"},
        "data": {"qasper": "d1", "trec": "d2"},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "other"}, "method: vanilla, now other"),
        ({"max_length": 3500}, "max_length: none, now 3500"),
        ({"data": {"trec": "x", "qasper": "d2"}}, "the data of qasper: not the same"),
        ({"method": "x", "checkpoint": "y"}, "the checkpoint's files: not the same; method: vanilla, now x"),
    ],
)
def test_another_identity_is_refused_with_both_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(IDENTITY)
    before = folder.read()
    with pytest.raises(UsageError) as failure:
        folder.claim({**IDENTITY, **change})
    assert str(failure.value) == (
        f"{tmp_path} holds a run with other settings: {message}. Choose another --name, start this one afresh with "
        f"--overwrite, or delete the folder."
    )
    assert folder.read() == before


def test_predictions_without_a_record_are_not_taken_over(tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", [row(0)])
    folder = RunFolder(tmp_path)
    with pytest.raises(UsageError, match=r"holds predictions of qasper but no run\.json"):
        folder.claim(IDENTITY)
    folder.clear(["qasper"])
    folder.claim(IDENTITY)


@pytest.mark.parametrize(
    ("content", "problem"), [("{half", "is not valid JSON"), ("[]", "the file is not a JSON object")]
)
def test_a_broken_record_is_an_error(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=rf"run\.json:? {problem}.*--overwrite"):
        RunFolder(tmp_path).read()


def test_clear_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(IDENTITY)
    for name in ("qasper.jsonl", "trec_e.jsonl", "result.json", "summary_e.json", "notes.txt", "mine.jsonl"):
        (tmp_path / name).touch()
    folder.clear(["qasper", "trec_e", "lcc"])
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"notes.txt", "mine.jsonl"}
    RunFolder(tmp_path / "nowhere").clear(["qasper"])


def test_clear_deletes_nothing_while_a_dataset_is_in_use(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(IDENTITY)
    for name in ("lcc", "trec"):
        write(folder.predictions(name), [row(0)])
    refused = pytest.raises(UsageError, match=r"qasper\.jsonl is being written.*--overwrite cannot delete it")
    with PredictionFile(folder.predictions("qasper")), refused:
        folder.clear(["lcc", "qasper", "trec"])
    assert folder.read()["identity"] == IDENTITY
    assert all(folder.predictions(name).exists() for name in ("lcc", "qasper", "trec"))
    folder.clear(["lcc", "qasper", "trec"])
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"file/run cannot be written to \(Not a directory\)\. Choose another --pred_dir"
    ):
        RunFolder(tmp_path / "file" / "run").claim(IDENTITY)
    with pytest.raises(UsageError, match=r"file cannot be written to \(File exists\)\."):
        PredictionFile(tmp_path / "file" / "qasper.jsonl")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"identity": []}, r"identity is \[\]; it must be an object"),
        ({"identity": {"data": []}}, r"identity\.data is \[\]; it must be an object"),
        ({"datasets": None}, "datasets is null; it must be an object"),
        ({"datasets": {"qasper": {}}}, "lacks datasets.qasper.expected_rows"),
        (
            {"datasets": {"qasper": {"expected_rows": True}}},
            "datasets.qasper.expected_rows is true; it must be a whole",
        ),
        ({"sessions": [5]}, r"sessions\[0\] is 5; it must be an object"),
        ({"sessions": [{"id": 1, "clock": 5}]}, r"sessions\[0\]\.clock is 5; it must be an object"),
        ({"model": "x"}, "model is 'x'; it must be an object"),
        ({"x": float("nan")}, "not valid JSON"),
    ],
)
def test_a_record_changed_by_hand_is_told_what_is_wrong(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=problem):
        RunFolder(tmp_path).read()


def test_rows_that_the_record_does_not_know_are_not_adopted(tmp_path: Path) -> None:
    """run.json was lost and begun anew by another dataset: how the old rows were made is not known."""
    folder = RunFolder(tmp_path)
    write(folder.predictions("qasper"), [row(0)])
    folder.claim({"window": 200, "data": {"trec": "a"}})
    with pytest.raises(UsageError, match="holds predictions of qasper but no run.json that says how"):
        folder.claim({"window": 200, "data": {"qasper": "b"}})


def test_an_infinite_value_is_recorded_as_text_and_compared(tmp_path: Path) -> None:
    """JSON has no infinity, and an option may well be infinite."""
    folder = RunFolder(tmp_path)
    identity = {"options": {"alpha": math.inf, "least": -math.inf, "budget": 0.1, "window": None, "skew": True}}
    for _ in range(2):
        folder.claim(identity)
        recorded = folder.read()["identity"]["options"]
        assert recorded == {"alpha": "inf", "least": "-inf", "budget": 0.1, "window": None, "skew": True}
    with pytest.raises(UsageError, match=r"with other settings: alpha: inf, now 5\.0\. Choose"):
        folder.claim({"options": {**identity["options"], "alpha": 5.0}})
