"""The general engine over a loaded model, and completions in the requests' order."""

from typing import Any

import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Completion, Request
from sparsecache.engine.general.model import CachedModel
from sparsecache.engine.reference import TransformersEngine

CPU = torch.device("cpu")
CALIBRATION = torch.arange(3, 203)


def general_engine(model: Any, method: CacheMethod, window: int) -> TransformersEngine:
    """Return the general engine over a loaded model, calibrated if the method needs it."""
    engine = TransformersEngine(model, CPU)
    engine.cached = CachedModel(model, method, window)
    method.check(engine.cached.shape)
    if method.calibration_text() is not None:
        with torch.inference_mode():
            engine.cached.calibrate(CALIBRATION, lambda layers: None)
    engine.cached.check()
    return engine


def completions(engine: Any, requests: list[Request]) -> list[tuple[list[int], str, dict[str, Any]]]:
    """Return the tokens, the finish reason and the report of each request, whose keys are 0, 1, ..."""
    done: dict[int, Completion] = {completion.key: completion for completion in engine.generate(requests)}
    assert [done[request.key].error for request in requests] == [None] * len(requests)
    return [(done[at].token_ids, done[at].finish_reason, done[at].report) for at in range(len(requests))]
