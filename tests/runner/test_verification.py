"""The same run through transformers' own generate, and comparisons with it."""

import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsecache.cache import FullCache
from sparsecache.engine.base import Completion, Request
from sparsecache.runner.verification import TOP, BestLogits, Expected, ulp, verify
from sparsecache.synthetic.rows import make_rows


@pytest.mark.parametrize(
    "method", [("vanilla",), ("infinigen", "-o", "budget=24", "-o", "dense_layers=1")], ids=lambda method: method[0]
)
def test_the_transformers_engine_gives_the_same_rows(method, predict, tmp_path, read_untimed, read_record) -> None:
    arguments = ("--datasets", "qasper,samsum,vcsum", "--max_samples", "2", "--method", *method)
    folder = tmp_path / "pred" / "tiny" / "ours"
    assert predict(*arguments, "--name", "ours").exit_code == 0
    assert predict(*arguments, "--engine", "transformers", "--name", "theirs").exit_code == 0
    for dataset in ("qasper", "samsum", "vcsum"):
        assert read_untimed(folder / f"{dataset}.jsonl") == read_untimed(folder.parent / "theirs" / f"{dataset}.jsonl")
    assert read_record(folder.parent / "theirs")["identity"]["engine"] == "transformers"


def test_verify_compares_first_and_counts_only_the_runs_own_tokens(predict, folder, read_rows, read_record) -> None:
    told = predict("--datasets", "qasper,trec", "--verify", "4")
    assert told.exit_code == 0
    assert "verify: 4 of 4 prompts give the text of transformers." in told.stdout
    (session,) = read_record(folder)["sessions"]
    assert session["verify"] == {"prompts": 4, "differing": [], "near_ties": 0}
    rows = [row for dataset in ("qasper", "trec") for row in read_rows(folder / f"{dataset}.jsonl")]
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)


def test_a_difference_is_told_with_the_gap_of_transformers_logits(
    predict, folder, monkeypatch, read_record, endless
) -> None:
    whole, steps = FullCache.attend, iter(range(10**6))

    def lie(self: FullCache, *arguments: Any) -> torch.Tensor:
        return whole(self, *arguments) * (1 if next(steps) < 5 else -3)

    monkeypatch.setattr(FullCache, "attend", lie)
    asked = _record_generations(monkeypatch)
    told = predict("--model", str(endless), "--verify", "1")
    (session,) = read_record(folder)["sessions"]
    (difference,) = session["verify"]["differing"]
    assert difference["_id"] == make_rows("qasper", 1, 256, 0)[0]["_id"] and difference["dataset"] == "qasper"
    at = difference["first_differing_token"]
    assert at >= 6
    assert f"the texts differ from new token {at} on; " in told.stdout
    assert "verify: 0 of 1 prompts" in told.stdout and "expected" not in told.stdout
    theirs, ours = asked[0][1][0], asked[1][1][0]
    assert theirs.token_ids[:at] == ours.token_ids[:at] and theirs.token_ids[at] != ours.token_ids[at]
    model = AutoModelForCausalLM.from_pretrained(endless, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([[*theirs.request.token_ids, *theirs.token_ids[:at]]])
        logits = model(ids).logits[0, -1]
    if ours.token_ids[at] in logits.topk(TOP).indices:
        expected = (logits[theirs.token_ids[at]] - logits[ours.token_ids[at]]).item()
        assert difference["reference_gap"] == pytest.approx(expected, abs=1e-4)
    else:
        assert difference["reference_gap"] is None
    assert not difference["near_tie"]


@pytest.mark.parametrize(
    "options", [("streaming", "budget=0.1"), ("infinigen", "budget=24")], ids=lambda options: options[0]
)
def test_a_sparse_method_is_compared_with_itself(predict, options) -> None:
    method, budget = options
    told = predict("--method", method, "-o", budget, "-o", "dense_layers=1", "--verify", "2")
    assert told.exit_code == 0, told.output
    assert "verify: 2 of 2 prompts give the text of transformers." in told.stdout


def test_datasets_that_share_ids_are_compared_each_with_itself(predict, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for dataset in ("qasper", "trec"):
        rows = [{**row, "_id": f"row {index}"} for index, row in enumerate(make_rows(dataset, 2, 256, 0))]
        (data / f"{dataset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = predict("--data", str(data), "--datasets", "qasper,trec", "--verify", "4")
    assert "verify: 4 of 4 prompts give the text of transformers." in told.stdout, told.output


class _Fixed:
    """An engine that answers these tokens, or an error."""

    def __init__(self, answers: dict[Any, list[int] | str]):
        self._answers = answers

    def generate(self, requests: list[Request]) -> Any:
        for request in requests:
            answer = self._answers[request.key]
            yield Completion(request, error=answer) if isinstance(answer, str) else Completion(request, answer)


def _expected(key: Any, token_ids: list[int], *steps: dict[int, float]) -> Expected:
    request = Request(key, [1], 9, ())
    best = [BestLogits(list(step.values()), list(step)) for step in steps]
    return Expected(request, Completion(request, token_ids), best)


@pytest.mark.parametrize(
    ("dtype", "gap", "near"),
    [
        (torch.bfloat16, 2 * 2.0**-7 * 4, True),  # 2 ulp at 4 to 8
        (torch.bfloat16, 3 * 2.0**-7 * 4, False),
        (torch.float32, 2 * 2.0**-23 * 4, True),
        (torch.float32, 2 * 2.0**-7 * 4, False),
    ],
)
def test_a_near_tie_is_counted_apart(dtype, gap, near, capsys) -> None:
    expected = [
        _expected(("qasper", "a"), [5, 6, 7], {5: 7.0}, {6: 5.0, 8: 5.0 - gap}, {7: 1.0}),
        _expected(("qasper", "b"), [5], {5: 7.0}),
    ]
    engine = _Fixed({("qasper", "a"): [5, 8, 7], ("qasper", "b"): [5]})
    record = verify(engine, expected, dtype, "vanilla")
    assert record["prompts"] == 2 and record["near_ties"] == near
    (difference,) = record["differing"]
    assert (difference["first_differing_token"], difference["near_tie"]) == (1, near)
    assert difference["reference_gap"] == pytest.approx(gap)
    told = capsys.readouterr().out
    assert ("1 of the 1 differences are near-ties" in told) == near


def test_a_prompt_that_fails_is_a_difference_with_its_error(capsys) -> None:
    record = verify(
        _Fixed({("qasper", "a"): "Broken: no"}), [_expected(("qasper", "a"), [5])], torch.float32, "vanilla"
    )
    assert record["differing"][0]["errors"] == {"sparsecache": "Broken: no"}
    assert "verify: qasper a: sparsecache failed: Broken: no" in capsys.readouterr().out
    json.dumps(record, allow_nan=False)


def test_a_token_beyond_the_best_logits_and_a_masked_one_have_no_gap(capsys) -> None:
    expected = [_expected(("qasper", name), [5], {5: 7.0, 4: -math.inf}) for name in "ab"]
    record = verify(_Fixed({("qasper", "a"): [9], ("qasper", "b"): [4]}), expected, torch.float32, "vanilla")
    assert [difference["reference_gap"] for difference in record["differing"]] == [None, None]
    assert record["near_ties"] == 0


@pytest.mark.parametrize("value", [0.3, 1.0, 5.5, -17.25, 1000.0])
def test_ulp_is_numpys_spacing(value: float) -> None:
    assert ulp(value, torch.float32) == np.spacing(np.float32(abs(value)))
    assert ulp(value, torch.float16) == np.spacing(np.float16(abs(value)))


def test_verify_takes_the_first_wanted_rows_also_of_a_finished_run(predict, folder, monkeypatch, read_record) -> None:
    assert predict("--datasets", "qasper,trec").exit_code == 0
    before = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("qasper", "trec")}
    asked = _record_generations(monkeypatch)
    told = predict("--datasets", "qasper,trec", "--max_samples", "2", "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts give the text of transformers." in told.stdout
    assert read_record(folder)["sessions"][-1]["verify"] == {"prompts": 3, "differing": [], "near_ties": 0}
    keys = [(name, row["_id"]) for name, rows in (("qasper", 2), ("trec", 1)) for row in make_rows(name, rows, 256, 0)]
    assert [(engine, done.key) for engine, completions in asked for done in completions] == [
        *(("TransformersEngine", key) for key in keys),
        *(("Generator", key) for key in keys),
    ]
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in before} == before
    clock = read_record(folder)["sessions"][-1]["clock"]
    assert (clock["prefill_tokens"], clock["decode_tokens"]) == (0, 0)


def _record_generations(monkeypatch) -> list[tuple[str, list[Completion]]]:
    """Every call of an engine that was asked for something, as its class and its completions."""
    from sparsecache.engine.generator import Generator
    from sparsecache.engine.reference import TransformersEngine

    asked: list[tuple[str, list[Completion]]] = []
    for kind in (TransformersEngine, Generator):

        def generate(self: Any, requests: Any, *arguments: Any, whole: Any = kind.generate) -> Any:
            if known := list(requests):
                asked.append((type(self).__name__, []))
                for completion in whole(self, known, *arguments):
                    asked[-1][1].append(completion)
                    yield completion

        monkeypatch.setattr(kind, "generate", generate)
    return asked


def test_a_condensed_rope_is_decoded_alike_by_both_engines(predict, tiny, tmp_path, read_rows) -> None:
    longchat = shutil.copytree(tiny, tmp_path / "longchat")
    config = json.loads((longchat / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters["rope_theta"], "rope_condense_ratio": 8}
    (longchat / "config.json").write_text(json.dumps(config))
    told = predict("--model", str(longchat), "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts" in told.stdout
    assert predict().exit_code == 0
    texts = [
        [row["pred"] for row in read_rows(tmp_path / "pred" / name / "vanilla" / "qasper.jsonl")]
        for name in ("longchat", "tiny")
    ]
    assert texts[0] != texts[1]
