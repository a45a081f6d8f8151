"""Two identities differ by named values, never by hashes or whole tables."""

import re
from typing import Any

import pytest

from sparsecache.longbench.identity import identity_differences

HASH = "3f786850e387550fdab836ed7e6dc881de23001b3f786850e387550fdab836ed"
OLD: dict[str, Any] = {
    "checkpoint": HASH,
    "method": "infinigen",
    "options": {"alpha": 5.0, "budget": 0.2, "calibration_file": None},
    "window": 4096,
    "chat": "none",
    "chat_wrapper": "x" * 500,
    "chat_template_args": {"enable_thinking": False},
    "probe_ids_sha256": HASH,
    "calibration_sha256": None,
    "stop_ids": [1, 2],
    "templates": {"qasper": HASH, "trec": HASH},
    "protocol": {"qasper": "max_new_tokens=128 chat=True newline_stop=False"},
    "data": {"qasper": HASH},
}


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        ({}, []),
        ({"options": OLD["options"] | {"alpha": 0.0}}, ["alpha: 5.0, now 0.0"]),
        ({"options": {"alpha": 5.0, "budget": 0.2, "sinks": 4}}, ["calibration_file: none, now not given",
                                                                 "sinks: not given, now 4"]),
        ({"checkpoint": HASH[::-1]}, ["the checkpoint's files: not the same"]),
        ({"window": 8192, "method": "h2o"}, ["method: infinigen, now h2o", "window: 4096, now 8192"]),
        ({"chat_wrapper": "y" * 500}, ["the rendered chat wrapper: not the same"]),
        ({"chat_template_args": {"enable_thinking": True}}, ["enable_thinking: false, now true"]),
        ({"probe_ids_sha256": "0"}, ["the token ids that the tokenizer gives a test text: not the same"]),
        ({"calibration_sha256": HASH}, ["the calibration text: not the same"]),
        ({"stop_ids": [1]}, ["stop_ids: [1, 2], now [1]"]),
        ({"chat": "<s>" * 100}, [f"chat: none, now {('<s>' * 100)[:40]}..."]),
        ({"templates": {"trec": "0", "lcc": "1"}}, ["the prompt template of trec: not the same"]),
        ({"data": {"qasper": "0"}}, ["the data of qasper: not the same"]),
        ({"protocol": {"qasper": "max_new_tokens=64 chat=True newline_stop=False"}},
         ["max_new_tokens of qasper: 128, now 64"]),
        ({"options": OLD["options"] | {"gates": f"sha256:{HASH[:16]}", "evict": f"b@{HASH[:16]},budget=1"}},
         ["gates: not given, now a file", "evict: not given, now b,budget=1"]),
        ({"method": f"mine@{HASH[:16]}"}, ["method: infinigen, now mine"]),
        ({"new_key": 1, "chat_clock": "2026-01-01"}, ["new_key: not recorded", "chat_clock: not recorded"]),
    ],
)  # fmt: skip
def test_each_difference_is_named(change: dict[str, Any], phrases: list[str]) -> None:
    found = list(identity_differences(OLD, OLD | change))
    assert found == phrases
    assert not any(re.search(r"[0-9a-f]{12}|\{", phrase) for phrase in found)


FIRST, SECOND = HASH[:16], HASH[::-1][:16]


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        (f"sha256:{FIRST}", f"sha256:{SECOND}", "the content of the file that x names: not the same"),
        (f"a@{FIRST},budget=1", f"a@{SECOND},budget=1", "the content of the file that x names: not the same"),
        (f"a@{FIRST},budget=1", f"a@{FIRST},budget=2", "x: a,budget=1, now a,budget=2"),
        ("my gates.tsv", f"sha256:{FIRST}", "the content of the file that x names: not recorded by an earlier version"),
        ("a.py,budget=1", f"a@{FIRST},budget=1",
         "the content of the file that x names: not recorded by an earlier version"),
        ("snapkv,budget=0.5", f"a@{FIRST},budget=0.5", "x: snapkv,budget=0.5, now a,budget=0.5"),
        (f"sha256:{FIRST}", None, "x: a file, now none"),
        (f"sha256:{FIRST}", f"sha256:{FIRST}", None),
    ],
)  # fmt: skip
def test_the_content_of_a_file_is_compared_and_not_shown(old: Any, new: Any, phrase: str | None) -> None:
    assert list(identity_differences({"options": {"x": old}}, {"options": {"x": new}})) == ([phrase] if phrase else [])


def test_a_calibration_file_whose_text_was_recorded_is_the_same() -> None:
    def identity(file: str | None, text: str | None) -> dict[str, Any]:
        return {"options": {"calibration_file": file}, "calibration_sha256": text}

    earlier, now = identity("a/text.txt", HASH), identity(f"sha256:{FIRST}", HASH)
    assert list(identity_differences(earlier, now)) == []
    other = identity(f"sha256:{SECOND}", HASH[::-1])
    assert list(identity_differences(now, other)) == list(identity_differences(earlier, other)) == [
        "the content of the file that calibration_file names: not the same", "the calibration text: not the same",
    ]  # fmt: skip
    assert len(list(identity_differences(identity("a", None), identity(f"sha256:{FIRST}", None)))) == 1
