"""Conditions: from a batch, mirrored, cut to images, bound to a network; a new kind is one class."""

from types import SimpleNamespace

import pytest
import torch

from reg_diffusers import RegularizedLoss, with_condition
from reg_diffusers.networks import conditions as module
from reg_diffusers.networks.conditions import KINDS, Condition, Conditions
from reg_diffusers.settings import DataSettings
from reg_diffusers.training.terms import build_terms

pytestmark = pytest.mark.training


class Pictures:
    """Data whose conditions are kept as 0..255."""

    classes = ("a", "b", "c")
    condition_channels = 0
    normalization = SimpleNamespace(normalize=lambda values: values / 127.5 - 1)


@pytest.fixture
def conditions():
    return Conditions({"class_labels": torch.arange(4), "condition": torch.rand(4, 2, 3, 5)})


def test_they_are_read_from_a_batch_as_the_network_sees_them():
    batch = {
        "values": torch.zeros(2, 1, 2, 2),
        "ids": torch.arange(2),
        "condition": torch.tensor([0.0, 255.0]).reshape(2, 1, 1, 1),
        "class_labels": torch.tensor([2, 0]),
    }
    found = Conditions.of_batch(Pictures, batch)
    assert set(found) == {"condition", "class_labels"}
    assert found["condition"].flatten().tolist() == [-1, 1] and found["class_labels"].tolist() == [2, 0]


def test_they_are_cut_and_mirrored_with_their_images(conditions):
    part = conditions.of_images(slice(1, 3))
    assert part["class_labels"].tolist() == [1, 2] and torch.equal(part["condition"], conditions["condition"][1:3])
    mask = torch.tensor([True, False, False, True]).reshape(4, 1, 1, 1)
    flipped = conditions.flipped(mask)
    assert torch.equal(flipped["class_labels"], conditions["class_labels"])
    assert torch.equal(flipped["condition"][0], conditions["condition"][0].flip(-1))
    assert torch.equal(flipped["condition"][1], conditions["condition"][1])
    again = flipped.flipped(mask)
    assert all(torch.equal(again[name], conditions[name]) for name in conditions)


def test_bound_they_are_what_a_loop_would_write(conditions, tiny_unet):
    from diffusers import DDPMScheduler, UNet2DModel

    config = {name: value for name, value in tiny_unet(channels=3).config.items() if not name.startswith("_")}
    config |= {"in_channels": 5, "num_class_embeds": 4}
    unet = UNet2DModel.from_config(config).eval()
    images = torch.randn(4, 3, 8, 8)
    given = Conditions({"class_labels": torch.arange(4), "condition": torch.rand(4, 2, 8, 8)})
    network, arguments = given.bind(unet)
    loss_fn, fixed = RegularizedLoss(DDPMScheduler()), {"noise": torch.randn_like(images)}
    fixed["timesteps"] = torch.tensor([1, 50, 300, 900])
    found = loss_fn(network, images, model_kwargs=arguments, **fixed).loss
    by_hand = with_condition(unet, given["condition"])
    expected = loss_fn(by_hand, images, model_kwargs={"class_labels": given["class_labels"]}, **fixed).loss
    assert torch.equal(found, expected)
    assert Conditions({}).bind(unet) == (unet, {})


def test_only_those_that_a_network_takes_are_left(conditions, tiny_unet):
    plain, by_class = tiny_unet(3).config, tiny_unet(3, num_class_embeds=2).config
    assert set(conditions.taken_by([(plain, 3)])) == set()
    assert set(conditions.taken_by([(plain, 3), (by_class, 3)])) == {"class_labels"}
    assert set(conditions.taken_by([(plain, 1)])) == {"condition"}  # two input channels more than its images have


def test_previews_show_all_classes_in_turn():
    assert Conditions.for_previews(Pictures, 5)["class_labels"].tolist() == [0, 1, 2, 0, 1]


class Angle(Condition):
    """A kind that no file of the package knows: an angle that turns its sign where an image is mirrored."""

    name, flag = "angle", "--image_column"

    def flipped(self, values, mask):
        return torch.where(mask.flatten(), -values, values)


def test_a_new_kind_is_one_class(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "KINDS", (*KINDS, Angle()))
    monkeypatch.setattr("reg_diffusers.training.terms.KINDS", module.KINDS)
    found = Conditions.of_batch(Pictures, {"angle": torch.tensor([1.0, 2.0])})
    assert found.flipped(torch.tensor([True, False]).reshape(2, 1, 1, 1))["angle"].tolist() == [-1, 2]
    network, arguments = found.of_images([1]).bind(abs)
    assert network is abs and arguments["angle"].tolist() == [2]
    (tmp_path / "turned.py").write_text("def loss(x, /, *, angle):\n    return angle\nloss.needs = ('angle',)\n")
    monkeypatch.chdir(tmp_path)
    from reg_diffusers.settings import LossSettings

    loss = LossSettings(regularizer=("turned:loss",))
    with pytest.raises(ValueError, match="needs angle: add --image_column"):
        build_terms(loss, DataSettings())
    assert build_terms(loss, DataSettings(image_column="image"))[0].needs == ("angle",)
