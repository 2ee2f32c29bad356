"""Strings of the command line become regularizers and weightings, with errors that say what is wrong."""

import sys
import textwrap

import pytest
import torch

from reg_diffusers import regularizers, weighting
from reg_diffusers.specs import load_regularizer, load_weighting

pytestmark = pytest.mark.loss

USER_MODULE = """
    import torch

    def brightness(x0_hat):
        return x0_hat.flatten(1).mean(1)

    class Scaled:
        factor = 2.0

        def __call__(self, x0_hat):
            return self.factor * brightness(x0_hat)

    class Group:
        darkness = Scaled()
        Nested = Scaled

    def late(level):
        return level.timesteps / 2

    instance = Scaled()
    number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of a name of its own in the current folder, which is not on the path."""
    name = f"wishes_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(USER_MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    yield name
    sys.modules.pop(name, None)


def value_of(spec):
    return load_regularizer(spec)(torch.full((2, 1, 2, 2), 0.5)).tolist()


@pytest.mark.parametrize("name", regularizers.__all__)
def test_built_in_regularizers_have_their_names(name):
    assert load_regularizer(name) is getattr(regularizers, name)


@pytest.mark.parametrize("name", weighting.__all__)
def test_built_in_weightings_have_their_names(name):
    assert load_weighting(name) is getattr(weighting, name)


@pytest.mark.parametrize(("load", "module"), [(load_regularizer, regularizers), (load_weighting, weighting)])
@pytest.mark.parametrize("spec", ["total_variatoin", "", "Tensor", "torch", "NoiseLevel", "partial", "Regularizer"])
def test_an_unknown_name_lists_the_known(load, module, spec):
    with pytest.raises(ValueError, match="unknown") as error:
        load(spec)
    assert repr(spec) in str(error.value)
    assert all(name in str(error.value) for name in module.__all__)
    assert "module:attribute" in str(error.value)


def test_a_function_of_an_installed_module_is_found():
    assert load_regularizer("reg_diffusers.regularizers:total_variation") is regularizers.total_variation


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [("brightness", 0.5), ("instance", 1.0), ("Scaled", 1.0), ("Group.darkness", 1.0), ("Group.Nested", 1.0)],
)
def test_a_module_of_the_current_folder_is_found(user_module, attribute, expected):
    assert value_of(f"{user_module}:{attribute}") == [expected, expected]


def test_a_module_inside_a_package_of_the_current_folder_is_found(tmp_path, user_module):
    package = tmp_path / f"package_{user_module}"
    package.mkdir()
    (package / "inner.py").write_text(textwrap.dedent(USER_MODULE))
    assert value_of(f"{package.name}.inner:brightness") == [0.5, 0.5]


def test_a_class_is_instantiated_and_other_objects_are_taken_as_they_are(user_module):
    first, second = load_regularizer(f"{user_module}:Scaled"), load_regularizer(f"{user_module}:Scaled")
    assert first is not second
    assert load_regularizer(f"{user_module}:instance") is load_regularizer(f"{user_module}:instance")


def test_a_weighting_of_the_current_folder_is_found(user_module):
    assert load_weighting(f"{user_module}:late") is sys.modules[user_module].late


@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.inner", "reg_diffusers.no_such_module"])
def test_a_missing_module_is_named_with_the_folder(tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no module '{module}' in ") as error:
        load_regularizer(f"{module}:brightness")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("attribute", ["darkness", "Group.lightness", "number.real.nothing", ""])
def test_a_missing_attribute_is_named(user_module, attribute):
    with pytest.raises(ValueError, match=f"regularizer '{user_module}:{attribute}': {user_module} has no"):
        load_regularizer(f"{user_module}:{attribute}")


def test_something_that_cannot_be_called_is_refused(user_module):
    with pytest.raises(ValueError, match="number' is a int, which cannot be called"):
        load_regularizer(f"{user_module}:number")
    with pytest.raises(ValueError, match=r"weighting .* which cannot be called"):
        load_weighting(f"{user_module}:number")


def test_an_empty_module_name_is_refused():
    with pytest.raises(ValueError, match="not of the form module:attribute"):
        load_regularizer(":brightness")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import no_such_dependency", ModuleNotFoundError, "no_such_dependency"),
        ("from math import no_such_name", ImportError, "no_such_name"),
        ("raise RuntimeError('broken')", RuntimeError, "broken"),
        ("def (", SyntaxError, "invalid syntax|never closed"),
    ],
)
def test_an_error_inside_the_users_module_is_the_users_to_see(tmp_path, monkeypatch, source, error, message):
    (tmp_path / "broken_wishes.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_regularizer("broken_wishes:brightness")
    assert "broken_wishes" not in sys.modules


@pytest.mark.parametrize("attribute", ["brightness", "missing"])
def test_the_import_path_is_restored(user_module, attribute):
    before = list(sys.path)
    for spec in (f"{user_module}:{attribute}", "no_such_module:x", ":x"):
        try:
            load_regularizer(spec)
        except ValueError:
            assert attribute == "missing" or not spec.startswith(user_module)
        assert sys.path == before
