"""guess=linear: the fitted map against closed forms, and the query that both engines make of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import ProjectQuery
from sparsecache.engine.base import Request
from sparsecache.engine.general.engine import GeneralEngine
from sparsecache.engine.general.model import CachedModel
from sparsecache.engine.generator import Generator
from sparsecache.errors import UsageError
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.infinigen.linear import RIDGES, fit_speculation_map
from tests.engine.general import completions

HIDDEN, ROWS = 12, 160


def _fit(x: Tensor, change: Tensor, weights: Tensor) -> Tensor:
    return fit_speculation_map(x, x + change, lambda hidden: hidden.float() @ weights.T)


def test_the_map_is_a_ridge_regression_toward_the_query_weights() -> None:
    """Queries by the map are those of weights that a ridge pulls toward the layer's own, solved for directly."""
    x, weights = torch.randn(ROWS, HIDDEN), torch.randn(8, HIDDEN)
    change = x @ torch.randn(HIDDEN, HIDDEN) * 0.3 + torch.randn(ROWS, HIDDEN) * 0.2
    found = _fit(x, change, weights)
    queries = (x + change) @ weights.T
    fits = []
    for ridge in RIDGES[:-1]:
        strength = ridge * (x.T @ x).diagonal().mean()
        gram, target = x.T @ x + strength * torch.eye(HIDDEN), x.T @ queries + strength * weights.T
        fits.append(torch.linalg.solve(gram, target))
    mapped = (torch.eye(HIDDEN) + found) @ weights.T
    assert min(float((mapped - fit).norm() / fit.norm()) for fit in fits) < 1e-4


def test_enough_text_finds_the_map_and_little_text_does_little_harm() -> None:
    x, weights, true = torch.randn(2000, HIDDEN), torch.randn(8, HIDDEN), torch.randn(HIDDEN, HIDDEN) / 4
    torch.testing.assert_close(_fit(x, x @ true, weights), true, rtol=0.02, atol=0.02)
    noise = torch.randn(2000, HIDDEN)
    found = _fit(x[:20], noise[:20], weights)
    plain = torch.linalg.lstsq(x[:20], noise[:20]).solution
    errors = [
        float(((noise - x @ each) @ weights.T)[20:].norm() / (noise @ weights.T)[20:].norm()) for each in (found, plain)
    ]
    assert errors[0] < 1.15 < errors[1]


class Recording(InfiniGen):
    """Keeps the speculated and the true query of each step."""

    def make_sparse_cache(self, layer: int, config: Any) -> Any:
        cache = super().make_sparse_cache(layer, config)
        speculate, attend = cache.speculate, cache.attend
        self.queries: list[tuple[Tensor, Tensor]] = []
        guessed: list[Tensor] = []

        def note_guess(hidden: Tensor, project_query: ProjectQuery, slots: Tensor) -> None:
            guessed[:] = [project_query(hidden, normed=False)]
            speculate(hidden, project_query, slots)

        def note_query(q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
            self.queries.append((guessed[0], q))
            return attend(q, k, v, slots)  # type: ignore[no-any-return]

        cache.speculate, cache.attend = note_guess, note_query
        return cache


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])  # with a bias; with a norm of the query
def test_the_speculated_query_is_nearer_to_the_true_one(model_type, decoder) -> None:
    prompt, errors = [0, *range(300, 345)], []
    for guess in ("residual", "linear"):
        method = Recording(dense_layers=1, budget=1.0, alpha=math.inf, guess=guess)
        (done,) = Generator(decoder(model_type, method), 1).generate([Request(0, prompt, 30, ())])
        assert done.error is None
        speculated, true = (torch.cat(queries) for queries in zip(*method.queries, strict=True))
        errors.append(float((speculated - true).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_both_engines_speculate_the_same(model_type, decoder, transformers_model) -> None:
    options = {"dense_layers": 1, "budget": 6, "alpha": math.inf, "guess": "linear"}
    ours, other = InfiniGen(**options), InfiniGen(**options)
    made = decoder(model_type, ours)
    other.restore(ours.calibration(), made.shape)
    requests = [Request(0, [0, *range(300, 345)], 12, ())]
    cached = CachedModel(transformers_model(model_type), other, 100)
    expected = completions(Generator(made, 1), requests)
    assert completions(GeneralEngine(cached, 1), requests) == expected
    with pytest.raises(UsageError, match="--engine sparsecache"):
        cached.calibrate(torch.arange(3, 50), lambda layers: None)


def test_a_stored_map_is_restored_and_a_wrong_one_refused(decoder) -> None:
    method = InfiniGen(guess="linear", skew=False, dense_layers=1)
    assert method.calibration_text() is not None
    made = decoder("llama", method)
    stored = method.calibration()
    assert len(stored["speculation_map"]) == made.shape.layers - 1 and stored["speculation_map"].any()
    again = InfiniGen(guess="linear")
    again.restore(stored, made.shape)
    assert torch.equal(again.calibration()["speculation_map"], stored["speculation_map"])
    for wrong in ({}, {"speculation_map": stored["speculation_map"][1:]}):
        with pytest.raises(ValueError, match="speculation_map"):
            again.restore({"skewing_matrix": stored["skewing_matrix"], **wrong}, made.shape)
    with pytest.raises(RuntimeError, match="must be calibrated"):
        InfiniGen(guess="linear", skew=False, dense_layers=1)._speculation_map(1, made.shape)
