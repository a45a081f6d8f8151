"""Builds HTML from escaped text. Only `Html` is taken as markup, so data cannot inject any."""

import html

from sparsecache.longbench.terminal import escape_control_chars

_VOID = ("meta", "br")


class Html(str):
    """A string that is HTML.

    String operations (`+`, formatting) return plain text, which is escaped again.
    """


def escape(content: str) -> Html:
    """Return text as HTML on one line, with control and formatting characters escaped."""
    return Html(html.escape(escape_control_chars(content)))


def escape_lines(content: str) -> Html:
    """Return text as HTML as `escape` does, but keep its line ends."""
    return Html("\n".join(map(escape, content.split("\n"))))


def join(*parts: str, between: str = "\n") -> Html:
    """Return the parts as one piece of HTML. Text parts are escaped."""
    return Html(between.join(map(_as_html, parts)))


def tag(name: str, /, *children: str, **attributes: str | bool) -> Html:
    """Return an element.

    `class_` means class, other underscores mean dashes, False omits the attribute.
    """
    start = name + "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not False
    )
    if name in _VOID:
        return Html(f"<{start}>")
    first_newline = "\n" if name == "pre" else ""  # parsers drop the first newline of a pre
    return Html(f"<{start}>{first_newline}{''.join(map(_as_html, children))}</{name}>")


def _as_html(part: str) -> Html:
    return part if isinstance(part, Html) else escape(part)
