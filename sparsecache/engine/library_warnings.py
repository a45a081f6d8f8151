"""Show the warnings of transformers to the user, each once and on one line, without irrelevant ones."""

import logging
import sys

from transformers.utils import logging as transformers_logging

_IRRELEVANT = (
    "sequence length is longer than the specified maximum",  # this project checks the window
    "generation flags are not valid",  # decoding is always greedy
    "Setting `pad_token_id`",
)


def show_library_warnings() -> None:
    """Show transformers' warnings on stderr, at the level of TRANSFORMERS_VERBOSITY; turn off progress bars."""
    logger = logging.getLogger("transformers")
    if not any(isinstance(handler, _WarningHandler) for handler in logger.handlers):
        transformers_logging.disable_default_handler()
        logger.addHandler(_WarningHandler(logging.WARNING))
    transformers_logging.disable_progress_bar()


class _WarningHandler(logging.Handler):
    """Writes each message once."""

    def __init__(self, level: int):
        super().__init__(level)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if message not in self._shown and not any(text in message for text in _IRRELEVANT):
            self._shown.add(message)
            print(f"Warning: transformers: {message}", file=sys.stderr)
