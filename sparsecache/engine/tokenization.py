"""The tokenizer of a checkpoint folder, and the token ids that end a text."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from sparsecache.errors import UsageError, one_line

_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a folder. Raises UsageError if transformers cannot make one of it."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer file raises
        raise UsageError(f"{path} holds no tokenizer that can be loaded: {one_line(error)}") from error


def find_stop_ids(path: Path, config: Any, tokenizer: Any) -> list[int]:
    """Returns the ids that end a turn: generation_config's eos, the tokenizer's eos, <|eot_id|> and <|im_end|>.

    Without a generation_config.json its eos is the one of `config`, as in transformers.
    """
    if (path / "generation_config.json").is_file():
        stated = _read_generation_config(path).eos_token_id
    else:
        stated = config.get_text_config().eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    wrong = [each for each in listed if each is not None and (type(each) is not int or each < 0)]
    if wrong:
        raise UsageError(f"{path} states eos_token_id {wrong[0]!r}; a token id is a whole number from 0 on.")
    ids = {*listed, tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in _TURN_ENDS if token in vocabulary}
    return sorted(stop_id for stop_id in ids if stop_id is not None)


def _read_generation_config(path: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # broken JSON, or values that transformers refuses
        raise UsageError(f"{path / 'generation_config.json'} cannot be read: {one_line(error)}") from error
