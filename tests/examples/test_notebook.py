"""The notebook is valid, holds no output, and its code cells run."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_the_code_cells_of_the_notebook_run(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((repo / "examples" / "compare_methods.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for cell in code:
        exec("".join(cell["source"]), known)
    assert known["answer"].report["sparse_steps"] > 0 and 0 < known["sparse"].kept < 1
    assert "| infinigen-64 |" in known["table"] and (tmp_path / "bars.svg").is_file()
