"""A selection after an eviction, against a selection from the text that the eviction leaves."""

from dataclasses import replace

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.errors import UsageError
from sparsecache.methods import make_method, parse_options
from sparsecache.methods.composed import Composed
from tests.methods.presses import kept_by_method
from tests.methods.stepping import Text, random_text, run, shape_of

PARTS = {"evict": "snapkv,budget=0.5,window=4,dense_layers=0", "select": "oracle,budget=6,dense_layers=0"}


def _make(name: str, **options: str) -> CacheMethod:
    return make_method(name, parse_options(name, options))


def _left(text: Text) -> Text:
    """Return the text that SnapKV leaves in one layer: every KV head keeps as many tokens, not the same."""
    kept = kept_by_method(_make("snapkv", budget="0.5", window="4", dense_layers="0"), *text.prompt_of(0))
    new = range(text.prompt, text.prompt + text.new)

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[0, head, [*of_head, *new]] for head, of_head in enumerate(kept)])[None]

    evicted = text.prompt - len(kept[0])
    return replace(text, q=text.q[:, :, evicted:], k=of_heads(text.k), v=of_heads(text.v), prompt=len(kept[0]))


@pytest.mark.parametrize(
    "select", ["oracle,budget=6", "oracle,budget=0.3", "quest,budget=6,page=4", "sparq,budget=9", "freekv,page=2"]
)
def test_a_selection_sees_what_the_eviction_left_and_new_tokens_as_a_text(select) -> None:
    shape = shape_of(2, layers=1)
    texts = [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate([(40, 9), (5, 12), (31, 4)])]
    found = run(Composed(PARTS["evict"], f"{select},dense_layers=0"), shape, texts)
    name, *options = select.split(",")
    alone = _make(name, **dict(pair.split("=") for pair in options), dense_layers="0")
    for each, expected in zip(found, run(alone, shape, [_left(text) for text in texts]), strict=True):
        torch.testing.assert_close(torch.stack(each.outputs[0]), torch.stack(expected.outputs[0]))
        assert each.attended == expected.attended


def test_kept_is_a_share_of_all_past_tokens() -> None:
    shape = shape_of(2, layers=1)
    (found,) = run(Composed(**PARTS), shape, [random_text(shape, 40, 10, 1)])
    share = sum(6 / past for past in range(40, 50)) / 10
    assert found.report == {"kept": pytest.approx(share), "sparse_steps": 10, "capped_steps": 10, "dense_layers": 0}


def test_a_layer_that_is_dense_for_one_method_has_the_other_alone() -> None:
    """Layer 0 has none, layer 1 the selection, layer 2 both; then the other way round."""
    shape = shape_of(2, layers=3)
    text = random_text(shape, 40, 5, 1)
    evict, select = "snapkv,budget=20,window=4,dense_layers={}", "oracle,budget=6,dense_layers={}"
    for dense, alone in (((2, 1), [6] * 5), ((1, 2), [20 + at for at in range(5)])):
        method = Composed(evict.format(dense[0]), select.format(dense[1]))
        (found,) = run(method, shape, [text])
        assert found.attended == [None, [[count] * 2 for count in alone], [[6, 6]] * 5]


def test_storage_belongs_to_the_selection() -> None:
    method = Composed(PARTS["evict"], "oracle,budget=6,storage=int8,dense_layers=0")
    shape = shape_of(2, layers=1)
    texts = [random_text(shape, 330, 3, 1)]
    (found,), (whole,) = run(method, shape, texts), run(Composed(**PARTS), shape, texts)
    out, expected = torch.stack(found.outputs[0]), torch.stack(whole.outputs[0])
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evict": "adakv"}, "evict=adakv must evict once after the prompt and keep as many tokens in all KV heads"),
        ({"evict": "h2o"}, "evict=h2o must evict once"),
        ({"evict": "snapkv,storage=int4"}, "evict=snapkv,storage=int4 stores nothing; give storage=int4 to `select`"),
        ({"select": "vanilla"}, "select=vanilla must select in every layer"),
        ({"select": "tidaldecode"}, "select=tidaldecode must select in every layer"),
        ({"select": "loki"}, "select=loki needs a calibration"),
        ({"select": "qest"}, "select=qest: There is no method 'qest'. Did you mean 'quest'"),
        ({"select": "quest,pages=3"}, "select=quest,pages=3: Method quest has no option 'pages'. Did you mean 'page'"),
        ({"select": "quest,page"}, "page='' is not a whole number"),
        ({"select": "quest,page=4,page=8"}, "select=quest,page=4,page=8: page is given twice"),
        ({"select": "quest,budget=0"}, "budget=0.0 must be a share"),
        ({"select": "composed"}, "composed cannot be a part of itself"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message) -> None:
    with pytest.raises(UsageError) as raised:
        _make("composed", **options)
    assert message in str(raised.value) and str(raised.value).count("--list_methods") == 1
