"""For the site: a link to a file outside docs/ becomes the file's path. The site does not have the file."""

import posixpath
import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this with every page's text."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def path(link: re.Match[str]) -> str:
        text = link[1].strip("`")
        name = posixpath.normpath(posixpath.join(folder, link[2].partition("#")[0]))
        if name.startswith("docs/"):
            return link[0]
        return f"`{name}`" if name.endswith(text) else f"{link[1]} (`{name}`)"

    return OUTSIDE.sub(path, markdown)
