"""Cache methods with options, as a command line names them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product

from sparsecache.errors import UsageError
from sparsecache.methods import load_method, method_names, method_options, parse_options, short_name


@dataclass(frozen=True)
class MethodSpec:
    """A cache method and its options, as on the command line."""

    method: str = "vanilla"
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([short_name(self.method), *(f"{key}={value}" for key, value in self.options.items())])


def combinations(method: str, options: dict[str, str], varied: dict[str, str]) -> list[MethodSpec]:
    """Return a method with its options and every combination of the comma-separated values that vary."""
    if both := options.keys() & varied.keys():
        raise UsageError(f"{min(both)} is given by -o and by --vary: leave one of them out.")
    values = [text.split(",") for text in varied.values()]
    return [MethodSpec(method, {**options, **dict(zip(varied, chosen, strict=True))}) for chosen in product(*values)]


def check_specs(specs: Iterable[MethodSpec]) -> None:
    """Raise UsageError for an unknown method or option, or a value that is not of the option's type."""
    for spec in specs:
        parse_options(spec.method, spec.options)


def specs_of_methods(names: str, options: dict[str, str], varied: dict[str, str]) -> list[MethodSpec]:
    """Return vanilla and the methods of a comma-separated list, or all; each with those options that it has.

    Raises UsageError for an unknown method, and for an option that no method of the list has.
    """
    methods = list(dict.fromkeys(["vanilla", *(method_names() if names == "all" else names.split(","))]))
    known = {method: method_options(load_method(method)) for method in methods}
    for key in (*options, *varied):
        if not any(key in own for own in known.values()):
            near = get_close_matches(key, {key: None for own in known.values() for key in own}, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"No method of --methods {names} has an option {key!r}.{hint}")
    specs: list[MethodSpec] = []
    for method, own in known.items():
        fixed, several = ({key: value for key, value in given.items() if key in own} for given in (options, varied))
        specs += combinations(method, fixed, several)
    _check_one_fits(specs)
    return specs


def _check_one_fits(specs: list[MethodSpec]) -> None:
    """Raise UsageError if every method with options refuses their values; the others are measured without it."""
    errors = []
    with_options = [spec for spec in specs if spec.options]
    for spec in with_options:
        try:
            parse_options(spec.method, spec.options)
        except UsageError as error:
            errors.append(error)
    if errors and len(errors) == len(with_options):
        raise errors[0]
