"""The bench's models: weights shared with transformers, and shapes of published checkpoints."""

import pytest
import torch

from sparsecache.bench.models import load_bench_model, shape_config, vocab_size
from sparsecache.bench.workload import Workload
from sparsecache.engine.families import load_family
from sparsecache.testing.random_checkpoint import MODEL_TYPES, VOCAB_SIZE, make_random_checkpoint


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


def test_shapes_have_the_parameters_of_the_published_checkpoints() -> None:
    """Counts as the model cards give them, without making any weights."""
    published = {"llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "qwen2.5-1.5b": 1.54}
    for name, billions in published.items():
        config = shape_config(name)
        tensors = load_family(config.model_type).architecture(config).tensors()
        assert sum(torch.Size(shape).numel() for shape in tensors.values()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert vocab_size(name) == tensors["model.embed_tokens.weight"][0]
