"""Strings of the command line become regularizers and weightings, with errors that say what is wrong."""

import json
import sys
import textwrap

import pytest
import torch
import transformers

from reg_diffusers import regularizers, weighting
from reg_diffusers.cli.judging import recorded_regularizers
from reg_diffusers.regularizers import Perceptual, regularizer_name
from reg_diffusers.specs import load_regularizer, load_schedule, load_weighting, name_of

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


@pytest.mark.parametrize("name", [name for name in weighting.__all__ if name not in ("gated", "signal_power")])
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


@pytest.mark.parametrize(
    "spec, fix",
    [
        ("path/my.py:f", "path.my:f"),
        ("my.py:f", "my:f"),
        ("path/my:f", "path.my:f"),
        ("/elsewhere/my.py:f", "my:f, from within /elsewhere"),
    ],
)
def test_a_file_in_the_place_of_a_module_is_answered_with_the_module(spec, fix):
    with pytest.raises(ValueError, match=f"names a file: name the module as import does, {fix}$"):
        load_regularizer(spec)


def test_arguments_are_literals_of_a_function_or_a_class(user_module):
    images = torch.full((2, 1, 2, 2), 0.5)
    assert load_regularizer("mean_intensity(target=0.5)")(images).tolist() == [0, 0]
    assert load_regularizer("mean_intensity (target=-0.5)")(images).tolist() == [1, 1]
    assert load_regularizer(f"{user_module}:Group.Nested()")(images).tolist() == [1, 1]
    assert load_weighting("gated(0.184)") == weighting.gated(0.184) == load_weighting("gated(min_snr=0.184)")
    assert load_weighting("matched(snr0=3)").keywords == {"snr0": 3}
    assert regularizer_name(load_regularizer("mean_intensity(target=0.5)")) == "mean_intensity"
    assert name_of("mean_intensity(target=0.5)") == "mean_intensity" == name_of("mean_intensity")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mean_intensity(target=open('x'))", "the arguments must be numbers, strings and the like"),
        ("mean_intensity(target=0.2).__class__", "the arguments must be numbers"),
        ("mean_intensity(**{'target': 1})", "the arguments must be numbers"),
        ("mean_intensity(", "the arguments must be numbers"),
        ("mean_intensity(0.2)", r"give the arguments by name: mean_intensity\(x0_hat"),
        ("mean_intensity(tarjet=0.2)", r"no argument 'tarjet': it is mean_intensity\(x0_hat.*target"),
        ("mean_intensity(x0_hat=0.2)", "no argument 'x0_hat'"),
        ("nothing(target=0.2)", "unknown regularizer 'nothing'; known: "),
    ],
)
def test_arguments_that_cannot_be_meant_are_named_with_the_signature(spec, message):
    with pytest.raises(ValueError, match=message):
        load_regularizer(spec)


@pytest.mark.parametrize("spec", ["gated", "gated(1, 2)", "gated(snr=1)"])
def test_a_class_of_the_library_names_what_it_takes(spec):
    with pytest.raises(ValueError, match=r"it is gated\(min_snr"):
        load_weighting(spec)


def test_perceptual_is_loaded_by_the_name_of_its_network(tmp_path):
    config = transformers.Dinov2Config(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    found = load_regularizer(f"perceptual('{tmp_path}', layers=(0, -1), size=16)")
    assert isinstance(found, Perceptual) and found.layers == (0, -1) and found.needs == ("original_samples",)
    with pytest.raises(ValueError, match=r"'perceptual' needs name_or_folder: it is perceptual\(name"):
        load_regularizer("perceptual")
    with pytest.raises(ValueError, match="unexpected keyword argument 'sizes'"):
        load_regularizer("perceptual('net', sizes=16)")


def test_a_network_that_cannot_be_loaded_is_named_with_the_reason(tmp_path):
    transformers.Dinov2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^regularizer \"perceptual\('.*'\)\": Error no file named model"):
        load_regularizer(f"perceptual('{tmp_path}')")


def test_the_record_of_a_model_cannot_load_a_network(tmp_path):
    """A downloaded reg_config.json must not cause another download, nor the reading of a file."""
    specs = [
        "total_variation",
        "perceptual('net')",
        "RadialSpectrum('spectrum.pt')",
        "classifier('net')",
        "prompt_similarity('net', 'x')",
    ]
    specs.append("os:abort")
    record = {"objective": {"terms": [{"regularizer": spec} for spec in specs]}}
    (tmp_path / "reg_config.json").write_text(json.dumps(record))
    assert recorded_regularizers([str(tmp_path)]) == ["total_variation"]


@pytest.mark.parametrize(
    ("load", "spec", "message"),
    [
        (load_regularizer, "near_background(background='x')", "background must be a number, not 'x'"),
        (load_regularizer, "mean_intensity(target='0.2')", "target must be a number, not '0.2'"),
        (load_weighting, "gated('low')", "min_snr must be a number, not 'low'"),
        (load_schedule, "warmup('10')", "steps must be a number, not '10'"),
        (load_regularizer, "mean_intensity(target=None)", "target must have a value, not None"),
        (load_regularizer, "mean_intensity(target=0.2, target=0.3)", "the arguments must be"),
        (load_schedule, "warmup", r"'warmup' needs steps: it is warmup\(steps\)$"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(load, spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec)
