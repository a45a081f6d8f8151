"""Passes the warnings of transformers on to the user, each once and on one line, without those that never matter."""

import logging
import sys

from transformers.utils import logging as transformers_logging

_NOISE = (
    "sequence length is longer than the specified maximum",  # the window is checked here
    "generation flags are not valid",  # decoding is greedy whatever generation_config.json says
    "Setting `pad_token_id`",
)


def show_library_warnings() -> None:
    """Shows what transformers warns of on stderr, at its own level (TRANSFORMERS_VERBOSITY), and no progress bars."""
    logger = logging.getLogger("transformers")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        transformers_logging.disable_default_handler()
        logger.addHandler(_Handler(logging.WARNING))
    transformers_logging.disable_progress_bar()


class _Handler(logging.Handler):
    """Writes each message once."""

    def __init__(self, level: int):
        super().__init__(level)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if message not in self._shown and not any(noise in message for noise in _NOISE):
            self._shown.add(message)
            print(f"Warning: transformers: {message}", file=sys.stderr)
