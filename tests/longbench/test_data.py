"""Reading rows from every source, with the contents of real files, and with broken files."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.errors import UsageError
from sparsecache.longbench.data import FolderSource, HubSource, ZipSource, load_rows, open_source
from sparsecache.longbench.jsonl import dumps, read_objects
from sparsecache.longbench.tasks import Task, load_tasks, select_tasks
from sparsecache.synthetic.rows import make_rows
from sparsecache.synthetic.source import SampleSource

KEYS = ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]
SAMPLE = SampleSource(rows=7)
QASPER = load_tasks()["qasper"]
ADVICE = "Invalid rows are never skipped. Fetch or write the complete file again."


def row(**changes: Any) -> dict[str, Any]:
    made = {
        "input": "Why?",
        "context": "Because.",
        "answers": ["So."],
        "length": 2,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "a",
    }
    return {**made, **changes}


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows).encode()


def load(folder: Path, content: bytes, task: Task = QASPER, e: bool = False) -> list[dict[str, Any]]:
    (folder / f"{task.file_stem(e)}.jsonl").write_bytes(content)
    return load_rows(FolderSource(folder), task, e).dataset.to_list()


def refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(UsageError) as failure:
        load(folder, content)
    message = str(failure.value)
    assert str(folder / "qasper.jsonl") in message
    return message


def test_real_rows_load_unchanged(fixtures_dir: Path) -> None:
    source, loaded = FolderSource(fixtures_dir / "raw"), 0
    for task in select_tasks("all"):
        for e in (False, True) if task.rows_e else (False,):
            content = (fixtures_dir / "raw" / f"{task.file_stem(e)}.jsonl").read_bytes()
            rows = load_rows(source, task, e)
            assert rows.dataset.to_list() == [json.loads(line) for line in content.split(b"\n") if line]
            assert rows.sha256 == hashlib.sha256(content).hexdigest()
            loaded += len(rows.dataset)
    assert loaded == 75


@pytest.mark.parametrize(("name", "e"), [("hotpotqa", True), ("multi_news", True), ("multifieldqa_zh", False)])
def test_real_truncated_files_are_refused(fixtures_dir: Path, name: str, e: bool) -> None:
    task = load_tasks()[name]
    path = fixtures_dir / "broken" / f"{task.file_stem(e)}.jsonl"
    last = path.read_bytes().count(b"\n") + 1
    with pytest.raises(UsageError) as failure:
        load_rows(FolderSource(fixtures_dir / "broken"), task, e)
    assert str(failure.value).startswith(f"{path}, line {last}: line contains invalid json")
    assert str(failure.value).endswith(ADVICE)


@pytest.mark.parametrize("name", [task.name for task in select_tasks("all")])
def test_sample_rows_load(name: str) -> None:
    source = SampleSource(rows=3, tokens=300, seed=5)
    assert load_rows(source, load_tasks()[name]).dataset.to_list() == make_rows(name, 3, 300, 5)
    assert source.describe() == {"source": "sample", "rows": 3, "tokens": 300, "seed": 5}


def test_the_sample_has_no_longbench_e() -> None:
    with pytest.raises(UsageError, match="sample has no LongBench-E rows. Leave out --e"):
        load_rows(SampleSource(), QASPER, e=True)


ODD = "a\x00b\rc\r\nd\x85e\u2028f\u2029g\x0bh\x0ci\x1cj\ufeffk{l}}m😀 \t"


def test_unusual_characters_survive(tmp_path: Path) -> None:
    for escaped in (False, True):
        content = (json.dumps(row(context=ODD, input=ODD, answers=[ODD]), ensure_ascii=escaped) + "\n").encode()
        assert load(tmp_path, content) == [row(context=ODD, input=ODD, answers=[ODD])]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, context: str, answer: str) -> None:
    wanted = [row(context=context, answers=[answer, ""], _id="x" + answer), row(_id="y")]
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    assert load(folder, lines(*wanted)) == wanted


@pytest.mark.parametrize(
    "content",
    [
        lines(row(), row(_id="b")).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + lines(row(), row(_id="b")),
        lines(row(), row(_id="b")).rstrip(b"\n"),
        b"\n  \n" + lines(row()) + b"\n\r\n" + lines(row(_id="b")) + b"\n",
    ],
    ids=["crlf", "bom", "no final newline", "blank lines"],
)
def test_harmless_differences_between_files_are_accepted(tmp_path: Path, content: bytes) -> None:
    assert load(tmp_path, content) == [row(), row(_id="b")]


def test_unknown_keys_are_dropped_and_length_may_be_large(tmp_path: Path) -> None:
    assert load(tmp_path, lines(row(length=2**40, note="x"))) == [row(length=2**40)]


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    broken = {name: value for name, value in row(_id="b").items() if name != key}
    message = refusal(tmp_path, lines(row(), broken))
    assert f"line 2: the row lacks {key}. {ADVICE}" in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"length": "7"}, 'length is "7", not of type int.'),
        ({"length": True}, "length is true, not of type int."),
        ({"length": 7.0}, "length is 7.0, not of type int."),
        ({"length": 10**30}, "length does not fit into 64 bits."),
        ({"input": None}, "input is null, not of type str."),
        ({"_id": 3}, "_id is 3, not of type str."),
        ({"answers": "So."}, "answers is not a list of at least one string."),
        ({"answers": []}, "answers is not a list of at least one string."),
        ({"answers": ["So.", 1]}, "answers is not a list of at least one string."),
        ({"all_classes": [1]}, "all_classes is neither null nor a list of strings."),
        ({"all_classes": "x"}, "all_classes is neither null nor a list of strings."),
        ({"dataset": "qasper_e"}, "the row belongs to dataset 'qasper_e', not 'qasper'."),
        ({"_id": "a"}, "_id 'a' is already in line 1."),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    message = refusal(tmp_path, lines(row(), row(**{"_id": "b", **change})))
    assert message == f"{tmp_path / 'qasper.jsonl'}, line 2: {problem} {ADVICE}"


def test_the_line_counts_blank_lines_too(tmp_path: Path) -> None:
    assert "line 4: the row lacks" in refusal(tmp_path, lines(row()) + b"\n\n{}\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"input": "cut of', "invalid json"),
        (b"[1]", "does not match requested type"),
        (b"null", "null value"),
        (b'{"input": "\xff"}', "not valid utf-8"),
        (b'{"a": ' + b"[" * 200_000, "recursion"),
    ],
    ids=["half", "list", "null", "latin-1", "nested"],
)
def test_a_line_that_is_not_an_object_is_refused(tmp_path: Path, line: bytes, problem: str) -> None:
    message = refusal(tmp_path, lines(row()) + line)
    assert ", line 2: " in message and problem in message and message.endswith(ADVICE)


@pytest.mark.parametrize("key", ["context", "answers"])
def test_a_lone_surrogate_is_refused(tmp_path: Path, key: str) -> None:
    text = '"\\ud83d"' if key == "context" else '["\\ud83d"]'
    value = json.dumps(row(_id="b")).replace(json.dumps(row()[key]), text)
    assert "line 2: a string holds a lone surrogate" in refusal(tmp_path, lines(row()) + value.encode())


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "holds no rows" in refusal(tmp_path, content)


def test_a_missing_file_error_lists_existing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \.jsonl file\. --data takes a folder of <dataset>\.jsonl files"):
        load_rows(FolderSource(tmp_path), QASPER)
    (tmp_path / "trec.jsonl").touch()
    with pytest.raises(UsageError, match=r"qasper\.jsonl does not.*holds: trec\. Choose among these with --datasets"):
        load_rows(FolderSource(tmp_path), QASPER)


def test_longbench_e_rows_have_the_suffix(tmp_path: Path) -> None:
    wanted = [row(dataset="qasper_e")]
    assert load(tmp_path, lines(*wanted), e=True) == wanted
    with pytest.raises(UsageError, match="belongs to dataset 'qasper', not 'qasper_e'"):
        load(tmp_path, lines(row()), e=True)


def make_zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_a_zip_may_have_any_folder_and_is_described(tmp_path: Path) -> None:
    path = make_zip(
        tmp_path / "x.zip",
        [("data/qasper.jsonl", lines(row())), ("__MACOSX/data/qasper.jsonl", b"x"), ("data/my_qasper.jsonl", b"x")],
    )
    source = open_source(str(path), sample=SAMPLE)
    assert load_rows(source, QASPER).dataset.to_list() == [row()]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.describe() == {"source": "zip", "path": str(path), "sha256": digest}


@pytest.mark.parametrize("members", [[], ["a/qasper.jsonl", "b/qasper.jsonl"]])
def test_a_zip_without_exactly_one_member_is_refused(tmp_path: Path, members: list[str]) -> None:
    path = make_zip(tmp_path / "x.zip", [(name, lines(row())) for name in members])
    with pytest.raises(UsageError, match=f"holds {len(members)} members named qasper.jsonl; it must hold exactly one"):
        load_rows(ZipSource(path), QASPER)


@pytest.mark.parametrize("offset", [40, 60, -60])
def test_a_damaged_zip_is_refused(tmp_path: Path, offset: int) -> None:
    rows = [row(_id=str(number), context=hashlib.sha256(bytes([number])).hexdigest()) for number in range(50)]
    path = make_zip(tmp_path / "x.zip", [("qasper.jsonl", lines(*rows))])
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.zip (is not a readable zip|holds 0 members)"):
        load_rows(ZipSource(path), QASPER)


def test_row_counts_are_checked_for_hub_data_only(tmp_path: Path) -> None:
    task = load_tasks()["multifieldqa_en"]
    rows = [row(_id=str(number), dataset=task.name) for number in range(150)]
    whole = make_zip(tmp_path / "whole.zip", [(f"data/{task.name}.jsonl", lines(*rows))])
    part = make_zip(tmp_path / "part.zip", [(f"data/{task.name}.jsonl", lines(*rows[:149]))])
    assert len(load_rows(HubSource({"longbench": (whole, {"commit": "c"})}), task).dataset) == 150
    assert len(load_rows(ZipSource(part), task).dataset) == 149
    with pytest.raises(UsageError, match="holds 149 rows; the published dataset has 150"):
        load_rows(HubSource({"longbench": (part, {"commit": "c"})}), task)


@pytest.mark.parametrize(
    ("value", "why"), [("nowhere", "does not exist"), ("setup.cfg", "is neither a folder nor"), ("", "is neither")]
)
def test_an_invalid_data_value_lists_the_allowed_ones(tmp_path: Path, value: str, why: str) -> None:
    (tmp_path / "setup.cfg").write_text("[x]")
    with pytest.raises(UsageError, match=f"{why}.*Allowed: hub, sample, a folder of <dataset>.jsonl"):
        open_source(str(tmp_path / value) if value == "setup.cfg" else value, sample=SAMPLE)


def test_a_revision_needs_the_hub() -> None:
    with pytest.raises(UsageError, match="--data_revision v1 applies to --data hub only, not to --data sample"):
        open_source("sample", sample=SAMPLE, revision="v1")


def test_sources_describe_themselves(tmp_path: Path) -> None:
    assert open_source(str(tmp_path), sample=SAMPLE).describe() == {"source": "folder", "path": str(tmp_path)}
    assert open_source("sample", sample=SAMPLE) is SAMPLE


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans(), max_size=4))
def test_records_survive_dumping_to_one_line(record: dict[str, Any]) -> None:
    line = dumps(record).encode()
    assert b"\n" not in line
    assert [value for _, value in read_objects([line], "x", "y")] == [record]


def test_dumping_keeps_characters_and_refuses_invalid_values() -> None:
    assert dumps({"a": "é中\x85"}) == '{"a": "é中\x85"}'
    with pytest.raises(ValueError, match="JSON"):
        dumps({"a": float("nan")})


def test_other_json_packages_change_nothing(tmp_path: Path, run_python: Callable[..., CompletedProcess[str]]) -> None:
    # jsonlines reads with orjson or ujson where there is one, and these differ from json.
    for name in ("orjson", "ujson"):
        (tmp_path / f"{name}.py").write_text("def loads(text):\n    return {'wrong': 1}\n")
    code = (
        "import jsonlines, orjson; from sparsecache.longbench.jsonl import read_objects\n"
        "assert jsonlines.Reader([b'{}']).read() == {'wrong': 1}\n"
        'print(list(read_objects([b\'{"a": 1}\'], "x", "y")))'
    )
    done = run_python("-c", code, path=(tmp_path,))
    assert done.stdout == "[(1, {'a': 1})]\n", done.stderr
