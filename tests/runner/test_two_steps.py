"""Tasks in two steps: the model reasons, then answers a second prompt that holds its reasoning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsecache.engine.base import Completion, Request
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import load_tasks
from sparsecache.runner.steps import generate_steps

COT = ("--datasets", "longbench_v2_cot", "--max_new_tokens", "6")
OFFICIAL = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")


def questions() -> list[dict[str, Any]]:
    texts = {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"}
    common = {"difficulty": "hard", "length": "short", "answer": "B", "domain": "x", **texts}
    return [{**common, "_id": str(at), "context": f"Text {at}.", "question": f"Which {at}?"} for at in range(3)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(questions()))
    return str(path)


def test_both_steps_are_what_transformers_writes(
    data: str, tiny: Path, predict: Callable[..., Any], folder: Path, read_rows: Any, read_record: Any
) -> None:
    result = predict(*COT, "--data", data, "--batch_size", "2")
    assert result.exit_code == 0, result.output
    rows = {row["_id"]: row for row in read_rows(folder / "longbench_v2_cot.jsonl")}
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)

    def answer(prompt: str, most: int) -> tuple[str, int, str]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=most)[0, ids.shape[1] :].tolist()
        ended = "stop" if new[-1] in model.generation_config.eos_token_id else "length"
        return tokenizer.decode(new, skip_special_tokens=True), len(new), ended

    task = load_tasks()["longbench_v2_cot"]
    for source in questions():
        row = rows[source["_id"]]
        texts = {"input" if key == "question" else key: source[key] for key in OFFICIAL}
        reasoning, reasoning_tokens, ended = answer(task.template.format(**texts), 6)
        pred, tokens, _ = answer(task.answer_template.format(**texts, reasoning=reasoning.strip()), 128)
        assert (row["reasoning"], row["reasoning_tokens"]) == (reasoning.strip(), reasoning_tokens)
        assert (row["pred"], row["new_tokens"]) == (pred, reasoning_tokens + tokens)
        assert row["prompt_end"].endswith("Let’s think step by step:") and row["reasoning_finish_reason"] == ended
        assert (row["answers"], row["difficulty"], row["length"]) == (["B"], "hard", "short")
    record = read_record(folder)
    assert record["identity"]["protocol"]["longbench_v2_cot"].endswith("answer_max_new_tokens=128")
    assert record["datasets"]["longbench_v2_cot"]["deviations"] == ["max_new_tokens is 6 instead of 1024"]
    assert "0 of 3 to do" in predict(*COT, "--data", data).output


def test_a_row_whose_answer_prompt_fails_becomes_an_error_row(
    data: str, predict: Callable[..., Any], folder: Path, read_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Prompter.build_answer

    def broken(self: Prompter, task: Any, row: dict[str, Any], reasoning: str) -> Any:
        if row["_id"] == "1":
            raise ValueError("no prompt")
        return build(self, task, row, reasoning)

    monkeypatch.setattr(Prompter, "build_answer", broken)
    assert predict(*COT, "--data", data).exit_code == 1
    rows = {row["_id"]: row.get("error") for row in read_rows(folder / "longbench_v2_cot.jsonl")}
    assert rows == {"0": None, "1": "ValueError: no prompt", "2": None}
    monkeypatch.undo()
    again = predict(*COT, "--data", data)
    assert again.exit_code == 0 and "1 of 3 to do" in again.output


def test_steps_follow_one_another() -> None:
    class Engine:
        """Answers each request with its key."""

        def __init__(self) -> None:
            self.calls: list[list[str]] = []

        def generate(self, requests: Any, on_tokens: Any) -> Any:
            requests = list(requests)
            self.calls.append([request.key for request in requests])
            return (Completion(request) for request in requests)

    def next_step(completion: Completion) -> Request | Completion:
        return Request(f"{completion.key}'", [1], 1, ()) if completion.key in ("a", "b", "b'") else completion

    engine = Engine()
    requests = (Request(key, [1], 1, ()) for key in "abc")
    done = [each.key for each in generate_steps(engine, requests, next_step, lambda _: None)]  # type: ignore[arg-type]
    assert done == ["c", "a'", "b''"] and engine.calls == [["a", "b", "c"], ["a'", "b'"], ["b''"]]
