"""Methods of one's own: a path to a .py file, or the dotted name of an installed module."""

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sparsecache.cache
from longbench_pred import main
from sparsecache.engine.base import Request
from sparsecache.engine.generator import Generator
from sparsecache.errors import UsageError
from sparsecache.methods import check_method_name, load_method, make_method, method_identity, parse_options, short_name
from tests.methods.stepping import (
    Kept,
    Text,
    budget_tokens,
    check_against,
    make_cache,
    prefill,
    random_text,
    random_texts,
    shape_of,
)

SOURCE = '''
"""Keeps the first prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from sparsecache.cache import EvictionMethod


@dataclass
class First(EvictionMethod):
    step: Annotated[int, "of the scores"] = {step}

    def score(self, q, k, v):
        return -self.step * torch.arange(k.shape[1]).expand(len(k), -1).float()
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a file below a folder that is not the current one, for one test."""
    known, folder = set(sys.modules), tmp_path / "elsewhere"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def make(name: str, source: str = SOURCE.format(step=1)) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    yield make
    for name in set(sys.modules) - known:
        if "elsewhere" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_file_of_any_folder_is_a_method(write) -> None:
    path = write("mine.py")
    for method in (str(path), os.path.relpath(path)):
        check_method_name(method)
        assert short_name(method) == "mine"
        options = parse_options(method, {"step": "2", "budget": "5"})
        assert options == {"budget": 5.0, "dense_layers": 2, "storage": "full", "step": 2}
        assert make_method(method, options).step == 2
    with pytest.raises(UsageError, match=r"step='x' is not a whole number\. step: of the scores \(default 1\)"):
        parse_options(str(path), {"step": "x"})
    with pytest.raises(UsageError, match="budget=0.0 must be a share above 0"):
        make_method(str(path), parse_options(str(path), {"budget": "0"}))


@pytest.mark.parametrize("name", ["torch.py", "json.py", "vanilla.py", "sparsecache.py", "a-b c.py", "x.y.py"])
def test_a_file_may_have_any_name_and_replaces_no_module(name, write) -> None:
    before = {module: sys.modules.get(module) for module in ("torch", "json", "sparsecache.methods.vanilla")}
    assert load_method(str(write(name))).__name__ == "First"
    assert before == {module: sys.modules.get(module) for module in before}
    assert method_identity("vanilla") == "vanilla" != method_identity(str(write(name)))


def test_the_identity_and_the_class_follow_the_file(write) -> None:
    path = write("mine.py")
    identity, first = method_identity(str(path)), load_method(str(path))
    assert identity.startswith("mine@") and method_identity(os.path.relpath(path)) == identity
    assert method_identity(str(write("copy/mine.py"))) == identity  # wherever the file lies
    assert load_method(os.path.relpath(path)) is first
    write("mine.py", SOURCE.format(step=7))
    assert method_identity(str(path)) != identity and parse_options(str(path), {})["step"] == 7
    write("mine.py")
    assert method_identity(str(path)) == identity and load_method(str(path)) is first


def test_a_module_of_an_installed_package_is_a_method(write, monkeypatch) -> None:
    package = write("caches_a/__init__.py", "").parent
    write("caches_a/first.py")
    write("caches_a/whole/__init__.py", "from caches_a.whole.parts import First")
    write(
        "caches_a/whole/parts.py", f"{SOURCE.format(step=1)}\n    def __post_init__(self):\n        self.budget / 2\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    for method, short in (("caches_a.first", "first"), ("caches_a.whole", "whole")):
        check_method_name(method)
        assert load_method(method).__name__ == "First" and short_name(method) == short
        assert method_identity(method).startswith(f"{short}@")
    with pytest.raises(UsageError, match=rf"with budget=x.*: TypeError: .* in {package}/whole/parts\.py, line \d+\."):
        make_method("caches_a.whole", {"budget": "x"})
    before = method_identity("caches_a.whole")
    write("caches_a/whole/parts.py", SOURCE.format(step=2))
    assert method_identity("caches_a.whole") != before


BROKEN = {
    "syntax.py": ("def f(:", r"SyntaxError: invalid syntax"),
    "division.py": ("\n\n1 / 0", r"ZeroDivisionError: division by zero, line 3\)"),
    "leaves.py": ("import sys\nsys.exit(0)", r"SystemExit: 0, line 2\)"),
    "needs.py": ("import no_such_library", r"ModuleNotFoundError: No module named 'no_such_library', line 1\)"),
    "lines.py": ("raise ValueError('one\\ntwo')", r"ValueError: one two, line 1\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_imported_is_refused_with_the_line(name, write) -> None:
    source, message = BROKEN[name]
    path = write(name, source)
    check_method_name(str(path))
    for _ in range(2):  # no half of the module stays behind
        with pytest.raises(UsageError, match=rf"^Method .*{name} cannot be imported \({message}"):
            load_method(str(path))


def test_a_file_that_is_no_text_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(b"\x00\xff\x80")
    with pytest.raises(UsageError, match="cannot be imported"):
        load_method(str(path))


def test_a_file_must_define_one_whole_method(write) -> None:
    one = SOURCE.format(step=1).replace("from __future__ import annotations", "")
    cases = {
        "none.py": ("from sparsecache.methods.vanilla import Vanilla", "exactly one subclass of CacheMethod; .* 0"),
        "two.py": (one + one.replace("class First", "class Second"), "it defines 2: First, Second"),
        "abstract.py": (one.replace("def score", "def scores"), "class First must also define score"),
        "alias.py": (one + "\nSame = First\n", None),
    }
    for name, (source, message) in cases.items():
        path = str(write(name, source))
        if message is None:
            assert load_method(path).__name__ == "First"
            continue
        with pytest.raises(UsageError, match=message):
            load_method(path)


FAILING = {
    "division": ("1 / (self.step - 3)", "ZeroDivisionError: division by zero"),
    "type": ("self.step.missing", "AttributeError: 'int' object has no attribute 'missing'"),
    "text": ("raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
    "leaves": ("raise SystemExit(0)", "SystemExit: 0"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_of_the_constructor_names_the_options_and_the_line(name, write) -> None:
    statement, message = FAILING[name]
    source = f"{SOURCE.format(step=1)}\n    def __post_init__(self):\n        {statement}\n"
    path = write("mine.py", source)
    with pytest.raises(UsageError) as refused:
        make_method(str(path), parse_options(str(path), {"budget": "5", "step": "3"}))
    assert str(refused.value) == (
        f"Method {path} fails with budget=5.0, dense_layers=2, step=3, storage=full: {message}. The error is in "
        f"{path}, line {len(source.splitlines())}. Correct that file."
    )
    assert refused.value.__cause__ is not None  # with the traceback, for users of the Python API


def test_an_error_of_an_inherited_constructor_names_the_file(write) -> None:
    path = write("mine.py", SOURCE.format(step="1\n    dense_layers: int | None = None"))
    with pytest.raises(UsageError, match=rf"dense_layers=none.*: TypeError: .* The error is in {path}\. Correct"):
        make_method(str(path), parse_options(str(path), {}))


@pytest.mark.parametrize(
    "method",
    ["no_such.py", "./no_such.py", "../no_such/mine.py", "folder/", "folder.py", "mine.txt/", "", "/dev/null", "a/b"],
)
def test_a_file_that_does_not_exist_is_refused(method, write, tmp_path) -> None:
    (tmp_path / "here" / "folder.py").mkdir()
    with pytest.raises(UsageError, match=r"there is no such \.py file|There is no method ''"):
        check_method_name(method)


@pytest.mark.parametrize("method", ["no_such.module", "json.no_such", ".mine", "mine.", "a..b", "sys.path", "x.\x00"])
def test_a_module_that_does_not_exist_is_refused(method) -> None:
    with pytest.raises(UsageError, match="no module of this name is installed"):
        check_method_name(method)


def test_a_module_in_a_broken_package_is_refused(write, monkeypatch) -> None:
    write("caches_b/__init__.py", "raise RuntimeError('no')")
    monkeypatch.syspath_prepend(str(write("caches_b/first.py").parent.parent))
    with pytest.raises(UsageError, match="no module of this name is installed"):
        check_method_name("caches_b.first")


def test_a_module_that_is_no_method_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Method json\.decoder must define exactly one subclass of CacheMethod"):
        load_method("json.decoder")


def test_a_name_without_its_ending_is_understood(write, tmp_path) -> None:
    (tmp_path / "here" / "mine.py").write_text(SOURCE.format(step=1))
    with pytest.raises(UsageError, match=r"There is no method 'mine'; did you mean 'mine\.py'\?"):
        check_method_name("mine")


def test_a_run_by_path_records_the_identity_and_follows_the_file(write, checkpoint, tmp_path) -> None:
    path = write("mine.py")

    def predict(method: str, *options: str):
        arguments = [
            *("--model", str(checkpoint("llama")), "--datasets", "trec", "--data", "sample", "--sample_rows", "1"),
            *("--sample_tokens", "256", "--device", "cpu", "--pred_dir", str(tmp_path / "pred"), "--name", "mine"),
        ]
        return CliRunner().invoke(main, [*arguments, "--method", method, *options])

    told = predict(os.path.relpath(path), "-o", "budget=20")
    assert told.exit_code == 0, told.output
    folder = tmp_path / "pred" / "llama" / "mine"
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    assert identity["method"] == method_identity(str(path))
    row = json.loads((folder / "trec.jsonl").read_text(encoding="utf-8"))
    assert 0 < row["kept"] < 1 and row["dense_layers"] == 2
    assert predict(str(path), "-o", "budget=20").exit_code == 0  # the same file by another path: the same run
    write("mine.py", SOURCE.format(step=2))
    told = predict(str(path), "-o", "budget=20")
    assert told.exit_code == 2 and "the content of the file that method names: not the same" in told.stderr
    told = predict("no_such.py")
    assert told.exit_code == 2 and told.stderr.startswith("Error: Method no_such.py: there is no such .py file.")


def _lowest_norms(text: Text, layer: int, budget: float) -> list[Kept]:
    """Return the prompt tokens whose keys have the lowest norms, and all new ones."""
    norms = text.k[layer, :, : text.prompt].double().norm(dim=2).tolist()
    count = budget_tokens(budget, text.prompt)
    kept = [sorted(sorted(range(text.prompt), key=of_head.__getitem__)[:count]) for of_head in norms]
    ends = range(text.prompt, text.prompt + text.new)
    return [[[*of_head, *range(text.prompt, end)] for of_head in kept] for end in ends]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("budget", [0.3, 1.0, 1, 9])
def test_the_example_keeps_the_keys_of_lowest_norm(budget, group, repo) -> None:
    method = str(repo / "examples" / "knorm.py")
    made = make_method(method, {**parse_options(method, {}), "budget": budget, "dense_layers": 1})
    shape = shape_of(group)
    check_against(lambda text, layer: _lowest_norms(text, layer, budget), made, shape, random_texts(shape))


def test_a_method_by_path_decodes(write, decoder) -> None:
    method = make_method(str(write("mine.py")), {"budget": 4.0, "dense_layers": 0, "step": 1})
    with torch.inference_mode():
        (done,) = Generator(decoder("llama", method), 1).generate([Request(0, list(range(40)), 5, ())])
    assert done.error is None and done.report["kept"] < 0.2


@pytest.mark.parametrize("composed", [False, True], ids=["alone", "composed"])
def test_scores_of_another_shape_are_refused(composed, write) -> None:
    path = write("mine.py", SOURCE.format(step=1).replace("k.shape[1]", "k.shape[1] - 3"))
    name = "composed" if composed else str(path)
    options = {"budget": "5", "dense_layers": "0"}
    if composed:
        options = {"evict": f"{path},budget=5,dense_layers=0", "select": "quest,budget=3,dense_layers=0"}
    shape = shape_of(2)
    cache = make_cache(make_method(name, parse_options(name, options)), shape, 1, 60, 4)
    with pytest.raises(ValueError, match=r"score returned \[2, 37\]\. It must return .* token, \[2, 40\]\."):
        prefill(cache, 0, random_text(shape, 40, 4, seed=1))


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_what_a_method_in_the_docs_imports_of_the_cache_is_there_under_one_path(page, repo) -> None:
    imported = re.findall(r"(?m)^from sparsecache\.cache[.\w]* import (.+)$", (repo / page).read_text(encoding="utf-8"))
    names = {name for line in imported for name in line.split(", ")}
    assert names and names <= set(sparsecache.cache.__all__)
