"""A law on fields holds in their own units: L' of a divergence-free flow is 0 wherever it is measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler

from reg_diffusers import RegDDPMPipeline, RegularizedLoss, Term
from reg_diffusers.cli import main
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.diagnosis import diagnose
from reg_diffusers.guidance import Guidance
from reg_diffusers.runs.lineage import changed_settings
from reg_diffusers.runs.manifest import write_manifest
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.sampling.sampler import Sampler
from reg_diffusers.sampling.settings import SampleSettings
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.terms import build_terms, in_units
from reg_diffusers.views import Affine

pytestmark = pytest.mark.training

LAW = """
def divergence(x):
    u, v = x[:, 0], x[:, 1]
    along_width = u.roll(-1, -1) - u.roll(1, -1)
    along_height = v.roll(-1, -2) - v.roll(1, -2)
    return ((along_width + along_height) / 2).square().flatten(1).mean(1)
"""
ROUNDING = 1e-12  # of float32 samples, squared


def flow(number=24, seed=0):
    """Periodic (u, v) of stream functions that vary in one direction more than in the other, in a wind along u."""
    place = np.arange(8) * 2 * np.pi / 8
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, (number, 2, 1, 1))
    stream = np.sin(place[None, None, :] + phases[:, 0]) * np.sin(2 * place[None, :, None] + phases[:, 1])
    stream = stream + 0.3 * np.sin(place[None, :, None] + phases[:, 1])
    u = 2.0 + (np.roll(stream, -1, 1) - np.roll(stream, 1, 1)) / 2
    v = -(np.roll(stream, -1, 2) - np.roll(stream, 1, 2)) / 2
    return 0.1 * np.stack([u, v], 1)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """flow.npy and the law, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "laws.py").write_text(LAW)
    np.save("flow.npy", flow())
    yield
    sys.modules.pop("laws", None)


def flags(*others):
    return ["--train_data_dir", "flow.npy", "--regularizer", "laws:divergence", *map(str, others)]


def terms_and_data(*others):
    settings = parse_args(flags(*others))
    data = load_training_data(settings.data)
    return in_units(build_terms(settings.loss, settings.data), data, settings.loss.reg_units), data


def samples_of(data):
    return data.normalization.normalize(data.__getitems__(list(range(len(data))))["values"])


@pytest.mark.parametrize(
    "others, holds",
    [
        ((), True),
        (("--reg_units", "model"), False),
        (("--reg_units", "model", "--field_scale", "common"), True),
        (("--field_scale", "common"), True),
    ],
    ids=["user", "model", "model with a common scale", "user with a common scale"],
)
def test_a_flow_without_divergence_has_none_in_the_loss(others, holds):
    """A perfect network: x0_hat is the flow up to the rounding of float32 at low noise."""
    terms, data = terms_and_data(*others)
    images = samples_of(data)
    assert images.min() >= -1 and images.max() <= 1
    scheduler = DDPMScheduler(prediction_type="sample")
    loss = RegularizedLoss(scheduler, terms)
    output = loss(lambda sample, timesteps: images, images, timesteps=torch.zeros(len(images), dtype=torch.long))
    assert (output.per_image["divergence"] < ROUNDING if holds else output.per_image["divergence"] > 1e-2).all()


def test_guidance_leaves_a_flow_without_divergence_alone():
    """x0_hat is the flow, up to rounding: under the law in its units there is nothing to move."""
    (term,), data = terms_and_data("--reg_weight", 1, "--reg_weighting", "constant")
    images, scheduler = samples_of(data), DDPMScheduler(prediction_type="sample")
    scheduler.set_timesteps(10)

    def moved(view):
        guidance = Guidance([replace(term, view=None)], view=view)
        return (guidance.model_output(lambda sample: images, scheduler, 0, images) - images).abs().max()

    assert moved(term.view) < 1e-6 and moved(None) > 1e-2


def test_a_pipeline_of_fields_scores_and_steers_in_their_units(tiny_unet):
    (term,), data = terms_and_data("--reg_weight", 1, "--reg_weighting", "constant")
    normalization = {name: list(getattr(data.normalization, name)) for name in ("offset", "scale")}
    pipeline = RegDDPMPipeline(tiny_unet(channels=2), DDPMScheduler(), normalization)

    def drawn(guidance, output_type="pt"):
        generator = torch.Generator().manual_seed(0)
        return pipeline(2, generator, 3, output_type, guidance=guidance, regularizers=[term.regularizer])

    plain, bare = drawn([]), drawn([term.regularizer])
    torch.testing.assert_close(plain.scores["divergence"], term.regularizer(plain.images))
    assert not torch.equal(plain.images, bare.images)
    assert torch.equal(bare.images, drawn([replace(term, weighting=Term(len, 1.0).weighting)]).images)
    model_units = drawn([Term(term.regularizer, 1.0, view=Affine(1.0))])
    assert not torch.allclose(model_units.images, bare.images)

    def sampled(reg_units):
        settings = {"scheduler": "DDPM", "num_inference_steps": 20, "guidance": ("laws:divergence",)}
        settings = SampleSettings(model_sha256="", reg_units=reg_units, regularizer_scale=1.0, **settings)
        return Sampler(pipeline, settings).draw([0])

    assert not torch.allclose(sampled("user"), sampled("model"))


def agreement(x, *, original_samples):
    return (x - original_samples).square().flatten(1).mean(1)


agreement.needs = ("original_samples",)


def test_a_diagnosis_sees_through_the_view():
    (term,), data = terms_and_data()
    images, scheduler = samples_of(data), DDPMScheduler()
    for view, holds in ((term.view, True), (None, False)):
        found = diagnose(scheduler, replace(term, view=view), images, num_levels=2)
        assert (found.data.mean < ROUNDING) if holds else (found.data.mean > 1e-2)
    paired = diagnose(scheduler, Term(agreement, 1.0, view=Affine(3.0, 5.0)), images, num_levels=2)
    assert paired.data.mean == 0
    model_units = diagnose(scheduler, Term(agreement, 1.0), images, num_levels=2)
    for ours, theirs in zip(paired.levels, model_units.levels, strict=True):
        assert ours.best.value == pytest.approx(9 * theirs.best.value, rel=1e-4)


@pytest.mark.parametrize("units, holds", [("user", True), ("model", False)])
def test_the_command_diagnoses_fields_in_their_units(units, holds):
    main(["diagnose", *flags("--reg_units", units, "--num_levels", 2, "--output", "found")])
    mean = json.loads(Path("found/divergence.json").read_text())["data"]["mean"]
    assert mean < ROUNDING if holds else mean > 1e-2


@pytest.mark.parametrize("units, holds", [("user", True), ("model", False)])
def test_an_evaluation_measures_in_the_units_of_the_file(tiny_unet, units, holds):
    np.save("flow.npy", flow(60))
    _, data = terms_and_data()
    normalization = {name: list(getattr(data.normalization, name)) for name in ("offset", "scale")}
    RegDDPMPipeline(tiny_unet(channels=2), DDPMScheduler(), normalization).save_pretrained("model")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    of_the_data = [
        "--data",
        "flow.npy",
        "--regularizer",
        "laws:divergence",
        "--num_images",
        "20",
        "--features",
        "pixels",
    ]
    main(["evaluate", "--model", "model", *of_the_data, "--num_inference_steps", "2", "--reg_units", units])
    rows = json.loads(Path("evaluation/evaluation.json").read_text())["rows"]
    value = rows["data"]["terms"]["laws:divergence"]["value"]
    assert value < ROUNDING if holds else value > 1e-2


def test_training_measures_in_the_units_of_the_file(train, tiny_unet, capsys):
    tiny_unet(channels=2).save_config("two")
    run = {"model": ("--model_config_name_or_path", "two")}
    out = train(*flags("--max_train_steps", 2, "--resolution", 8, "--checkpointing_steps", 2), **run)
    said = capsys.readouterr().out
    assert "units      L' sees the fields' own units, and its weight refers to them; --reg_units model" in said
    on_data = next(line for line in said.splitlines() if line.startswith("data       divergence"))
    assert float(on_data.split()[2]) < ROUNDING
    assert "data       offset (0.2, " in said
    assert json.loads((out / "reg_config.json").read_text())["objective"]["units"] == "user"
    assert "a loss sees it in the fields' own units" in (out / "README.md").read_text()
    comparison = flags("--max_train_steps", 2, "--resolution", 8, "--reg_units", "model", "--compare")
    other = train(*comparison, output="other", **run)
    said = capsys.readouterr().out
    assert "units      L' sees the network's units, about -1 to 1" in said
    assert json.loads((other / "reg_config.json").read_text())["objective"]["units"] == "model"
    assert json.loads((other / "comparison.json").read_text())["rows"]["data"]["terms"]["divergence"] > 1e-2


def test_a_run_from_before_is_not_continued_in_other_units(train, tiny_unet, capsys):
    tiny_unet(channels=2).save_config("two")
    run = {"model": ("--model_config_name_or_path", "two")}
    start = flags("--resolution", 8, "--checkpointing_steps", 1, "--lr_scheduler", "constant", "--reg_units", "model")
    out = train(*start, "--max_train_steps", 1, **run)
    manifest = out / "checkpoint-1" / "manifest.json"
    content = json.loads(manifest.read_text())
    for flag in ("--reg_units", "--field_scale"):  # as versions wrote it that had neither
        del content["settings"][flag]
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        train(*start[:-2], "--max_train_steps", 2, "--resume", "auto", **run)
    assert "other settings: --reg_units model -> user." in capsys.readouterr().err
    train(*start, "--max_train_steps", 2, "--resume", "auto", **run)
    assert (out / "checkpoint-2").is_dir()


def test_pictures_have_no_units_of_their_own(image_folder, tmp_path):
    """So a run on pictures from before goes on."""
    settings = parse_args(["--train_data_dir", str(image_folder()), "--cache_dir", str(tmp_path / "cache")])
    data = load_training_data(settings.data)
    assert all(
        term.view is None
        for term in in_units(build_terms(settings.loss, settings.data), data, settings.loss.reg_units)
    )
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, 1, {"images": 8}, run="before", resumed_from=[])
    assert changed_settings(folder, {"images": 8}) == []


def test_a_common_scale_is_refused_where_it_cannot_be_had(image_folder):
    with pytest.raises(UsageError, match="--field_scale common applies to "):
        load_training_data(parse_args(["--train_data_dir", str(image_folder()), "--field_scale", "common"]).data)
    settings = parse_args(flags("--field_scale", "common"))
    _, data = terms_and_data()
    with pytest.raises(UsageError, match="--field_scale common: the given model keeps its own scales"):
        load_training_data(settings.data, normalization=data.normalization)


def test_fields_in_other_units_than_a_given_models_are_named(capsys):
    _, data = terms_and_data()
    np.save("flow.npy", 100 * flow())
    load_training_data(parse_args(flags()).data, normalization=data.normalization)
    assert "channel 0 of the fields ranges from 7.96" in capsys.readouterr().err
    np.save("flow.npy", np.where(flow() > 0.1, np.nan, 0))
    with pytest.raises(UsageError, match=r"infinite or missing \(nan\) values"):
        load_training_data(parse_args(flags()).data, normalization=data.normalization)
