"""A process that tells how long it took to its first token: `python -m sparsecache.bench.first_token BEGAN ENGINE ...`.

Each engine imports what it needs, and no more. The rest of the arguments are FOLDER DEVICE DTYPE TOKENS; BEGAN is when
the process was started, in seconds since the epoch, from which on everything told is counted.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

_NEW_TOKENS = 64  # for which room is made
Tell = Callable[[str], None]


def sparsecache(folder: Path, device: str, dtype: str, tokens: int, tell: Tell) -> None:
    """As longbench_pred.py: the plan of a run, its engine, room for its longest prompt, a prompt."""
    from sparsecache.engine.base import Request
    from sparsecache.runner.context import RunContext
    from sparsecache.runner.settings import Settings

    tell("imports")
    settings = Settings(str(folder), device=device, dtype=dtype)
    context = RunContext(settings)
    engine = context.engine(settings.slots(context.device.type))
    tell("weights")
    engine.reserve(tokens + _NEW_TOKENS)
    tell("room")
    (done,) = engine.generate([Request(0, _prompt(folder, tokens), 1, ())])
    if done.error:
        raise RuntimeError(done.error)


def transformers(folder: Path, device: str, dtype: str, tokens: int, tell: Tell) -> None:
    """transformers' generate, without anything of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    tell("imports")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(where).eval()
    tell("weights")
    prompt = torch.tensor([_prompt(folder, tokens)], device=where)
    with torch.inference_mode():
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    new[0, -1].item()


def _prompt(folder: Path, tokens: int) -> list[int]:
    vocabulary, drawn = json.loads((folder / "config.json").read_text())["vocab_size"], random.Random(0)
    return [drawn.randrange(3, vocabulary) for _ in range(tokens)]


def main(began: str, engine: str, folder: str, device: str, dtype: str, tokens: str) -> None:
    """Prints, as JSON, seconds from `began` to each stage."""
    told: dict[str, float] = {}

    def tell(stage: str) -> None:
        told[stage] = time.time() - float(began)

    run = {"sparsecache": sparsecache, "transformers": transformers}[engine]
    run(Path(folder), device, dtype, int(tokens), tell)
    tell("first token")
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
