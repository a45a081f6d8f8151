"""Tables are aligned, every format reads back, and data never leaves its cell."""

import csv
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.longbench.tables import (
    FORMATS,
    Cell,
    Document,
    Table,
    merge_documents,
    number,
    records,
    render,
    text_table,
    to_csv,
    to_latex,
    to_markdown,
    to_terminal,
    words,
)
from sparsecache.longbench.terminal import display_width, escape_control_chars

ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text(
    "|\\`*_[]<>~&$#%{}^-@=+\"',\n\r\t\x1b会a1 ", max_size=9
)
NASTY = "\\ | * _ ` [x](y) <b> & $ # % { } ~ ^ \x1b[2J \n -1 会议 =1+1"


def document(*texts: str) -> Document:
    head, *rows = ([text, text] for text in texts)
    cells = [[words(first), words(second)] for first, second in rows]
    flat = records("", [{"name": text, "value": 1 / 3} for text in texts[1:]])
    return Document([Table(texts[0], head, cells)], flat, title=texts[0], preamble=[texts[0]], notes=[texts[-1]])


def test_columns_are_aligned() -> None:
    text = text_table(["name", "n", "score"], [["a", "1", "10.00"], [], ["longer", "100", "9.5"]])
    assert text.split("\n") == [
        "name      n  score",
        "------  ---  -----",
        "a         1  10.00",
        "------  ---  -----",
        "longer  100    9.5",
    ]


def test_chinese_columns_are_aligned() -> None:
    rows = [[words("会议记录"), words("x"), number(1.5, 2)], [words("ab"), words("议"), number(None, 2)]]
    lines = to_terminal(Table("标题", ["name", "left", "right"], rows, "llr")).split("\n")
    assert lines == [
        "标题",
        "name      left  right",
        "--------  ----  -----",
        "会议记录  x      1.50",
        "ab        议        -",
    ]
    assert len({display_width(line) for line in lines[1:]}) == 1


def test_marking_the_best_keeps_the_alignment() -> None:
    rows = [[words("a"), number(10, 1, best=True), number(9, 1)], [], [words("b"), number(1, 1), number(1, 1)]]
    found = Table("", ["x", "one", "two"], rows)
    assert to_terminal(found).split("\n") == [
        "x   one   two",
        "-  -----  ---",
        "a  10.0*  9.0",
        "-  -----  ---",
        "b   1.0   1.0",
    ]
    assert "| a | **10.0** | 9.0 |" in to_markdown(found)
    assert r"a & \textbf{10.0} & 9.0 \\" in to_latex(found)
    assert to_csv(found) == "x,one,two\na,10,9\nb,1,1"


def read_markdown(text: str) -> list[list[str]]:
    """Parse a GitHub table: bars end cells, and a backslash escapes the punctuation after it."""
    lines = [_hidden(line).split("|")[1:-1] for line in text.split("\n")]
    return [[_shown(cell).strip(" ") for cell in line] for line in lines]


def _hidden(line: str) -> str:
    return re.sub(r"\\(.)", lambda match: chr(0xE000 + ord(match[1])), line)


def _shown(cell: str) -> str:
    return re.sub("[\ue000-\ue07f]", lambda match: chr(ord(match[0]) - 0xE000), cell)


@given(st.lists(ANY_TEXT.filter(lambda text: not re.search("[\ue000-\ue07f]", text)), min_size=1, max_size=5))
def test_markdown_reads_back(texts: list[str]) -> None:
    made = Table("", ["a", *texts], [[words("b"), *map(words, texts)], [], [words(NASTY), *map(words, texts)]])
    head, rule, *rows = read_markdown(to_markdown(made))
    expected = [escape_control_chars(text).strip(" ") for text in texts]
    assert head == ["a", *expected]
    assert rule == [":---", *["---:"] * len(texts)]
    assert rows == [["b", *expected], [escape_control_chars(NASTY), *expected]]


@given(ANY_TEXT)
def test_markdown_escapes_markup(text: str) -> None:
    bare = re.sub(r"\\.", "", to_markdown(Table("", [text], [[words(text)]])))
    rule = "| :--- |"
    assert not set("\\`*_[]<>~&$#") & set(bare.replace(rule, ""))
    assert bare.count("|") == 6 and bare.count("\n") == 2


def read_latex(cell: str) -> str:
    plain = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
             r"\textgreater{}": ">", r"\textbar{}": "|", "{[}": "[", "{]}": "]", "{*}": "*", "$-$": "-"}  # fmt: skip
    tokens = re.findall(r"\\text\w+\{\}|\\.|\{[\[\]*]\}|\$-\$|[^\\{}$&#%_~^<>|\[\]*]", cell)
    assert "".join(tokens) == cell, "an active character is left"
    return "".join(plain.get(token) or (token[1:] if token[0] == "\\" else token) for token in tokens)


@given(ANY_TEXT)
def test_latex_reads_back_and_escapes_commands(text: str) -> None:
    lines = to_latex(Table(text, [text, "n"], [[words(text), words("1")], [], [words("[0]"), words("*")]])).split("\n")
    start = 1 if text else 0
    assert not text or lines[0] == f"% {escape_control_chars(text)}"
    assert lines[start:][:2] == [r"\begin{tabular}{lr}", r"\toprule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert [line for line in lines if "rule" in line and "&" not in line and line[0] == "\\"] == [
        r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]  # fmt: skip
    head, body = lines[start + 2], lines[start + 4]
    for line, second in ((head, "n"), (body, "1")):
        assert line.endswith(rf" & {second} \\")
        assert read_latex(line.removesuffix(rf" & {second} \\")) == escape_control_chars(text)
    assert lines[start + 6] == r"{[}0{]} & {*} \\"


def test_latex_uses_math_mode_for_negative_numbers() -> None:
    text = to_latex(Table("", ["a"], [[words("-1.5 to -0.2")], [words("2020-01-02 a-b v-1")]]))
    assert "$-$1.5 to $-$0.2" in text and "2020-01-02 a-b v-1" in text


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_csv_reads_back(texts: list[str]) -> None:
    rows = [{"text": text, "number": 1 / 3, "none": None, "flag": True, "minus": -0.5} for text in texts]
    found = list(csv.DictReader(io.StringIO(to_csv(records("", rows)))))
    for text, line in zip(texts, found, strict=True):
        guard = "'" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and text else ""
        assert line == {
            "text": guard + escape_control_chars(text), "number": repr(1 / 3), "none": "", "flag": "True",
            "minus": "-0.5",
        }  # fmt: skip


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_csv_escapes_formulas(text: str) -> None:
    assert to_csv(records("", [{"a": text}])).split("\n")[1].startswith("'")


@given(ANY_TEXT)
def test_json_reads_back_unrounded(text: str) -> None:
    found = json.loads(render(document("t", text), "json"))
    assert found == {"title": "t", "rows": [{"name": text, "value": 1 / 3}], "notes": ["t", text]}
    assert render(document("t", text), "json").isascii()


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        render(Document([], records("", [{"a": float("nan")}])), "json")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_escapes_control_characters(format: str) -> None:
    nasty = "a\x1b[31m\x07\x9b2J\u202e\u2028\x85\r\tb\ud800"
    text = render(document(nasty, nasty, nasty), format)
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.encode()


def test_notes_are_above_and_below_the_tables() -> None:
    flat = records("", [])
    one = Table("", ["a"], [[words("1")]])
    assert render(Document([one], flat, "title", ["lead"], ["note"]), "terminal") == "title\nlead\na\n-\n1\nnote"
    two = Document([one, Table("second", ["b"], [])], flat, "title", [], ["first", "second"])
    assert render(two, "terminal") == "title\n\na\n-\n1\n\nsecond\nb\n-\n\nfirst\nsecond"
    assert render(two, "markdown").split("\n\n") == [
        "## title", "| a |\n| :--- |\n| 1 |", "### second", "| b |\n| :--- |", "first", "second"]  # fmt: skip
    assert render(two, "latex").startswith("% title\n\n\\begin{tabular}{l}\n")
    assert render(two, "latex").endswith("% first\n% second")
    assert render(two, "csv") == ""


def test_merged_documents_keep_their_titles() -> None:
    first, second = (
        Document([Table("", ["a"], [[words(name)]])], records("", [{"run": name}]), name, ["lead"], ["note"])
        for name in ("x", "y")
    )
    assert merge_documents([first]) == first
    both = merge_documents([first, second])
    assert [table.title for table in both.tables] == ["x", "y"]
    assert to_csv(both.records) == "run\nx\ny"
    assert both.all_notes == ["x: lead", "x: note", "y: lead", "y: note"]


def test_cells_keep_the_unrounded_value() -> None:
    assert number(1 / 3, 2) == Cell("0.33", 1 / 3)
    assert number(None, 2) == Cell("-", None)
    assert words("a").value == "a"
    value: Any = records("t", [{"a": None, "b": 0.1}]).rows[0]
    assert [cell.value for cell in value] == [None, 0.1]
