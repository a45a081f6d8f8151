"""Progress: a bar on a terminal, lines elsewhere, nothing with --quiet."""

import io

from sparsecache.runner import progress
from sparsecache.runner.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_a_minute_and_one_at_the_end(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 10.0, 61.0, 61.0, 70.0, 130.0, 130.0, 130.0]).__next__)
    with Progress("qasper", 1, 5) as shown:
        for _ in range(4):
            shown.add_tokens(10)
            shown.add_row()
    assert capsys.readouterr().err.splitlines() == [
        "qasper: 2 of 5 rows, 20 new tokens in 61 s",
        "qasper: 4 of 5 rows, 40 new tokens in 130 s",
        "qasper: 5 of 5 rows, 40 new tokens in 130 s",
    ]


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("qasper", 0, 2) as shown:
        for _ in range(2):
            shown.add_tokens(10)
            shown.add_row()
    assert "\r" in terminal.getvalue() and "2/2" in terminal.getvalue() and "20 new tokens" in terminal.getvalue()


def test_a_run_without_a_terminal_writes_one_line_per_dataset(predict) -> None:
    told = predict("--datasets", "qasper,trec")
    lines = told.stderr.splitlines()
    assert "\r" not in told.stderr
    assert [line.partition(",")[0] for line in lines] == ["qasper: 3 of 3 rows", "trec: 3 of 3 rows"]


def test_quiet_shows_no_bar_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    with Progress("qasper", 0, 1, quiet=True) as shown:
        shown.add_tokens(10)
        shown.add_row()
    assert terminal.getvalue() == ""


def test_quiet_prints_warnings_errors_and_verify_only(predict) -> None:
    told = predict("--quiet")
    assert (told.exit_code, told.output) == (0, "")
    told = predict("--quiet", "--verify", "1", "--name", "verified")
    assert told.output == "verify: 1 of 1 prompts give the text of transformers.\n"
    assert predict("--quiet", "--max_length", "200").stderr.startswith("Error: ")
