"""Decoding in fp8 on a GPU: logits of the CPU's reference, and every method by CUDA graphs."""

import pytest
import torch

from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names
from sparsecache.engine.steps import EagerSteps, GraphedSteps
from sparsecache.kernels.fp8 import FP8
from sparsecache.kernels.linear import MAX_FUSED_ROWS
from sparsecache.methods import make_method, method_names, parse_options
from sparsecache.testing.method_under_test import MethodUnderTest

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies in fp8",
)


@pytest.mark.parametrize("model_type", family_names())
@torch.inference_mode()
def test_logits_on_a_gpu_are_those_of_the_cpu(model_type, make_checkpoint, make_decoder, make_prompts) -> None:
    folder = make_checkpoint(model_type, initializer_range=0.1)
    for length in (9, 40):
        (prompt,) = make_prompts(length + 1)
        found = []
        for device in (CPU, torch.device("cuda")):
            decoder = make_decoder(folder, None, FP8, device)
            decoder.allocate(1, length + 1, 1)
            logits = [decoder.prefill(torch.tensor(prompt[:-1], device=device), 0).cpu().float()]
            step = torch.tensor([[prompt[-1]], [length], [0]], device=device)
            found.append([*logits, decoder.step(*step)[0].cpu().float()])
        for cpu, gpu in zip(*found, strict=True):
            # bfloat16 rounds otherwise. An input between two values of fp8 may then become the other one.
            assert (cpu - gpu).norm() <= 0.2 * cpu.norm()


@torch.inference_mode()
def test_a_step_of_more_rows_than_the_kernels_take_is_a_graph_too(make_checkpoint, make_decoder) -> None:
    slots = MAX_FUSED_ROWS + 4
    decoder, logits = make_decoder(make_checkpoint(), None, FP8, torch.device("cuda")), []
    inputs = torch.stack((torch.arange(3, 3 + slots), torch.zeros(slots, dtype=torch.int64), torch.arange(slots)))
    for make_steps in (lambda: GraphedSteps(decoder, slots), lambda: EagerSteps(decoder)):
        decoder.allocate(slots, 24, 4)
        steps = make_steps()
        for slot in range(slots):  # a capture decodes tokens in free slots
            decoder.cache.start_sequence(slot, 0)
        logits.append(steps.launch(inputs).read()[0].clone())
    assert torch.equal(*logits) and logits[0].isfinite().all()


@pytest.mark.parametrize("name", method_names())
def test_every_method_decodes_in_fp8_by_graphs(
    name, make_checkpoint, make_engine, make_prompts, our_texts, monkeypatch
) -> None:
    """One sequence by graphs has the text of one without: the same kernels."""
    folder, device = make_checkpoint("llama", num_hidden_layers=3), torch.device("cuda")
    options = {**parse_options(name, {}), **MethodUnderTest.of(name).tight}
    texts = []
    for graphable in (True, False):
        if not graphable:
            monkeypatch.setattr(Decoder, "graphable", property(lambda self: False))
        texts.append(
            our_texts(make_engine(folder, 1, make_method(name, options), FP8, device), make_prompts(50, 7), 12)
        )
    assert texts[0] == texts[1]
