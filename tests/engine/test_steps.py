"""Steps: kernels and graphs give the text of plain operations, whatever fills up a batch, whatever memory there is."""

from types import SimpleNamespace

import pytest
import torch

from sparsecache.engine import generator
from sparsecache.engine.steps import GraphedSteps
from sparsecache.kernels._triton import INTERPRETED, running
from sparsecache.methods.vanilla import Vanilla

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

    def _capture(self, size: int) -> SimpleNamespace:
        self.batches = []
        inputs = torch.zeros(3, size, dtype=torch.int64)
        inputs[2] = torch.arange(size)
        greedy = torch.zeros(size, dtype=torch.int64)
        logits = self._run(inputs, greedy)

        def replay() -> None:
            self.batches.append(inputs.clone())
            logits.copy_(self._run(inputs, greedy))

        return SimpleNamespace(
            graph=SimpleNamespace(replay=replay), inputs=inputs, logits=logits, greedy=greedy, left=None
        )

    def _wait(self) -> None:
        pass


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_batches_are_filled_up_with_idle_slots(
    slots, folder, make_engine, our_texts, make_prompts, monkeypatch
) -> None:
    prompts = make_prompts(*LENGTHS)
    alone = our_texts(make_engine(folder), prompts)
    made: list[_Recorded] = []
    monkeypatch.setattr(generator, "make_steps", lambda *arguments: made.append(_Recorded(*arguments)) or made[-1])
    engine = make_engine(folder, slots)
    engine.reserve(100)
    assert our_texts(engine, prompts) == alone
    batches = [batch[2].tolist() for steps in made for batch in steps.batches]
    assert all(len(set(batch)) == len(batch) and max(batch) < slots for batch in batches)
    assert {len(batch) for batch in batches} <= {1, 2, 4, slots}
    assert max(map(len, batches)) == slots


@torch.inference_mode()
def test_a_step_that_is_cut_off_can_be_done_again(folder, make_engine, our_texts, make_prompts, monkeypatch) -> None:
    made: list[_Recorded] = []
    monkeypatch.setattr(generator, "make_steps", lambda *arguments: made.append(_Recorded(*arguments)) or made[-1])
    our_texts(make_engine(folder), make_prompts(9), 3)
    (steps,) = made
    inputs = torch.tensor([[5], [12], [0]])
    first = steps(inputs)[1]
    after = torch.tensor([first.tolist(), [13], [0]])

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        steps(after)
    monkeypatch.setattr(steps, "_wait", lambda: None)
    steps(after)
    assert steps.batches[-1].tolist() == after.tolist()


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
