"""The bench's models: weights shared with transformers, and shapes of published checkpoints."""

import pytest
import torch

from sparsecache.bench.models import load_bench_model, shape_config, vocab_size
from sparsecache.bench.roofline import prefill_s
from sparsecache.bench.workload import Workload
from sparsecache.engine.families import load_family
from sparsecache.errors import UsageError
from sparsecache.kernels.fp8 import FP8
from sparsecache.testing.random_checkpoint import MODEL_TYPES, VOCAB_SIZE, make_random_checkpoint

CPU = torch.device("cpu")
PROJECTIONS = ("qkv", "output", "gate_up", "down")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_shares_the_weights_and_decodes_the_same_text(model_type, tmp_path) -> None:
    folder = make_random_checkpoint(tmp_path / model_type, model_type=model_type, initializer_range=0.25)
    model = load_bench_model(str(folder), [torch.device("cpu")], torch.float32)
    assert model.vocab_size == vocab_size(str(folder)) == VOCAB_SIZE
    reference = model.reference()
    requests = Workload(30, 12, 2).requests(VOCAB_SIZE)
    expected, found = (
        {completion.key: completion.token_ids for completion in engine.generate(requests)}
        for engine in (reference, model.engine(slots=2))
    )
    assert found == expected
    query = reference.model.model.layers[0].self_attn.q_proj.weight
    assert query.data_ptr() == model.weights.layers[0].qkv.data_ptr()


def test_a_model_in_fp8_counts_a_byte_a_weight_and_is_dequantised_for_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.models.check_fp8_devices", lambda devices: None)
    monkeypatch.setattr("sparsecache.bench.roofline._SECONDS", 0.001)
    folder = make_random_checkpoint(tmp_path / "llama")
    plain, model = (load_bench_model(str(folder), [CPU], dtype) for dtype in (torch.bfloat16, FP8))
    assert (plain.dtype, model.dtype) == (torch.bfloat16, torch.bfloat16)
    projections = [getattr(layer, name) for layer in plain.weights.layers for name in PROJECTIONS]
    assert model.nbytes == plain.nbytes - sum(each.numel() - 4 * len(each) for each in projections)
    theirs, layer = model.reference().model.model.layers[0], model.weights.layers[0]
    assert torch.equal(theirs.mlp.down_proj.weight, layer.down.dequantise())
    assert torch.equal(theirs.self_attn.q_proj.weight, layer.qkv.dequantise()[: len(theirs.self_attn.q_proj.weight)])
    assert prefill_s(model, 40) > 0
    (done,) = model.engine().generate(Workload(30, 2).requests(VOCAB_SIZE))
    assert done.error is None


def test_fp8_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="--dtype fp8 needs an NVIDIA GPU"):
        load_bench_model("llama-3.1-8b", [CPU], FP8)


def test_shapes_have_the_parameters_of_the_published_checkpoints() -> None:
    """Counts as the model cards give them, without making any weights."""
    published = {"llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "qwen2.5-1.5b": 1.54}
    for name, billions in published.items():
        config = shape_config(name)
        tensors = load_family(config.model_type).architecture(config).tensors()
        assert sum(torch.Size(shape).numel() for shape in tensors.values()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert vocab_size(name) == tensors["model.embed_tokens.weight"][0]
