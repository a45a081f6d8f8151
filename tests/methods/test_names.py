"""Methods are found by file name, without torch, and options are converted by annotation."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsecache.methods
from sparsecache.errors import UsageError
from sparsecache.methods import (
    check_method_name,
    describe_methods,
    load_method,
    make_method,
    method_meaning,
    method_names,
    method_options,
    parse_options,
)
from sparsecache.methods.vanilla import Vanilla

GOOD = """'''{name}: a paper and its address.

More of it.
'''

from typing import Annotated, Literal

from sparsecache.methods.vanilla import Vanilla as Base


class {name}(Base):
    def __init__(
        self,
        budget: Annotated[int, "tokens attended to, 1 or more"] = 64,
        share: Annotated[float, "how wide"] = 0.5,
        exact: Annotated[bool, "no guessing"] = False,
        mode: str = "mean",
        window: Annotated[int | None, "last tokens; none: all"] = None,
        fetch: Annotated[Literal["mean", "per_head"], "how many for a layer"] = "mean",
        rule: "Annotated[Literal['max'] | None, 'a second one']" = None,
        args: int = 1,
    ):
        if budget < 1:
            raise ValueError(f"budget is {{budget}}; it must be 1 or more.")
        self.chosen = dict(budget=budget, share=share, exact=exact, mode=mode, window=window, fetch=fetch, rule=rule,
                           args=args)
"""
DEFAULTS = {
    "budget": 64, "share": 0.5, "exact": False, "mode": "mean", "window": None, "fetch": "mean", "rule": None,
    "args": 1,
}  # fmt: skip


@pytest.fixture
def add_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a file beside the built-in methods, for one test."""
    monkeypatch.setattr(sparsecache.methods, "__path__", [*sparsecache.methods.__path__, str(tmp_path)])
    before = set(sys.modules)

    def add(name: str, source: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        return path.stem

    yield add
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_listing_and_refusing_names_imports_no_torch_and_no_method(run_python) -> None:
    told = run_python(
        "-c",
        "import sys\n"
        "from sparsecache.methods import check_method_name, method_names\n"
        "print(*method_names())\n"
        "try:\n    check_method_name('vanila')\n"
        "except Exception as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'sparsecache.methods.vanilla'} & set(sys.modules)))",
    )
    names, refusal, modules = told.stdout.splitlines()
    assert "vanilla" in names.split()
    assert refusal == (
        "There is no method 'vanila'; did you mean 'vanilla'? Give a method of longbench_pred.py --list_methods, the "
        "path of a .py file, or the dotted name of an installed module."
    )
    assert modules == "[]"


def test_a_new_file_or_package_is_a_method_and_helpers_are_not(add_method) -> None:
    add_method("sieve.py", GOOD.format(name="Sieve"))
    add_method("_helper.py", "")
    add_method("net/__init__.py", "from sparsecache.methods.net.parts import Net")
    add_method("net/parts.py", GOOD.format(name="Net"))
    add_method("notes.txt", "")
    assert {"sieve", "net", "vanilla"} <= set(method_names())
    assert not {"_helper", "helper", "notes"} & set(method_names())
    assert load_method("sieve").__name__ == "Sieve"
    assert load_method("net").__name__ == "Net"
    with pytest.raises(UsageError, match="_helper"):
        check_method_name("_helper")


def test_vanilla_is_found_and_has_no_options() -> None:
    assert load_method("vanilla") is Vanilla
    assert isinstance(make_method("vanilla", {}), Vanilla)
    with pytest.raises(UsageError, match=r"Method vanilla has no option 'budget'. Its options: offload=false\."):
        parse_options("vanilla", {"budget": "64"})


def test_a_method_has_a_storage_or_says_why_not_and_what_to_use() -> None:
    for method in method_names():
        if "storage" in method_options(load_method(method)):
            assert not load_method(method).absent_options
            continue
        with pytest.raises(UsageError, match=rf"^Method {method} has no option 'storage': \w.*\. \w.*\.$") as raised:
            parse_options(method, {"storage": "int4"})
        assert "Its options" not in str(raised.value)


def test_options_are_converted_and_completed(add_method) -> None:
    add_method("sieve.py", GOOD.format(name="Sieve"))
    assert parse_options("sieve", {}) == DEFAULTS
    given = {
        "budget": "7", "share": "1e-2", "exact": "True", "mode": "7", "window": "8", "fetch": "per_head", "rule": "max",
    }  # fmt: skip
    found = parse_options("sieve", given)
    assert found == {
        "budget": 7, "share": 0.01, "exact": True, "mode": "7", "window": 8, "fetch": "per_head", "rule": "max",
        "args": 1,
    }  # fmt: skip
    assert [type(found[key]) for key in given] == [int, float, bool, str, int, str, str]
    assert make_method("sieve", found).chosen == found
    assert parse_options("sieve", {"exact": "false", "window": "none", "rule": "None"}) == DEFAULTS
    assert parse_options("sieve", {"share": "inf"})["share"] == math.inf


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "budget",
            "many",
            r"Method sieve: budget='many' is not a whole number\. budget: tokens attended to, 1 or more "
            r"\(default 64\)\.$",
        ),
        ("budget", "0.5", r"budget='0.5' is not a whole number"),
        ("budget", "inf", r"budget='inf' is not a whole number"),
        ("share", "half", r"share='half' is not a number\. share: how wide"),
        ("share", "nan", r"share='nan' is not a number"),
        ("share", "5%", r"share='5%' is not a number\. 5% is 0\.05\. share: how wide"),
        ("share", "x%", r"share='x%' is not a number\. share: how wide"),
        ("share", "none", r"share='none' is not a number"),
        ("exact", "yes", r"exact='yes' is not true or false"),
        ("window", "wide", r"window='wide' is not a whole number or none\. .*\(default none\)"),
        ("fetch", "max", r"fetch='max' is not one of mean, per_head\. fetch: how many for a layer \(default mean\)"),
        ("rule", "mean", r"rule='mean' is not one of max or none"),
        ("args", "x", r"args='x' is not a whole number\. longbench_pred\.py --list_methods"),
        (
            "budgets",
            "1",
            r"no option 'budgets'; did you mean 'budget'\? Its options: budget=64, share=0.5, exact=false, .*"
            r"window=none, .*args=1\.$",
        ),
        ("self", "1", r"no option 'self'"),
    ],
)
def test_bad_options_are_refused_with_the_value_and_what_is_allowed(key, value, message, add_method) -> None:
    add_method("sieve.py", GOOD.format(name="Sieve"))
    with pytest.raises(UsageError, match=message):
        parse_options("sieve", {key: value})


def test_every_method_is_described_with_its_options_under_its_kind(add_method) -> None:
    add_method("sieve.py", GOOD.format(name="Sieve"))
    lines = list(describe_methods())
    headings = [line.partition(":")[0] for line in lines if line[0] != " "]
    named = [line.partition(":")[0].strip() for line in lines if line[:2] == "  " and line[2] != " "]
    assert sorted(named) == method_names() and headings[:3] == ["full", "selection", "eviction"]
    order = [next(at for at, line in enumerate(lines) if line.startswith(f"{text}:")) for text in (
        "full", "  vanilla", "selection", "  quest", "eviction", "  snapkv", "  streaming",
    )]  # fmt: skip
    assert order == sorted(order)
    start = lines.index("  sieve: Sieve: a paper and its address.")
    assert start < order[2]
    assert lines[start + 1 : start + 9] == [
        "    -o budget=64    tokens attended to, 1 or more [a whole number]",
        "    -o share=0.5    how wide [a number]",
        "    -o exact=false  no guessing [true or false]",
        "    -o mode=mean     [text]",
        "    -o window=none  last tokens; none: all [a whole number or none]",
        "    -o fetch=mean   how many for a layer [one of mean, per_head]",
        "    -o rule=none    a second one [one of max or none]",
        "    -o args=1        [a whole number]",
    ]


@pytest.mark.parametrize("name", method_names())
def test_every_method_and_every_option_has_its_meaning_in_one_line(name) -> None:
    assert method_meaning(name).strip(), f"methods/{name} begins without a docstring."
    for option in method_options(load_method(name)).values():
        whole = f'-o {option.name}: annotate it Annotated[type, "meaning"], with one line that does not end in a stop.'
        assert option.meaning and option.meaning == " ".join(option.meaning.split()).rstrip("."), whole


def test_a_value_out_of_range_is_refused_in_the_methods_words(add_method) -> None:
    add_method("sieve.py", GOOD.format(name="Sieve"))
    with pytest.raises(
        UsageError,
        match=r"Method sieve refuses its options: budget is 0; it must be 1 or more\. longbench_pred\.py --list_",
    ):
        make_method("sieve", parse_options("sieve", {"budget": "0"}))


def test_a_broken_file_shows_its_own_traceback(add_method) -> None:
    add_method("broken.py", "import torch\n\n\ndef oops():\n    return 1 / 0\n\n\nX = oops()\n")
    assert "broken" in method_names()
    with pytest.raises(ZeroDivisionError) as raised:
        load_method("broken")
    assert [(Path(str(entry.path)).name, entry.name) for entry in raised.traceback][-1] == ("broken.py", "oops")


def test_a_missing_import_of_a_method_is_not_taken_for_a_missing_method(add_method) -> None:
    add_method("needy.py", "import no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_method("needy")


def test_exactly_one_method_a_file(add_method) -> None:
    add_method("none.py", "from sparsecache.methods.vanilla import Vanilla")
    add_method("two.py", GOOD.format(name="One") + GOOD.format(name="Two"))
    with pytest.raises(UsageError, match=r"Method none must define exactly one subclass of CacheMethod; .*defines 0"):
        load_method("none")
    with pytest.raises(UsageError, match="defines 2: One, Two"):
        load_method("two")


def test_a_name_that_begins_anothers_is_not_mixed_up_with_it(add_method) -> None:
    add_method("sieve_fine.py", GOOD.format(name="Fine"))
    add_method("sieve.py", "from sparsecache.methods.sieve_fine import Fine\n" + GOOD.format(name="Sieve"))
    assert load_method("sieve").__name__ == "Sieve"


@pytest.mark.parametrize("argument", ["budget", "budget=64", "budget: int"])
def test_an_option_without_a_type_or_a_default_is_a_mistake_of_the_file(argument, add_method) -> None:
    source = "from sparsecache.methods.vanilla import Vanilla as Base\n\n\nclass Sieve(Base):\n"
    add_method("sieve.py", f"{source}    def __init__(self, {argument}):\n        pass\n")
    with pytest.raises(UsageError, match="Sieve.*option budget needs an annotation and a default"):
        parse_options("sieve", {})


@pytest.mark.parametrize("kind", ["list[int]", "int | float", "object", "None", "dict", "'dict'"])
def test_an_option_that_no_text_can_give_is_a_mistake_of_the_file(kind, add_method) -> None:
    source = "from sparsecache.methods.vanilla import Vanilla as Base\n\n\nclass Sieve(Base):\n"
    add_method("sieve.py", f"{source}    def __init__(self, budget: {kind} = None):\n        pass\n")
    with pytest.raises(UsageError, match=r"Sieve.*option budget is of type .*Types: float, int, bool, str, FilePath"):
        parse_options("sieve", {})


@pytest.mark.parametrize("annotation", ["'no_such_type'", "'int |'"])
def test_an_annotation_that_cannot_be_evaluated_is_a_mistake_of_the_file(annotation, add_method) -> None:
    source = "from sparsecache.methods.vanilla import Vanilla as Base\n\n\nclass Sieve(Base):\n"
    add_method("sieve.py", f"{source}    def __init__(self, budget: {annotation} = 1):\n        pass\n")
    with pytest.raises(UsageError, match="The options of Sieve cannot be read"):
        parse_options("sieve", {})
