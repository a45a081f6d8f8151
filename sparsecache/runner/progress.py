"""Show the progress of a run: a bar on a terminal, else one line per minute. Both go to stderr."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

INTERVAL_S = 60.0
_ROWS_PER_SECOND = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class Progress:
    """Counts rows and new tokens of `name`; `done` of `total` rows are finished at the start.

    quiet: shows nothing. per_second: the bar shows rows per second, not seconds per row, as many workers need it.
    """

    def __init__(self, name: str, done: int, total: int, *, quiet: bool = False, per_second: bool = False):
        self._name, self._done, self._total = name, done, total
        self._new_tokens, self._start = 0, time.monotonic()
        self._bar: tqdm | None = None
        self._lines = not quiet and not sys.stderr.isatty()
        self._last_line = self._start
        if not quiet and not self._lines:
            bar_format = {"bar_format": _ROWS_PER_SECOND} if per_second else {}
            self._bar = tqdm(total=total, initial=done, desc=name, unit="row", **bar_format)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None:
            self._print_line()

    def add_tokens(self, count: int) -> None:
        """Add new tokens."""
        self._new_tokens += count
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._new_tokens} new tokens", refresh=False)
            self._bar.update(0)
        elif self._lines and time.monotonic() - self._last_line >= INTERVAL_S:
            self._print_line()

    def add_row(self) -> None:
        """Add a row."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._start
        text = f"{self._name}: {self._done} of {self._total} rows, {self._new_tokens} new tokens in {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)
