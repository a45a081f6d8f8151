"""A checkpoint's weights: strict, in every layout, and what is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecache.engine import weights
from sparsecache.engine.families import load_family
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.weights import LayerWeights, Weights
from sparsecache.errors import UsageError

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def _load(folder: Path, allow_pickle: bool = False, dtype: torch.dtype = torch.float32) -> Weights:
    checkpoint = Checkpoint(folder, allow_pickle)
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    return checkpoint.load(architecture, CPU, dtype)


def _flat(weights: Weights) -> dict[str, Tensor | None]:
    layers = {
        f"{at}.{field.name}": getattr(layer, field.name)
        for at, layer in enumerate(weights.layers)
        for field in fields(LayerWeights)
    }
    return {"embedding": weights.embedding, "norm": weights.norm, "head": weights.head, **layers}


def _assert_equal(first: Weights, second: Weights) -> None:
    one, two = _flat(first), _flat(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or (tensor.dtype == other.dtype and torch.equal(tensor, other)), name


def _change(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _to_pickle(folder: Path, shards: int = 1) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = {name: f"pytorch_model-{at % shards}.bin" for at, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.fixture
def sharded(folder, tmp_path) -> Path:
    """The same checkpoint in several files, as transformers writes them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    other = shutil.copytree(folder, tmp_path / "sharded")
    (other / WEIGHTS).unlink()
    model.save_pretrained(other, max_shard_size="100KB")
    assert len(list(other.glob("model-*.safetensors"))) > 2
    return other


def test_shards_equal_one_file(folder, sharded) -> None:
    _assert_equal(_load(folder), _load(sharded))


def test_a_missing_shard_or_a_broken_index_is_refused_by_name(sharded) -> None:
    index = sharded / "model.safetensors.index.json"
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    for read in (_load, lambda folder: Checkpoint(folder).fingerprint):
        with pytest.raises(UsageError, match=f"lacks {shard.name}, named in {index.name}"):
            read(sharded)
    for text in ("{", "[]", "{}", '{"weight_map": null}'):
        index.write_text(text)
        with pytest.raises(UsageError, match=rf"{index.name} (is not an index of shards|is not valid JSON|holds list)"):
            _load(sharded)


def test_a_shard_with_a_tensor_of_another_is_no_harm_but_one_left_out_is(sharded) -> None:
    first = min(sharded.glob("model-*.safetensors"))
    tensors = load_file(first)
    gone = min(tensors)
    del tensors[gone]
    save_file(tensors, first, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"lacks {re.escape(gone)}"):
        _load(sharded)


PICKED = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PICKED), f"it lacks {PICKED}."),
        (lambda t: t.pop("lm_head.weight"), "it lacks lm_head.weight."),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "it holds unexpected extra.weight."),
        (lambda t: t.update({f"{PICKED[:-6]}bias": torch.zeros(32)}), f"it holds unexpected {PICKED[:-6]}bias."),
        (
            lambda t: t.update({PICKED: t[PICKED].T.contiguous()}),
            f"{PICKED} of shape [64, 32] instead of [32, 64]",
        ),
        (lambda t: t.update({PICKED: t[PICKED][:-1].clone()}), "[31, 64] instead of [32, 64]"),
        (lambda t: t.update({PICKED: t[PICKED].flatten()}), f"{PICKED} of shape [2048]"),
        (lambda t: [t.pop(key) for key in list(t) if "layers.1" in key], " and 4 further differences."),
    ],
    ids=["missing", "head", "unexpected", "bias", "transposed", "short", "flat", "many"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, folder) -> None:
    _change(folder, change)
    with pytest.raises(UsageError) as refused:
        _load(folder)
    assert message in str(refused.value) and str(folder) in str(refused.value)


def test_misfits_are_found_before_any_tensor_is_read(folder, monkeypatch) -> None:
    """Minutes into loading shards is too late to learn of a missing tensor."""

    def read() -> Tensor:
        raise AssertionError("a tensor was read")

    real = weights._open_safetensors
    monkeypatch.setattr(
        weights,
        "_open_safetensors",
        lambda path: {name: replace(stored, read=read) for name, stored in real(path).items()},
    )
    with pytest.raises(AssertionError, match="was read"):
        _load(folder)
    _change(folder, lambda tensors: tensors.pop(PICKED))
    with pytest.raises(UsageError, match="lacks"):
        _load(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1, -5000])
def test_a_truncated_file_is_refused_by_name(kept, folder) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=rf"{WEIGHTS} cannot be read \(.*\)\. Download it again\."):
        _load(folder)


def test_a_folder_without_weights_is_refused(folder) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        UsageError, match=r"holds no weights; it holds config\.json.*model\.safetensors.*--allow_pickle"
    ):
        _load(folder)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_unless_allowed_and_then_equal(shards, folder) -> None:
    expected = _load(folder)
    _to_pickle(folder, shards)
    for read in (_load, lambda folder: Checkpoint(folder).fingerprint):
        with pytest.raises(UsageError, match="pickle files.*--allow_pickle"):
            read(folder)
    _assert_equal(_load(folder, allow_pickle=True), expected)
    assert len(Checkpoint(folder, allow_pickle=True).fingerprint) == 64


class _Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_with_code_in_it_is_not_run_even_where_allowed(folder, tmp_path) -> None:
    marker = tmp_path / "ran"
    _to_pickle(folder)
    torch.save({"model.norm.weight": _Bomb(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read"):
        _load(folder, allow_pickle=True)
    assert not marker.exists()


def test_safetensors_are_preferred_to_pickles_beside_them(folder) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    _assert_equal(_load(folder, allow_pickle=True), _load(folder))


def test_tied_embeddings_with_and_without_a_stored_head(make_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(make_checkpoint(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    plain = _load(folder)
    assert plain.head is plain.embedding
    _change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    stored = _load(folder)
    assert stored.head is stored.embedding
    _assert_equal(stored, plain)


def test_a_stored_head_that_differs_is_used_as_in_transformers(
    make_checkpoint, make_engine, reference_texts, our_texts, make_prompts, tmp_path
) -> None:
    folder = shutil.copytree(make_checkpoint(tie_word_embeddings=True), tmp_path / "tied")
    before = our_texts(make_engine(folder), make_prompts(20))
    _change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}))
    after = our_texts(make_engine(folder), make_prompts(20))
    assert after == reference_texts(folder, make_prompts(20))
    assert after != before
    _change(folder, lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}))
    with pytest.raises(UsageError, match=r"lm_head\.weight of shape \[3, 64\]"):
        _load(folder)


def test_rotary_buffers_of_old_files_are_ignored(folder) -> None:
    expected = _load(folder)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    _change(folder, lambda tensors: tensors.update(buffers))
    _assert_equal(_load(folder), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_to_the_dtype_asked_for(dtype, folder) -> None:
    expected = _flat(_load(folder))
    _change(folder, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    for name, tensor in _flat(_load(folder, dtype=dtype)).items():
        assert tensor is None or (tensor.dtype == dtype and torch.equal(tensor, expected[name].half().to(dtype))), name
