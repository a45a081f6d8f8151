"""A selection after an eviction, against a selection from the text that the eviction leaves."""

import re
from dataclasses import replace

import pytest
import torch

from sparsecache.cache.base import CacheMethod, Shape
from sparsecache.errors import UsageError
from sparsecache.kernels.quantisation import QuantisedStore
from sparsecache.methods import make_method, parse_options
from sparsecache.methods.composed import Composed
from tests.methods.partial_keys import calibration_qk
from tests.methods.presses import kept_by_method
from tests.methods.stepping import Text, make_cache, random_text, run, shape_of

PARTS = {"evict": "snapkv,budget=0.5,window=4,dense_layers=0", "select": "oracle,budget=6,dense_layers=0"}


def _make(name: str, **options: str) -> CacheMethod:
    return make_method(name, parse_options(name, options))


def _left(text: Text) -> Text:
    """Return the text that SnapKV leaves: in a layer every KV head keeps as many tokens, not the same."""
    snapkv = _make("snapkv", budget="0.5", window="4", dense_layers="0")
    kept = [kept_by_method(snapkv, *text.prompt_of(layer)) for layer in range(len(text.k))]
    new = range(text.prompt, text.prompt + text.new)

    def left(x: torch.Tensor) -> torch.Tensor:
        of_layers = (
            torch.stack([x[at, head, [*own, *new]] for head, own in enumerate(of)]) for at, of in enumerate(kept)
        )
        return torch.stack(list(of_layers))

    count = len(kept[0][0])
    return replace(text, q=text.q[:, :, text.prompt - count :], k=left(text.k), v=left(text.v), prompt=count)


def _calibrated(method: CacheMethod, shape: Shape) -> CacheMethod:
    if method.calibration_text() is not None:
        for layer, (q, k) in enumerate(calibration_qk(shape)):
            method.calibrate(layer, q, k)
    return method


@pytest.mark.parametrize(
    "select",
    [
        *("oracle,budget=6", "oracle,budget=0.3", "quest,budget=6,page=4", "sparq,budget=9", "freekv,page=2"),
        *("loki,budget=6,channels=3", "doublesparse,budget=0.3,channels=2"),
        *("infinigen,budget=6,partial_bits=16,partial_weight_ratio=0.5", "infinigen,budget=0.3,sinks=1"),
        "infinigen,budget=6,partial_bits=8,partial_weight_ratio=0.5,group=max",
    ],
)
def test_a_selection_sees_what_the_eviction_left_and_new_tokens_as_a_text(select) -> None:
    shape = shape_of(2, layers=2)
    texts = [random_text(shape, prompt, new, seed) for seed, (prompt, new) in enumerate([(40, 9), (5, 12), (31, 4)])]
    name, *options = select.split(",")
    dense = "1" if name == "infinigen" else "0"
    composed = _calibrated(Composed(PARTS["evict"], f"{select},dense_layers={dense}"), shape)
    alone = _calibrated(_make(name, **dict(pair.split("=") for pair in options), dense_layers=dense), shape)
    found = run(composed, shape, texts)
    for each, expected in zip(found, run(alone, shape, [_left(text) for text in texts]), strict=True):
        for outputs, others in zip(each.outputs, expected.outputs, strict=True):
            torch.testing.assert_close(torch.stack(outputs), torch.stack(others))
        assert each.attended[1] == expected.attended[1]


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


@pytest.mark.parametrize("dense", [(0, 2), (2, 0), (1, 1)])
def test_all_layers_have_the_storage_of_the_selection(dense) -> None:
    """Also those that are dense for the selection alone."""
    method = Composed(f"snapkv,dense_layers={dense[0]}", f"quest,storage=int4,dense_layers={dense[1]}")
    cache = make_cache(method, replace(shape_of(2, layers=3), head_dim=32), 2, 400, 10)
    for layer in cache.layers:
        holder = getattr(layer, "selection", layer)
        kv = getattr(holder, "kv", None) or holder.full.kv
        assert isinstance(kv.quantised, QuantisedStore) and kv.quantised.bits == 4


def test_a_calibration_is_that_of_the_selection_and_not_that_of_another_one() -> None:
    loki, doublesparse = (Composed(PARTS["evict"], select) for select in ("loki,budget=6", "doublesparse,budget=6"))
    assert loki.calibration_name == _make("loki").calibration_name != doublesparse.calibration_name
    shape = shape_of(2)
    loki.restore(_calibrated(_make("loki"), shape).calibration(), shape)
    assert loki.calibration().keys() == {"projection"}
    with pytest.raises(ValueError, match="its projection has the shape None"):
        loki.restore({}, shape)


@pytest.mark.parametrize("part", ["evict", "select"])
def test_an_option_that_does_not_fit_the_model_names_its_part(part) -> None:
    options = {"evict": "snapkv,dense_layers=9", "select": "quest,dense_layers=9"}
    with pytest.raises(ValueError, match=rf"^{part}={options[part]}: dense_layers=9 must be 0 to 3, the layers of"):
        Composed(**{part: options[part]}).check(shape_of(2, layers=3))


def test_a_calibration_file_that_cannot_be_read_names_its_part() -> None:
    with pytest.raises(
        ValueError, match=r"^select=loki,calibration_file=no\.txt: calibration_file=no\.txt cannot be read"
    ):
        Composed(select="loki,calibration_file=no.txt").calibration_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evict": "adakv"},
            "evict=adakv must evict once after the prompt and keep equally many tokens in all KV heads",
        ),
        ({"evict": "h2o"}, "evict=h2o must evict once"),
        (
            {"evict": "snapkv,storage=int4"},
            "evict=snapkv,storage=int4 has a storage, but `select` stores the tokens. Give storage=int4 to `select`",
        ),
        ({"select": "vanilla"}, "select=vanilla must select tokens at each step, as quest does."),
        ({"select": "snapkv"}, "select=snapkv must select tokens at each step, as quest does."),
        ({"select": "kivi"}, "select=kivi must select tokens at each step, as quest does. Quantise with storage=int2"),
        ({"select": "tidaldecode"}, "select=tidaldecode lets a layer select for later layers, but layers keep"),
        ({"select": "shadowkv"}, "select=shadowkv needs each token's position in the text, but KV heads keep"),
        ({"select": "loki,channels=1.5"}, "select=loki,channels=1.5: Method loki refuses its options: channels=1.5"),
        ({"select": "qest"}, "select=qest: There is no method 'qest'; did you mean 'quest'?"),
        ({"select": "quest,pages=3"}, "select=quest,pages=3: Method quest has no option 'pages'; did you mean 'page'?"),
        ({"select": "quest,page"}, "page='' is not a whole number"),
        ({"select": "quest,page=4,page=8"}, "select=quest,page=4,page=8: page is given twice"),
        ({"select": "quest,budget=0"}, "budget=0.0 must be a share"),
        ({"select": "composed"}, "composed cannot be a part of itself"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message) -> None:
    with pytest.raises(UsageError) as raised:
        _make("composed", **options)
    assert message in str(raised.value) and len(re.findall(r"[.?] |[.?]$", str(raised.value))) == 2
