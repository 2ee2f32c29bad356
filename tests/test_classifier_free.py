"""Classifier-free guidance by class, class labels that are dropped in training, and the names of classes."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from runs import differ, refusal, weights

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.cli import main
from reg_diffusers.regularizers import mean_intensity
from reg_diffusers.sampling.class_names import label_of
from reg_diffusers.weighting import constant

pytestmark = pytest.mark.sampling

NAMES = ["cat", "dog"]


@pytest.fixture
def pipeline(tiny_unet):
    """Two classes and the embedding of no class."""
    unet = tiny_unet(num_class_embeds=3).eval()
    return quiet(RegDDPMPipeline(unet, DDIMScheduler(clip_sample=False), class_names=NAMES))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def outputs(pipeline, guidance_scale, label="dog", steps=2, **kwargs):
    """The model outputs of a call, (steps, B, C, H, W)."""
    seen = []

    def look(pipeline, index, timestep, tensors):
        seen.append(tensors["model_output"])

    pipeline(
        2,
        torch.Generator().manual_seed(0),
        steps,
        class_labels=label,
        guidance_scale=guidance_scale,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["model_output"],
        **kwargs,
    )
    return torch.stack(seen)


def of_no_class(pipeline):
    """The same network, whose third embedding counts as a class."""
    return quiet(RegDDPMPipeline(pipeline.unet, pipeline.scheduler))


def test_the_output_is_on_the_line_through_those_with_and_without_the_class(pipeline):
    with_class, without = outputs(pipeline, None)[0], outputs(of_no_class(pipeline), None, label=2)[0]
    assert (with_class - without).abs().max() > 1e-3
    for scale in (0, 0.5, 3):
        torch.testing.assert_close(outputs(pipeline, scale)[0], without + scale * (with_class - without))


def test_a_scale_of_1_is_the_network_alone_bit_for_bit(pipeline):
    assert torch.equal(outputs(pipeline, 1), outputs(pipeline, None))
    calls = []
    pipeline.unet.register_forward_hook(lambda *given: calls.append(1))
    outputs(pipeline, 1.0)
    assert len(calls) == 2
    outputs(pipeline, 2.0)
    assert len(calls) == 6


def test_a_learned_variance_is_that_of_the_class(tiny_unet):
    class LearnedVariance(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            config = tiny_unet().config
            self.config = type(config)({**config, "out_channels": 2, "num_class_embeds": 3})

        def forward(self, x, t, class_labels):
            label = class_labels.reshape(-1, 1, 1, 1).float()
            return type("Output", (), {"sample": torch.cat([label + 0 * x, 0.1 * label + 0 * x], dim=1)})

    scheduler = DDPMScheduler(variance_type="learned_range")
    pipeline = quiet(RegDDPMPipeline(LearnedVariance(), scheduler, class_names=NAMES))
    image, variance = outputs(pipeline, 3.0, label=1)[0].unbind(1)
    torch.testing.assert_close(image, torch.full_like(image, 2 + 3 * (1 - 2)))
    torch.testing.assert_close(variance, torch.full_like(variance, 0.1))


def test_guidance_by_a_loss_moves_the_image_of_the_guided_network(pipeline):
    """mpgd at weight 1 puts the mean of x0_hat on the target: the step is exact for a quadratic loss."""
    dark = Term(mean_intensity, 1.0, weighting=constant)
    output = pipeline(
        2,
        torch.Generator().manual_seed(0),
        3,
        class_labels="cat",
        guidance_scale=4.0,
        guidance=[dark],
        return_x0_hat=True,
    )
    means = output.x0_hat.flatten(2).mean(2)
    torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be finite and at least 0, not -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite"),
        ({"class_labels": "dgo"}, "no class is named 'dgo'; did you mean 'dog'?"),
        ({"class_labels": ["cat", "zebra"]}, "no class is named 'zebra'; the classes are cat, dog"),
        ({"class_labels": 2}, "class_labels must be whole numbers from 0 to 1"),
        ({"negative_prompt": "blurry"}, "negative_prompt is for text-to-image pipelines"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?")):
        pipeline(2, num_inference_steps=2, **{"class_labels": 0, "guidance_scale": 2.0, **arguments})


def test_a_network_that_never_lacked_a_label_is_refused_with_the_fix(tiny_unet):
    always = RegDDPMPipeline(tiny_unet(num_class_embeds=2), DDIMScheduler(), class_names=NAMES)
    with pytest.raises(ValueError, match="trained without labels: train it with --class_conditional --condition_dro"):
        always(2, num_inference_steps=2, class_labels="cat", guidance_scale=2.0)
    with pytest.raises(ValueError, match="is a name, but this model does not record the names"):
        label_of("cat", None)
    for names in ([], ["a", "b", "c"], [1, 2], "ab"):
        with pytest.raises(ValueError, match="class_names"):
            RegDDPMPipeline(tiny_unet(num_class_embeds=2), DDIMScheduler(), class_names=names)
    with pytest.raises(ValueError, match="no class embeddings"):
        RegDDPMPipeline(tiny_unet(), DDIMScheduler(), class_names=NAMES)


def test_names_are_saved_with_the_model_which_stock_diffusers_still_loads_silently(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    loaded = quiet(RegDDPMPipeline.from_pretrained(tmp_path / "model"))
    assert loaded.config.class_names == NAMES and loaded.num_classes == 2
    assert torch.equal(outputs(loaded, 2.0), outputs(pipeline, 2.0, label=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(DDPMPipeline.from_pretrained(tmp_path / "model")) is DDPMPipeline
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert "class_names" not in index


# Through the commands


LOSS = """
def labelled(x0_hat, /, *, class_labels):
    assert class_labels.max() < 2
    return x0_hat.flatten(1).mean(1) * class_labels


labelled.needs = ("class_labels",)
"""


@pytest.fixture
def by_class(train, image_folder, tmp_path):
    """Trains on two classes, with labels that are dropped."""
    folder = image_folder(16)
    (tmp_path / "labelled.py").write_text(LOSS)

    def run(*flags, dropout=0.5, **kwargs):
        given = ("--train_data_dir", folder, "--class_conditional", "--max_train_steps", 4, "--num_threads", 1)
        dropped = ("--condition_dropout", dropout) if dropout else ()
        return train(*given, *dropped, "--regularizer", "labelled:labelled", "--reg_weight", 0.1, *flags, **kwargs)

    return run


def sample(*flags):
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    quick = "--num_images 2 --num_inference_steps 2 --num_threads 1".split()
    main(["sample", *quick, *map(str, flags)])


def test_dropped_labels_train_one_more_embedding_and_the_losses_see_the_true_labels(by_class, capsys):
    out = by_class("--checkpointing_steps", 2)
    embeddings = weights(out)["class_embedding.weight"]
    assert len(embeddings) == 3
    (card,) = [ModelCard((out / "README.md").read_text())]
    assert "0 cats, 1 dogs" in card.text and "classifier-free guidance" in card.text
    whole = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet")
    by_class("--resume", "auto", "--checkpointing_steps", 2)
    assert not differ(weights(out), whole)
    sample("--model", out, "--class_labels", "dogs", "--guidance_scale", 2, "--output", "by_name")
    sample("--model", out, "--class_labels", 1, "--guidance_scale", 2, "--output", "by_number.npz")
    assert json.loads((out.parent / "by_name" / "sample_settings.json").read_text())["class_labels"] == [1]
    capsys.readouterr()
    for flags, reason in (
        (("--class_labels", "dgs"), "--class_labels dgs: no class is named 'dgs'; did you mean 'dogs'?"),
        (("--class_labels", 2), "--class_labels must be from 0 to 1"),
        (("--guidance_scale", -1), "--guidance_scale must be finite and at least 0"),
    ):
        with pytest.raises(SystemExit):
            sample("--model", out, "--output", "refused", *flags)
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_class_that_is_named_like_a_number_is_meant_by_its_name(tiny_unet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline = RegDDPMPipeline(tiny_unet(num_class_embeds=2), DDIMScheduler(), class_names=["1", "7"])
    pipeline.save_pretrained("model")
    sample("--model", "model", "--class_labels", 1, 7, "--output", "a.npz")
    assert np.load("a.npz")["arr_1"].tolist() == [0, 1]
    assert capsys.readouterr().err.count("the class of this name, which has the label") == 2


def test_classes_of_a_given_model_that_do_not_fit_are_refused_or_said(by_class, capsys):
    without = by_class(dropout=0, output="without")
    again = {"model": ("--pretrained_model_name_or_path", str(without))}
    assert "has an embedding for each class, but none for images without" in refusal(by_class, capsys, **again)
    out = by_class()
    index = json.loads((out / "model_index.json").read_text())
    index["_reg_diffusers"]["class_names"] = ["birds", "dogs"]
    (out / "model_index.json").write_text(json.dumps(index))
    kept = by_class(
        "--max_train_steps", 1, dropout=0, model=("--pretrained_model_name_or_path", str(out)), output="kept"
    )
    assert "0 was 'birds' and is 'cats'" in capsys.readouterr().err
    assert RegDDPMPipeline.from_pretrained(kept).config.class_names == ["cats", "dogs"]
    assert len(weights(kept)["class_embedding.weight"]) == 3


def test_dropping_nothing_is_refused(train, capsys):
    assert "drops class labels or texts: add --class_conditional" in refusal(train, capsys, "--condition_dropout", 0.1)
