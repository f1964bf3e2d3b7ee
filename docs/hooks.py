"""Two things that mkdocs does not do by itself: links out of `docs/`, and diagrams in the colours of the page.

A page links to an example or a chart by its place in the repository (`../examples/quickstart.py`), so that the link
works where the repository is read. What it leads to is taken along: Markdown and Python as pages, all else as it is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
IMAGE = re.compile(r'<img alt="[^"]*" src="([^"]+\.svg)" ?/?>')


def place_of(page: str) -> str:
    """Where a page of the site stands in the repository."""
    if (REPOSITORY / "docs" / page).is_file():
        return posixpath.join("docs", page)
    return page.removesuffix(".md") if page.endswith(".py.md") else page


def page_of(place: str) -> str:
    """The page of the site, or the file beside it, for a place in the repository."""
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return f"{place}.md" if place.endswith(".py") else place


def linked(text: str, place: str) -> dict[str, str]:
    """The links of a page that lead to files of the repository, with their places in it."""
    found = {}
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith(("/", "mailto:")):
            to = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
            if not to.startswith("..") and (REPOSITORY / to).is_file():
                found[target] = to
    return found


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Take along what pages link to outside of `docs/`, and what that links to."""
    waiting = [(file.content_string, place_of(file.src_uri)) for file in files.documentation_pages()]
    while waiting:
        text, place = waiting.pop()
        for to in linked(text, place).values():
            uri = page_of(to)
            if to.startswith("docs/") or files.get_file_from_path(uri) is not None:
                continue
            source = REPOSITORY / to
            if to.endswith(".py"):
                code = source.read_text(encoding="utf-8")
                content = f"# {source.name}\n\n```python\n{code}```\n"
                files.append(File.generated(config, uri, content=content))
            elif to.endswith(".md"):
                content = source.read_text(encoding="utf-8")
                files.append(File.generated(config, uri, content=content))
                waiting.append((content, to))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links lead to the pages of what was taken along."""
    here = page.file.src_uri
    if here.endswith(".py.md"):
        return markdown
    places = linked(markdown, place_of(here))

    def moved(match: re.Match[str]) -> str:
        to = places.get(match[1])
        return match[1] if to is None else posixpath.relpath(page_of(to), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Put diagrams into the page, where they take its colours; as images they could not."""

    def inlined(match: re.Match[str]) -> str:
        svg = REPOSITORY / "docs" / "images" / posixpath.basename(match[1])
        return f'<span class="diagram-frame" style="display: block">{svg.read_text(encoding="utf-8")}</span>'

    return IMAGE.sub(inlined, html)
