"""Finds the size at which a generated text fills a budget of tokens."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_SLACK = 0.01  # share of the budget that may stay empty
_UNLIMITED = 2**40


class TooLongError(ValueError):
    """The smallest text exceeds the budget. tokens: its length."""

    def __init__(self, tokens: int):
        super().__init__(f"The smallest text has {tokens} tokens.")
        self.tokens = tokens


def fill(
    make: Callable[[int], T],
    count: Callable[[T], int],
    budget: int,
    min_size: int = 1,
    max_size: int = _UNLIMITED,
    start: int | None = None,
) -> tuple[int, T]:
    """Return a size and its text, which has at most `budget` tokens and nearly as many.

    make: the text of a size; its tokens grow about linearly. min_size, max_size: of the text. start: the first size
    tried. Ends once 99 % of the budget are filled, or no size between a fitting and a larger one is left. Raises
    TooLongError if the smallest text does not fit.
    """
    aim = budget * (1 - _SLACK / 2)
    fits: tuple[int, int, T] | None = None  # size, tokens, text
    exceeds: tuple[int, int] | None = None  # size, tokens
    size = min(max_size, max(min_size, start or 8 * min_size))
    while True:
        text = make(size)
        tokens = count(text)
        if tokens <= budget:
            fits = size, tokens, text
            if tokens >= budget * (1 - _SLACK) or size == max_size:
                return size, text
        elif size == min_size:
            raise TooLongError(tokens)
        else:
            exceeds = size, tokens
        if fits and exceeds:
            if exceeds[0] - fits[0] <= 1:
                return fits[0], fits[2]
            slope = (exceeds[1] - fits[1]) / (exceeds[0] - fits[0])
            size = min(exceeds[0] - 1, max(fits[0] + 1, fits[0] + int((aim - fits[1]) / slope)))
        elif exceeds:
            size = max(min_size, min(exceeds[0] - 1, int(exceeds[0] * aim / exceeds[1])))
        else:
            size = min(max_size, max(size + 1, int(size * aim / tokens)))
