"""Check that the settings of a run fit its checkpoint. Reads no weights."""

from collections.abc import Sequence

import torch

from sparsecache.engine.families import load_family
from sparsecache.engine.fp8 import check_fp8_devices
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.model_registry import Model
from sparsecache.engine.rope import Rope
from sparsecache.errors import UsageError, one_line
from sparsecache.runner.settings import Settings


def find_window(settings: Settings, model: Model, checkpoint: Checkpoint) -> int:
    """Return the tokens for prompt and answer: --window, else the model's table, else the checkpoint's own.

    Raises UsageError if --window is longer than the other two allow, and if none of the three states a window.
    """
    wanted, longest = settings.window, model.window or checkpoint.window
    if wanted is not None and longest is not None and wanted > longest:
        raise UsageError(
            f"--window {wanted} is beyond the {longest} tokens that {checkpoint.path} is made for. Pass at "
            f"most --window {longest}. For a checkpoint that can do more, state `window` in a table of "
            f"configs/models.toml, or RoPE scaling in its config.json."
        )
    if wanted is None and longest is None:
        raise UsageError(
            f"{checkpoint.config_source} states no max_position_embeddings. Pass --window, the number of "
            f"tokens for prompt and answer together."
        )
    window = wanted or longest
    assert window is not None
    return window


def check_model_type(settings: Settings, model: Model, checkpoint: Checkpoint) -> None:
    """Raise UsageError for another model_type than --model_type or the model's table states."""
    wanted, found = settings.model_type or model.model_type, checkpoint.model_type
    if wanted is not None and wanted != found:
        raise UsageError(
            f"{checkpoint.config_source} says model_type {found!r}, not {wanted!r}. "
            f"Pass --model_type {found}, leave it out, or correct configs/models.toml."
        )


def check_dtype(settings: Settings, dtype_name: str, devices: Sequence[torch.device]) -> None:
    """Raise UsageError for fp8 with an engine or on devices that do not decode in it."""
    if dtype_name != "fp8":
        return
    if settings.engine == "transformers" or settings.verify:
        raise UsageError(
            "--dtype fp8 needs --engine sparsecache without --verify, since transformers does not decode in fp8. "
            "Use --dtype bfloat16."
        )
    if not settings.on_ray:  # on Ray, each worker checks its own devices
        check_fp8_devices(devices)


def check_chat(settings: Settings, model: Model, checkpoint: Checkpoint, chat: str) -> None:
    """Raise UsageError if the chat wrapper is a template that the tokenizer does not have."""
    if chat == "template" and not checkpoint.tokenizer.chat_template:
        source = "--chat" if settings.chat else f"`chat` of [{model.table}] in configs/models.toml"
        raise UsageError(
            f'{checkpoint.path} has no chat template, but {source} is "template". Pass --chat none, or a text '
            f"with {{prompt}} in it."
        )


def check_family(settings: Settings, checkpoint: Checkpoint, window: int) -> None:
    """Raise UsageError for a checkpoint that the fast engine cannot decode within the window."""
    family = load_family(checkpoint.model_type)
    shape = family.architecture(checkpoint.config).shape
    if settings.gpus_per_worker > shape.layers:
        raise UsageError(
            f"--gpus_per_worker {settings.gpus_per_worker} is more than the {shape.layers} layers of {checkpoint.path}."
        )
    try:
        Rope(checkpoint.config, torch.device("cpu"))
    except UsageError:
        raise
    except Exception as error:  # values of config.json that no rotation can be made of
        raise UsageError(
            f"{checkpoint.config_source} states RoPE parameters that cannot be used: {one_line(error)}"
        ) from error
    sliding = family.sliding_window(checkpoint.config)
    if sliding is not None and sliding < window:
        raise UsageError(
            f"{checkpoint.path} has layers with sliding-window attention over {sliding} tokens, which are "
            f"not decoded here beyond that window. Keep within it with --window {sliding}, or use "
            f"--engine transformers."
        )
