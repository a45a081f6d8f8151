"""Prompts shorter than a budget, a window or a partition lose no more than the budget asks for."""

import pytest

from sparsecache.methods.adakv import AdaKV
from sparsecache.methods.keydiff import KeyDiff
from sparsecache.methods.lagkv import LagKV
from sparsecache.methods.pyramidkv import PyramidKV
from sparsecache.methods.rkv import RKV
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.streaming import Streaming
from sparsecache.methods.tova import TOVA
from tests.methods.presses import kept_by_layers, kept_by_press, random_prompt

WINDOWED = (SnapKV, PyramidKV, AdaKV, RKV)


@pytest.mark.parametrize("kind", [*WINDOWED, KeyDiff, LagKV, TOVA])
@pytest.mark.parametrize("group", [1, 4])
def test_a_prompt_within_the_budget_is_kept_whole(kind, group) -> None:
    for length in (1, 2, 7, 12):
        prompt = random_prompt(length, group)
        for budget in (1.0, 12, 200):
            whole = [[list(range(length))] * (4 // group)] * 3
            assert kept_by_layers(kind(budget=budget, dense_layers=0), *prompt, layers=3) == whole


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("length", [3, 8, 20])
def test_a_budget_below_the_window_keeps_its_last_tokens(kind, length) -> None:
    method = kind(budget=2, window=8, dense_layers=0)
    assert kept_by_layers(method, *random_prompt(length, 2), layers=3) == [[[length - 2, length - 1]] * 2] * 3


@pytest.mark.parametrize("count", [5, 20, 32])
def test_streaming_keeps_what_kvpress_keeps(count, kvpress) -> None:
    prompt = random_prompt(33, 4)
    expected = kept_by_press(kvpress("streaming_llm_press").StreamingLLMPress(1 - (count + 0.5) / 33), *prompt)
    assert kept_by_layers(Streaming(budget=count, dense_layers=0), *prompt, layers=1) == [expected]
