"""Text on a terminal: escapes, display widths, and shortening."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.longbench.terminal import display_width, escape_control_chars, pad, truncate_middle

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 会议 — ok", "plain, 会议 — ok"),
        ("one\ntwo\r\n\tthree", "one⏎two\\r⏎⇥three"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("abc\u202edef\u200b\ufeff", "abc\\u202edef\\u200b\\ufeff"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("half \ud800", "half \\ud800"),
        ("no character \ufffe\uffff", "no character \\ufffe\\uffff"),
        ("nor \U0002fffe\ufdd0\ufdef", "nor \\U0002fffe\\ufdd0\\ufdef"),
        ("full\u3000width", "full\u3000width"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_control_chars(text) == shown


@given(ANY_TEXT)
def test_any_text_becomes_one_printable_line(text: str) -> None:
    shown = escape_control_chars(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert shown.encode() and len(shown.splitlines()) == 1 if text else shown == ""
    assert escape_control_chars(shown) == shown


def test_display_widths() -> None:
    assert [display_width(text) for text in ("", "abc", "会议", "a会b", "e\u0301", "ｆｕｌｌ")] == [0, 3, 4, 4, 1, 8]
    assert pad("会", 4) == "会  " and pad("会", 4, right=True) == "  会"


def test_short_texts_are_unchanged() -> None:
    assert truncate_middle("abc", 3) == "abc" and truncate_middle("会议", 4) == "会议"


@given(st.text(st.characters(exclude_categories=("C", "Z"))), st.integers(1, 50))
def test_long_texts_keep_both_ends_and_count_the_rest(text: str, columns: int) -> None:
    found = truncate_middle(text, columns)
    if display_width(text) <= columns:
        assert found == text
        return
    match = re.fullmatch(r"(.*) \[\.\.\. (\d+) characters \.\.\.\] (.*)", found, re.DOTALL)
    assert match is not None
    head, left_out, tail = match.groups()
    assert text.startswith(head) and text.endswith(tail)
    assert len(head) + int(left_out) + len(tail) == len(text)
    assert columns - 2 <= display_width(head) + display_width(tail) <= columns
