"""Rotations: every position its own, none clamped, nothing remembered between calls."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparsecache.engine.rope import Rope
from sparsecache.errors import UsageError
from sparsecache.kernels.rotation import rotate, rotate_rows, rotate_rows_back

CPU = torch.device("cpu")
FACTORS = [1.0 + i for i in range(16)]
TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 16,
        "long_factor": FACTORS,
        "original_max_position_embeddings": 50,
    },
}


def _config(**parameters) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=100,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )


def _rope(**parameters) -> Rope:
    return Rope(_config(**parameters), CPU)


@pytest.mark.parametrize("length", [1, 49, 50, 51, 52, 99, 100, 101, 102, 400])
@pytest.mark.parametrize("parameters", TYPES.values(), ids=TYPES)
def test_a_sequence_of_any_length_turns_as_in_transformers(parameters, length) -> None:
    """To the last bit, also where a length begins to change the frequencies."""
    positions = torch.arange(length)
    theirs = LlamaRotaryEmbedding(_config(**parameters))(torch.zeros(1), positions[None])
    ours = _rope(**parameters).cos_sin(positions, torch.tensor([length]), torch.float32)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other[0])


@pytest.mark.parametrize("parameters", TYPES.values(), ids=TYPES)
def test_5000_positions_give_5000_rotations_though_the_window_is_100(parameters) -> None:
    positions = torch.arange(5000)
    cos, sin = _rope(**parameters).cos_sin(positions, torch.tensor([5000]), torch.float32)
    assert cos.shape == sin.shape == (5000, 32)
    assert len(torch.unique(torch.cat((cos, sin), dim=1), dim=0)) == 5000


@pytest.mark.parametrize("parameters", TYPES.values(), ids=TYPES)
def test_positions_beyond_the_window_turn_at_the_rate_of_those_within(parameters) -> None:
    """Clamping at the window (or at a table's end) would stop the turning."""
    rope, length = _rope(**parameters), torch.tensor([10**6])
    x = torch.randn(32).expand(2, 1, -1)

    def score(first: int, second: int) -> torch.Tensor:
        one, other = rotate(x, rope.cos_sin(torch.tensor([first, second]), length, torch.float32))[:, 0]
        return one @ other

    for start in (101, 700, 9999):
        torch.testing.assert_close(score(start, start + 7), score(3, 10), rtol=2e-3, atol=2e-3)
        assert (score(start, start + 7) - score(start, start)).abs() > 1e-2


@pytest.mark.parametrize("parameters", TYPES.values(), ids=TYPES)
def test_a_row_depends_on_its_own_position_and_length_only(parameters) -> None:
    rope = _rope(**parameters)
    positions, lengths = torch.tensor([4000, 3, 99, 100, 40, 60]), torch.tensor([4001, 4, 100, 101, 41, 61])
    cos, sin = rope.cos_sin(positions, lengths, torch.float32)
    for row in reversed(range(len(positions))):
        alone = _rope(**parameters).cos_sin(positions[row, None], lengths[row, None], torch.float32)
        again = rope.cos_sin(positions[row, None], lengths[row, None], torch.float32)
        assert torch.equal(alone[0][0], cos[row]) and torch.equal(alone[1][0], sin[row])
        assert torch.equal(again[0][0], cos[row]) and torch.equal(again[1][0], sin[row])


@pytest.mark.parametrize("kind", TYPES)
def test_only_dynamic_and_longrope_follow_the_length(kind) -> None:
    rope, position = _rope(**TYPES[kind]), torch.tensor([30])
    short, _ = rope.cos_sin(position, torch.tensor([31]), torch.float32)
    long, _ = rope.cos_sin(position, torch.tensor([3000]), torch.float32)
    assert torch.equal(short, long) == (kind not in ("dynamic", "longrope"))


def test_rotation_keeps_lengths_and_angles_are_exact() -> None:
    rotation = _rope(**TYPES["default"]).cos_sin(torch.tensor([0, 70000]), torch.tensor([70001]), torch.float32)
    cos, sin = rotation
    assert torch.equal(cos[0], torch.ones(32)) and torch.equal(sin[0], torch.zeros(32))
    exact = 70000 / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    torch.testing.assert_close(cos[1, :16].double(), exact.cos(), rtol=0, atol=0.02)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1))


def test_partly_rotated_heads_and_unknown_types_are_refused() -> None:
    with pytest.raises(UsageError, match="part of each head"):
        _rope(rope_type="default", partial_rotary_factor=0.5)
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(UsageError, match=r"'spiral'.*default, .*longrope"):
        Rope(config, CPU)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_methods_get_the_rotation_of_any_position_and_its_inverse(kind) -> None:
    parameters = TYPES[kind]
    positions = torch.tensor([[3, 0, 77], [5, 5000, 1]])
    rotation = _rope(**parameters).rotation_of()(positions)
    theirs = LlamaRotaryEmbedding(_config(**parameters))(torch.zeros(1), positions)
    assert all(torch.equal(own, other) for own, other in zip(rotation, theirs, strict=True))
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(rotate_rows_back(rotate_rows(x, rotation), rotation), x)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_are_refused_to_methods(kind) -> None:
    with pytest.raises(UsageError, match=f"type '{kind}' also depends on the length of the text"):
        _rope(**TYPES[kind]).rotation_of()
