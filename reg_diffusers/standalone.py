"""The pipeline with all it needs of this package as one source file, for those who have not installed it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

__all__ = ["standalone_source"]

# In the order of their imports: each needs only those before it.
_MODULES = (
    *("prediction", "weighting", "regularizers", "term", "conditioning", "guidance"),
    *("model_index", "measurement", "card_text", "card", "repository", "pipeline"),
)

_HEAD = '''"""RegDDPMPipeline of reg_diffusers {version} in one file, made from its sources; licence: Apache-2.0.

    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)

pip install of reg_diffusers gives the same class, with documentation and tests.
"""

from __future__ import annotations

from pathlib import Path


def standalone_source() -> str:
    """The text of this file, for saving it again."""
    return Path(__file__).read_text(encoding="utf-8")
'''


@functools.cache
def standalone_source() -> str:
    """Python source that defines `RegDDPMPipeline` and everything it uses but torch, diffusers, numpy and PIL."""
    from . import __version__

    folder = Path(__file__).parent
    bodies = [_body((folder / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES]
    return "\n\n".join([_HEAD.format(version=__version__), *bodies])


def _body(source: str) -> str:
    """A module's text without what only a module of the package has: relative imports, __all__, __future__."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        relative = isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__")
        exports = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
        if relative or exports:
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None).strip() + "\n"
