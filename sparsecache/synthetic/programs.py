"""The code sets of the sample, lcc and repobench-p: a call whose arguments an earlier definition settles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, mark, parts, share

_VERBS = """
    append check collect compute convert copy count decode delete encode expand fetch filter group
    hash insert join limit load lock map merge move pack parse print prune query rank read render
    reset resize rotate save scale scan select send shift sort split store swap trace trim update
    verify wrap
""".split()
_NOUNS = """
    account batch block budget buffer cache channel client column cursor device edge event field
    file folder frame graph header image index invoice item job label ledger matrix message module
    node order packet page path price queue record region report row sample sensor server session
    signal table task ticket timer token user vector
""".split()
_ARGUMENTS = """
    alpha base beta bound child count data delta depth factor first flag gamma height host index
    items key last left level limit mask mode name offset origin parent port rate ratio right rows
    scale score size source speed start step stop target text total value weight width
""".split()


# What a line or two outside the definitions costs, an import or a commented call.
_CALL_TOKENS = 20.0


@dataclass(frozen=True)
class Function:
    """A definition: what it is called, what it takes, and its text."""

    name: str
    arguments: list[str]
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def task(self) -> str:
        return self.name.replace("_", " ")

    @property
    def call(self) -> str:
        return f"    result = {self.name}({', '.join(self.arguments)})"

    @property
    def question(self) -> Question:
        return f"    # {self.task}\n", self.call


def _name(rng: Rng) -> str:
    return f"{rng.pick(_VERBS)}_{rng.pick(_NOUNS)}_{rng.pick(_NOUNS)}"


def _lookalike_name(rng: Rng, name: str) -> str:
    """Another name that shares one or two of the three words of `name`."""
    words = name.split("_")
    for place in rng.several((0, 1, 2), rng.span(1, 2)):
        words[place] = rng.pick(_NOUNS if place else _VERBS)
    return "_".join(words)


def _define(rng: Rng, name: str) -> Function:
    arguments = rng.several(_ARGUMENTS, rng.span(2, 4))
    lines = [f"def {name}({', '.join(arguments)}):", f'    """{name.replace("_", " ").capitalize()}."""']
    for _ in range(rng.span(0, 2)):
        a, b = rng.several(arguments, 2)
        lines.append(f"    {a} = {a} {rng.pick('+-*')} {b} * {rng.span(2, 99)}")
    lines.append(f"    return {arguments[0]} {rng.pick('+-*')} {arguments[1]}")
    return Function(name, arguments, "\n".join(lines) + "\n")


def _library(rng: Rng, target: Function, names: set[str], room: float, others: int = 1) -> list[Function]:
    """About `room` tokens of functions: the target at a uniform place, `others` at least, some named alike.

    Names come from outside `names` and are added there.
    """

    def other() -> Function:
        make = (lambda rng: _lookalike_name(rng, target.name)) if rng.chance(0.4) else _name
        return _define(rng, rng.fresh(make, names))

    functions = [other() for _ in range(others)]
    room -= sum(estimate_tokens(function.text) for function in (target, *functions))
    functions += fill(room, other)
    rng.insert(functions, target)
    return functions


def _main(rng: Rng, functions: list[Function], target: Function, calls: int) -> str:
    """A `main` that calls a few others, each under a comment, and ends at the comment for the target."""
    others = rng.several([function for function in functions if function is not target], calls)
    lines = [f"    # {function.task}\n{mark(function.call)}\n" for function in others]
    return "def main():\n" + "".join(lines) + f"    # {target.task}\n"


def _further(rng: Rng, functions: list[Function], target: Function) -> Iterator[Question]:
    """The next line for other comments than the target's."""
    return (function.question for function in rng.drawn(functions) if function is not target)


def _blocks(functions: list[Function]) -> str:
    return "".join(f"{function.text}\n\n" for function in functions)


def lcc(rng: Rng, room: float) -> Draft:
    """One file; the last line is a call of a function that is defined in it."""
    target = _define(rng, _name(rng))
    calls = parts(room, 300, 1, 3)
    functions = _library(rng, target, {target.name}, room - _CALL_TOKENS * (calls + 1))
    header = f'"""Tools for the {rng.pick(_NOUNS)} {rng.pick(_NOUNS)}."""\n\nimport math\n\n\n'
    context = header + _blocks(functions) + _main(rng, functions, target, calls)
    return Draft(context, "", [target.call], more=_further(rng, functions, target))


def repobench(rng: Rng, room: float) -> Draft:
    """Several files; the last line is a call of a function that another file defines."""
    target = _define(rng, _name(rng))
    names, package = {target.name}, rng.pick(_NOUNS)
    modules = [f"{noun}_tools" for noun in rng.several(_NOUNS, parts(room, 300, 2, 12))]
    home = rng.pick(modules)
    imported: dict[str, Function] = {}
    functions: list[Function] = []

    def writer(module: str) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = f'{package}/{module}.py\n"""Tools for the {module.removesuffix("_tools")}."""\n\n\n'
            imported[module] = target if module == home else _define(rng, rng.fresh(_name, names))
            library = _library(rng, imported[module], names, tokens - estimate_tokens(head), int(module == home))
            functions.extend(library)
            return head + _blocks(library)

        return write

    context = "".join(share(room - _CALL_TOKENS * (len(modules) + 1), [writer(module) for module in modules]))
    imports = "".join(f"from {package}.{name} import {used.name}\n" for name, used in imported.items())
    main = _main(rng, list(imported.values()), target, min(3, len(modules) - 1))
    return Draft(context, f"{imports}\n\n{main}", [target.call], more=_further(rng, functions, target))
