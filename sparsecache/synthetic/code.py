"""Generators of lcc and repobench-p: predict a call of a function that the code defines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsecache.synthetic.draft import Draft, QAPair, Rng, estimate_tokens, fill, mark, num_parts, write_parts

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


# Estimated tokens of a commented call or an import, the lines outside the definitions.
_CALL_TOKENS = 20.0


@dataclass(frozen=True)
class Function:
    """A function definition: name, parameters and source text."""

    name: str
    arguments: list[str]
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def comment(self) -> str:
        return self.name.replace("_", " ")

    @property
    def call(self) -> str:
        return f"    result = {self.name}({', '.join(self.arguments)})"

    @property
    def qa_pair(self) -> QAPair:
        return f"    # {self.comment}\n", self.call


def _name(rng: Rng) -> str:
    return f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}_{rng.choice(_NOUNS)}"


def _lookalike_name(rng: Rng, name: str) -> str:
    """Return another name that shares one or two of the three words of `name`."""
    words = name.split("_")
    for index in rng.sample((0, 1, 2), rng.randint(1, 2)):
        words[index] = rng.choice(_NOUNS if index else _VERBS)
    return "_".join(words)


def _define(rng: Rng, name: str) -> Function:
    arguments = rng.sample(_ARGUMENTS, rng.randint(2, 4))
    lines = [f"def {name}({', '.join(arguments)}):", f'    """{name.replace("_", " ").capitalize()}."""']
    for _ in range(rng.randint(0, 2)):
        a, b = rng.sample(arguments, 2)
        lines.append(f"    {a} = {a} {rng.choice('+-*')} {b} * {rng.randint(2, 99)}")
    lines.append(f"    return {arguments[0]} {rng.choice('+-*')} {arguments[1]}")
    return Function(name, arguments, "\n".join(lines) + "\n")


def _library(rng: Rng, target: Function, names: set[str], tokens: float, others: int = 1) -> list[Function]:
    """Return about `tokens` tokens of functions: the target and at least `others` more.

    40 % of the others have a name similar to the target's. Names are not in `names` and are added to it.
    """

    def other() -> Function:
        make = (lambda rng: _lookalike_name(rng, target.name)) if rng.chance(0.4) else _name
        return _define(rng, rng.unique(make, names))

    functions = [other() for _ in range(others)]
    tokens -= sum(estimate_tokens(function.text) for function in (target, *functions))
    functions += fill(tokens, other)
    rng.insert(functions, target)
    return functions


def _main(rng: Rng, functions: list[Function], target: Function, calls: int) -> str:
    """Return a `main` with `calls` commented calls that ends before the target's call."""
    others = rng.sample([function for function in functions if function is not target], calls)
    lines = [f"    # {function.comment}\n{mark(function.call)}\n" for function in others]
    return "def main():\n" + "".join(lines) + f"    # {target.comment}\n"


def _follow_ups(rng: Rng, functions: list[Function], target: Function) -> Iterator[QAPair]:
    """Return the next line after the comments of the other functions."""
    return (function.qa_pair for function in rng.shuffled(functions) if function is not target)


def _blocks(functions: list[Function]) -> str:
    return "".join(f"{function.text}\n\n" for function in functions)


def lcc(rng: Rng, tokens: float) -> Draft:
    """Return one file; the next line calls a function that the file defines."""
    target = _define(rng, _name(rng))
    calls = num_parts(tokens, 300, 1, 3)
    functions = _library(rng, target, {target.name}, tokens - _CALL_TOKENS * (calls + 1))
    header = f'"""Tools for the {rng.choice(_NOUNS)} {rng.choice(_NOUNS)}."""\n\nimport math\n\n\n'
    context = header + _blocks(functions) + _main(rng, functions, target, calls)
    return Draft(context, "", [target.call], follow_ups=_follow_ups(rng, functions, target))


def repobench(rng: Rng, tokens: float) -> Draft:
    """Return several files; the next line calls a function that another file defines."""
    target = _define(rng, _name(rng))
    names, package = {target.name}, rng.choice(_NOUNS)
    modules = [f"{noun}_tools" for noun in rng.sample(_NOUNS, num_parts(tokens, 300, 2, 12))]
    target_module = rng.choice(modules)
    imported: dict[str, Function] = {}
    functions: list[Function] = []

    def module_writer(module: str) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = f'{package}/{module}.py\n"""Tools for the {module.removesuffix("_tools")}."""\n\n\n'
            has_target = module == target_module
            imported[module] = target if has_target else _define(rng, rng.unique(_name, names))
            library = _library(rng, imported[module], names, tokens - estimate_tokens(head), int(has_target))
            functions.extend(library)
            return head + _blocks(library)

        return write

    tokens -= _CALL_TOKENS * (len(modules) + 1)
    context = "".join(write_parts(tokens, [module_writer(module) for module in modules]))
    imports = "".join(f"from {package}.{name} import {used.name}\n" for name, used in imported.items())
    main = _main(rng, list(imported.values()), target, min(3, len(modules) - 1))
    return Draft(context, f"{imports}\n\n{main}", [target.call], follow_ups=_follow_ups(rng, functions, target))
