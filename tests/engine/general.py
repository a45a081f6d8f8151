"""Completions of an engine in the order of the requests."""

from typing import Any

import torch

from sparsecache.engine.base import Completion, Request

CPU = torch.device("cpu")
NO_RESIDUAL = ("cohere2", "gpt2")  # attention and MLP side by side; other names than the known ones


def guess_of(model_type: str, method: str) -> dict[str, str]:
    """Return the option `guess` where infinigen's default has no place in a family's layers."""
    return {"guess": "input"} if model_type in NO_RESIDUAL and method == "infinigen" else {}


def completions(engine: Any, requests: list[Request]) -> list[tuple[list[int], str, dict[str, Any]]]:
    """Return the tokens, the finish reason and the report of each request, whose keys are 0, 1, ..."""
    done: dict[int, Completion] = {completion.key: completion for completion in engine.generate(requests)}
    assert [done[request.key].error for request in requests] == [None] * len(requests)
    return [(done[at].token_ids, done[at].finish_reason, done[at].report) for at in range(len(requests))]
