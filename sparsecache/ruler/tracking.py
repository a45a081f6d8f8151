"""Variable tracking: a chain of assignments hidden in noise. All its variables have the value of the first."""

import string
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

from sparsecache.longbench.tasks import Task
from sparsecache.ruler.draft import Draft, distinct_places, letters
from sparsecache.ruler.fill import fill
from sparsecache.ruler.needles import NOISE
from sparsecache.synthetic.draft import Rng

_HOPS = 4
_EXAMPLE_TOKENS = 500


class Tracking:
    """The task `vt`. task: gives the text of the solved example. count_text: the tokens of a text."""

    def __init__(self, task: Task, count_text: Callable[[str], int]):
        self._task, self._count_text = task, count_text

    def make(self, rng: Rng, size: int) -> Draft:
        """Return a row with `size` lines of noise, after a solved example of at most 500 tokens."""
        example = f"{self._example(rng, self._example_size)}\n\n"
        context, value, names = _chain(rng, size, 5, str(rng.randint(10_000, 99_998)))
        return Draft(context, value, names, example)

    @cached_property
    def _example_size(self) -> int:
        size, _ = fill(lambda size: self._example(Rng("vt"), size), self._count_text, _EXAMPLE_TOKENS, _HOPS + 1)
        return size

    def _example(self, rng: Rng, size: int) -> str:
        context, value, names = _chain(rng, size, 3, str(rng.randint(10_000, 99_998)))
        row = {"context": context, "input": value, "examples": ""}
        question = (self._task.template + self._task.answer_prefix).format(**row)
        return f"{question} {' '.join(names)}"


def _chain(rng: Rng, size: int, letters_per_name: int, value: str) -> tuple[str, str, list[str]]:
    """Return lines of noise with a chain of assignments among them, its value, and the names of its variables."""
    used: set[str] = set()
    names = []
    for _ in range(_HOPS + 1):
        name = rng.unique(lambda rng: letters(rng, string.ascii_uppercase, letters_per_name), used)
        names.append(name)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    lines = [NOISE] * size
    for at, (place, assignment) in enumerate(zip(distinct_places(rng, size, len(chain)), chain, strict=True)):
        lines.insert(place + at, assignment)
    return "\n".join(lines), value, names
