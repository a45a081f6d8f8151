"""Runs of own tasks, of LongBench v2, of models that reason, and with another limit of new tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsecache.engine.base import Completion, Request
from sparsecache.errors import UsageError
from sparsecache.longbench.prompts import Prompt
from sparsecache.longbench.scores import score_run
from sparsecache.runner.detokenizer import Detokenizer
from sparsecache.runner.rows import finished_row
from sparsecache.runner.settings import Settings

TABLE = 'template = "{context}\\n{input}"\nmax_new_tokens = 5\nmetric = "token_f1"\n'


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """The options of a run over two own tasks and one file of rows."""
    (tmp_path / "my_tasks.toml").write_text(f"[mine]\n{TABLE}[yours]\n{TABLE}")
    rows = [{"input": f"Which is number {number}?", "context": "word " * 40, "answers": ["x"]} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--tasks", str(tmp_path / "my_tasks.toml"), "--data", str(tmp_path / "rows.jsonl")]


@pytest.fixture
def v2_file(tmp_path: Path) -> Path:
    """A file of three questions in the form of LongBench v2."""
    choices = {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"}
    rows = [
        {"_id": str(at), "domain": "d", "sub_domain": "s", "difficulty": "hard", "length": "medium", **choices,
         "question": "Which?", "answer": "C", "context": "word " * 300}
        for at in range(3)
    ]  # fmt: skip
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_own_tasks_run_resume_and_are_scored_without_the_option(
    predict, folder, own, read_rows, read_record, forbid_weights
) -> None:
    arguments = ["--datasets", "own", *own]
    told = predict(*arguments)
    assert told.exit_code == 0, told.output
    for name in ("mine", "yours"):
        rows = read_rows(folder / f"{name}.jsonl")
        assert len(rows) == 3 and all(row["new_tokens"] <= 5 for row in rows)
    run = score_run(folder)
    assert run.complete and (run.averages["own_mean"].datasets, run.averages["own_mean"].n) == (2, 6)
    assert list(read_record(folder)["tasks"]) == ["mine", "yours"]
    forbid_weights()
    assert predict(*arguments).exit_code == 0


def test_own_is_the_default_with_a_file_of_tasks(tmp_path: Path) -> None:
    path = tmp_path / "my_tasks.toml"
    path.write_text(f"[mine]\n{TABLE}")
    assert [task.name for task in Settings(tasks=path).wanted_tasks()] == ["mine"]
    assert len(Settings().wanted_tasks()) == 21


@pytest.mark.parametrize("data", ["hub", "sample"])
def test_own_tasks_need_rows_of_their_own(data, predict, own, forbid_weights) -> None:
    forbid_weights()
    told = predict("--datasets", "mine", *own, "--data", data)
    assert told.exit_code == 2 and f"--data {data} has no rows of mine" in told.stderr


def test_an_unknown_metric_names_the_file_of_tasks(predict, tmp_path, own, forbid_weights) -> None:
    forbid_weights()
    (tmp_path / "my_tasks.toml").write_text(f"[mine]\n{TABLE}".replace("token_f1", "bleu"))
    told = predict("--datasets", "own", *own)
    assert told.exit_code == 2 and "There is no metric 'bleu'" in told.stderr and "my_tasks.toml" in told.stderr


def test_overwrite_deletes_the_rows_of_own_tasks(predict, folder, own) -> None:
    assert predict("--datasets", "mine", *own).exit_code == 0
    assert predict("--overwrite", "--max_samples", "1").exit_code == 0
    assert not (folder / "mine.jsonl").exists() and score_run(folder).complete


def test_v2_rows_keep_what_scores_need(predict, folder, v2_file, read_rows) -> None:
    told = predict("--datasets", "longbench_v2", "--data", str(v2_file))
    assert told.exit_code == 0, told.output
    rows = read_rows(folder / "longbench_v2.jsonl")
    assert {(row["answers"][0], row["length"], row["difficulty"]) for row in rows} == {("C", "medium", "hard")}
    assert rows[0]["prompt_end"].endswith('"The correct answer is (insert answer here)".')
    run = score_run(folder)
    assert run.complete and list(run.datasets[0].strata) == ["hard", "medium"]
    assert run.datasets[0].count("no_letter") == 3


def test_another_limit_of_new_tokens_is_recorded_and_refused_for_other_rows(
    predict, folder, read_rows, read_record, forbid_weights
) -> None:
    told = predict("--max_new_tokens", "3")
    assert told.exit_code == 0, told.output
    assert all(row["new_tokens"] <= 3 for row in read_rows(folder / "qasper.jsonl"))
    assert read_record(folder)["datasets"]["qasper"]["deviations"] == ["max_new_tokens is 3 instead of 128"]
    assert "not the protocol: max_new_tokens is 3 instead of 128" in score_run(folder).datasets[0].warnings
    forbid_weights()
    again = predict()
    assert again.exit_code == 2 and "max_new_tokens of qasper: 3, now 128" in again.stderr
    assert predict("--max_new_tokens", "3").exit_code == 0
    assert predict("--max_new_tokens", "0").exit_code == 2


def test_the_protocols_own_limit_is_no_deviation(predict, folder, read_record) -> None:
    assert predict("--max_new_tokens", "128", "--max_samples", "1").exit_code == 0
    assert read_record(folder)["datasets"]["qasper"] == {"expected_rows": 1}


def test_a_limit_that_the_window_cannot_hold_is_refused(predict, forbid_weights) -> None:
    forbid_weights()
    told = predict("--max_new_tokens", "100000")
    assert told.exit_code == 2 and "needs 100000 new tokens" in told.stderr


def made_row(text: str, end: str = "Answer:") -> dict[str, Any]:
    prompt = Prompt([1], 1, False, 0, "h", end, "h")
    completion = Completion(Request("key", [1], 9, ()), [5, 6], "stop", 0.1, 0.2)
    source = {"answers": ["yes"], "all_classes": None, "length": 1, "_id": "a"}
    return finished_row(source, prompt, completion, lambda token_ids: text)


def test_reasoning_is_kept_beside_the_answer() -> None:
    assert "full_text" not in made_row("yes") and made_row("yes")["pred"] == "yes"
    row = made_row("<think>no</think>\n\nyes")
    assert (row["pred"], row["full_text"], row["unclosed_think"]) == ("yes", "<think>no</think>\n\nyes", False)
    row = made_row("no</think>yes", end="<think>\n")
    assert (row["pred"], row["full_text"]) == ("yes", "no</think>yes")
    row = made_row("it never ends", end="<think>\n")
    assert (row["pred"], row["full_text"], row["unclosed_think"]) == ("", "it never ends", True)


class Marks:
    """A tokenizer of letters in which `</think>` is a special token with the id 1."""

    def get_vocab(self) -> dict[str, int]:
        return {"</think>": 1}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id != 1)


def test_marks_that_are_special_tokens_are_not_lost() -> None:
    detokenizer = Detokenizer(Marks())
    assert detokenizer.decode([*b"no", 1, *b"yes"]) == "no</think>yes"
    assert detokenizer.decode([*b"yes"]) == "yes"


def test_evaluate_takes_own_tasks(tiny, tmp_path, own) -> None:
    from sparsecache import LLM, evaluate

    result = evaluate(tiny, tasks=own[1], data=own[3], device="cpu", pred_dir=tmp_path / "api", max_new_tokens=2)
    assert list(result.scores) == ["mine", "yours"] and result.mean == 0
    with pytest.raises(UsageError, match="LLM takes no max_new_tokens"):
        LLM(tiny, max_new_tokens=3)
