"""The Python code of the documentation's pages."""

import ast
import builtins
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "hosts").glob("*.md")),
    )
    if page.exists()
]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, code) of each ```python block that is not marked `<!-- not run: reason -->` on the line before."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, start = [], None
    for number, line in enumerate(lines):
        if start is None and line.strip() == "```python":
            start = number
        elif start is not None and line.strip() == "```":
            if not NOT_RUN.fullmatch(lines[start - 1].strip()):
                blocks.append((start + 1, "\n".join(lines[start + 1 : number])))
            start = None
    assert start is None, f"{page.name}: the block of line {start} has no end"
    return blocks


def borrowed_names(code: str) -> set[str]:
    """The names that a block uses and neither defines nor imports."""
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    own |= {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    return used - own - {*dir(builtins), "__name__"}


def block(page: str, containing: str) -> dict:
    """Runs the first block of docs/PAGE.md, which has the imports, and the first one with this text.

    Returns what they define.
    """
    blocks = [code for _, code in python_blocks(ROOT / "docs" / f"{page}.md")]
    namespace = {"__name__": f"docs_{page}"}
    with torch.random.fork_rng():
        for code in (blocks[0], next(code for code in blocks if containing in code)):
            exec(code, namespace)
    return namespace
