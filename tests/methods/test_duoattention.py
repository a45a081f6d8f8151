"""DuoAttention: streaming heads against kvpress at the prompt, attention against plain softmax while decoding."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.methods.duoattention import DuoAttention, estimated_gates
from tests.methods.presses import press_arguments, random_prompt
from tests.methods.stepping import Kept, Text, check_against, make_cache, random_text, random_texts, shape_of

SINKS, RECENT = 2, 5
GATES = [[0.9, 0.1, 0.7, 0.2], [0.3, 0.4, 1.0, 0.95], [0.8, 0.85, 0.6, 0.75]]


@pytest.fixture
def gates_file(tmp_path: Path):
    """Return a function that writes gates in the authors' format and returns the file's path."""

    def write(gates: list[list[float]] = GATES) -> str:
        path = tmp_path / "full_attention_heads.tsv"
        path.write_text("".join("\t".join(f"{gate:.18e}" for gate in of_layer) + "\n" for of_layer in gates))
        return str(path)

    return write


def _streaming(sparsity: float, gates: list[list[float]]) -> list[list[bool]]:
    ranked = sorted((gate, layer, head) for layer, of_layer in enumerate(gates) for head, gate in enumerate(of_layer))
    chosen = {place[1:] for place in ranked[: round(sparsity * len(ranked))]}
    return [[(layer, head) in chosen for head in range(len(of_layer))] for layer, of_layer in enumerate(gates)]


def _kept(is_streaming: bool, past: int) -> list[int]:
    if not is_streaming:
        return list(range(past))
    return [*range(min(SINKS, past)), *range(max(SINKS, past - RECENT), past)]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_streaming_heads_attend_to_first_and_last_tokens_and_the_others_to_all(sparsity, group, gates_file) -> None:
    shape = shape_of(group, layers=3)
    gates = [of_layer[: shape.kv_heads] for of_layer in GATES]
    streaming = _streaming(sparsity, gates)

    def truth(text: Text, layer: int) -> list[Kept]:
        ends = range(text.prompt, text.prompt + text.new)
        return [[_kept(of_head, past) for of_head in streaming[layer]] for past in ends]

    method = DuoAttention(gates=gates_file(gates), sparsity=sparsity, sinks=SINKS, recent=RECENT)
    method.check(shape)
    check_against(truth, method, shape, random_texts(shape))


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
@pytest.mark.parametrize("length", [6, 33, 64])
def test_a_prompt_keeps_what_kvpress_keeps(length, sparsity, gates_file, kvpress, monkeypatch) -> None:
    press_class = kvpress("duo_attention_press").DuoAttentionPress
    monkeypatch.setattr(
        press_class, "load_attention_pattern", staticmethod(lambda model: (SINKS, RECENT, np.array(GATES)))
    )
    press = press_class(head_compression_ratio=sparsity)
    press.post_init_from_model(SimpleNamespace(device=torch.device("cpu")))
    q, k, v = random_prompt(length, 1)
    shape = Shape(3, 4, 4, q.shape[2])
    method = DuoAttention(gates=gates_file(), sparsity=sparsity, sinks=SINKS, recent=RECENT)
    assert method.streaming_heads(shape).tolist() == press.streaming_mask.tolist()
    for layer in range(3):
        module, *arguments = press_arguments(q, k, v, layer=layer, layers=3)
        press.compress(module, *arguments)
        is_kept = torch.ones(4, length, dtype=torch.bool)
        is_kept[module.masked_key_indices[1:]] = False
        expected = [of_head.nonzero().flatten().tolist() for of_head in is_kept]
        assert [_kept(of_head, length) for of_head in press.streaming_mask[layer].tolist()] == expected


@torch.inference_mode()
def test_memory_and_report(gates_file) -> None:
    shape = Shape(3, 4, 4, 6)
    method = DuoAttention(gates=gates_file(), sparsity=0.25, sinks=SINKS, recent=RECENT)  # layers 0 (two) and 1 (one)
    cache = make_cache(method, shape, 2, 500, 10)
    assert [layer.sparse for layer in cache.layers] == [True, True, True]  # layer 2 has retrieval heads only
    assert cache.layers[0].keys.shape == (2, 2, SINKS + RECENT + 1, 6)
    assert cache.layers[0].full_values.shape == (2, 2, 500, 6)
    for prompt, capped in ((3, 5), (20, 10), (1, 3)):
        text = random_text(shape, prompt, 10, seed=1)
        for layer, layer_cache in enumerate(cache.layers):
            layer_cache.prefill(0, *text.prompt_of(layer))
        cache.start_sequence(0, prompt)
        for at in range(prompt, prompt + 10):
            for layer, layer_cache in enumerate(cache.layers):
                layer_cache.attend(*(part[None] for part in text.token_of(layer, at)), torch.tensor([0]))
            cache.end_step(torch.tensor([0]))
        shares = [min(past, SINKS + RECENT) / past for past in range(prompt, prompt + 10)]
        kept = (3 * sum(shares) / 10 + 9) / 12
        expected = {"kept": pytest.approx(kept), "sparse_steps": 10, "capped_steps": capped, "dense_layers": 0}
        assert cache.report(0) == expected
        cache.free_slot(0)


def test_gates_are_estimated_from_attention_between_the_first_and_the_recent_tokens() -> None:
    """Head 0 attends to token 300 alone, head 1 to the first tokens and head 2 to itself."""
    length, dim = 1100, 16
    k = torch.zeros(3, length, dim)
    k[0, 300, 0], k[1, :4, 0] = 400.0, 400.0
    k[2] = torch.nn.functional.one_hot(torch.arange(length) % 7, dim) * 40.0
    q = torch.zeros(3, 2, length, dim)
    q[:2, ..., 0] = 10.0
    assert estimated_gates(q[:2], k[:2]).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    text = random_prompt(600, 2, seed=3)
    grouped = text[0].view(2, 2, 600, -1)
    whole = (text[0] @ text[1].repeat_interleave(2, 0).mT / 4).masked_fill(torch.ones(600, 600).triu(1).bool(), -1e9)
    attention = whole.softmax(-1)[:, 600 - 256 :]
    recent = 600 // 4
    expected = [
        sum(attention[head, at - 344, 75 : at - recent + 1].sum().item() for at in range(344, 600)) / 256
        for head in range(4)
    ]
    found = estimated_gates(grouped, text[1])
    assert found.tolist() == pytest.approx([sum(expected[:2]) / 2, sum(expected[2:]) / 2], rel=1e-4)


def test_estimated_gates_are_restored() -> None:
    shape = Shape(2, 4, 2, 16)
    method = DuoAttention()
    assert method.calibration_text() and DuoAttention(calibration_file=__file__).calibration_text().startswith('"""')
    with pytest.raises(RuntimeError, match="must be calibrated"):
        method.streaming_heads(shape)
    for layer in range(2):
        q, k, _ = random_prompt(300, 2, seed=layer)
        method.calibrate(layer, q.view(2, 2, 300, 16), k)
    restored = DuoAttention()
    restored.restore(method.calibration(), shape)
    assert torch.equal(restored.streaming_heads(shape), method.streaming_heads(shape))
    assert int(method.streaming_heads(shape).sum()) == 2
    for wrong in ({}, {"gates": torch.zeros(3, 2)}, {"gates": torch.full((2, 2), torch.nan)}):
        with pytest.raises(ValueError, match=r"^its gates must be 2 x 2 finite numbers for this model\.$"):
            restored.restore(wrong, shape)


def test_gates_just_below_0_are_read_as_the_authors_have_them(gates_file) -> None:
    DuoAttention(gates=gates_file([[-0.0014, 1.0]])).check(Shape(1, 2, 2, 6))


def test_a_named_pipe_of_gates_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "gates")
    with pytest.raises(ValueError, match=r"^gates=.* cannot be read \(.* it is a named pipe, not a regular file\)\."):
        DuoAttention(gates=str(tmp_path / "gates"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"^gates=.* cannot be read \(.*No such file.*\)\. Give a file with a line per layer"),
        ("0.1\tx\n", r"^gates=.* cannot be read \(could not convert"),
        ("0.1\tnan\n", r"^gates=.* has the gate nan\. Gates must be numbers from 0 to 1\.$"),
        ("0.1\t-5\n", r"^gates=.* has the gate -5\."),
        ("99\t0.1\n", r"^gates=.* has the gate 99\."),
        ("", r"^gates=.* has 0 lines of 0 numbers\. This model needs 3 lines, one per layer, of 4 numbers"),
        ("1\t0\n.3\t.4\n", r"^gates=.* has 2 lines of 2 numbers\. This model needs 3 lines"),
        ("1 1 0 0\n1 1 0\n1 1 0 0\n", r"^gates=.* has 3 lines of 3 or 4 numbers\."),
    ],
)
def test_a_bad_file_of_gates_is_refused(text, message, tmp_path) -> None:
    path = tmp_path / "gates.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DuoAttention(gates=str(path)).check(Shape(3, 4, 4, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.1}, r"^sparsity=1.1 must be a share from 0 to 1\.$"),
        ({"sinks": -1}, r"^sinks=-1 must be 0 tokens or more\.$"),
        ({"recent": 0}, r"^recent=0 must be 1 token or more\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DuoAttention(**options)
