"""LongBench v2: its rows, its prompt, the letter in an answer, accuracy by stratum, and the strata everywhere."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import load_baseline
from sparsecache.longbench.compare import compare
from sparsecache.longbench.data import FileSource, FolderSource, HubSource, load_rows
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.plots import get_plot
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.report import summary_json, v2_result, write_results
from sparsecache.longbench.score_types import STRATA
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.tasks import load_tasks, select_tasks
from sparsecache.longbench.text import choice_letter
from tests.longbench.scoring import score_table

TASK, COT = load_tasks()["longbench_v2"], load_tasks()["longbench_v2_cot"]
PLACEHOLDERS = {"context": "$DOC$", "input": "$Q$", **{f"choice_{letter}": f"$C_{letter}$" for letter in "ABCD"}}
MARKS = tuple(PLACEHOLDERS.values())
TEMPLATE_SHA256 = "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"
COT_SHA256 = "6cc33d92fd8f611662b756c1f10f302c541ca005b58c46d5f3188ac3a939bfe8"
COT_ANSWER_SHA256 = "85ec59df4ac0e27aabbc619a7ca5cf3ae1787dd5a76cf51a18944eb52c91955f"


def question(row_id: int = 0, **changes: Any) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"}
    made = {
        "_id": str(row_id), "domain": "Code", "sub_domain": "x", "difficulty": "easy", "length": "short",
        "question": "Which?", **choices, "answer": "B", "context": "Text.",
    }  # fmt: skip
    return {**made, **changes}


def official_prompt(template: str, row: dict[str, Any]) -> str:
    """Replace the placeholders one after the other, as the benchmark's description says."""
    keys = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
    for mark, key in zip(MARKS, keys, strict=True):
        template = template.replace(mark, row[key].strip())
    return template


def load(path: Path, content: str) -> list[dict[str, Any]]:
    path.write_text(content, encoding="utf-8")
    rows: list[dict[str, Any]] = load_rows(FileSource(path), TASK).dataset.to_list()
    return rows


def test_v2_is_in_no_group_of_longbench() -> None:
    for group in ("all", "en", "zh", "synthetic"):
        assert TASK not in select_tasks(group)
    assert select_tasks("longbench_v2") == [TASK] and select_tasks("longbench_v2_cot") == [COT]
    assert (TASK.max_new_tokens, TASK.rows, TASK.chat, TASK.group) == (128, 503, True, "longbench_v2")
    assert (COT.max_new_tokens, COT.answer_max_new_tokens, COT.rows, COT.group) == (1024, 128, 503, COT.name)
    with pytest.raises(UsageError, match="not part of LongBench-E"):
        select_tasks("longbench_v2", e=True)


def test_the_template_is_the_official_one(fixtures_dir: Path) -> None:
    official = (fixtures_dir / "official" / "longbench_v2_0shot.txt").read_text(encoding="utf-8")
    assert TASK.template.format(**PLACEHOLDERS) == official


def test_the_template_has_the_published_hash() -> None:
    assert hashlib.sha256(TASK.template.format(**PLACEHOLDERS).encode()).hexdigest() == TEMPLATE_SHA256


def test_the_templates_of_both_steps_have_the_published_hashes() -> None:
    assert hashlib.sha256(COT.template.format(**PLACEHOLDERS).encode()).hexdigest() == COT_SHA256
    answer = COT.answer_template.format(**PLACEHOLDERS, reasoning="$COT$")
    assert hashlib.sha256(answer.encode()).hexdigest() == COT_ANSWER_SHA256


@pytest.mark.parametrize("reasoning", [" Because.\n", "", "$Q$ {x} $COT$ $C_A$", "<think>So.</think>\n\n(A)"])
def test_the_answer_prompt_equals_the_official_one(reasoning: str, tmp_path: Path) -> None:
    row = question(0, question=" Which $COT$? ", choice_D="$COT$ {reasoning} \n")
    (found,) = load(tmp_path / "data.json", json.dumps([row]))
    template = COT.answer_template.format(**PLACEHOLDERS, reasoning="$COT$")
    expected = official_prompt(template, row).replace("$COT$", reasoning.strip())
    prompt = Prompter(Words(), 4096).build_answer(COT, found, reasoning)  # type: ignore[arg-type]
    assert prompt.sha256 == hashlib.sha256(expected.encode()).hexdigest() and not prompt.truncated


def test_prompts_equal_the_official_ones_byte_for_byte(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = [*MARKS, " ", "\n", "{", "}", "{context}", "$", "x", "\u00a0", "ß", "$Q", "C_A$"]
    rows = []
    for number in range(200):
        texts = {
            key: "".join(rng.choices(parts, k=rng.randrange(6)))
            for key in ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
        }
        rows.append(question(number, **texts))
    template = TASK.template.format(**PLACEHOLDERS)
    found = load(tmp_path / "data.json", json.dumps(rows))
    assert [TASK.template.format(**row) for row in found] == [official_prompt(template, row) for row in rows]


def test_rows_come_from_an_array_lines_a_folder_or_the_hub(tmp_path: Path) -> None:
    rows = [question(0, answer="A"), question(1, length="long", difficulty="hard")]
    found = load(tmp_path / "data.json", json.dumps(rows))
    assert [(row["_id"], row["answers"], row["length"], row["difficulty"]) for row in found] == [
        ("0", ["A"], "short", "easy"), ("1", ["B"], "long", "hard"),
    ]  # fmt: skip
    assert load(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))) == found
    assert load_rows(FolderSource(tmp_path), TASK).dataset.to_list() == found
    (tmp_path / "longbench_v2.jsonl").write_text(json.dumps(rows[0]))
    assert load_rows(FolderSource(tmp_path), TASK).dataset.to_list() == found[:1]
    assert load_rows(FolderSource(tmp_path), COT).dataset["_id"] == ["0"]
    hub = HubSource({"longbench_v2": (tmp_path / "data.json", {"repo": "r", "commit": "c"})})
    with pytest.raises(UsageError, match="holds 2 rows; the published dataset has 503"):
        load_rows(hub, TASK)
    (tmp_path / "data.json").write_text(json.dumps([question(number) for number in range(503)]))
    assert len(load_rows(hub, TASK).dataset) == 503
    assert {"source": "hub", "repo": "r", "commit": "c"}.items() <= hub.describe().items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, "row 1: answer is 'E'; it must be A or B or C or D"),
        ({"difficulty": "mid"}, "difficulty is 'mid'; it must be easy or hard"),
        ({"length": 5}, "length is 5, not of type str"),
        ({"choice_C": None}, "choice_C is null, not of type str"),
        ({"context": "\ud800"}, "lone surrogate"),
    ],
)
def test_wrong_questions_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "data.json", json.dumps([question(0, **changes)]))


def test_missing_and_repeated_fields_are_refused(tmp_path: Path) -> None:
    row = question()
    del row["question"], row["choice_D"]
    with pytest.raises(UsageError, match="row 1: the row lacks question, choice_D"):
        load(tmp_path / "data.json", json.dumps([row]))
    with pytest.raises(UsageError, match="row 2: _id '0' is already in row 1"):
        load(tmp_path / "data.json", json.dumps([question(), question()]))
    with pytest.raises(UsageError, match="not valid JSON"):
        load(tmp_path / "data.json", json.dumps([question()])[:-1])


class Words:
    """A tokenizer whose tokens are words."""

    bos_token = bos_token_id = None

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        start = len(self.words)
        self.words += text.split(" ")
        return list(range(start, len(self.words)))

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join(self.words[token_id] for token_id in token_ids)


@pytest.mark.parametrize("max_length", [20, 21])
def test_the_middle_cut_decodes_both_halves_as_one(max_length: int, tmp_path: Path) -> None:
    (row,) = load(tmp_path / "data.json", json.dumps([question(context=" ".join(map(str, range(500))))]))
    prompt = Prompter(Words(), 4096, max_length).build(TASK, row)  # type: ignore[arg-type]
    words = TASK.template.format(**row).split(" ")
    half = max_length // 2
    expected = " ".join(words[:half] + words[-max_length // 2 :])
    assert prompt.truncated and prompt.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    assert len(prompt.token_ids) == max_length


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is B.", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **(D) text**", "D"),
        ("The correct answer is A or The correct answer is (C)", "C"),
        ("First: The correct answer is (A). The correct answer is (B).", "A"),
        ("The correct answer is Because", "B"),
        ("The correct answer is (insert answer here)", None),
        ("The correct answer is (E)", None),
        ("The correct answer is: B", None),
        ("the correct answer is (B)", None),
        ("The correct answer  is (B)", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_the_letter_is_found_as_the_official_code_finds_it(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def answer(row_id: int, letter: str, right: str = "A", **more: Any) -> dict[str, Any]:
    text = f"The correct answer is ({letter})" if letter else "I do not know"
    made = {"pred": text, "answers": [right], "all_classes": None, "length": "short", "difficulty": "easy"}
    return {**made, "_id": str(row_id), **more}


ROWS = [
    answer(0, "A"),
    answer(1, "B"),
    answer(2, "", difficulty="hard"),
    answer(3, "A", difficulty="hard", length="medium"),
    answer(4, "B", length="medium"),
    answer(5, "A", length="medium"),
    answer(6, "A", difficulty="hard", length="long"),
]


def test_accuracy_by_stratum(make_run: Callable[..., Path]) -> None:
    run = score_run(make_run("a", {"longbench_v2": ROWS}))
    (dataset,) = run.datasets
    assert {name: (part.summary.score, part.summary.n) for name, part in dataset.strata.items()} == {
        "easy": (50, 4), "hard": (66.67, 3), "short": (33.33, 3), "medium": (66.67, 3), "long": (100, 1),
    }  # fmt: skip
    assert v2_result(dataset) == ["57.1", "50.0", "66.7", "33.3", "66.7", "100.0"]
    assert run.averages["longbench_v2"].score == 57.14 and run.averages["flat_mean"].datasets == 0
    assert (dataset.count("no_letter"), run.complete) == (1, True)
    assert "1 of 7 predictions give no letter and count 0.0" in dataset.warnings
    assert not any("length" in warning for warning in dataset.warnings)
    table = score_table(run)
    assert ["longbench_v2", "medium", "66.67"] in [line.split()[:3] for line in table.split("\n")]
    assert "overall 57.1, easy 50.0" in table
    entry = summary_json(run, ScoringOptions())["datasets"]["longbench_v2"]
    assert entry["no_letter"] == 1 and list(entry["strata"]) == list(STRATA)
    assert [path.name for path in write_results(run, ScoringOptions())] == ["result.json", "summary.json", "result.txt"]
    assert (run.folder / "result.txt").read_text() == (
        "Model\tOverall\tEasy\tHard\tShort\tMedium\tLong\na\t57.1\t50.0\t66.7\t33.3\t66.7\t100.0"
    )


def test_files_of_the_official_code_give_the_same_scores(make_run: Callable[..., Path]) -> None:
    official = [
        {
            **question(int(row["_id"]), difficulty=row["difficulty"], length=row["length"], answer=row["answers"][0]),
            "response": row["pred"],
            "pred": choice_letter(row["pred"]),
            "judge": choice_letter(row["pred"]) == row["answers"][0],
        }
        for row in ROWS
    ]
    assert official[2]["pred"] is None
    theirs = score_run(make_run("official", {"longbench_v2": official}, record=False))
    mine = score_run(make_run("mine", {"longbench_v2": ROWS}))
    assert [row.score for row in theirs.datasets[0].rows] == [row.score for row in mine.datasets[0].rows]
    assert v2_result(theirs.datasets[0]) == v2_result(mine.datasets[0])
    assert not theirs.complete  # 503 rows are published


def test_chain_of_thought_has_a_mean_and_a_line_of_its_own(make_run: Callable[..., Path]) -> None:
    run = score_run(make_run("a", {"longbench_v2": ROWS, "longbench_v2_cot": [{**row, "pred": "?"} for row in ROWS]}))
    scores = {name: (mean.score, mean.datasets) for name, mean in run.averages.items() if mean.datasets}
    assert scores == {"longbench_v2": (57.14, 1), "longbench_v2_cot": (0, 1)}
    assert ["longbench_v2_cot", "easy", "0.00"] in [line.split()[:3] for line in score_table(run).split("\n")]
    write_results(run, ScoringOptions())
    lines = (run.folder / "result.txt").read_text().split("\n")
    assert lines[1:] == ["a\t57.1\t50.0\t66.7\t33.3\t66.7\t100.0", "a_cot\t0.0\t0.0\t0.0\t0.0\t0.0\t0.0"]


def test_an_unknown_stratum_counts_as_in_the_official_code(make_run: Callable[..., Path]) -> None:
    rows = [answer(0, "A", difficulty="?", length="?")]
    (dataset,) = score_run(make_run("a", {"longbench_v2": rows})).datasets
    assert list(dataset.strata) == ["hard", "long"] and v2_result(dataset) == ["100.0", "-", "100.0", "-", "-", "100.0"]


def test_strata_are_compared_gated_and_plotted(
    make_run: Callable[..., Path], score_to_baseline: Callable[..., Any]
) -> None:
    worse = [row if row["length"] != "medium" else {**row, "pred": "?"} for row in ROWS]
    folders = [make_run("a", {"longbench_v2": ROWS}), make_run("b", {"longbench_v2": worse})]
    runs = [score_run(folder) for folder in folders]
    groups = {group.name: group for group in compare(runs, resamples=50).groups}
    differences = {name: groups[f"longbench_v2 {name}"].entries[1].difference for name in STRATA}
    assert {name: part and round(part.mean, 2) for name, part in differences.items()} == {
        "easy": -25, "hard": -33.33, "short": 0, "medium": -66.67, "long": 0,
    }  # fmt: skip
    baseline, run = (score_to_baseline(folder) for folder in folders)
    verdict = gate(run, baseline, Limits(max_drop=30, max_drop_dataset=30))
    failed = [check.text.split(":")[0] for check in verdict.checks if not check.passed]
    assert failed == ["longbench_v2 hard", "longbench_v2 medium"]
    run.save(folders[0] / "baseline.json")
    assert load_baseline(folders[0] / "baseline.json").datasets == run.datasets
    pytest.importorskip("matplotlib")
    svg = get_plot("bars")(runs).svg().decode()
    assert "LongBench v2" in svg and all(f">{name}<" in svg for name in STRATA)
