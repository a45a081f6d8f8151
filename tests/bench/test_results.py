"""What is printed of a result, and of a profile."""

import json
import subprocess

import pytest
import torch

from sparsecache.bench.profiling import profile_steps, row_label
from sparsecache.bench.results import Result, save, table
from sparsecache.bench.timing import check_workers
from sparsecache.runner import provenance


def cells(results: list[Result]) -> list[list[str]]:
    return [line.split() for line in table(results).splitlines()]


def test_a_result_is_printed_as_rate_time_share_of_the_roofline_and_speedups() -> None:
    printed = cells([Result("decode", 0.004, 2, 0.003, {"transformers": 0.01}), Result("replay", 1.5)])
    assert ["decode", "500.0", "4.00", "3.00", "75.0", "2.50"] in printed
    assert ["replay", "-", "1500.00", "-", "-", "-"] in printed


def test_notes_are_printed_as_text() -> None:
    notes = {"kept": [0.05, 0.15], "fetched_bytes_per_step": 2e6, "gpu_cache_hit": [0.5, 0.7]}
    printed = table([Result("decode", 0.004, notes={**notes, "cache_host_bytes": 3 * 2**30})])
    assert "attended to 10.0 % of past tokens in sparse layers; fetched 2.0 MB per step; found 60.0 % of it" in printed
    assert "cache in pinned host memory 3.00 GiB" in printed and "in GPU memory" not in printed
    shares = {"prompts_per_s": 2.5, "prefill_share": 0.75, "decode_share": 0.2}
    printed = table([Result("replay", 0.4, notes=shares)])
    assert "2.50 prompts per second; 75.0 % prefill; 20.0 % decode" in printed
    assert "imports 1.0 s; weights 0.5 s" in table(
        [Result("start", 2, notes={"stages": {"imports": 1, "weights": 1.5}})]
    )


def test_the_json_names_the_commit_and_whether_files_are_changed(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        run = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(run, cwd=project, check=True, capture_output=True, text=True).stdout.strip()

    def saved_commit() -> str | None:
        provenance.code_commit.cache_clear()
        save([Result("decode", 0.004)], tmp_path / "results.json", mode="decode")
        content = json.loads((tmp_path / "results.json").read_text())
        assert content["mode"] == "decode" and content["results"][0]["seconds"] == 0.004
        return content["commit"]

    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setattr(provenance, "_PROJECT", project)
    assert saved_commit() is None
    git("init", "-q")
    assert saved_commit() is None  # no commit yet
    (project / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "one")
    (project / "results.json").write_text("{}")  # is not code
    assert saved_commit() == git("rev-parse", "HEAD")
    (project / "code.py").write_text("2")
    assert saved_commit() == git("rev-parse", "HEAD") + "+"
    git("commit", "-qam", "two")
    (project / "sparsecache").mkdir()
    (project / "sparsecache" / "calibration.txt").write_text("a text")
    assert saved_commit() == git("rev-parse", "HEAD") + "+"
    monkeypatch.setenv("PATH", "")
    assert saved_commit() is None  # git is missing
    provenance.code_commit.cache_clear()  # for later tests


def test_a_time_with_a_dead_worker_is_no_result() -> None:
    alive, dead = {"died": False}, {"died": True}
    check_workers([alive, alive], 2)
    for workers in ([alive, dead], [alive], [alive, dead, alive]):
        with pytest.raises(RuntimeError, match="one of 2 workers died and was replaced"):
            check_workers(workers, 2)


def test_a_profile_counts_a_steps_operations_and_leaves_the_prompt_out(tmp_path) -> None:
    def decode(new_tokens: int) -> None:
        torch.ones(300, 300) @ torch.ones(300, 300)  # a prompt
        for _ in range(new_tokens - 1):
            with torch.profiler.record_function("x" * 300):
                torch.ones(40).cumsum(0).cumsum(0)

    printed = profile_steps(decode, 300, False, tmp_path / "profile.txt")  # so many that a slow moment does not matter
    rows = [line.split() for line in printed.splitlines()]
    operations = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row and row[0].startswith("aten::")}
    microseconds, count, each = operations["aten::cumsum"]
    assert count == 2 and each == pytest.approx(microseconds / 2, abs=0.1) and microseconds > 0
    written = {line.split()[0] for line in (tmp_path / "profile.txt").read_text().splitlines() if line}
    assert written >= set(operations) and "aten::mm" not in written
    assert "x" * 97 + "..." in written


def test_own_kernels_are_told_from_those_of_libraries(repo) -> None:
    """By the names of the functions that Triton compiles, which are what the profiler reports."""
    files = (repo / "sparsecache" / "kernels").glob("*.py")
    sources = [part for file in files for part in file.read_text().split("@triton.jit")[1:]]
    functions = [source.partition("def ")[2].partition("(")[0] for source in sources]
    kernels = [name for name in functions if name.endswith("_kernel")]
    assert len(kernels) > 10 and all(
        f"{row_label(name).replace(' ', '_')}_kernel" == name.removeprefix("_") for name in kernels
    )
    for name in ("void at::native::reduce_kernel<512, 1>", "_ZN7cutlass_kernel", "nvjet_hsh_128x8_64x12_kernel"):
        assert row_label(name) == "others"
