"""The table of docs/methods.md of bytes per token is what the caches allocate and say that a step reads."""

from pathlib import Path

import pytest
import torch

import sparsecache.cache.storage
import sparsecache.methods.infinigen.cache
import sparsecache.methods.shadowkv
from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.cache.shared_selection import SharedSelectionMethod
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.methods.duoattention import DuoAttention

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
LLAMA = Shape(layers=32, heads=32, kv_heads=8, head_dim=128)
FEW = Shape(layers=4, heads=32, kv_heads=8, head_dim=128)  # two dense layers and two sparse ones
CPU, TOKENS, BUDGET, KIB = torch.device("cpu"), 8192, 0.05, 1024
LINES = [
    *((name, {}) for name in method_names() if name not in ("kivi", "composed")),
    *(("kivi", {"bits": bits}) for bits in ("2", "4", "8")),
    ("composed", {"evict": "snapkv,budget=0.2", "select": "quest,budget=0.05"}),
    *((name, {"offload": "true"}) for name in ("vanilla", "infinigen", "shadowkv")),
]


def _cells(name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a line's cells: KiB per token on the GPU and the host, and what a step reads of each."""
    budget = {"budget": str(BUDGET)} if "budget" in method_options(load_method(name)) else {}
    method = make_method(name, parse_options(name, {**budget, **options}))
    if method.calibration_text() is not None:
        method.restore(_calibration(), FEW)
    offloaded = []

    def allocate(size, dtype, device, offload=False):
        made = torch.zeros(size, dtype=dtype, device=device)
        offloaded.extend([made.nbytes] * offload)
        return made

    for module in (sparsecache.cache.storage, sparsecache.methods.infinigen.cache, sparsecache.methods.shadowkv):
        monkeypatch.setattr(module, "allocate", allocate)
    method.rope = lambda positions: None  # type: ignore[assignment, return-value]
    cache = ModelCache(method, FEW, [CPU] * 4, 1, TOKENS, 128, torch.bfloat16)

    # How many layers of the whole model each of the four stands for.
    has_dense = name == "composed" or hasattr(method, "dense_layers")
    selecting = len(set(method.selecting_layers(LLAMA))) if isinstance(method, SharedSelectionMethod) else 15
    times = [1, 1, selecting, 30 - selecting] if has_dense else [8] * 4
    dense = 2 * LLAMA.kv_nbytes(torch.bfloat16) / 32 if has_dense else 0
    memory = dense + (cache.memory.token_nbytes - dense) * (15 if has_dense else 8)
    host = sum(offloaded) / TOKENS * (15 if has_dense else 8)
    share = (TOKENS + 320) / 2 / TOKENS if isinstance(method, DuoAttention) else BUDGET
    if name == "composed":
        share = BUDGET * 0.2
    steps = [(each.step_nbytes(TOKENS, TOKENS * share), n) for each, n in zip(cache.layers, times, strict=True)]
    read, read_host = (sum(getattr(step, place) * n for step, n in steps) / TOKENS for place in ("device", "host"))
    return [f"{nbytes / KIB:.1f}" if nbytes else "" for nbytes in (memory - host, host, read, read_host)]


def _calibration() -> dict[str, torch.Tensor]:
    """Return what calibrated methods restore; half of the heads of each layer are streaming heads."""
    eye = torch.eye(128).expand(4, 8, 128, 128)
    return {"projection": eye, "skewing_matrix": eye, "gates": torch.tensor([0.0, 1.0]).repeat(4, 4)}


def test_bytes_are_those_of_the_code(monkeypatch) -> None:
    expected = []
    for name, options in LINES:
        text = ", ".join(f"`{key}={value}`" for key, value in options.items())
        cells = _cells(name, options, monkeypatch)
        expected.append(f"| `{name}`{', ' * bool(text)}{text} | {' | '.join(cells)} |")
    section = PAGE.read_text(encoding="utf-8").partition("### Bytes per token")[2].partition("\n## ")[0]
    found = [line for line in section.splitlines() if line.startswith("| `")]
    assert sorted(found) == sorted(expected), "\n" + "\n".join(expected)
