"""KeyDiff, and the example of key norms, against kvpress on the same keys."""

import pytest
import torch

from sparsecache.methods import load_method
from sparsecache.methods.expected_attention import ExpectedAttention
from sparsecache.methods.keydiff import KeyDiff
from sparsecache.testing.cache_checks import plain_rope
from tests.methods.presses import (
    HEAD_DIM,
    LENGTHS,
    kept_by_method,
    kept_by_press,
    press_arguments,
    random_prompt,
)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["keydiff", "knorm"])
def test_scores_and_kept_tokens_are_those_of_kvpress(name, length, group, kvpress, repo) -> None:
    method = KeyDiff if name == "keydiff" else load_method(str(repo / "examples" / "knorm.py"))
    module = kvpress(f"{name}_press")
    make_press = module.KeyDiffPress if name == "keydiff" else module.KnormPress
    q, k, v = random_prompt(length, group)
    expected = make_press(0.5).score(*press_arguments(q, k, v))[0]
    torch.testing.assert_close(method().score(q, k, v), expected)
    for count in {2, length // 2, length - 1}:
        expected_kept = kept_by_press(make_press(1 - (count + 0.5) / length), q, k, v)
        assert kept_by_method(method(budget=count, dense_layers=0), q, k, v) == expected_kept


def test_scores_of_half_precision_keys_are_computed_in_single_precision() -> None:
    q, k, v = (x.bfloat16() for x in random_prompt(300, 2))
    scores = KeyDiff().score(q, k, v)
    assert scores.dtype == torch.float32 and all(len(set(of_head.tolist())) > 290 for of_head in scores)


@pytest.mark.parametrize("kind", [KeyDiff, ExpectedAttention])
def test_recent_tokens_stay_and_the_others_keep_their_order(kind) -> None:
    q, k, v = random_prompt(64, 2)
    method, plain = (kind(budget=20, dense_layers=0, recent=recent) for recent in (6, 0))
    method.rope = plain.rope = plain_rope(HEAD_DIM, 50.0)
    best = plain.score(q, k, v)[:, :-6].topk(14, dim=1).indices.sort().values.tolist()
    assert kept_by_method(method, q, k, v) == [[*of_head, *range(58, 64)] for of_head in best]
    with pytest.raises(ValueError, match=r"^recent=-1 must be 0 tokens or more\.$"):
        kind(recent=-1)
