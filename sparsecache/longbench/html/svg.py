"""Embeds the SVG that matplotlib writes in a page."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from sparsecache.longbench.html.markup import Html


def inline(svg: bytes, name: str, title: str, description: str) -> Html:
    """Return the svg element with a title and a description for screen readers.

    Its ids begin with `name`.

    A color `#0077bb` becomes `var(--c-0077bb, #0077bb)`, so that the page can replace it. The page also sets fonts and
    size.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w-]+)", " ".join(value for each in root.iter() for value in each.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element.attrib, name, used))
    for parent in root.findall(".//style/.."):
        parent.clear()  # a style element would apply to the whole page
    for size in ("width", "height", "version"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-text"}
    for at, (tag, ending, text) in enumerate((("title", "title", title), ("desc", "text", description))):
        label = ElementTree.Element(tag, {"id": f"{name}-{ending}"})
        label.text = text
        root.insert(at, label)
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _attributes(attributes: dict[str, str], name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the attributes without namespaces and without unused ids."""
    for key, value in attributes.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key == "style":
            value = re.sub(r"font(-family)?:[^;]*;? ?", "", value)
            value = re.sub(r"(?<!\()#([0-9a-f]{6})\b", r"var(--c-\1, #\1)", value)
            yield key, value.replace("url(#", f"url(#{name}-")
        elif key == "href":
            yield key, value.replace("#", f"#{name}-")
        else:
            yield key, value.replace("url(#", f"url(#{name}-")
