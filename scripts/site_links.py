"""Hook of mkdocs: turns links to files outside docs/ into plain code, since the site holds only docs/."""

import re
from pathlib import PurePosixPath
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page in which a link that leads out of docs/ is its text."""
    depth = len(PurePosixPath(page.file.src_uri).parents) - 1
    return _LINK.sub(lambda link: link[0] if link[2].count("../") <= depth else link[1], markdown)
