"""RegDDPMPipeline: equal to diffusers' own where it has one, and loadable by it."""

import ast
import builtins
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from reg_diffusers import RegDDPMPipeline, standalone
from reg_diffusers.regularizers import mean_intensity, total_variation

pytestmark = pytest.mark.sampling


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, batch_size=2, steps=6, seed=0, **kwargs):
    kwargs.setdefault("output_type", "np")
    generator = torch.Generator().manual_seed(seed)
    return quiet(pipeline)(batch_size=batch_size, num_inference_steps=steps, generator=generator, **kwargs)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_same_images_as_the_pipeline_of_diffusers_bit_for_bit(tiny_unet, scheduler):
    unet = tiny_unet()
    ours = sample(RegDDPMPipeline(unet, scheduler)).images
    theirs = sample(DDPMPipeline(unet, scheduler)).images
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("loader", [DDPMPipeline, DiffusionPipeline, RegDDPMPipeline])
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_every_pipeline_class_loads_what_is_saved_silently_with_the_same_images(
    tiny_unet, scheduler, loader, tmp_path, caplog, capfd
):
    pipeline = RegDDPMPipeline(tiny_unet().eval(), scheduler)
    expected = sample(pipeline).images
    pipeline.save_pretrained(str(tmp_path))
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()

    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = loader.from_pretrained(str(tmp_path))
    finally:
        logging.disable_propagation()
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert "not expected" not in capfd.readouterr().err
    assert isinstance(loaded, RegDDPMPipeline if loader is RegDDPMPipeline else DDPMPipeline)
    assert np.array_equal(sample(loaded).images, expected)


def test_saving_again_keeps_the_pipeline_loadable(tiny_unet, tmp_path):
    pipeline = RegDDPMPipeline(tiny_unet(), DDPMScheduler(), normalization={"offset": [1.0], "scale": [2.0]})
    for name in "abc":
        pipeline.save_pretrained(str(tmp_path / name))
        pipeline = RegDDPMPipeline.from_pretrained(str(tmp_path / name))
    assert pipeline.config.normalization == {"offset": [1.0], "scale": [2.0]}


def test_loading_imports_no_code_from_the_folder(tiny_unet, tmp_path):
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(str(tmp_path))
    (tmp_path / "pipeline.py").write_text("raise SystemExit('imported')")
    RegDDPMPipeline.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "scheduler_class, steps",
    [
        (DDPMScheduler, 1000),
        (DDIMScheduler, 200),
        (DPMSolverMultistepScheduler, 200),
        (UniPCMultistepScheduler, 200),
        (EulerDiscreteScheduler, 200),
    ],
)
def test_every_scheduler_samples_the_gaussian_that_an_ideal_network_knows(scheduler_class, steps):
    """For data N(mu, tau^2) the ideal noise prediction is affine in x_t: samples must have mean mu and std tau."""
    mu, tau = 0.3, 0.2
    training = DDPMScheduler(clip_sample=False)

    class IdealNetwork(torch.nn.Module):
        config = type("Config", (), {"sample_size": 16, "in_channels": 1, "out_channels": 1, "num_class_embeds": None})
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, x, t, class_labels=None):
            alpha_bar = torch.exp(torch.lerp(*self.neighbours(t)))
            a, variance = alpha_bar**0.5, alpha_bar * tau**2 + 1 - alpha_bar
            return type("Output", (), {"sample": (1 - alpha_bar) ** 0.5 * (x - a * mu) / variance})

        def neighbours(self, t):
            t = torch.as_tensor(t, dtype=torch.float32)
            low = t.floor().long()
            logs = training.alphas_cumprod.log()
            return logs[low], logs[(low + 1).clamp(max=999)], t - low

    pipeline = RegDDPMPipeline(IdealNetwork(), scheduler_class.from_config(training.config))
    images = sample(pipeline, batch_size=16, steps=steps, output_type="latent").images
    # 4096 independent pixels: the standard error of the mean is tau / 64, of the standard deviation tau / 90.
    assert images.mean() == pytest.approx(mu, abs=5 * tau / 64)
    assert images.std() == pytest.approx(tau, abs=5 * tau / 90)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pictures_have_the_mode_of_their_channels(tiny_unet, channels, mode):
    images = sample(RegDDPMPipeline(tiny_unet(channels), DDPMScheduler()), output_type="pil").images
    assert [image.mode for image in images] == [mode, mode]


def test_output_types_agree(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(3), DDIMScheduler())
    as_array, as_tensor = (sample(pipeline, output_type=kind).images for kind in ("np", "pt"))
    assert np.array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    assert as_array.min() >= 0 and as_array.max() <= 1


def test_scores_are_the_regularizers_of_the_samples(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDPMScheduler())  # clips to [-1, 1] at the last step
    output = sample(pipeline, output_type="pt", regularizers=[total_variation, mean_intensity])
    images = output.images * 2 - 1
    assert set(output.scores) == {"total_variation", "mean_intensity"}
    torch.testing.assert_close(output.scores["total_variation"], total_variation(images))
    torch.testing.assert_close(output.scores["mean_intensity"], mean_intensity(images))


def test_two_scores_of_one_name_are_told_apart_by_names_given(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDPMScheduler())
    dark, bright = partial(mean_intensity, target=-1.0), partial(mean_intensity, target=1.0)
    with pytest.raises(ValueError, match="different names"):
        sample(pipeline, regularizers=[dark, bright])
    scores = sample(pipeline, regularizers={"dark": dark, "bright": bright}).scores
    # (m + 1)^2 - (m - 1)^2 = 4 m, and their sum is 2 m^2 + 2
    mean = (scores["dark"] - scores["bright"]) / 4
    torch.testing.assert_close(scores["dark"] + scores["bright"], 2 * mean**2 + 2)


def test_return_dict_false_gives_a_tuple(tiny_unet):
    images, scores = sample(RegDDPMPipeline(tiny_unet(), DDPMScheduler()), return_dict=False)
    assert images.shape == (2, 8, 8, 1) and scores == {}


def test_eta_makes_ddim_random_and_is_ignored_elsewhere(tiny_unet):
    unet = tiny_unet()
    still = sample(RegDDPMPipeline(unet, DDIMScheduler()), eta=0.0).images
    moved = sample(RegDDPMPipeline(unet, DDIMScheduler()), eta=1.0).images
    assert not np.array_equal(still, moved)
    sample(RegDDPMPipeline(unet, UniPCMultistepScheduler()), eta=1.0)


def test_one_generator_per_image_makes_it_independent_of_the_batch(tiny_unet):
    pipeline = quiet(RegDDPMPipeline(tiny_unet(), DDPMScheduler()))

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(len(seeds), generators, 4, output_type="pt").images

    together = draw([1, 2, 3])
    for index, seed in enumerate([1, 2, 3]):
        torch.testing.assert_close(together[index], draw([seed])[0], atol=1e-5, rtol=0)


def test_fields_come_back_in_their_own_units(tiny_unet):
    unet = tiny_unet(2)
    normalization = {"offset": [10.0, -5.0], "scale": [2.0, 0.5]}
    plain = sample(RegDDPMPipeline(unet, DDPMScheduler()), output_type="pt").images * 2 - 1
    fields = sample(RegDDPMPipeline(unet, DDPMScheduler(), normalization), output_type="pt").images
    torch.testing.assert_close(fields[:, 0], 10 + 2 * plain[:, 0])
    torch.testing.assert_close(fields[:, 1], -5 + 0.5 * plain[:, 1])


def test_class_labels_matter_and_are_checked(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler())
    zero, one = (sample(pipeline, class_labels=label).images for label in (0, 1))
    assert not np.array_equal(zero, one)
    for labels, message in [(None, "0 to 2"), (3, "0 to 2"), (0.5, "whole numbers"), ([0, 1, 2], "batch_size=2")]:
        with pytest.raises(ValueError, match=message):
            sample(pipeline, class_labels=labels)
    with pytest.raises(ValueError, match="not class-conditional"):
        sample(RegDDPMPipeline(tiny_unet(), DDPMScheduler()), class_labels=0)


def test_what_cannot_be_shown_is_refused_before_sampling(tiny_unet):
    with pytest.raises(ValueError, match="output_type='np'"):
        sample(RegDDPMPipeline(tiny_unet(2), DDPMScheduler()), output_type="pil")
    with pytest.raises(ValueError, match="'pil', 'np', 'pt' or 'latent'"):
        sample(RegDDPMPipeline(tiny_unet(), DDPMScheduler()), output_type="jpeg")

    def masked(x0_hat, mask):
        return x0_hat

    masked.needs = ("mask",)
    with pytest.raises(ValueError, match="needs mask"):
        sample(RegDDPMPipeline(tiny_unet(), DDPMScheduler()), regularizers=[masked])


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), UniPCMultistepScheduler()])
def test_intermediate_images_are_those_that_the_scheduler_heads_for(tiny_unet, scheduler):
    unet = tiny_unet()
    pipeline = RegDDPMPipeline(unet, scheduler)
    output = sample(pipeline, output_type="latent", return_x0_hat=True)
    assert output.x0_hat.shape == (6, 2, 1, 8, 8)
    images, scores, x0_hat = sample(pipeline, output_type="latent", return_x0_hat=True, return_dict=False)
    assert torch.equal(x0_hat, output.x0_hat) and scores == {}
    if isinstance(scheduler, DDIMScheduler):  # its last step goes to x0_hat
        torch.testing.assert_close(output.x0_hat[-1], images, atol=1e-2, rtol=0)
    assert sample(pipeline).x0_hat is None


def test_a_condition_is_laid_beside_the_sample_and_checked(tiny_unet):
    unet = UNet2DModel.from_config({**tiny_unet().config, "in_channels": 3}).eval()
    pipeline = RegDDPMPipeline(unet, DDIMScheduler())
    condition = torch.linspace(-1, 1, 2 * 2 * 64).reshape(2, 2, 8, 8)
    both = sample(pipeline, output_type="pt", condition=condition).images
    assert both.shape == (2, 1, 8, 8)
    for_all = sample(pipeline, output_type="pt", condition=condition[:1]).images
    torch.testing.assert_close(both[0], for_all[0], atol=1e-5, rtol=0)
    assert not torch.allclose(both[1], for_all[1], atol=1e-3)
    for wrong, message in [
        (None, "pass a condition of 2 channels"),
        (condition[:, :1], r"\(2, 2, 8, 8\)"),
        (condition[..., :4], r"\(2, 2, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(pipeline, condition=wrong)
    with pytest.raises(ValueError, match="no channels for one"):
        sample(RegDDPMPipeline(tiny_unet(), DDIMScheduler()), condition=condition)


@pytest.mark.slow
def test_who_lacks_the_package_loads_the_same_class_from_the_folder(tiny_unet, tmp_path):
    """In a process that cannot import reg_diffusers, from the pipeline.py beside the weights; saved again, too."""
    pipeline = RegDDPMPipeline(tiny_unet().eval(), DDIMScheduler(), {"offset": [2.0], "scale": [3.0]})
    pipeline.save_pretrained(tmp_path / "saved")
    # With a smooth guidance and as many threads there, float32's last bits are not blown up by signs.
    expected = sample(pipeline, output_type="pt", guidance=[mean_intensity], regularizers=[total_variation])
    code = f"""
import sys
sys.modules["reg_diffusers"] = None
import torch
torch.set_num_threads({torch.get_num_threads()})
from diffusers import DiffusionPipeline
for folder, copy in (("saved", "copy"), ("copy", "last")):
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipeline).__name__ == "RegDDPMPipeline" and type(pipeline).__module__.startswith("diffusers_modules")
    assert pipeline.config.normalization == {{"offset": [2.0], "scale": [3.0]}}
    module = sys.modules[type(pipeline).__module__]
    output = pipeline(2, torch.Generator().manual_seed(0), 6, output_type="pt",
                      guidance=[module.mean_intensity], regularizers=[module.total_variation])
    pipeline.save_pretrained(copy)
torch.save([output.images, output.scores["total_variation"]], "out.pt")
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, scores = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(images, expected.images)
    torch.testing.assert_close(scores, expected.scores["total_variation"])


def without_docstrings(node):
    """The source of a statement in one form, without docstrings and comments."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:]
    return ast.unparse(node)


def test_the_single_file_has_the_code_of_the_package_and_is_complete():
    """Each of its statements is one of the package, and it defines each name of the package that it uses."""
    assert {*standalone._PUBLIC, standalone._DOCUMENTED} <= set(standalone._MODULES)
    folder = Path(standalone.__file__).parent
    tree = ast.parse(standalone.standalone_source())
    package = set()
    for path in folder.rglob("*.py"):
        package |= {without_docstrings(node) for node in ast.parse(path.read_text()).body}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    others = [
        node for node in tree.body[1:] if node not in imports and getattr(node, "name", "") != "standalone_source"
    ]
    assert len(others) > 100
    assert [code for node in others if (code := without_docstrings(node)) not in package] == []
    assert not any(getattr(node, "level", 0) for node in ast.walk(tree))

    bound = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names} | set(dir(builtins))
    extended = [node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)]
    for node in (node for node in ast.walk(tree) if node not in extended):
        bound |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) else set()
        bound |= {node.arg} if isinstance(node, ast.arg) else set()
        bound |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
        bound |= {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used - bound == {"__file__"} - bound


def test_the_single_file_is_short_and_documents_the_pipeline_alone():
    folder = Path(standalone.__file__).parent
    source = standalone.standalone_source()
    whole = sum(len((folder / f"{module}.py").read_text().splitlines()) for module in standalone._MODULES)
    assert len(source.splitlines()) < min(0.65 * whole, 3400)
    assert source.startswith('"""RegDDPMPipeline of reg_diffusers ') and "licence: Apache-2.0" in source[:200]
    assert "# reg_diffusers.guidance\n" in source and "class MonteCarlo" not in source
    documented = {
        inner.name
        for node in ast.parse(source).body
        for inner in ast.walk(node)
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) and len(inner.body) > 1
    }
    assert {"RegDDPMPipeline", "__call__", "push_to_hub", "fast_scheduler", "standalone_source"} <= documented
    assert not {"Guidance", "Term", "total_variation", "write_card"} & documented


def test_the_modules_of_the_single_file_have_no_name_in_common():
    """In one file a later definition would silently replace an earlier one."""
    folder = Path(standalone.__file__).parent
    names = []
    for module in standalone._MODULES:
        for node in ast.parse((folder / f"{module}.py").read_text()).body:
            names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names += [target.id for target in node.targets if target.id != "__all__"]
    assert len(names) > 40 and sorted(names) == sorted(set(names))
