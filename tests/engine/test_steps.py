"""Steps without a GPU: kernels in Triton's interpreter, and graphs replaced by a replay of the decoder itself."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine import generator
from sparsecache.engine.base import Request
from sparsecache.engine.steps import GraphedSteps, TokenReadback, _Graph, blocked_max
from sparsecache.kernels._triton import INTERPRETED, force_backend
from sparsecache.methods import method_names
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.method_under_test import MethodUnderTest

CPU = torch.device("cpu")
LENGTHS = (9, 30, 4, 17, 12)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


def _tight(name: str, **options: Any) -> CacheMethod:
    """Return a method with options that drop tokens of short prompts."""
    subject = MethodUnderTest.of(name)
    return subject.make({**subject.tight, **options})


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_text_through_kernels_is_that_of_transformers(
    model_type, make_checkpoint, make_engine, reference_texts, our_texts
) -> None:
    """A prompt of few tokens, and one of more than a kernel takes; the families with biases and with a QK norm.

    The model is tiny, since the interpreter is slow.
    """
    tiny = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    folder, prompts = make_checkpoint(model_type, **tiny), [list(range(3, 12)), list(range(20, 41))]
    with force_backend("kernels"):
        ours = our_texts(make_engine(folder, 2), prompts, 2)
    assert ours == reference_texts(folder, prompts, 2)
    assert len({token for text in ours for token in text}) > 2


class _Replayed(GraphedSteps):
    """Replays by calling the decoder with what a graph's inputs hold by then, and records the inputs."""

    batches: list[torch.Tensor]

    def _capture(self, size: int) -> _Graph:
        self.batches = []
        inputs = torch.zeros(3, size, dtype=torch.int64)
        inputs[2] = torch.arange(size)
        logits = self._run(inputs)

        steps = weakref.proxy(self)  # a graph does not keep its steps alive

        def replay() -> None:
            steps.batches.append(inputs.clone())
            logits.copy_(steps._run(inputs))

        readbacks = (TokenReadback(size, CPU), TokenReadback(size, CPU))
        return _Graph(SimpleNamespace(replay=replay), inputs, logits, readbacks)


class _NeverAhead(_Replayed):
    """Launches no step ahead."""

    def submit_next(self) -> None:
        return None


@pytest.fixture
def replayed(monkeypatch) -> Callable[..., list[_Replayed]]:
    """Let engines step by a kind of _Replayed; return the list of the steps that they then make."""

    def use(kind: type[_Replayed] = _Replayed) -> list[_Replayed]:
        made: list[_Replayed] = []
        monkeypatch.setattr(generator, "make_steps", lambda *arguments: made.append(kind(*arguments)) or made[-1])
        return made

    return use


@pytest.mark.parametrize(
    ("name", "slots"), [*(("vanilla", slots) for slots in (1, 2, 3)), *((name, 5) for name in method_names())]
)
def test_batches_are_padded_with_free_slots(name, slots, folder, make_engine, make_prompts, replayed) -> None:
    """The texts end one by one. With five slots, a batch of three is then padded to four."""
    limits = (12, 4, 10, 6, 8)
    requests = [Request(at, prompt, limits[at], ()) for at, prompt in enumerate(make_prompts(*LENGTHS))]

    def texts(engine: generator.Generator) -> dict[int, list[int]]:
        return {done.key: done.token_ids for done in engine.generate(requests)}

    alone = texts(make_engine(folder, 1, _tight(name)))
    made = replayed()
    engine = make_engine(folder, slots, _tight(name))
    engine.reserve(60)
    assert texts(engine) == alone
    assert [len(alone[at]) for at in range(len(limits))] == list(limits)
    batches = [batch[2].tolist() for steps in made for batch in steps.batches]
    assert all(len(set(batch)) == len(batch) and max(batch) < slots for batch in batches)
    assert {len(batch) for batch in batches} == {size for size in (1, 2, 4, slots) if size <= slots}


@pytest.fixture
def steps(folder, make_engine, our_texts, make_prompts, replayed) -> _Replayed:
    """Return the steps of an engine that has decoded a prompt of 9 tokens."""
    made = replayed()
    our_texts(make_engine(folder), make_prompts(9), 3)
    return made[0]


@torch.inference_mode()
def test_a_step_that_is_never_read_can_be_launched_again(steps) -> None:
    first = steps.launch(torch.tensor([[5], [12], [0]])).read()[1]
    after = torch.tensor([first.tolist(), [13], [0]])
    steps.launch(after)
    steps.launch(after)
    assert steps.batches[-1].tolist() == after.tolist()


@torch.inference_mode()
def test_a_step_launched_ahead_has_the_inputs_of_the_next_one(steps) -> None:
    handle = steps.launch(torch.tensor([[5], [12], [0]]))
    ahead = steps.submit_next()
    first, second = handle.read()[1].tolist(), ahead.read()[1].tolist()
    assert steps.batches[-1].tolist() == [first, [13], [0]]
    launched = len(steps.batches)
    steps.launch(torch.tensor([second, [14], [0]]))
    assert len(steps.batches) == launched + 1 and steps.batches[-1].tolist() == [second, [14], [0]]


@torch.inference_mode()
def test_graphs_are_freed_with_their_steps(folder, make_engine, our_texts, make_prompts, replayed) -> None:
    """At once, without the garbage collector: the next caches may need the memory."""
    made = replayed()
    engine = make_engine(folder)
    our_texts(engine, make_prompts(9), 5)
    graphs = [weakref.ref(graph) for graph in made[-1]._graphs.values()]
    gc.disable()
    try:
        made.clear()
        engine._steps = None
        assert graphs and not any(graph() for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize(("slots", "minimum"), [(1, 0), (1, 6), (2, 0), (3, 6)])
def test_text_does_not_depend_on_steps_launched_ahead(
    slots, minimum, folder, make_engine, our_texts, make_prompts, replayed
) -> None:
    """Stop ids end sequences while the next step is in flight, and other sequences take the slots."""
    prompts = make_prompts(*LENGTHS, 5, 21)
    texts = our_texts(make_engine(folder), prompts, 30)
    stops = [text[3 + 2 * at] for at, text in enumerate(texts)]
    requests = [Request(at, prompt, 30 - at, (stops[at],), minimum) for at, prompt in enumerate(prompts)]
    alone = {done.key: done.token_ids for done in make_engine(folder).generate(requests)}
    launches, counts = [], []
    for kind in (_Replayed, _NeverAhead):
        made = replayed(kind)
        engine = make_engine(folder, slots)
        engine.reserve(100)
        assert {done.key: done.token_ids for done in engine.generate(requests, counts.append)} == alone
        assert engine.stats.decode_tokens == sum(map(len, alone.values())) - len(alone)
        launches.append(sum(len(steps.batches) for steps in made))
    assert sum(counts) == 2 * sum(map(len, alone.values()))
    assert {len(text) for text in alone.values()} - {30 - at for at in range(len(prompts))}, "some are stopped"
    assert launches[0] > launches[1] if slots == 1 else launches[0] >= launches[1], "some steps went too far"


_OFFLOAD: dict[str, Any] = {"budget": 0.5, "skew": False, "offload": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in method_names()),
        ("vanilla", {"offload": True}),
        ("infinigen", _OFFLOAD),
        ("infinigen", {**_OFFLOAD, "gpu_cache": 8}),
    ],
    ids=str,
)
def test_a_step_too_far_is_not_reported(name, options, folder, make_engine, our_texts, make_prompts, replayed) -> None:
    prompts, reports, launches = make_prompts(9, 12, 5), [], []
    texts = our_texts(make_engine(folder, 1, _tight(name, **options)), prompts, 6)
    stops = [(texts[0][3],), (texts[1][3],), ()]  # the last one takes a slot whose last step went too far
    requests = [Request(at, prompt, 6, stops[at]) for at, prompt in enumerate(prompts)]
    for kind in (_Replayed, _NeverAhead):
        made = replayed(kind)
        engine = make_engine(folder, 2, _tight(name, **options))
        engine.reserve(20)
        done = {each.key: each for each in engine.generate(requests)}
        reports.append([(done[at].token_ids, done[at].report, done[at].error) for at in (0, 1, 2)])
        launches.append(len(made[-1].batches))
    assert launches[0] == launches[1] + 1, "one goes too far"
    assert reports[0] == reports[1]
    if options:
        assert all(report["fetched_bytes"] > 0 for _, report, _ in reports[0])


def test_fetched_bytes_of_vanilla_are_those_of_all_past_tokens(folder, make_engine, make_prompts) -> None:
    engine = make_engine(folder, 2, Vanilla(offload=True))
    done = {
        each.key: each for each in engine.generate(Request(at, p, 4, ()) for at, p in enumerate(make_prompts(9, 5)))
    }
    shape = engine._decoder.shape
    token_nbytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    past = [9 + 10 + 11, 5 + 6 + 7]
    assert [done[at].report["fetched_bytes"] for at in (0, 1)] == [tokens * token_nbytes for tokens in past]


@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_a_maximum_by_blocks_is_the_first_largest_value(blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(200, 48, generator=generator).mul(2).round().to(dtype)  # full of ties
        logits[3, 7] = logits[4, 40] = torch.nan
        logits[5, 11] = torch.inf
        best, token_ids = blocked_max(logits, blocks)
        assert torch.equal(token_ids, logits.argmax(-1))
        assert torch.equal(best.nan_to_num(9e9), logits.amax(-1).nan_to_num(9e9))
