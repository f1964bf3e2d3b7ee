"""What of the package's metadata depends on where the repository is: its links, those in the README among them.

On a package index the README stands without the repository, so a link to a file beside it has to say where that is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code is passed over: `table[key](value)` looks like a link.
_LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)"
    r"|(?P<before>(?P<picture>!\[[^\]]*)?\]\(|\b(?:(?P<source>src|srcset)|href)=\")"
    r"(?P<target>(?![a-z]+:|#)[^)\"\s]+)",
    re.DOTALL,
)


def with_absolute_links(markdown: str, repository: str) -> str:
    """A page of the repository's root, with links that work anywhere: to pages on the web, and to bare pictures."""

    def absolute(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        view = "raw" if match["picture"] or match["source"] else "blob"
        return f"{match['before']}{repository}/{view}/HEAD/{match['target'].removeprefix('./')}"

    return _LINK.sub(absolute, markdown)


class Links(MetadataHookInterface):
    """Fills in the README and the addresses, from the one address that pyproject.toml states."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with what pyproject.toml says, to be added to."""
        repository = self.config["repository"]
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(readme, repository)}
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/tree/HEAD/docs",
            "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
