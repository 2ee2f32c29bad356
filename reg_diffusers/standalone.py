"""Generates one source file with the pipeline and what it needs of this package, to load it without installing.

The file has each definition that the pipeline reaches, and the losses and weightings that its users pass to it,
word for word. Docstrings are left out except for those of the pipeline itself.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

__all__ = ["standalone_source"]

# In import order: each module needs only those before it.
_MODULES = (
    *("precision", "schedule", "parameterization", "learned_variance", "level_table", "prediction", "weighting"),
    *("context", "regularizers/contract", "regularizers/pixels", "estimators", "weight_rules", "term"),
    *(
        "conditioning",
        "guidance",
        "frozen",
        "views",
        "autoencoder",
        "sampling/inference_steps",
        "sampling/fast_scheduler",
        "hub/model_index",
        "runs/measurement",
    ),
    *(
        "runtime/files",
        "runtime/links",
        "runs/run_folder",
        "hub/data_text",
        "hub/held_out_text",
        "hub/objective_text",
        "hub/card_text",
        "hub/card",
        "hub/repository",
    ),
    *(
        "sampling/class_names",
        "sampling/call_inputs",
        "sampling/conditioned_network",
        "sampling/step_callback",
        "sampling/pipeline_output",
        "sampling/image_space",
        "pipeline",
    ),
)
_PUBLIC = ("weighting", "regularizers/pixels", "pipeline")  # all that these export is in the file
_DOCUMENTED = "pipeline"
_PART_OF_IT = "sampling/fast_scheduler"  # which it exports

_HEAD = '''"""RegDDPMPipeline of reg_diffusers {version} in one file, generated from its sources; licence: Apache-2.0.

    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)

Installing reg_diffusers provides the same class. The modules of the package that are named below document this code.
"""

from __future__ import annotations
'''

_OWN_TEXT = '''

def standalone_source() -> str:
    """Returns the text of this file, to save it again."""
    return Path(__file__).read_text(encoding="utf-8")
'''


@dataclass(frozen=True)
class _Statement:
    """A statement at the top of a module.

    Attributes:
        module: name of the module.
        text: the source without docstrings, with the comments above it.
        defines: names that it binds; none for a call.
        uses: names that occur in it.
    """

    module: str
    text: str
    defines: frozenset[str]
    uses: frozenset[str]


@functools.cache
def standalone_source() -> str:
    """Returns Python source that defines `RegDDPMPipeline` and requires only torch, diffusers, numpy and PIL."""
    from . import __version__

    folder = Path(__file__).parent
    imports, statements, roots = [], [], set()
    for module in _MODULES:
        source = (folder / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body[1:]:  # after the docstring of the module
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(node)
            elif (defined := _defined(node)) == {"__all__"}:
                roots |= set(ast.literal_eval(node.value)) if module in _PUBLIC else set()
            else:
                text = _text(node, source.splitlines(), is_documented=module in (_DOCUMENTED, _PART_OF_IT))
                statements.append(_Statement(module, text, defined, _used(node)))
    reached = _reached(statements, roots)
    used = frozenset({"Path"}).union(*(statement.uses for statement in reached))
    by_module = defaultdict(list)
    for statement in reached:
        by_module[statement.module].append(statement.text)
    blocks = [f"\n\n# reg_diffusers.{name.replace('/', '.')}\n{''.join(texts)}" for name, texts in by_module.items()]
    return "".join([_HEAD.format(version=__version__), "\n", *_merged(imports, used), _OWN_TEXT, *blocks])


def _reached(statements: list[_Statement], roots: set[str]) -> list[_Statement]:
    """Those that define a root or what a reached one uses, and those that define nothing, such as calls."""
    homes = defaultdict(list)  # of a name that += extends, each statement
    for statement in statements:
        for name in statement.defines:
            homes[name].append(statement)
    found = [statement for statement in statements if not statement.defines or statement.defines & roots]
    for statement in found:  # which grows
        found += {home for name in statement.uses for home in homes[name]}.difference(found)
    return [statement for statement in statements if statement in found]


def _defined(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return frozenset({node.name})
    if isinstance(node, ast.AnnAssign | ast.AugAssign):  # such as __all__ += [...]
        return _used(node.target)
    return frozenset().union(*map(_used, node.targets)) if isinstance(node, ast.Assign) else frozenset()


def _used(node: ast.AST) -> frozenset[str]:
    return frozenset(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


def _text(node: ast.stmt, lines: list[str], *, is_documented: bool) -> str:
    """The lines of a statement, its decorators and the comments directly above, without docstrings.

    Of a documented module, public names keep theirs. So does a body that has nothing else.
    """
    first, left_out = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))]), set()
    while lines[first - 2].startswith("#"):
        first -= 1
    for inner in ast.walk(node):
        if not isinstance(inner, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(inner) is None:
            continue
        is_public = not inner.name.startswith("_") or inner.name == "__call__"
        if len(inner.body) > 1 and not (is_documented and is_public):
            last = inner.body[0].end_lineno
            left_out |= {*range(inner.body[0].lineno, last + 1), *([last + 1] if not lines[last].strip() else [])}
    kept = [lines[number - 1] for number in range(first, node.end_lineno + 1) if number not in left_out]
    space = "\n\n" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
    return space + "\n".join(kept) + "\n"


def _merged(nodes: list[ast.Import | ast.ImportFrom], used: frozenset[str]) -> list[str]:
    """One line for each module of another package, that imports the names that are used."""
    modules, names = set(), defaultdict(set)
    for node in nodes:
        aliases = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in used]
        if isinstance(node, ast.Import):
            modules |= set(map(ast.unparse, aliases))
        elif aliases and not node.level and node.module != "__future__":
            names[node.module] |= set(map(ast.unparse, aliases))
    lines = [f"from {module} import {', '.join(sorted(found))}\n" for module, found in sorted(names.items())]
    return [*(f"import {module}\n" for module in sorted(modules)), *lines]
