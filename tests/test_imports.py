"""Imports go one way, from the loss up to the commands, and importing the package costs nothing."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import reg_diffusers
from reg_diffusers.moved import MOVED

pytestmark = pytest.mark.project

PACKAGE = Path(reg_diffusers.__file__).parent
SCRIPT = PACKAGE.parent / "train_reg.py"

# From the bottom to the top: a module imports from its own layer and those before it. A package counts as one module.
LAYERS = [
    {"prediction", "weighting", "regularizers", "term", "estimators", "objective", "nonfinite", "balancing", "specs"}
    | {
        "conditioning",
        "context",
        "views",
        "autoencoder",
        "loss_weighting",
        "regularization",
        "seeding",
        "term_values",
        "inputs",
        "shown",
        "loss_output",
    }
    | {
        "schedule",
        "adaptive_weights",
        "level_table",
        "weight_table",
        "precision",
        "conflict_free",
        "weight_rules",
        "weight_schedules",
        "paired",
        "affine_schedule",
        "parameterization",
        "learned_variance",
        "watching",
        "description",
        "wiring",
        "moved",
        "frozen",
    },
    {"recipes"},
    {"runtime"},
    {"settings"},
    {"runs"},
    {"hub", "standalone"},
    {"sampling", "guidance", "pipeline"},
    {"data"},
    {"networks"},
    {"trial"},
    {"diagnosis"},
    {"evaluation"},
    {"training"},
    {"demo", "cli", "__main__", "train_reg"},
]
LOSS = LAYERS[0]
LOSS_MAY_IMPORT = {"torch", "diffusers", "reg_diffusers"}
# imported in the function that needs it
LATE = {"conflictfree", "pytorch_msssim", "safetensors", "transformers"}


def module_of(path):
    """The module or package directly below `reg_diffusers` that a file belongs to."""
    return path.stem if path == SCRIPT else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return files + ([SCRIPT] if SCRIPT.exists() else [])


def imported_names(source, package):
    """Absolute dotted names of everything imported anywhere in a source, functions included.

    Args:
        source: the text of a module.
        package: the parts of the package it is in, against which relative imports are resolved.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_of(path):
    package = () if path == SCRIPT else ("reg_diffusers", *path.relative_to(PACKAGE).parts[:-1])
    return set(imported_names(path.read_text(), package))


def internal_modules(names):
    """The modules of this package among dotted names; `from reg_diffusers import Term` means the module of Term."""
    below = [name.split(".")[1] for name in names if name.startswith("reg_diffusers.")]
    return {reg_diffusers._HOME.get(name, name) for name in below} - {"__version__"}


def layer_of(module):
    return next(height for height, layer in enumerate(LAYERS) if module in layer)


def test_every_module_is_in_exactly_one_layer():
    listed = [module for layer in LAYERS for module in layer]
    assert len(listed) == len(set(listed))
    assert {module_of(path) for path in sources()} <= set(listed)
    assert {"prediction", "objective", "regularizers", "specs"} <= {module_of(path) for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_module_imports_from_a_layer_above_it(path):
    height = layer_of(module_of(path))
    above = {module for module in internal_modules(imports_of(path)) if layer_of(module) > height}
    assert not above, f"{path.name} imports {sorted(above)} from a layer above it"


@pytest.mark.parametrize("path", [path for path in sources() if module_of(path) in LOSS], ids=lambda path: path.stem)
def test_the_loss_needs_torch_and_diffusers_only(path):
    external = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
    assert external <= LOSS_MAY_IMPORT | LATE
    at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not LATE & {name.split(".")[0] for node in at_once for name in imported_names(ast.unparse(node), ())}


def test_the_package_itself_names_only_modules_that_exist():
    modules = {module_of(path) for path in sources()}
    assert {home.partition(".")[0] for home in reg_diffusers._HOME.values()} <= modules
    assert all(importlib.util.find_spec(f"reg_diffusers.{home}") for home in reg_diffusers._HOME.values())
    assert set(reg_diffusers._SUBMODULES) <= modules


def test_relative_and_absolute_imports_are_understood():
    source = """
import reg_diffusers.hub.uploads
from reg_diffusers import Term, pipeline
from . import model
from .. import specs
from ..prediction import noise_level
def late():
    from ..evaluation.metrics import score
"""
    names = imported_names(source, ("reg_diffusers", "training"))
    assert internal_modules(names) == {*("hub", "term", "pipeline", "training", "specs", "prediction", "evaluation")}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = (
        "import sys, reg_diffusers; dir(reg_diffusers);"
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_every_public_name_is_there_and_unknown_ones_are_not():
    for name in reg_diffusers.__all__:
        assert getattr(reg_diffusers, name) is not None
        assert name in dir(reg_diffusers)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        getattr(reg_diffusers, "no_such" + "_name")


def test_the_loss_imports_nothing_else_of_the_package():
    """What is imported at run time, in case a string or an attribute hides an arrow from the parser."""
    code = (
        "import sys, reg_diffusers.specs, reg_diffusers.objective;"
        "print(*(name.split('.')[1] for name in sys.modules if name.startswith('reg_diffusers.')))"
    )
    assert set(run_python(code).split()) <= LOSS


@pytest.mark.slow
@pytest.mark.parametrize("old, new", MOVED.items())
def test_a_module_of_before_is_found_under_its_new_name(old, new):
    code = (
        "import importlib, warnings; warnings.simplefilter('error', FutureWarning);"
        f"new = importlib.import_module('reg_diffusers.{new}'); spec = new.__spec__\n"
        "try:\n"
        f"    importlib.import_module('reg_diffusers.{old}')\n"
        "except FutureWarning as warning:\n"
        "    print(warning)\n"
        "warnings.simplefilter('ignore')\n"
        f"old = importlib.import_module('reg_diffusers.{old}')\n"
        "print(old is new and new.__spec__ is spec)"
    )
    assert run_python(code).splitlines() == [f"reg_diffusers.{old} has moved: import reg_diffusers.{new}", "True"]


def test_what_evaluation_had_of_a_diagnosis_is_still_found_there():
    from reg_diffusers import diagnosis, evaluation

    with pytest.warns(FutureWarning, match=r"diagnose has moved: import it from reg_diffusers\.diagnosis"):
        assert evaluation.diagnose is diagnosis.diagnose
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(evaluation, "noth" + "ing")
