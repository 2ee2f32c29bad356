"""Sphinx configuration. Build with `python -m sphinx -W -b html docs docs/_build/html`."""

import re
import tempfile
import zlib
from pathlib import Path

import reg_diffusers
from reg_diffusers import cli
from reg_diffusers.settings.arguments import build_parser

project = "reg_diffusers"
copyright = "the reg_diffusers authors"
author = "the reg_diffusers authors"
release = version = reg_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.intersphinx"]
extensions += ["sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "data", "figures"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
templates_path = ["_templates"]
napoleon_use_ivar = True
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
mathjax_path = "mathjax/tex-svg.js"  # bundled, with its fonts: the pages need no other server
copybutton_exclude = ".linenos, .gp, .go"
html_title = f"reg_diffusers {release}"


def _inventories(names: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Writes the inventories of other projects from a text file; returns the address and the file of each."""
    entries: dict[tuple[str, str], list[str]] = {}
    for line in names.read_text(encoding="utf-8").splitlines():
        if line.startswith("> "):
            project = tuple(line.split()[1:])
            entries[project] = []
        elif not line.startswith("#"):
            name, kind, page = line.split()
            entries[project].append(f"{name} py:{kind} 1 {page} -\n")
    found = {}
    for (name, address), lines in entries.items():
        head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# compressed by zlib:\n"
        path = folder / f"{name}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        found[name] = address, str(path)
    return found


_folder = tempfile.TemporaryDirectory()  # until the end of the build
intersphinx_mapping = _inventories(Path(__file__).with_name("inventories.txt"), Path(_folder.name))


def _options(program: str, parser) -> str:
    """Writes the flags of a command as options, each with an anchor: #cmdoption-train-reg_weight."""
    lines = [f".. program:: {program}", ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            lines += [f".. rubric:: {group.title}", ""]
        for action in actions:
            value = parser._get_formatter()._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
            names = ", ".join(f"{name} {value}".strip() for name in action.option_strings)
            text = re.sub(r"([*`|_])", r"\\\1", parser._get_formatter()._expand_help(action))
            lines += [f".. option:: {names}", "", f"   {text}", ""]
    return "\n".join(lines)


def _flags(app, docname: str, source: list[str]) -> None:
    """Fills the marks `<!-- flags of COMMAND -->` of a page."""
    commands = {**cli.build_parser()._subparsers._group_actions[0].choices, "train": build_parser()}

    def filled(mark: re.Match) -> str:
        return f"```{{eval-rst}}\n{_options(mark[1], commands[mark[1]])}\n```"

    source[0] = re.sub(r"<!-- flags of (\w+) -->", filled, source[0])


def _plain_text_to_rst(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: formulas and tables become literal blocks, bars and stars stay as they are."""
    result, formula = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        table = line.lstrip().startswith("|")
        if formula is None and line.strip() and (table or (result and not result[-1].strip())):
            outer = next((len(text) - len(text.lstrip()) for text in reversed(result) if text.strip()), indent)
            if table or indent > outer:
                formula = outer
                result += [" " * outer + "::", ""]
        elif formula is not None and line.strip() and indent <= formula and not table:
            formula = None
        if formula is not None:
            result.append("    " + line.replace(r"\|", "|") if table else line)
        else:
            line = re.sub(r"(?<=\s)\*\*?(?=\w)|\|", lambda found: re.sub("(.)", r"\\\1", found[0]), line)
            result.append(re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line))  # `Term`s
    lines[:] = result


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _plain_text_to_rst, priority=100)
    app.connect("source-read", _flags)
