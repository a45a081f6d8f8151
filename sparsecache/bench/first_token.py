"""Times a process from its start to its first token: `python -m sparsecache.bench.first_token STARTED ENGINE ...`.

Each engine imports only what it needs. The other arguments are FOLDER DEVICE DTYPE TOKENS. STARTED is when the process
was started, in seconds since the epoch; every time is counted from it.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

_NEW_TOKENS = 64  # memory is allocated for so many
OnStage = Callable[[str], None]


def sparsecache(folder: Path, device: str, dtype: str, tokens: int, on_stage: OnStage) -> None:
    """As longbench_pred.py: a run's context, its engine, memory for its longest prompt, one prompt."""
    from sparsecache.engine.base import Request
    from sparsecache.runner.context import RunContext
    from sparsecache.runner.settings import Settings

    on_stage("imports")
    settings = Settings(str(folder), device=device, dtype=dtype)
    context = RunContext(settings)
    engine = context.engine(settings.slots(context.device.type))
    on_stage("weights")
    engine.reserve(tokens + _NEW_TOKENS, _NEW_TOKENS)
    on_stage("allocation")
    (completion,) = engine.generate([Request(0, _prompt(folder, tokens), 1, ())])
    if completion.error:
        raise RuntimeError(completion.error)


def transformers(folder: Path, device: str, dtype: str, tokens: int, on_stage: OnStage) -> None:
    """transformers' generate, without any module of this project."""
    import torch
    from transformers import AutoModelForCausalLM

    on_stage("imports")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if dtype == "fp8" else dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    on_stage("weights")
    prompt = torch.tensor([_prompt(folder, tokens)], device=device)
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    output[0, -1].item()


def stages(started: float, engine: str, folder: Path, device: str, dtype: str, tokens: int) -> dict[str, float]:
    """Return seconds from `started` to the end of each stage, in order."""
    seconds: dict[str, float] = {}

    def on_stage(stage: str) -> None:
        seconds[stage] = time.time() - started

    {"sparsecache": sparsecache, "transformers": transformers}[engine](folder, device, dtype, tokens, on_stage)
    on_stage("first token")
    return seconds


def _prompt(folder: Path, tokens: int) -> list[int]:
    vocab_size, generator = json.loads((folder / "config.json").read_text())["vocab_size"], random.Random(0)
    return [generator.randrange(3, vocab_size) for _ in range(tokens)]


if __name__ == "__main__":
    _started, _engine, _folder, _device, _dtype, _tokens = sys.argv[1:]
    print(json.dumps(stages(float(_started), _engine, Path(_folder), _device, _dtype, int(_tokens))))
