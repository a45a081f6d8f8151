"""The lines that a run prints about its context before its first row."""

from collections.abc import Iterator

from sparsecache.options import show
from sparsecache.runner.context import RunContext


def describe(context: RunContext) -> Iterator[str]:
    """Yield the lines that describe the run before its first row."""
    model, checkpoint = context.model, context.checkpoint
    table = f"settings of [{model.table}]" if model.table else "no table in configs/models.toml"
    chat = {"template": "the tokenizer's template", "none": "none"}.get(context.chat, repr(context.chat))
    if context.prompter.wrapper.content_is_list:
        chat += ", which renders content as a list of parts"
    stop_tokens = [f"{token} ({i})" for token, i in zip(context.stop_tokens, checkpoint.stop_ids, strict=True)]
    options = ", ".join(f"{key}={show(value)}" for key, value in context.options.items())
    yield f"checkpoint  {checkpoint.path} ({checkpoint.model_type}, {table})"
    devices = " and ".join(map(str, context.devices))
    yield f"decoding    {context.settings.method} ({options or 'no options'}), {context.dtype_name} on {devices}"
    length = context.prompter.max_length
    long = "longer prompts" if length is None else f"prompts of more than {length} tokens (max_length)"
    yield f"prompts     window {context.window} tokens; {long} are cut in the middle"
    yield f"chat        {chat}; stop tokens: {', '.join(stop_tokens) or 'none'}"


def describe_engine(context: RunContext) -> Iterator[str]:
    """Yield lines about the layers that the method serves, and a batch size that has no effect.

    Both are known once the engine is loaded.
    """
    served, layers = context.served_layers or (0, 0)
    if served < layers:
        yield (
            f"layers      {served} of {layers} have full attention: the method and `kept` are about these, counted "
            f"from 0; the others keep transformers' own cache"
        )
    if context.one_slot_reason is not None and context.slots > 1:
        yield f"prompts     decoded one at a time, since {context.one_slot_reason}"


def context_warnings(context: RunContext) -> Iterator[str]:
    """Yield warnings to show before the first row."""
    name = context.model.name
    yield from getattr(context.checkpoint.tokenizer, "notes", ())
    looks_instructed = any(mark in name.lower() for mark in ("chat", "instruct", "-it"))
    if context.chat == "none" and looks_instructed:
        yield (
            f"{name} looks instruction-tuned but has no chat template, so prompts are not wrapped; "
            f"pass --chat, or give it a table with `chat` in configs/models.toml."
        )
    if not context.checkpoint.stop_ids:
        yield "the checkpoint names no end-of-text token, so every prediction ends by length."
