"""Compare the first prompts of a run with the same method in transformers, and find near-ties.

transformers runs first, and its weights are freed before this engine's are loaded. The TOP largest of its logits are
kept per step, to compare the logits of two differing tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecache.engine.base import Completion, Engine, Request
from sparsecache.engine.general import GeneralEngine
from sparsecache.engine.reference import TransformersEngine

TOP = 64
NEAR_TIE_ULP = 2


@dataclass(frozen=True)
class BestLogits:
    """The largest logits of one step and their token ids, best first."""

    values: list[float]
    token_ids: list[int]

    def gap(self, first: int, second: int) -> float | None:
        """Return the logit of `first` minus that of `second`; None if one of them is not among the best."""
        if first not in self.token_ids or second not in self.token_ids:
            return None
        gap = self.values[self.token_ids.index(first)] - self.values[self.token_ids.index(second)]
        return gap if math.isfinite(gap) else None  # a masked stop token


@dataclass(frozen=True)
class Expected:
    """What transformers answers to one request, with the best logits of each step."""

    request: Request
    completion: Completion
    steps: list[BestLogits]


def expected_completions(reference: TransformersEngine | GeneralEngine, requests: Sequence[Request]) -> list[Expected]:
    """Run the requests through transformers, keeping the best logits of each step."""
    found, steps = [], list[BestLogits]()

    def keep(logits: torch.Tensor) -> None:
        values, token_ids = logits[0].float().topk(min(TOP, logits.shape[-1]))
        steps.append(BestLogits(values.tolist(), token_ids.tolist()))

    reference.on_logits = keep
    for request, completion in zip(requests, reference.generate(requests), strict=True):
        found.append(Expected(request, completion, list(steps)))
        steps.clear()
    return found


def verify(engine: Engine, expected: Sequence[Expected], dtype: torch.dtype, method: str) -> dict[str, Any]:
    """Run the same requests through our engine, print each difference, and return the record for run.json.

    A request's key must be the dataset's file stem and the row's `_id`. A difference is a near-tie if
    transformers' own logits of the two tokens lie within NEAR_TIE_ULP units in the last place of `dtype`.
    """
    theirs = {each.request.key: each for each in expected}
    differing = []
    for ours in engine.generate([each.request for each in expected]):
        stem, row_id = ours.key
        difference = _difference(ours, theirs[stem, row_id], dtype)
        if difference is not None:
            differing.append({"_id": row_id, "dataset": stem, **difference})
            print(f"verify: {stem} {row_id}: {_sentence(difference)}")
    near = sum(difference["near_tie"] for difference in differing)
    for line in _summary(len(expected), len(differing), near, dtype, method):
        print(line)
    return {"prompts": len(expected), "differing": differing, "near_ties": near}


def _difference(ours: Completion, expected: Expected, dtype: torch.dtype) -> dict[str, Any] | None:
    theirs = expected.completion
    if ours.error is not None or theirs.error is not None:
        errors = {"sparsecache": ours.error, "transformers": theirs.error}
        found = {"first_differing_token": 0, "reference_gap": None, "near_tie": False}
        return {**found, "errors": {name: error for name, error in errors.items() if error is not None}}
    if ours.token_ids == theirs.token_ids:
        return None
    index = first_difference(ours.token_ids, theirs.token_ids)
    gap, near_tie = None, False
    # Past the end of one text there is no pair of tokens to compare.
    if index < min(len(ours.token_ids), len(theirs.token_ids), len(expected.steps)):
        step = expected.steps[index]
        gap = step.gap(theirs.token_ids[index], ours.token_ids[index])
        near_tie = gap is not None and gap <= NEAR_TIE_ULP * ulp(step.values[0], dtype)
    return {"first_differing_token": index, "reference_gap": gap, "near_tie": near_tie}


def ulp(value: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of a dtype at the magnitude of `value`."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(value), info.smallest_normal))[1] - 1
    return float(info.eps) * 2.0**exponent


def first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the first index at which two sequences differ; the length of the shorter if it begins the longer."""
    pairs: Iterable[tuple[int, tuple[int, int]]] = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _sentence(difference: dict[str, Any]) -> str:
    if errors := difference.get("errors"):
        return " and ".join(f"{name} failed: {error}" for name, error in errors.items())
    index, gap = difference["first_differing_token"], difference["reference_gap"]
    if gap is None:
        reason = f"our token is not among transformers' {TOP} best, or one text ends there"
    else:
        reason = f"transformers' logits differ by {gap:.3g}{', a near-tie' if difference['near_tie'] else ''}"
    return f"the texts differ from new token {index} on; {reason}."


def _summary(prompts: int, differing: int, near: int, dtype: torch.dtype, method: str) -> Iterable[str]:
    yield f"verify: {prompts - differing} of {prompts} prompts give the text of transformers."
    if near:
        yield (
            f"verify: {near} of the {differing} differences are near-ties: transformers' own logits of the two tokens "
            f"are at most {NEAR_TIE_ULP} units in the last place of {str(dtype).removeprefix('torch.')} apart."
        )
    if differing > near and method != "vanilla":
        yield (
            f"verify: both engines decode with {method}. Near-ties among the tokens it selects can also make texts "
            f"differ; --dtype float32 has the fewest, and --method vanilla has none."
        )
