"""Commands in the documents: they are those of the files beside them, and the programs take them."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

import longbench_eval
import longbench_pred
from sparsecache.cli import DefaultGroup

PROGRAMS = {"longbench_pred.py": longbench_pred.main, "longbench_eval.py": longbench_eval.main}


def commands(text: str) -> list[list[str]]:
    """Every call of one of the programs in a document's blocks, as words; continued lines are joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == ["python"] and words[1] in PROGRAMS]


def check(words: list[str]) -> None:
    """Parses a command down to its last option, and runs nothing. Raises click's errors."""
    program, *arguments = words
    command: click.Command = PROGRAMS[program]
    if isinstance(command, DefaultGroup):
        name = arguments.pop(0) if arguments[0] in command.commands else command.default
        command = command.commands[name]
    command.make_context(program, arguments)


def test_the_ci_example_is_the_workflow_file_and_its_commands_are_understood(repo: Path) -> None:
    page = (repo / "docs" / "ci.md").read_text(encoding="utf-8")
    workflow = (repo / "docs" / "gate.yml").read_text(encoding="utf-8")
    assert re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE) == [workflow]
    steps = yaml.safe_load(workflow)["jobs"]["infinigen"]["steps"]
    found = [shlex.split(step["run"])[1:] for step in steps if step.get("run", "").startswith("python")]
    assert [words[0] for words in found] == ["longbench_pred.py", "longbench_pred.py", "longbench_eval.py"]
    for words in found:
        check(words)


@pytest.mark.parametrize("document", ["README.md", "docs/ci.md"])
def test_commands_of_the_documents_are_understood(repo: Path, document: str) -> None:
    found = commands((repo / document).read_text(encoding="utf-8"))
    assert found
    for words in found:
        check(words)


def test_a_command_that_is_not_understood_is_found() -> None:
    for line in ("longbench_pred.py --modle demo", "longbench_eval.py plot demo/vanilla --kind pie --out a.svg"):
        with pytest.raises(click.UsageError):
            check(line.split())
