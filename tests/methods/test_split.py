"""A model split by layers over several devices gives the text of the unsplit one, every tensor with its layer."""

from dataclasses import replace

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.rope import Rope
from sparsecache.methods import make_method, method_names, parse_options
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.method_under_test import MethodUnderTest
from sparsecache.testing.random_checkpoint import make_random_checkpoint
from tests.methods.fake_devices import FakeDevices

LAYERS = 5
DEVICES = [torch.device("cpu", number) for number in range(3)]
PROMPTS = (40, 5, 33)
NEW_TOKENS = 4
MORE = {
    "infinigen": [
        {"offload": True, "gpu_cache": 3, "budget": 4, "sinks": 1, "recent": 1},
        {"offload": True, "budget": 4, "partial_bits": 4, "partial_weight_ratio": 1.0},
        {"budget": 4, "partial_bits": 8, "partial_weight_ratio": 0.5},
    ]
}
CASES = [
    pytest.param(name, options, id=f"{name} {options}")
    for name in method_names()
    for options in [MethodUnderTest.of(name).tight, *MORE.get(name, [])]
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("split") / "model"
    return Checkpoint(make_random_checkpoint(folder, num_hidden_layers=LAYERS, initializer_range=0.25))


def _decoder(checkpoint: Checkpoint, method: CacheMethod, devices: list[torch.device]) -> Decoder:
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    weights = checkpoint.load(architecture, devices, torch.float32)
    return Decoder(architecture, weights, Rope(checkpoint.config, devices[0]), method)


def _texts(checkpoint: Checkpoint, name: str, options: dict[str, object], devices: list[torch.device]) -> list[object]:
    method = make_method(name, {**parse_options(name, {}), **options})
    decoder = _decoder(checkpoint, method, devices)
    if method.calibration_text() is not None:
        with torch.inference_mode():
            decoder.calibrate(torch.arange(3, 203).to(devices[0]), lambda layers: None)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in PROMPTS]
    requests = [Request(at, token_ids, NEW_TOKENS, ()) for at, token_ids in enumerate(prompts)]
    done = list(Generator(decoder, 2).generate(requests))
    assert [completion.error for completion in done] == [None] * len(PROMPTS)
    return sorted((completion.key, completion.token_ids, completion.report) for completion in done)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_method_gives_the_text_of_the_unsplit_model(name, options, checkpoint) -> None:
    whole = _texts(checkpoint, name, options, [torch.device("cpu")])
    with FakeDevices() as fake:
        split = _texts(checkpoint, name, options, DEVICES)
    assert [each[:2] for each in split] == [each[:2] for each in whole]
    for (*_, mine), (*_, theirs) in zip(split, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    between = {(a, b) for a, b in fake.crossings if a.index is not None and b.index is not None}
    forward = {(DEVICES[0], DEVICES[1]), (DEVICES[1], DEVICES[2])}
    assert between == {*forward, (DEVICES[0], DEVICES[2])}  # the latter for the slots, when a step ends; nothing back


class _AllOnTheFirst(Vanilla):
    """Keeps the layers of every device on one."""

    def make_cache(self, layer, config):
        return super().make_cache(layer, replace(config, device=DEVICES[0]))


def test_a_cache_on_another_device_than_its_layer_is_found(checkpoint) -> None:
    with FakeDevices():
        engine = Generator(_decoder(checkpoint, _AllOnTheFirst(), DEVICES), 1)
        (done,) = engine.generate([Request(0, [5, 6, 7], 2, ())])
    assert done.error is not None and "tensors on cpu:0, cpu:1" in done.error


def test_weights_lie_with_their_layers_in_equal_parts(checkpoint) -> None:
    with FakeDevices():
        decoder = _decoder(checkpoint, Vanilla(), DEVICES)
        layers = [vars(layer).values() for layer in decoder._weights.layers]
        places = [{tensor.device for tensor in tensors if tensor is not None} for tensors in layers]
        assert places == [{DEVICES[at]} for at in (0, 0, 1, 1, 2)]
        assert decoder.devices == tuple(DEVICES)
