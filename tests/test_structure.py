"""Imports go one way: command lines and API -> runner -> longbench | engine -> cache -> kernels. Files are short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsecache"
ORDER = (
    "errors files options configs versions kernels cache methods engine longbench synthetic ruler cli cluster runner "
    "bench testing api __init__"
).split()
"""A module imports only from parts to the left of its own."""
APART = [
    (("kernels", "cache", "methods", "engine"), ("longbench", "synthetic", "ruler", "cli")),
    (("longbench", "synthetic", "ruler"), ("kernels", "cache", "methods", "engine")),
    (("engine", "cache"), ("methods",)),
]
"""Parts that import nothing of each other, whatever their order."""
MAX_LINES = 300


def imports() -> Iterator[tuple[str, str, Path]]:
    """Yield importing part, imported part and file, for every import of the package's own."""
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "sparsecache" and len(parts) > 1 and parts[1] != own:
                    yield own, parts[1], file


def test_every_part_has_a_place() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"demo"} == set(ORDER)


def test_no_import_points_back() -> None:
    back = [f"{file}: {own} -> {other}" for own, other, file in imports() if ORDER.index(other) > ORDER.index(own)]
    assert not back


@pytest.mark.parametrize(("those", "others"), APART)
def test_halves_know_nothing_of_each_other(those: tuple[str, ...], others: tuple[str, ...]) -> None:
    assert not [f"{file}: {own} -> {other}" for own, other, file in imports() if own in those and other in others]


def test_the_benchmark_half_imports_no_torch() -> None:
    for file in (PACKAGE / "longbench").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] in ("torch", "transformers") for alias in node.names), file
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("torch", "transformers"), file


def test_a_long_file_says_why_it_is_one_file() -> None:
    for folder in ("sparsecache", "scripts", "tests", "examples", "."):
        for file in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            text = file.read_text(encoding="utf-8")
            docstring = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            assert text.count("\n") <= MAX_LINES or "In one file because" in docstring, file
