"""TidalDecode against the true scores of the layers that select, in float64."""

import pytest
import torch

from sparsecache.methods.tidaldecode import TidalDecode
from tests.methods.partial_keys import selected
from tests.methods.stepping import Kept, Text, check_against, make_cache, random_texts, shape_of


def _kept(text: Text, layer: int, budget: float, selecting: tuple[int, ...]) -> list[Kept]:
    """Return what a layer attends to: the tokens of highest true score in the last selecting layer before it."""
    source = max(each for each in selecting if each < layer)
    identity = torch.eye(text.k.shape[3], dtype=torch.float64)
    return selected(text, source, budget, [identity] * text.k.shape[1])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("budget", "dense_layers", "given", "selecting"),
    [(0.2, 1, None, (1, 2)), (7, 0, 3, (0, 3)), (1, 0, 1, (0, 1)), (1.0, 1, None, (1, 2)), (0.5, 2, None, (2,))],
)
def test_layers_attend_to_what_the_last_selecting_layer_chose(budget, dense_layers, given, selecting, group) -> None:
    shape = shape_of(group, layers=5)  # 13/32 of five layers are two
    method = TidalDecode(budget, dense_layers, given)
    cache = make_cache(method, shape, 1, 10, 5)
    full = {*range(dense_layers), *selecting}
    assert [not layer.sparse for layer in cache.layers] == [layer in full for layer in range(5)]
    texts = random_texts(shape)[:3:2]
    check_against(lambda text, layer: _kept(text, layer, budget, selecting), method, shape, texts)


@pytest.mark.parametrize(("layer", "dense_layers"), [(0, 0), (2, 2), (-1, 0), (5, 1), (99, 1)])
def test_a_layer_that_cannot_select_again_is_refused(layer, dense_layers) -> None:
    told = rf"^reselection_layer={layer} must be {dense_layers + 1} to 4, a layer of this model after layer"
    with pytest.raises(ValueError, match=told):
        TidalDecode(dense_layers=dense_layers, reselection_layer=layer).check(shape_of(2, layers=5))


def test_a_second_model_of_any_depth_needs_no_option() -> None:
    for layers in range(1, 5):
        TidalDecode(dense_layers=0).check(shape_of(2, layers=layers))
