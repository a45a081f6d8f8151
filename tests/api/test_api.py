"""The Python API against transformers and the command line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import longbench_eval
from longbench_pred import main
from sparsecache import LLM, compare, evaluate
from sparsecache.errors import UsageError
from sparsecache.longbench.records import read_rows
from sparsecache.longbench.tables import FORMATS
from sparsecache.testing.random_checkpoint import make_random_checkpoint

SMALL = {"datasets": ["trec", "lcc"], "data": "sample", "sample_rows": 1, "sample_tokens": 256}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", initializer_range=0.25)


def expected_ids(checkpoint: Path, token_ids: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    out = model.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False)
    return out[0, len(token_ids) :].tolist()


def test_generate_gives_the_text_of_transformers_in_the_order_of_the_prompts(checkpoint: Path) -> None:
    prompts = ["One two three four five", "Six", "Seven eight nine ten eleven twelve thirteen"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = LLM(checkpoint, batch_size=2).generate(prompts, max_new_tokens=12)
    for prompt, generation in zip(prompts, found, strict=True):
        token_ids = tokenizer(prompt)["input_ids"]
        assert generation.token_ids == expected_ids(checkpoint, token_ids, 12)
        assert generation.prompt_tokens == len(token_ids)
        assert generation.text == tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert generation.error is None


def test_texts_and_token_ids_are_the_same_prompt(checkpoint: Path) -> None:
    llm = LLM(checkpoint, method="snapkv", budget=4)
    token_ids = AutoTokenizer.from_pretrained(checkpoint)("a b c d e f g h i j k l m n o p")["input_ids"]
    by_text, by_ids = llm.generate(["a b c d e f g h i j k l m n o p", token_ids], max_new_tokens=6)
    assert by_text.token_ids == by_ids.token_ids
    assert 0 < by_text.report["kept"] < 1
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 3.5, "method": "snapkv"}, "budget=3.5"),
        ({"bugdet": 3, "method": "snapkv"}, "bugdet"),
        ({"budget": 3, "options": {"budget": 4}, "method": "snapkv"}, "twice"),
        ({"datasets": "qasper"}, "LLM takes no datasets"),
        ({"batch_sizes": 2}, "no argument 'batch_sizes'; did you mean 'batch_size'"),
        ({"method": "snapvk"}, "snapkv"),
        ({"dtype": "float64"}, "dtype=float64 is not one of auto, "),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"batch_size": "4"}, "batch_size=4 is of the type str; it must be int | None"),
        ({"offline": "no"}, "offline=no is of the type str; it must be bool"),
        ({"window": True}, "window=True is of the type bool"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(checkpoint: Path, arguments: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LLM(checkpoint, **arguments)


def test_prompts_that_do_not_fit_are_refused(checkpoint: Path) -> None:
    llm = LLM(checkpoint, window=16)
    for prompts, new_tokens, said in (
        ([[5] * 12], 8, "exceeds the window"),
        ([[]], 4, "empty"),
        (["a"], 0, "max_new_tokens=0"),
        (["a"], 2.0, "max_new_tokens=2.0 must be a whole number"),
        (5, 4, "prompts=5 must be a text, or a list"),
        ([[3, 10**9]], 4, "Prompt 0 holds 1000000000. Give a text, or a list of token ids from 0 to "),
        ([["a"]], 4, "Prompt 0 holds a. Give a text"),
        ([5, 6, 7], 4, "Prompt 0 is 5. Give a text, or a list of token ids"),
    ):
        with pytest.raises(UsageError, match=said):
            llm.generate(prompts, max_new_tokens=new_tokens)


def test_an_option_with_the_name_of_a_setting_goes_into_options(checkpoint: Path, tmp_path: Path) -> None:
    result = evaluate(
        checkpoint, "snapkv", {"window": 8}, budget=16, window=700, pred_dir=tmp_path, name="narrow", **SMALL
    )
    assert result.folder == tmp_path / "tiny" / "narrow"
    identity = json.loads((result.folder / "run.json").read_text())["identity"]
    assert (identity["options"]["window"], identity["window"]) == (8, 700)


def test_evaluate_writes_the_rows_of_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    result = evaluate(checkpoint, "infinigen", budget=32, name="same", pred_dir=tmp_path / "api", **SMALL)
    command = "--method infinigen -o budget=32 --datasets trec,lcc --data sample --sample_rows 1 --sample_tokens 256"
    arguments = [*command.split(), "--name", "same", "--model", str(checkpoint), "--pred_dir", str(tmp_path / "shell")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    for dataset in ("trec", "lcc"):
        mine, theirs = (
            read_rows(tmp_path / place / "tiny" / "same" / f"{dataset}.jsonl") for place in ("api", "shell")
        )
        assert [(row["pred"], row["kept"]) for row in mine] == [(row["pred"], row["kept"]) for row in theirs]
    assert result.exit_code == 0 and set(result.scores) == {"trec", "lcc"}
    assert result.mean == pytest.approx(sum(result.scores.values()) / 2, abs=0.01)
    assert 0 < result.kept < 1
    again = evaluate(checkpoint, "infinigen", budget=32, name="same", pred_dir=tmp_path / "api", **SMALL)
    assert "0 of 2 to do" in again.log

    full = evaluate(checkpoint, name="full", pred_dir=tmp_path / "api", **SMALL)
    for form in FORMATS:
        folders = [str(each.folder) for each in (full, result)]
        printed = CliRunner().invoke(longbench_eval.main, ["compare", *folders, "--format", form])
        assert compare(full, result, format=form) == printed.stdout.rstrip("\n")
    for wrong, said in (((full,), "two evaluations or more"), ((full, result, "x"), "not an Evaluation")):
        with pytest.raises(UsageError, match=said):
            compare(*wrong)
    with pytest.raises(UsageError, match="format=yaml is not one of terminal, markdown"):
        compare(full, result, format="yaml")


def test_evaluate_warns_of_failed_rows(checkpoint: Path, tmp_path: Path) -> None:
    method = tmp_path / "mine.py"
    method.write_text(
        "from sparsecache.cache import EvictionMethod\n\n\nclass Mine(EvictionMethod):\n"
        "    def score(self, q, k, v):\n        raise RuntimeError('odd')\n"
    )
    with pytest.warns(UserWarning, match="2 of 2 rows failed and count 0") as warned:
        result = evaluate(checkpoint, method, pred_dir=tmp_path, **SMALL)
    assert warned[0].filename == __file__ and "RuntimeError: odd" in result.log
    assert repr(result) == f"Evaluation({str(result.folder)!r}, mean=0.0, kept=None, exit_code=1)"


def test_evaluate_finds_the_rows_of_a_model_with_another_name(checkpoint: Path, tmp_path: Path) -> None:
    result = evaluate(checkpoint, model_name="renamed", pred_dir=tmp_path, **SMALL)
    assert result.folder == tmp_path / "renamed" / "vanilla" and set(result.scores) == {"trec", "lcc"}


def test_memory_is_reserved_again_for_longer_sequences_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, calls = LLM(checkpoint), []
    reserve = llm._engine.reserve
    monkeypatch.setattr(llm._engine, "reserve", lambda *sizes: (calls.append(sizes), reserve(*sizes)))
    texts = [llm.generate([[5] * tokens], new_tokens)[0].token_ids for tokens, new_tokens in ((9, 4), (3, 2), (9, 6))]
    assert calls == [(13, 4), (15, 6)]
    assert texts[0] == LLM(checkpoint).generate([[5] * 9], 4)[0].token_ids == texts[2][:4]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(tmp_path)])
    runpy.run_path("examples/compare_methods.py")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[4:8]]
    assert names == ["vanilla", "infinigen-budget=64", "snapkv-budget=64", "knorm-budget=64"]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sparsecache, sys; assert 'torch' not in sys.modules; sparsecache.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)
