"""longbench_eval.py as it is typed."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.eval_cli.runs import Evaluate


@pytest.fixture
def evaluate(run_python: Callable[..., CompletedProcess[str]], repo: Path, tmp_path: Path) -> Evaluate:
    """Runs longbench_eval.py in an empty working folder."""

    def run(*arguments: str | Path, **options: Any) -> CompletedProcess[str]:
        return run_python(repo / "longbench_eval.py", *arguments, cwd=tmp_path, **options)

    return run
