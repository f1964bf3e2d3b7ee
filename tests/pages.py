"""The pages of the documentation, and the Python in them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
}
NOT_RUN = "<!-- not run: "


class Snippet:
    """A Python block of a page, with what it promises to print."""

    def __init__(self, page: str, line: int, before: str, code: str) -> None:
        self.page = page
        self.line = line
        self.code = code
        self.is_script = "asyncio.run(main())" in code
        self.reason_not_to_run = before.removeprefix(NOT_RUN).removesuffix(" -->") if NOT_RUN in before else ""
        self.promised = re.findall(r"# -> (.*)", code)

    def compiled(self) -> Any:
        # As many lines down as in the page, so that a traceback names the line there.
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        return compile("\n" * self.line + self.code, self.page, "exec", flags=flags, dont_inherit=True)


def snippets(page: str) -> list[Snippet]:
    text = PAGES[page]
    found = []
    for match in re.finditer(r"^([^\n]*)\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Snippet(page, text.count("\n", 0, match.start(2)), match[1], match[2]))
    return found


def anchors(text: str) -> set[str]:
    """What a link into a page may name, which its headings make."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
