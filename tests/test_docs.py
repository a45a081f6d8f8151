"""The documents: their commands are understood, their links and files exist, and the README's code runs.

In one file because its tests share the reading of blocks and commands.
"""

import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

import longbench_eval
import longbench_pred
from sparsecache.bench.specs import specs_of_methods
from sparsecache.cli import DefaultGroup
from sparsecache.errors import UsageError
from sparsecache.longbench.records import read_rows
from sparsecache.methods import load_method, method_names, parse_options
from sparsecache.testing import contract
from sparsecache.testing.cache_checks import check_counts, check_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
SCRIPTS = ("bench", "recall", "select_rows", "study", "study_pairs", "sweep", "write_sample")
MODEL = "smollm2-135m-instruct"
OTHER_FLAGS = {
    "--help",
    "--no-deps",
    "--nodes",
    "--head",
    "--port",
    "--address",
    "--num-cpus",
    "--generate",
    "--extra-index-url",
}
"""Options of pip, Slurm and Ray."""


@cache
def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module(name)


@cache
def programs() -> dict[str, click.Command]:
    """The programs whose arguments are checked, by what stands behind `python`."""
    return {
        "longbench_pred.py": longbench_pred.main,
        "longbench_eval.py": longbench_eval.main,
        "sparsecache.testing.contract": contract.main,
        **{f"scripts/{name}.py": script(name).main for name in SCRIPTS},
    }


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def lines(block: str) -> list[str]:
    """The commands of a block of shell: continued lines joined, variables of the block put in."""
    variables: dict[str, str] = {}
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r"(\w+)=(\S+|\".*\"|\$\(.*\))", line):
            name, value = assigned.groups()
            variables[name] = MODEL if value.startswith("$(") else value.strip('"')
            found += [value[2:-1]] if value.startswith("$(") else []
        elif line.split("#")[0].strip():
            for name, value in variables.items():
                line = line.replace(f'"${name}"', value).replace(f"${name}", value)
            found.append(line)
    return found


def command(line: str) -> list[str]:
    """The program that a line starts, and its arguments; an empty list where it starts none of ours."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["sbatch"]:
        words = words[words.index("scripts/slurm.sh") :]
    if words[:1] == ["scripts/slurm.sh"]:
        words = words[1:]
    if words[:1] == ["scripts/sweep.sh"]:
        return ["scripts/sweep.py", *words[1:]]
    if words[:2] == ["python", "-m"]:
        return words[2:]
    if words[:1] == ["python"]:
        return words[1:]
    return words if words and words[0].startswith("scripts/") else []


def check(words: list[str]) -> None:
    """Parses a command down to its last option, and runs nothing. Raises click's errors and the options' own."""
    name, *arguments = words
    program = programs()[name]
    if isinstance(program, DefaultGroup):
        chosen = arguments.pop(0) if arguments[0] in program.commands else program.default
        program = program.commands[chosen]
    try:
        found = program.make_context(name, arguments).params
    except click.exceptions.Exit:  # --list_methods, --help
        return
    for pair in found.get("options") or ():
        key, _, value = pair.partition("=") if isinstance(pair, str) else (pair[0], "=", pair[1])
        if found.get("methods"):
            specs_of_methods(found["methods"], {key: value}, {})
        elif found["method"] in method_names():
            parse_options(found["method"], {key: value})


def every_command(page: str) -> list[list[str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [command(line) for block in blocks(text, "bash") for line in lines(block)]
    spans = re.findall(r"`((?:python|scripts/\w+\.sh) [^`]+)`", text)
    return [words for words in [*found, *(command(span.replace("\n", " ")) for span in spans)] if words]


def known_flags() -> set[str]:
    commands = [*programs().values(), *longbench_eval.main.commands.values()]
    return {flag for each in commands for option in each.params for flag in option.opts} | OTHER_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    for words in every_command(page):
        if words[0] in programs() and words[1:]:
            check(words)
        elif words[0].endswith((".py", ".sh")):
            assert (ROOT / words[0]).is_file(), words
        else:
            assert importlib.util.find_spec(words[0]), words


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert flags <= known_flags() | train_flags(), flags - known_flags()


@cache
def train_flags() -> set[str]:
    """Options of the training example, which is an argparse program."""
    text = (ROOT / "examples" / "train_demo" / "train.py").read_text(encoding="utf-8")
    text += (ROOT / "scripts" / "fetch_model.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(--\w+)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:sparsecache|scripts|tests|configs|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_order_of_imports_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tested = (ROOT / "tests" / "test_structure.py").read_text(encoding="utf-8")
    (order,) = re.findall(r"^ORDER = \(\n(.*?)^\)", tested, flags=re.DOTALL | re.MULTILINE)
    stated = re.search(r"in this order:\n\n```\n(.*?)```", page, flags=re.DOTALL)
    assert stated and stated.group(1).split() == [name for name in re.findall(r"\w+", order) if name != "__init__"]


@pytest.mark.parametrize("page", PAGES)
def test_paragraphs_are_short(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n(?=\n|[-*] |\d+\. )", text)
    long = [part for part in paragraphs if not part.strip().startswith("|") and len(part.strip().splitlines()) > 5]
    assert not long


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Methods"), ("docs/methods.md", "## Built-in methods")])
def test_the_tables_hold_the_built_in_methods(page: str, heading: str) -> None:
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    cells = [row.split("|")[1 if "methods.md" in page else 2] for row in rows]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(method_names())


@pytest.mark.parametrize(
    "line",
    [
        "python longbench_pred.py --modle demo",
        "python longbench_pred.py --method infinigen -o aplha=3",
        "python longbench_eval.py plot demo/vanilla --kind pie --out a.svg",
        "scripts/sweep.sh configs/sweeps/budgets.toml --job 4",
        "OMP_NUM_THREADS=1 python scripts/bench.py decode --token 5",
        "sbatch --nodes=2 scripts/slurm.sh python longbench_pred.py --worker_count 2",
    ],
)
def test_a_command_that_is_not_understood_is_found(line: str) -> None:
    with pytest.raises((click.UsageError, UsageError)):
        check(command(line))


def test_the_ci_example_is_the_workflow_file_and_its_commands_are_understood() -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    workflow = (ROOT / "docs" / "gate.yml").read_text(encoding="utf-8")
    assert blocks(page, "yaml") == [workflow]
    steps = yaml.safe_load(workflow)["jobs"]["infinigen"]["steps"]
    found = [command(step["run"]) for step in steps if step.get("run", "").startswith("python")]
    assert [words[0] for words in found] == ["longbench_pred.py", "longbench_pred.py", "longbench_eval.py"]
    for words in found:
        check(words)


def readme(language: str, word: str) -> str:
    """The README's one block of a language that holds a word."""
    found = [block for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"), language) if word in block]
    assert len(found) == 1, word
    return found[0]


def run(line: str, *more: str) -> None:
    """Runs a command in this process. A gate may fail; nothing else may."""
    name, *arguments = command(line)
    result = CliRunner().invoke(programs()[name], [*arguments, *more])
    assert result.exit_code in ((0, 1) if "gate" in arguments else (0,)), f"{line}\n{result.output}"


SMALLER = ("--datasets", "qasper", "--sample_rows", "1", "--sample_tokens", "512")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader with a checkpoint of this name: here the bundled one."""
    (tmp_path / MODEL).symlink_to(ROOT / "sparsecache" / "demo" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_python_of_the_readme_run(folder: Path) -> None:
    download, *commands = lines(readme("bash", "fetch_model.py"))
    assert download == f"python scripts/fetch_model.py {MODEL} --out models"
    for line in commands:
        run(line, *(SMALLER if "longbench_pred" in line else ()))

    code = (
        readme("python", "evaluate(")
        .replace(f"models/{MODEL}.gguf", MODEL)
        .replace('["samsum", "triviaqa"]', '"qasper"')
    )
    code = code.replace('"sample_rows": 5, "sample_tokens": 1024', '"sample_rows": 1, "sample_tokens": 512')
    known: dict[str, Any] = {}
    exec(code, known)
    assert list(known["sparse"].scores) == ["qasper"]
    assert 0 < known["sparse"].kept < 1
    assert len(list((folder / "pred" / MODEL).iterdir())) == 2  # shell and Python name the same runs

    fields = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = [next(iter(read_rows(file))) for file in (folder / "pred" / MODEL).glob("*/qasper.jsonl")]
    assert not [field for row in rows for field in row if f"`{field}`" not in fields]

    for line in lines(readme("bash", "longbench_eval.py gate")):
        run(line)
    assert (folder / "report.html").is_file()
    assert (folder / "frontier.pdf").is_file()


def test_the_sweep_of_the_readme_runs_with_a_method_of_ones_own(folder: Path) -> None:
    own = readme("python", "EvictionMethod")
    (folder / "my_method.py").write_text(own, encoding="utf-8")
    file = readme("toml", "[[methods]]").replace('"snapkv"', '"my_method.py"').replace('"8"', '"1"')
    (folder / "sweep.toml").write_text(file.replace('"qasper,trec"', '"qasper"'), encoding="utf-8")
    sweep, plot = lines(readme("bash", "sweep.toml"))
    run(sweep)
    assert "method-budget=0.3" in (folder / "tables" / "demo.md").read_text(encoding="utf-8")
    run(plot.replace("pred/demo/*", " ".join(map(str, (folder / "pred" / "demo").iterdir()))))
    assert (folder / "frontier.pdf").is_file()


def test_the_readme_holds_a_whole_method_that_passes_the_contract(folder: Path) -> None:
    code = readme("python", "EvictionMethod")
    file = (ROOT / "sparsecache" / "methods" / "snapkv.py").read_text(encoding="utf-8")
    assert file.split('"""', 2)[2].strip() == code.strip()
    (folder / "my_method.py").write_text(code, encoding="utf-8")
    checked, used = lines(readme("bash", "contract"))
    run(checked, "--model_type", "llama")
    run(used, *SMALLER)
    assert (folder / "pred" / "try" / "demo" / "my-method" / "qasper.jsonl").is_file()


def test_the_methods_of_the_guide_pass_the_checks_of_caches(tmp_path: Path) -> None:
    *whole_files, cache_class = blocks((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "python")
    assert len(whole_files) == 3
    whole = "@dataclass\nclass Whole(SparseMethod):\n    def make_sparse_cache(self, layer, config):\n"
    imports = "from dataclasses import dataclass\nfrom sparsecache.cache import SparseMethod\n"
    for at, code in enumerate([*whole_files, f"{imports}{cache_class}\n{whole}        return MyCache(config)\n"]):
        file = tmp_path / f"method{at}.py"
        file.write_text(code, encoding="utf-8")
        for check_caches in (check_counts, check_shapes):
            check_caches(load_method(str(file))(dense_layers=1))
