"""Sweeps: the runs of a small file, one line each, resumed where they stopped, ending in a table and a report."""

import importlib
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparsecache.runner.context import RunContext
from sparsecache.runner.run import run as predict
from sparsecache.runner.settings import Settings
from sparsecache.testing.random_checkpoint import make_random_checkpoint

Sweep = Callable[..., Result]
FILE = """
models = ["{model}"]
arguments = ["--data", "sample", "--datasets", "qasper", "--sample_rows", "2", "--sample_tokens", "256",
             "--max_new_tokens", "9"]

[[methods]]
method = "vanilla"

[[methods]]
method = ["streaming"]
budget = [0.1]
"""
NAMES = ["vanilla", "streaming-budget=0.1"]


@pytest.fixture
def script(repo, monkeypatch) -> Any:
    """The module scripts/sweep.py."""
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    return importlib.import_module("sweep")


@pytest.fixture
def started(monkeypatch, script) -> list[str]:
    """The names of the runs that were started in a process of their own. They run in this one."""
    names: list[str] = []

    def start(settings: Settings, log: Path) -> int:
        names.append(settings.run_name)
        with log.open("a") as out, redirect_stdout(out), redirect_stderr(out):
            return predict(settings)

    monkeypatch.setattr(importlib.import_module("sweep_predict"), "start_process", start)
    return names


@pytest.fixture
def sweep(script, tiny, tmp_path, monkeypatch, started) -> Sweep:
    """Runs scripts/sweep.py in this process over a file of this text, in which {model} is a tiny checkpoint."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *arguments: str) -> Result:
        (tmp_path / "sweep.toml").write_text(text.replace("{model}", str(tiny)), encoding="utf-8")
        return CliRunner().invoke(script.main, ["sweep.toml", *arguments])

    return run


def _progress(told: Result) -> list[str]:
    return [line for line in told.stdout.splitlines() if line.startswith("[")]


def test_a_sweep_ends_in_a_table_and_a_report(sweep, tmp_path, started, tiny) -> None:
    done = sweep(FILE, "--out", "out", "--html")
    assert done.exit_code == 0, done.output
    progress, table = done.stdout.split("\n\n", 1)
    assert table.splitlines()[0] == "tiny on synthetic rows" and started == []
    expected = [f"[{at}/2] {tiny} {name}: done" for at, name in enumerate(NAMES, 1)]
    assert [line.partition(",")[0] for line in progress.splitlines()] == expected
    assert [line.split()[0] for line in table.splitlines()[3:5]] == NAMES
    rows = json.loads((tmp_path / "out" / "tiny.json").read_text())["rows"]
    assert [(row["run"], row["n"]) for row in rows if row["name"] == "flat_mean"] == [(name, 2) for name in NAMES]
    assert "| streaming-budget=0.1 |" in (tmp_path / "out" / "tiny.md").read_text()
    assert (tmp_path / "out" / "tiny.html").read_text().count("<svg") == 3
    assert done.stdout.endswith("Written: out/tiny.* (md, json, html)\n")


@pytest.mark.parametrize("mode", [(), ("--separate",)])
def test_a_sweep_resumes_and_skips_finished_runs_fast(sweep, tmp_path, started, mode) -> None:
    assert sweep(FILE, *mode).exit_code == 0
    predictions = tmp_path / "pred" / "tiny" / NAMES[1] / "qasper.jsonl"
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[: whole.index(b"\n") + 1])
    finished = tmp_path / "pred" / "tiny" / "vanilla" / "qasper.jsonl"
    before = finished.stat().st_mtime_ns
    started.clear()
    told = sweep(FILE, *mode)
    assert told.exit_code == 0 and started == [NAMES[1]] * len(mode)
    assert [": finished before" in line for line in _progress(told)] == [True, False]
    texts = [[json.loads(line)["pred"] for line in each.splitlines()] for each in (whole, predictions.read_bytes())]
    assert texts[0] == texts[1] and finished.stat().st_mtime_ns == before
    began = time.process_time()
    assert sweep(FILE, *mode).exit_code == 0 and len(started) == len(mode)
    assert time.process_time() - began < 2  # two runs, each under a second


def test_a_separate_run_is_a_process_of_its_own(script, tiny, tmp_path, capfd) -> None:
    (tmp_path / "sweep.toml").write_text(FILE.replace("{model}", str(tiny)))
    runs, common_arguments = script.read_sweep(tmp_path / "sweep.toml")
    (run,) = (run for run in runs if run.method == "streaming")
    settings, log = script.check_runs([run], common_arguments, tmp_path / "pred")[run], tmp_path / "a.log"
    log.write_text("before\n")
    assert importlib.import_module("sweep_predict").start_process(settings, log) == 0
    assert log.read_text().startswith("before\n") and "rows        2 of 2 to do" in log.read_text()
    assert "".join(capfd.readouterr()) == ""
    record = json.loads((settings.run_folder / "run.json").read_text())
    assert len(record["sessions"]) == 1 and record["identity"]["options"]["budget"] == 0.1


def test_separate_runs_of_a_model_read_its_tokenizer_once_to_see_what_is_finished(sweep, monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("sweep_predict"), "start_process", lambda *_: 0)
    loading, loaded = importlib.import_module("sparsecache.engine.loading"), []
    original = loading.load_tokenizer
    monkeypatch.setattr(loading, "load_tokenizer", lambda path: loaded.append(path) or original(path))
    sweep(FILE, "--separate")
    assert len(loaded) == 1


def test_models_of_the_command_line_stand_in_for_those_of_the_file(sweep, tiny) -> None:
    told = sweep(FILE.replace('models = ["{model}"]', 'models = ["demo"]'), "--dry_run", "--model", str(tiny))
    assert told.exit_code == 0 and told.stdout.count(f"--model {tiny} ") == 2 and "demo" not in told.stdout
    told = sweep(FILE.replace('models = ["{model}"]', ""), "--dry_run", "--model", str(tiny), "--model", "demo")
    assert told.exit_code == 0 and len(told.stdout.splitlines()) == 4


def test_an_error_of_a_method_file_is_told_before_a_run_starts(sweep, tmp_path, started, tiny) -> None:
    source = "from sparsecache.methods.vanilla import Vanilla\nclass Mine(Vanilla):\n    def __init__(self):\n"
    (tmp_path / "mine.py").write_text(f"{source}        1 / 0\n")
    told = sweep(FILE.replace('"vanilla"', '"mine.py"'))
    assert told.exit_code == 2 and not started and not Path("pred").exists()
    assert told.stderr == (
        f"Error: 1 of 2 runs cannot start. {tiny} mine: Method mine.py fails with no options: ZeroDivisionError: "
        f"division by zero. The error is in {tmp_path}/mine.py, line 4. Correct that file.\n"
    )


def test_a_dry_run_prints_each_command_and_starts_none(sweep, tmp_path, started, tiny) -> None:
    told = sweep(FILE.replace("qasper", "qasper,a b").replace(",a b", ""), "--dry_run", "--", "--max_samples", "1")
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("python longbench_pred.py --model ") for line in lines)
    assert "--name streaming-budget=0.1 " in lines[1] and "-o budget=0.1" in lines[1] and "--max_samples 1" in lines[1]
    assert started == [] and not (tmp_path / "pred").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models = [", "sweep.toml is not valid TOML"),
        ("models = ['\0']", "sweep.toml is not valid TOML"),
        (f"models = [0x{'f' * 5000}]", "sweep.toml is not valid TOML"),
        ('models = ["demo"]', "lacks [[methods]]. A sweep has `models` (or --model) and [[methods]], may have `arg"),
        ('[[methods]]\nmethod = "h2o"', "lacks `models`. A sweep has `models` (or --model)"),
        ('models = ["demo"]\nbudget = 1\n[[methods]]\nmethod = "h2o"', "no key 'budget'. A sweep has"),
        ('models = ["demo"]\n[[method]]\nmethod = "h2o"', "no key 'method'; did you mean 'methods'? A sweep has"),
        ('model = "demo"\n[[methods]]\nmethod = "h2o"', "no key 'model'; did you mean 'models'? A sweep has"),
        ('models = ["demo"]\ndata = "hub"\n[[methods]]\nmethod = "h2o"', 'arguments = ["--data", ...]. A sweep has'),
        ('models = ["demo"]\n[[methods]]\nbudget = 1', "each of [[methods]] needs a `method`"),
        ('models = ["demo"]\n[[methods]]\nmethod = ["h2o", "h2o"]', "names a run twice: h2o"),
        ('models = "demo"\n[[methods]]\nmethod = "h2o"', "`models` is a list of texts"),
        ('models = ["demo"]\nmethods = "h2o"', "methods are tables ([[methods]])"),
        ('models = ["demo"]\narguments = "--e"\n[[methods]]\nmethod = "h2o"', "`arguments` is a list of texts"),
        ('models = ["demo"]\narguments = [["--e"]]\n[[methods]]\nmethod = "h2o"', "`arguments` is a list of texts"),
        ('models = ["demo"]\n[[methods]]\nmethod = 3', "method = 3 must be a value"),
        (
            f'models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = {[*range(1, 102)]}\ndense_layers = {[0] * 10}',
            "makes 1,010 runs; at most 1,000",
        ),
        ('models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = []', "budget = [] must be a value"),
        ('models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = 2020-01-01', "must be a value"),
        ('models = ["demo"]\n[[methods]]\nmethod = "h2o"\nbudget = {a = 1}', "budget = {'a': 1} must be a value"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(sweep, tmp_path, text: str, told: str) -> None:
    done = sweep(text)
    assert (done.exit_code, done.stdout) == (2, "") and done.stderr.startswith("Error: ") and told in done.stderr
    assert not (tmp_path / "pred").exists()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("budget = [0.1]", "budgt = [0.1]", ["streaming-budgt=0.1", "has no option 'budgt'"]),
        ("budget = [0.1]", "budget = [0.1, 'x']", ["streaming-budget=x", "budget='x' is not a number"]),
        ("budget = [0.1]", "budget = [-1, 0.1]", ["streaming-budget=-1", "budget=-1.0 must be a share"]),
        ('["streaming"]', '["streaming", "nope"]', ["nope-budget=0.1", "no method 'nope'"]),
        ('"--sample_rows", "2"', '"--sample_rws", "2"', ["2 of 2 runs cannot start", "--sample_rws"]),
        ('"--sample_rows", "2"', '"--sample_rows", "0"', ["2 of 2 runs cannot start", "--sample_rows"]),
        ('"qasper"', '"qaspr"', ["2 of 2 runs cannot start", "qaspr"]),
        ('"--sample_rows", "2"', '"--help"', ["2 of 2 runs cannot start", "--help"]),
        ('"--sample_rows", "2"', '"--name", "same"', ["2 of 2 runs cannot start", "its arguments give --name"]),
        ('"--sample_rows", "2"', '"--method", "h2o"', ["its arguments give --method, which the sweep states"]),
    ],
)
def test_a_mistake_in_any_run_is_found_before_the_first_one_starts(sweep, tmp_path, started, old, new, parts) -> None:
    for arguments in ((), ("--dry_run",)):
        done = sweep(FILE.replace(old, new), *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: ") and all(part in done.stderr for part in parts), done.stderr
    assert started == [] and not (tmp_path / "pred").exists()


def test_a_report_needs_a_folder(sweep) -> None:
    done = sweep(FILE, "--html")
    assert (done.exit_code, done.stderr) == (2, "Error: --html needs --out, the folder for the report.\n")


def test_a_limit_that_is_no_number_is_refused(sweep) -> None:
    done = sweep(FILE, "--limit_memory", "nan")
    assert (done.exit_code, done.stderr) == (2, "Error: --limit_memory nan must be a number of GiB above 0.\n")


def test_a_separate_run_that_does_not_fit_the_model_fails_alone(sweep, started) -> None:
    done = sweep(FILE.replace("budget = [0.1]", "budget = [0.1]\ndense_layers = [0, 99]"), "--separate")
    assert done.exit_code == 1 and started == ["vanilla", "streaming-budget=0.1-dense_layers=0"]
    assert "streaming-budget=0.1-dense_layers=99: failed: " in _progress(done)[2]
    table = done.stdout.split("\n\n", 1)[1].splitlines()
    assert [line.split()[0] for line in table[3:5]] == started
    (missing,) = (line for line in table if line.startswith("Not in the table: "))
    assert "dense_layers=99, which failed: Method streaming" in missing and "must be 0 to 3" in missing


def test_a_separate_run_that_ends_with_an_error_is_told_with_its_log_and_its_own_reason(
    sweep, tmp_path, monkeypatch, started
) -> None:
    log = tmp_path / "pred" / "logs" / "tiny-streaming-budget=0.1.log"
    log.parent.mkdir(parents=True)
    log.write_text("Error: of long ago\n")
    module = importlib.import_module("sweep_predict")
    whole = module.start_process

    def start(settings: Settings, log: Path) -> int:
        if settings.method == "vanilla":
            return max(1, whole(settings, log))
        with log.open("a") as out:
            out.write("qasper 1 of 2\nError: The disk is full.\n")
        return 2

    monkeypatch.setattr(module, "start_process", start)
    done = sweep(FILE, "--separate")
    assert done.exit_code == 1 and "vanilla: done, with failed rows, " in _progress(done)[0]
    assert "failed, 0 s; see pred/logs/tiny-streaming-budget=0.1.log. Error: The disk is full" in done.stdout
    table = done.stdout.split("\n\n", 1)[1]
    assert table.splitlines()[0] == "pred/tiny/vanilla" and "There is no other run to compare with." in table


def test_numbers_of_another_model_or_of_other_settings_are_never_tabulated(
    sweep, script, tmp_path, started, tiny, capsys, monkeypatch
) -> None:
    assert sweep(FILE).exit_code == 0
    other = make_random_checkpoint(tmp_path / "other" / "tiny", seed=5, num_hidden_layers=3)
    for text, arguments in (
        (FILE.replace("{model}", str(other)), ()),
        (FILE, ("--separate", "--", "--window", "1000")),
    ):
        done = sweep(text, *arguments)
        assert done.exit_code == 1 and started == []
        assert "mean" not in done.stdout and "No run succeeded, so there is no table." in done.stderr
        assert all(": failed: " in line for line in _progress(done))
    done = sweep(FILE.replace('"{model}"', f'"{{model}}", "{other}"'))
    assert done.exit_code == 2 and f"its folder pred/tiny/vanilla is also that of {tiny} vanilla" in done.stderr
    # A process that ends well but left another run's record behind.
    record = tmp_path / "pred" / "tiny" / NAMES[1] / "run.json"
    content = json.loads(record.read_text())
    content["identity"]["options"]["budget"] = 0.5
    record.write_text(json.dumps(content))
    (tmp_path / "sweep.toml").write_text(FILE.replace("{model}", str(tiny)))
    runs, common_arguments = script.read_sweep(tmp_path / "sweep.toml")
    capsys.readouterr()
    settings = script.check_runs(runs, common_arguments, Path("pred")).values()
    read = []
    monkeypatch.setattr(RunContext, "__init__", lambda *given, init=RunContext.__init__: read.append(1) or init(*given))
    script.Report(None, False).show(*script.move_mismatched_runs(list(settings), []))
    assert len(settings) > 1 == len(read)  # a tokenizer may take seconds to read
    table = capsys.readouterr().out
    assert table.splitlines()[1] == "pred/tiny/vanilla" and "There is no other run to compare with." in table
    assert "Not in the table: pred/tiny/streaming-budget=0.1: " in table and "budget: 0.5, now 0.1" in table
