"""Chinese words depend only on the installed jieba dictionary."""

import marshal
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import jieba
import pytest

from sparsecache.longbench.text import jieba_cut

RunPython = Callable[..., CompletedProcess[str]]
PREDICTION, ANSWER = "河边的小镇有一座石桥和一个集市", "小镇上有石桥"
OTHER = ({"小镇上有": 900, "小镇": 0, "石桥": 0, "石": 5, "桥": 5, "小": 1, "小镇上": 0, "镇": 1}, 1000)
SCORE = f"""
import sys
{{before}}
from sparsecache.longbench.metrics import Context, jieba_f1
print(round(100 * jieba_f1({PREDICTION!r}, {ANSWER!r}, Context()), 2))
"""


@pytest.mark.parametrize("kind", ["none", "another one", "corrupt", "a folder", "a pipe", "read-only folder"])
def test_a_shared_jieba_cache_changes_nothing(kind: str, run_python: RunPython, tmp_path: Path) -> None:
    cache = tmp_path / "jieba.cache"
    if kind == "another one":
        cache.write_bytes(marshal.dumps(OTHER))
    elif kind == "corrupt":
        cache.write_bytes(b"not marshal")
    elif kind == "a folder":
        cache.mkdir()
    elif kind == "a pipe":
        os.mkfifo(cache)
    elif kind == "read-only folder":
        tmp_path.chmod(0o555)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run_python("-c", SCORE.format(before=""), env={"TMPDIR": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("46.15\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_user_words_change_nothing(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("小镇上有 9000\n", encoding="utf-8")
    changes = f"import jieba; jieba.load_userdict({str(tmp_path / 'words.txt')!r}); jieba.add_word('石桥和一个', 99999)"
    done = run_python("-W", "ignore", "-c", SCORE.format(before=changes), env={"TMPDIR": str(tmp_path)})
    assert done.stdout == "46.15\n", done.stderr


def test_words_equal_those_of_a_fresh_jieba(fixtures_dir: Path) -> None:
    fresh = jieba.Tokenizer()
    text = (fixtures_dir / "raw" / "dureader.jsonl").read_text(encoding="utf-8")[:20_000]
    assert jieba_cut(text) == list(fresh.cut(text, cut_all=False))
