"""The description of the package for an index: README.md with absolute links, because no files lie beside it there.

All other metadata are in setup.cfg.
"""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
BRANCH = "main"


def with_absolute_links(text: str, address: str) -> str:
    """Replaces the relative links and pictures of a Markdown text by those of the repository at an address."""

    def absolute(found: re.Match) -> str:
        picture, label, path = found.groups()
        if "://" in path or path.startswith("#"):
            return found[0]
        return f"{picture}[{label}]({address}/{'raw' if picture else 'blob'}/{BRANCH}/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=with_absolute_links(readme, metadata["metadata"]["url"]))
