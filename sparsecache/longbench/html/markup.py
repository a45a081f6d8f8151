"""HTML out of small parts. Text is escaped unless it is Html already, so that nothing from data can become markup."""

import html

from sparsecache.longbench.terminal import visible

_VOID = ("meta", "br")


class Html(str):
    """Text that is HTML. What is done to it as text (`+`, formatting) gives plain text again, which is escaped."""


def text(content: str) -> Html:
    """Text on one line; characters that are not seen, or change the direction, are spelled out as on the terminal."""
    return Html(html.escape(visible(content)))


def lines(content: str) -> Html:
    """The same with its lines kept, for where white space counts."""
    return Html("\n".join(map(text, content.split("\n"))))


def joined(*parts: str, between: str = "\n") -> Html:
    """Parts behind each other."""
    return Html(between.join(map(_escaped, parts)))


def tag(name: str, /, *children: str, **attributes: str | bool) -> Html:
    """An element. `class_` is class, and other underscores are dashes; an attribute that is False is left out."""
    start = name + "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not False
    )
    if name in _VOID:
        return Html(f"<{start}>")
    lead = "\n" if name == "pre" else ""  # a parser drops the first line's end there
    return Html(f"<{start}>{lead}{''.join(map(_escaped, children))}</{name}>")


def _escaped(part: str) -> Html:
    return part if isinstance(part, Html) else text(part)
