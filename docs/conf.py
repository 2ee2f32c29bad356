"""Sphinx configuration. Build with `python -m sphinx -W -b html docs docs/_build/html`."""

import re

import reg_diffusers

project = "reg_diffusers"
author = "the reg_diffusers authors"
release = version = reg_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "data", "figures"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
html_theme = "furo"
html_static_path = ["_static"]
mathjax_path = "mathjax/tex-svg.js"  # bundled, with its fonts: the pages need no other server
copybutton_exclude = ".linenos, .gp, .go"
html_title = f"reg_diffusers {release}"


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
