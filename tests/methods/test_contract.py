"""What every method promises (methods/base.py), for every method file found and every family.

A new file under methods/ is tested here without being named: with its default options, with those under which
it drops tokens of prompts as short as these (its class attribute `tight`), and, if there are options under which
it keeps and attends to everything (`lossless`), against transformers.
"""

import json
from typing import Any, ClassVar

import pytest
import torch

from sparsecache.cache.base import Method, Shape
from sparsecache.engine.base import Request
from sparsecache.engine.families import family_names
from sparsecache.engine.generator import Generator
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.methods.vanilla import Vanilla

LENGTHS = (90, 5, 33, 14)
NEW_TOKENS = 24

every_method = pytest.mark.parametrize("name", method_names())
every_family = pytest.mark.parametrize("model_type", family_names())


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in LENGTHS]


def _make(name: str, options: dict[str, Any]) -> Method:
    return make_method(name, {**parse_options(name, {}), **options})


def _settings(name: str) -> list[dict[str, Any]]:
    """The options, over the defaults, with which a method is tested."""
    tight = load_method(name).tight
    return [{}, tight] if tight else [{}]


def _calibrate(method: Method, shape: Shape) -> None:
    """As a run does, from random queries."""
    if method.calibration_text() is not None:
        for layer in range(shape.layers):
            group = shape.heads // shape.kv_heads
            method.calibrate(layer, torch.randn(shape.kv_heads, group, 40, shape.head_dim))


def _check_declarations(kind: type[Method]) -> None:
    assert kind.lossless is not None or kind.tight, (
        f"{kind.__name__} must name options with which it keeps everything (class attribute `lossless`) or options "
        f"with which it drops tokens of a prompt of a few dozen (`tight`); with neither these tests show nothing."
    )
    for options in (kind.lossless or {}, kind.tight):
        unknown = options.keys() - method_options(kind).keys()
        assert not unknown, f"{kind.__name__} has no option {', '.join(unknown)}, which `lossless` or `tight` names."


def _texts(engine: Generator, order: list[int]) -> dict[int, list[int]]:
    prompts = _prompts()
    done = list(engine.generate(Request(at, prompts[at], NEW_TOKENS, ()) for at in order))
    assert [completion.error for completion in done] == [None] * len(order)
    for completion in done:
        json.dumps(completion.report, allow_nan=False)
    return {completion.key: completion.token_ids for completion in done}


def _check_independence(new_engine: Any) -> None:
    """`new_engine(slots)` makes an engine. Each text is the one that a fresh engine gives to its prompt alone."""
    alone = {at: _texts(new_engine(1), [at])[at] for at in range(len(LENGTHS))}
    for slots in (1, 3):
        engine = new_engine(slots)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 2, 1]):
            assert _texts(engine, order) == {at: alone[at] for at in order}


@torch.inference_mode()
def _check_rows_not_in_flight(decoder: Any, method: Method) -> None:
    """Steps that name an idle slot, until it has run full, change nothing for the slots in flight."""
    prompt = torch.tensor(_prompts()[2])
    tokens = torch.arange(5, 5 + 60)

    def logits(rows: list[int]) -> list[torch.Tensor]:
        method.allocate(decoder.shape, 3, 40, decoder.device, decoder.dtype)
        slots = torch.tensor(rows)
        for slot in (1, 2):  # the idle slot held something once
            decoder.prefill(prompt[:9], slot, 5)
            method.release(slot)
        found = []
        for start in (0, 3, 6):  # several sequences, while the idle slot goes on
            found.append(decoder.prefill(prompt, 1, 7))
            for at in range(start, start + 6):
                positions = torch.full((len(rows),), len(prompt) + at - start)
                step = decoder.step(tokens[at].expand(len(rows)), positions, slots)
                found.append(step[rows.index(1)])
            method.release(1)
        for _ in range(40 if len(rows) > 1 else 0):
            decoder.step(tokens[:2], torch.tensor([39, 39]), torch.tensor([2, 0]))
        found.append(decoder.prefill(prompt, 2, 7))
        found.append(decoder.step(tokens[:1], torch.tensor([len(prompt)]), torch.tensor([2]))[0])
        return found

    for with_idle, without in zip(logits([2, 1]), logits([1]), strict=True):
        torch.testing.assert_close(with_idle, without, rtol=1e-4, atol=1e-4)


@every_method
@every_family
def test_lossless_options_give_the_text_of_transformers(name, model_type, decoder, transformers_model) -> None:
    lossless = load_method(name).lossless
    if lossless is None:
        pytest.skip(f"{name} has no options with which it keeps everything")
    method = _make(name, lossless)
    found = _texts(Generator(decoder(model_type, method), method, 2), [0, 1, 2, 3])
    model = transformers_model(model_type)
    for at, prompt in enumerate(_prompts()):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert found[at] == out[0, len(prompt) :].tolist()
        assert len(set(found[at])) > NEW_TOKENS // 3


@every_method
@every_family
def test_a_text_depends_on_its_prompt_alone(name, model_type, decoder) -> None:
    for options in _settings(name):

        def new_engine(slots: int, options: dict[str, Any] = options) -> Generator:
            method = _make(name, options)
            return Generator(decoder(model_type, method), method, slots)

        _check_independence(new_engine)


@every_method
@every_family
def test_rows_not_in_flight_are_harmless(name, model_type, decoder) -> None:
    for options in _settings(name):
        method = _make(name, options)
        _check_rows_not_in_flight(decoder(model_type, method), method)


@every_method
def test_tight_options_change_the_text(name, decoder) -> None:
    """Else the tests under them show no more than those under the defaults."""
    tight = load_method(name).tight
    if tight:
        vanilla, method = Vanilla(), _make(name, tight)
        whole, found = (_texts(Generator(decoder("llama", each), each, 1), [0, 2]) for each in (vanilla, method))
        assert found != whole


@every_method
def test_inputs_are_left_alone_and_outputs_have_the_shape_of_q(name) -> None:
    for options in _settings(name):
        _check_shapes(_make(name, options))


@torch.inference_mode()
def _check_shapes(method: Method) -> None:
    shape = Shape(layers=2, heads=4, kv_heads=2, head_dim=8)
    _calibrate(method, shape)
    method.allocate(shape, 2, 50, torch.device("cpu"), torch.float32)
    for layer in range(2):
        prompt = [torch.randn(heads, 40, 8) for heads in (4, 2, 2)]
        copies = [tensor.clone() for tensor in prompt]
        method.prefill(layer, 1, *prompt, 5)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(prompt, copies, strict=True))
    for layer in range(2):
        token = [torch.randn(1, heads, 1, 8) for heads in (4, 2, 2)]
        copies = [tensor.clone() for tensor in token]
        if layer and method.guesses(layer):
            method.anticipate(layer, token[0], torch.tensor([1]))
        out = method.attend(layer, *token, torch.tensor([1]))
        assert out.shape == (1, 4, 1, 8) and out.dtype == torch.float32 and out.isfinite().all()
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(token, copies, strict=True))
    json.dumps(method.report(1), allow_nan=False)


@every_method
@torch.inference_mode()
def test_releasing_an_empty_slot_does_nothing(name) -> None:
    for options in _settings(name):
        method, shape = _make(name, options), Shape(layers=2, heads=4, kv_heads=2, head_dim=8)
        _calibrate(method, shape)
        method.allocate(shape, 3, 50, torch.device("cpu"), torch.float32)
        for _ in range(2):
            for slot in range(3):
                method.release(slot)


@every_method
def test_options_can_be_recorded_and_the_tested_ones_are_named(name) -> None:
    for value in parse_options(name, {}).values():  # nan equals nothing, so no run with it could be gone on with
        assert value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and value == value)
    _check_declarations(load_method(name))


class _Leaky(Vanilla):
    """Forgets nothing: a later sequence goes on behind the earlier one's keys."""

    def prefill(self, layer, slot, q, k, v, max_new_tokens):
        super().prefill(layer, slot, q, k, v, max_new_tokens)
        self._cache.lengths[layer, slot] = max(k.shape[1], self.longest.get(slot, 0))
        self.longest[slot] = int(self._cache.lengths[layer, slot])

    def allocate(self, *arguments):
        super().allocate(*arguments)
        self.longest = {}


class _FirstOnly(Vanilla):
    """Is itself for the first sequence only, like the code bases that keep a flag."""

    seen = 0

    def release(self, slot):
        super().release(slot)
        self.seen += 1

    def attend(self, layer, q, k, v, slots):
        out = super().attend(layer, q, k, v, slots)
        return out if self.seen else out * 0.5


class _Crosstalk(Vanilla):
    """Looks into every slot's keys."""

    def attend(self, layer, q, k, v, slots):
        out = super().attend(layer, q, k, v, slots)
        return out + 0.1 * self._cache.values[layer].sum()


@pytest.mark.parametrize("kind", [_Leaky, _FirstOnly, _Crosstalk])
def test_the_checks_find_state_that_leaks(kind, decoder) -> None:
    def new_engine(slots: int) -> Generator:
        method = kind()
        engine = Generator(decoder("llama", method), method, slots)
        engine.reserve(max(LENGTHS) + NEW_TOKENS)
        return engine

    with pytest.raises(AssertionError):
        _check_independence(new_engine)


def test_the_checks_find_rows_that_harm(decoder) -> None:
    method = _Crosstalk()
    with pytest.raises(AssertionError):
        _check_rows_not_in_flight(decoder("llama", method), method)


def test_a_method_that_names_no_options_to_test_is_told_how() -> None:
    class Silent(Vanilla):
        lossless = None

    with pytest.raises(AssertionError, match=r"Silent must name .*`lossless`.*`tight`"):
        _check_declarations(Silent)

    class Misspelt(Silent):
        tight: ClassVar[dict[str, Any]] = {"budgte": 4}

    with pytest.raises(AssertionError, match="Misspelt has no option budgte"):
        _check_declarations(Misspelt)
    _check_declarations(Vanilla)
