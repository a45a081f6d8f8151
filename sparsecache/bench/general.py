"""Time per token of the general engine beside transformers' own generate, over one loaded model.

    python -m sparsecache.bench.general --model demo --tokens 512

Both decode the same random prompt, in turns, so that a busy machine slows both alike.
"""

import statistics

import click
import torch

from sparsecache.cli import FlexibleCommand, option_pairs, report_usage_errors
from sparsecache.engine.base import Engine, Request
from sparsecache.engine.devices import find_device
from sparsecache.engine.general import CachedModel, GeneralEngine
from sparsecache.engine.loading import DTYPES, Checkpoint
from sparsecache.engine.model_registry import checkpoint_folder, find_model
from sparsecache.engine.reference import TransformersEngine
from sparsecache.methods import make_method, option_errors, parse_options


def measure(checkpoint: Checkpoint, method: str, options: dict[str, str], **sizes: int | str) -> tuple[float, float]:
    """Return the median milliseconds per decoded token of transformers' generate and of the general engine.

    sizes: tokens of the prompt, new_tokens, rounds, device and dtype. Raises UsageError for a model or options that
    do not fit.
    """
    device, dtype = find_device(str(sizes["device"])), DTYPES[str(sizes["dtype"])]
    tokens, new_tokens = int(sizes["tokens"]), int(sizes["new_tokens"])
    reference = TransformersEngine.load(checkpoint.path, device, dtype, config=checkpoint.config)
    made = make_method(method, parse_options(method, options))
    model = CachedModel(reference.model, made, tokens + new_tokens)
    with option_errors(method):
        made.check(model.shape)
    text = made.calibration_text()
    if text is not None:
        token_ids = torch.tensor(checkpoint.tokenizer(text)["input_ids"][:tokens], device=device)
        with torch.inference_mode():
            model.calibrate(token_ids, lambda layers: None)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, len(checkpoint.tokenizer.get_vocab()), (tokens,), generator=generator).tolist()
    request = Request(0, prompt, new_tokens, ())
    engines: tuple[Engine, Engine] = (reference, GeneralEngine(model, 1))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(int(sizes["rounds"]) + 1):
        for engine, found in zip(engines, times, strict=True):
            (done,) = engine.generate([request])
            if done.error is not None:
                raise RuntimeError(done.error)
            if turn:  # the first warms up
                found.append(1000 * done.decode_s / (new_tokens - 1))
    return statistics.median(times[0]), statistics.median(times[1])


@click.command(cls=FlexibleCommand)
@click.option("--model", default="demo", show_default=True, help="Checkpoint, as for longbench_pred.py.")
@click.option("--method", default="vanilla", show_default=True, help="Cache method of the general engine.")
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable.")
@click.option("--tokens", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--new_tokens", type=click.IntRange(2, 2**20), default=64, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Turns of each engine.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:NUMBER.")
@click.option(
    "--dtype", type=click.Choice([name for name in DTYPES if name != "fp8"]), default="float32", show_default=True
)
def main(model: str, method: str, options: tuple[str, ...], **sizes: int | str) -> None:
    """Print the milliseconds per token of both, and their ratio."""
    with report_usage_errors():
        checkpoint = Checkpoint(checkpoint_folder(find_model(model), offline=True, weights=True))
        theirs, ours = measure(checkpoint, method, option_pairs(options), **sizes)
    click.echo(f"transformers' generate {theirs:.1f} ms per token")
    click.echo(f"general engine, {method} {ours:.1f} ms per token, {ours / theirs:.2f} times as long")


if __name__ == "__main__":
    main()
