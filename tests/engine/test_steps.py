"""Steps: kernels and graphs give the text of plain operations, whatever fills up a batch, whatever memory there is."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sparsecache.engine import generator
from sparsecache.engine.base import Request
from sparsecache.engine.steps import GraphedSteps, HostTokens, _Graph
from sparsecache.kernels._triton import INTERPRETED, running
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.vanilla import Vanilla

CPU = torch.device("cpu")
LENGTHS = (9, 30, 4, 17, 12)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_text_through_kernels_is_that_of_transformers(
    model_type, make_checkpoint, make_engine, reference_texts, our_texts, make_prompts
) -> None:
    """A prompt of few tokens, and one of more than a kernel takes; the families with biases and with a QK norm."""
    folder, prompts = make_checkpoint(model_type), make_prompts(9, 21)
    with running("kernels"):
        ours = our_texts(make_engine(folder, 2), prompts, 3)
    assert ours == reference_texts(folder, prompts, 3)


class _Recorded(GraphedSteps):
    """Replays by calling the decoder again with what a graph's inputs hold by then: no GPU needed."""

    batches: list[torch.Tensor]

    def _capture(self, size: int) -> _Graph:
        self.batches = []
        inputs = torch.zeros(3, size, dtype=torch.int64)
        inputs[2] = torch.arange(size)
        logits = self._run(inputs)

        steps = weakref.proxy(self)  # a graph knows nothing of who replays it

        def replay() -> None:
            steps.batches.append(inputs.clone())
            logits.copy_(steps._run(inputs))

        return _Graph(SimpleNamespace(replay=replay), inputs, logits, (HostTokens(size, CPU), HostTokens(size, CPU)))


class _Hesitant(_Recorded):
    """Launches nothing ahead."""

    def go_on(self) -> None:
        return None


@pytest.fixture
def recorded(monkeypatch) -> Callable[..., list[_Recorded]]:
    """Makes engines step as recorded; the steps that they then make."""

    def record(kind: type[_Recorded] = _Recorded) -> list[_Recorded]:
        made: list[_Recorded] = []
        monkeypatch.setattr(generator, "make_steps", lambda *arguments: made.append(kind(*arguments)) or made[-1])
        return made

    return record


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_batches_are_filled_up_with_idle_slots(slots, folder, make_engine, our_texts, make_prompts, recorded) -> None:
    prompts = make_prompts(*LENGTHS)
    alone = our_texts(make_engine(folder), prompts)
    made = recorded()
    engine = make_engine(folder, slots)
    engine.reserve(100)
    assert our_texts(engine, prompts) == alone
    batches = [batch[2].tolist() for steps in made for batch in steps.batches]
    assert all(len(set(batch)) == len(batch) and max(batch) < slots for batch in batches)
    assert {len(batch) for batch in batches} <= {1, 2, 4, slots}
    assert max(map(len, batches)) == slots


@torch.inference_mode()
def test_a_step_that_is_cut_off_can_be_done_again(folder, make_engine, our_texts, make_prompts, recorded) -> None:
    made = recorded()
    our_texts(make_engine(folder), make_prompts(9), 3)
    (steps,) = made
    inputs = torch.tensor([[5], [12], [0]])
    first = steps.launch(inputs).read()[1]
    after = torch.tensor([first.tolist(), [13], [0]])
    steps.launch(after)  # and never read
    steps.launch(after)
    assert steps.batches[-1].tolist() == after.tolist()


@torch.inference_mode()
def test_a_step_launched_ahead_is_the_one_that_would_have_been_asked_for(
    folder, make_engine, our_texts, make_prompts, recorded
) -> None:
    made = recorded()
    our_texts(make_engine(folder), make_prompts(9), 3)
    (steps,) = made
    flight = steps.launch(torch.tensor([[5], [12], [0]]))
    ahead = steps.go_on()
    first, second = flight.read()[1].tolist(), ahead.read()[1].tolist()
    assert steps.batches[-1].tolist() == [first, [13], [0]]
    asked = len(steps.batches)
    steps.launch(torch.tensor([second, [14], [0]]))
    assert len(steps.batches) == asked + 1 and steps.batches[-1].tolist() == [second, [14], [0]]


@torch.inference_mode()
def test_graphs_are_gone_with_the_steps(folder, make_engine, our_texts, make_prompts, recorded) -> None:
    """At once, without the garbage collector: the next room may need the memory."""
    made = recorded()
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


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("least", [0, 6])
def test_text_is_the_same_whatever_is_launched_ahead(
    slots, least, folder, make_engine, our_texts, make_prompts, recorded
) -> None:
    """Stop ids end sequences while the next step is under way, and the slots go to others."""
    prompts = make_prompts(*LENGTHS, 5, 21)
    texts = our_texts(make_engine(folder), prompts, 30)
    stops = [text[3 + 2 * at] for at, text in enumerate(texts)]
    requests = [Request(at, prompt, 30 - at, (stops[at],), least) for at, prompt in enumerate(prompts)]
    alone = {done.key: done.token_ids for done in make_engine(folder).generate(requests)}
    made = recorded()
    engine, ticks = make_engine(folder, slots), []
    engine.reserve(100)
    assert {done.key: done.token_ids for done in engine.generate(requests, ticks.append)} == alone
    assert {len(text) for text in alone.values()} - {30 - at for at in range(len(prompts))}, "some are stopped"
    assert sum(ticks) == sum(map(len, alone.values()))
    assert engine.clock.decode_tokens == sum(map(len, alone.values())) - len(alone)
    ahead = sum(len(steps.batches) for steps in made)
    hesitant = recorded(_Hesitant)
    engine = make_engine(folder, slots)
    engine.reserve(100)
    list(engine.generate(requests))
    asked = sum(len(steps.batches) for steps in hesitant)
    assert ahead > asked if slots == 1 else ahead >= asked, "some steps went too far"


_SPARSE = {"budget": 0.5, "dense_layers": 1, "skew": False, "offload": True}


@pytest.mark.parametrize(
    ("method", "options"),
    [(InfiniGen, _SPARSE), (InfiniGen, {**_SPARSE, "gpu_cache": 8}), (Vanilla, {"offload": True})],
    ids=["infinigen", "gpu_cache", "vanilla"],
)
def test_a_step_too_far_is_not_reported(
    method, options, folder, make_engine, our_texts, make_prompts, recorded, monkeypatch
) -> None:
    monkeypatch.setattr("sparsecache.methods.infinigen.in_kernels", lambda device: True)  # as on a GPU, with the twins
    prompts, reports, steps = make_prompts(9, 12, 5), [], []
    texts = our_texts(make_engine(folder, 1, method(**options)), prompts, 6)
    stops = [(texts[0][3],), (texts[1][3],), ()]  # the last one takes a slot whose last step went too far
    requests = [Request(at, prompt, 6, stops[at]) for at, prompt in enumerate(prompts)]
    for kind in (_Recorded, _Hesitant):
        made = recorded(kind)
        engine = make_engine(folder, 2, method(**options))
        engine.reserve(20)
        done = {each.key: each for each in engine.generate(requests)}
        reports.append([(done[at].token_ids, done[at].report, done[at].error) for at in (0, 1, 2)])
        steps.append(len(made[-1].batches))
    assert steps == [9, 8], "one goes too far"
    assert reports[0] == reports[1] and reports[0][0][1]["fetched_bytes"] > 0
    if method is Vanilla:  # all that is past, in three steps
        shape = engine._decoder.shape
        each = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
        read = [9 + 10 + 11, 12 + 13 + 14, 5 + 6 + 7 + 8 + 9]
        assert [report["fetched_bytes"] for _, report, _ in reports[0]] == [tokens * each for tokens in read]


class _Small(Vanilla):
    """Memory for `most` sequences of 40 tokens: to be in flight, or to have room made for."""

    def __init__(self, most: int, where: str):
        self._most, self._where, self.rooms = most, where, []

    def allocate(self, shape, slots, max_tokens, device, dtype) -> None:
        self.rooms.append(slots)
        if self._where == "allocate" and slots > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().allocate(shape, slots, max_tokens, device, dtype)

    def prefill(self, layer, slot, q, k, v, max_new_tokens) -> None:
        if self._where == "prefill" and slot >= self._most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().prefill(layer, slot, q, k, v, max_new_tokens)

    def attend(self, layer, q, k, v, slots):
        if self._where == "attend" and len(slots) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().attend(layer, q, k, v, slots)


@pytest.mark.parametrize("where", ["allocate", "prefill", "attend"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_shrinks_the_batch_and_goes_on(
    where, most, folder, make_engine, our_texts, make_prompts, capfd
) -> None:
    prompts = make_prompts(*LENGTHS)
    alone = our_texts(make_engine(folder), prompts, 10)
    method = _Small(most, where)
    engine = make_engine(folder, 5, method)
    engine.reserve(40)
    assert our_texts(engine, prompts, 10) == alone
    assert method.rooms[0] == 5 and 1 <= method.rooms[-1] <= most
    assert ("out of memory" in capfd.readouterr().err) == (where != "allocate")
    engine.reserve(40)  # the next dataset may fit again
    assert method.rooms[-1] == 5 or where == "allocate"
