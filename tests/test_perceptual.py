"""Distances in the features of frozen networks: values, gradients, preprocessing, and what is refused."""

import copy
import json
import re
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers import UNet2DModel
from losses import images, scheduler_of
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reg_diffusers import Term, X0Regularization, noise_level, weighting
from reg_diffusers.regularizers import Perceptual
from reg_diffusers.regularizers.network_input import NetworkInput
from reg_diffusers.views import Affine

pytestmark = pytest.mark.loss

TRANSFORMER = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVOLUTIONS = {"hidden_sizes": [8, 16], "depths": [1, 1]}
# Model, its configuration, and the number of tokens that precede the patches.
NETWORKS = {
    "ViTModel": ({**TRANSFORMER, "intermediate_size": 32}, 1),
    "Dinov2Model": (TRANSFORMER, 1),
    "DINOv3ViTModel": ({**TRANSFORMER, "intermediate_size": 32, "num_register_tokens": 4}, 5),
    "CLIPVisionModel": ({**TRANSFORMER, "intermediate_size": 32}, 1),
    "SiglipVisionModel": ({**TRANSFORMER, "intermediate_size": 32}, 0),
    "ResNetModel": ({**CONVOLUTIONS, "embedding_size": 8, "layer_type": "basic"}, 0),
    "ConvNextModel": ({**CONVOLUTIONS, "num_stages": 2}, 0),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def network(name="Dinov2Model", dtype=torch.float64):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    net = kind(kind.config_class(**NETWORKS[name][0]))
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.3)  # the usual initialization makes nearly the same features of all images
    return net.to(dtype)


def pair(channels=3, side=16, number=2, dtype=torch.float64):
    return images(2, number, channels, side, side, dtype=dtype).clamp(-1, 1)


def of(loss, x0_hat, original):
    return loss(x0_hat, original_samples=original)


@EVERY_NETWORK
def test_it_is_the_cosine_distance_of_the_patches(name):
    x0_hat, original = pair()
    net, prefix = network(name).eval(), NETWORKS[name][1]
    one, other = (net(x).last_hidden_state for x in (x0_hat, original))
    if one.ndim == 4:
        one, other = (f.flatten(2).transpose(1, 2) for f in (one, other))
    else:
        assert one.shape[1] == 4 + prefix
    expected = 1 - torch.cosine_similarity(one[:, prefix:], other[:, prefix:], dim=-1).mean(1)
    assert expected.min() > 1e-3
    torch.testing.assert_close(of(Perceptual(net), x0_hat, original), expected, rtol=1e-6, atol=0)


@EVERY_NETWORK
@pytest.mark.parametrize("distance", ["cosine", "l2", "gram"])
def test_the_gradient_is_that_of_the_value(name, distance):
    loss = Perceptual(network(name), layers=(0, 1, -1), distance=distance)
    x0_hat, original = pair()
    x0_hat.requires_grad_()
    value = of(loss, x0_hat, original)
    (gradient,) = torch.autograd.grad(value.sum(), x0_hat)
    direction, step = images(*x0_hat.shape, seed=1), 1e-5
    with torch.no_grad():
        ends = [of(loss, x0_hat + sign * step * direction, original) for sign in (1, -1)]
    along = (gradient * direction).flatten(1).sum(1)
    assert along.abs().min() > 0
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), along, rtol=1e-5, atol=1e-9)


@EVERY_NETWORK
def test_equal_images_have_distance_zero_and_images_do_not_affect_each_other(name):
    loss = Perceptual(network(name), layers=(1, -1))
    x0_hat, original = pair(number=3)
    assert of(loss, original, original).tolist() == [0, 0, 0]
    whole = of(loss, x0_hat, original)
    alone = torch.cat([of(loss, x0_hat[i : i + 1], original[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-9, atol=0)


def test_equal_images_have_a_finite_gradient():
    """Also where features are 0, as after a ReLU."""
    x0_hat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    for distance in ("cosine", "l2", "gram"):
        loss = Perceptual(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()), distance=distance)
        (gradient,) = torch.autograd.grad(of(loss, x0_hat, torch.zeros(1, 3, 16, 16)).sum(), x0_hat)
        assert gradient.isfinite().all()


def test_l2_is_that_of_features_of_length_one():
    x0_hat, original = pair()
    net = network("ResNetModel").eval()
    features = [net(x, output_hidden_states=True).hidden_states for x in (x0_hat, original)]
    expected = 0
    for one, other in zip(*features, strict=True):
        difference = nn.functional.normalize(one, dim=1) - nn.functional.normalize(other, dim=1)
        expected = expected + difference.square().sum(1).mean((1, 2)) / 3
    found = of(Perceptual(net, layers=(0, 1, 2), distance="l2"), x0_hat, original)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    half = of(Perceptual(net, layers=(0, 1, 2)), x0_hat, original)
    torch.testing.assert_close(half, found / 2)


def test_the_gram_distance_is_that_of_gatys():
    x0_hat, original = pair()
    net = network("ConvNextModel").eval()
    one, other = (net(x).last_hidden_state.flatten(2) for x in (x0_hat, original))
    channels, positions = one.shape[1:]
    squares = (one @ one.mT - other @ other.mT).square().sum((1, 2))
    found = of(Perceptual(net, distance="gram"), x0_hat, original)
    torch.testing.assert_close(found, squares / (4 * channels**2 * positions**2))


def test_the_gram_distance_and_the_mean_disregard_places():
    net = nn.Conv2d(3, 8, 4, 4).double()
    _, original = pair()
    moved = original.roll(4, dims=-1)
    for options in ({"distance": "gram"}, {"pool": "mean"}):
        assert of(Perceptual(net, **options), moved, original).max() < 1e-20
    assert of(Perceptual(net), moved, original).min() > 0.01


def test_a_network_of_the_users_own_returns_features():
    layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)]).double()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            first = self.layers[0](x)
            return first, self.layers[1](first), first.mean((2, 3))

    x0_hat, original = pair()
    every = of(Perceptual(Own(), layers=(0, 1, 2)), x0_hat, original)
    each = [of(Perceptual(Own(), layers=layer), x0_hat, original) for layer in range(3)]
    torch.testing.assert_close(every, torch.stack(each).mean(0))
    pooled = of(Perceptual(Own(), layers=0, pool="mean"), x0_hat, original)
    torch.testing.assert_close(each[2], pooled)


def test_of_a_model_of_images_and_text_the_vision_model_is_used():
    config = {**TRANSFORMER, "intermediate_size": 32}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    net = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=config)).double()
    x0_hat, original = pair()
    found = of(Perceptual(net), x0_hat, original)
    torch.testing.assert_close(found, of(Perceptual(net.vision_model), x0_hat, original), rtol=0, atol=0)


PROCESSORS = {
    "warped": ("ViTImageProcessor", {"size": {"height": 20, "width": 24}}),
    "to a square": ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}}),
    "cropped": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}),
    "by a share": ("ConvNextImageProcessor", {"size": {"shortest_edge": 24}}),
    "normalized only": ("BitImageProcessor", {"do_resize": False, "do_center_crop": False}),
    "resized only": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, "do_normalize": False, "crop_size": 24}),
}


@pytest.mark.parametrize("kind, numbers", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("height, width", [(40, 40), (30, 51), (16, 12)])
def test_the_network_sees_what_its_processor_makes(kind, numbers, height, width):
    y, x = np.mgrid[:height, :width]
    picture = np.stack([np.sin(x / 5 + y / 7), np.cos(x / 4), np.sin(y / 3 - x / 6)], axis=-1)
    picture = (255 * (picture + 1) / 2).round().astype(np.uint8)
    processor = getattr(transformers, kind)(**numbers)
    expected = processor(PIL.Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    found = NetworkInput.of(processor)(torch.from_numpy(picture / 255).permute(2, 0, 1)[None].float())
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.01


def test_a_model_is_loaded_with_the_numbers_of_its_processor(tmp_path):
    net = network(dtype=torch.bfloat16)
    net.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    loss = Perceptual.from_pretrained(str(tmp_path), layers=(1, -1), distance="l2")
    assert loss.net.dtype == torch.float32 and not loss.net.training
    assert (loss.layers, loss.distance) == ((1, -1), "l2")
    assert loss.network_input == NetworkInput.of(processor) and loss.network_input.crop == (16, 16)
    x0_hat, original = pair(side=40, dtype=torch.float32)
    same = Perceptual(copy.deepcopy(net).float(), processor, layers=(1, -1), distance="l2")
    torch.testing.assert_close(of(loss, x0_hat, original), of(same, x0_hat, original))
    assert Perceptual.from_pretrained(str(tmp_path), dtype=torch.bfloat16).net.dtype == torch.bfloat16


def test_numbers_of_a_processor_that_needs_torchvision_are_read(tmp_path, monkeypatch):
    network("DINOv3ViTModel").save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise ImportError("requires torchvision")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", refuse)
    assert Perceptual.from_pretrained(str(tmp_path)).network_input == NetworkInput.of(processor)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel"])
def test_a_size_of_its_own_shows_all_of_the_image(name):
    processor = transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 16, "width": 16})
    x0_hat, original = pair(side=32)
    x0_hat.requires_grad_()
    for size, sees_border in ((None, False), (24, True)):
        loss = Perceptual(network(name), processor, size=size)
        (gradient,) = torch.autograd.grad(of(loss, x0_hat, original).sum(), x0_hat)
        assert (gradient[..., 0, 0].abs().max() > 0) == sees_border
        assert gradient[..., 16, 16].abs().max() > 0


def test_grey_images_are_repeated():
    x0_hat, original = pair(channels=1)
    loss = Perceptual(network())
    colour = of(loss, *(image.expand(-1, 3, -1, -1) for image in (x0_hat, original)))
    torch.testing.assert_close(of(loss, x0_hat, original), colour, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 2, 16, 16), (2, 4, 16, 16), (2, 3, 4, 16, 16)])
def test_other_channels_are_refused(shape):
    latents = torch.zeros(shape).double()
    with pytest.raises(ValueError, match=rf"1 or 3 channels, \(n, C, H, W\), not {re.escape(str(shape))}: use a view"):
        of(Perceptual(network()), latents, latents)


def test_images_outside_the_range_are_refused():
    loss = Perceptual(network(), input_range="[0, 1]")
    x0_hat, original = pair()
    with pytest.raises(
        ValueError, match=r'input_range="\[0, 1\]", but the images have values from -1 to 1: set .* view'
    ):
        of(loss, x0_hat, original)
    with pytest.raises(ValueError, match=r'input_range="\[-1, 1\]", but the images have values from 0 to 255'):
        of(Perceptual(network()), x0_hat, 255 * (original > 0).double())
    of(Perceptual(network()), 9 * x0_hat, 1.3 * original)  # x0_hat is anywhere at high noise; decoders overshoot


def test_images_that_look_like_the_other_range_cause_one_warning():
    loss = Perceptual(network())
    x0_hat, original = ((x + 1) / 2 for x in pair())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(loss, x0_hat, original)
        of(loss, x0_hat, original)
    with pytest.warns(UserWarning, match=r'no image so far has a value below 0: .* set input_range="\[0, 1\]"'):
        of(loss, x0_hat, original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(loss, x0_hat, original)


def test_the_range_is_converted():
    x0_hat, original = pair()
    expected = of(Perceptual(network()), x0_hat, original)
    found = of(Perceptual(network(), input_range="[0, 1]"), (x0_hat + 1) / 2, (original + 1) / 2)
    torch.testing.assert_close(found, expected)


def test_half_precision_images_and_networks():
    x0_hat, original = pair(dtype=torch.bfloat16)
    x0_hat.requires_grad_()
    exact = of(Perceptual(network(dtype=torch.float32)), x0_hat, original)
    assert exact.dtype == torch.float32
    exact.sum().backward()
    assert x0_hat.grad.dtype == torch.bfloat16 and x0_hat.grad.abs().max() > 0
    double = of(Perceptual(network()), x0_hat.double(), original.double())
    torch.testing.assert_close(exact.double(), double, rtol=1e-4, atol=1e-6)
    half = of(Perceptual(network(dtype=torch.bfloat16)), x0_hat, original)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.01)


def test_chunks_change_memory_only():
    x0_hat, original = pair(number=5)
    results, sizes = [], []
    for chunk in (None, 2):
        loss = Perceptual(network(), chunk=chunk)
        loss.net.register_forward_pre_hook(
            lambda net, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        x = x0_hat.clone().requires_grad_()
        value = of(loss, x, original)
        results.append((value, *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(*results)
    assert sizes[:2] == [5, 5]
    assert sorted(sizes[2:]) == [1, 1, 1, 2, 2, 2, 2, 2, 2]  # the original, x0_hat, and x0_hat in the backward pass


def test_in_training_it_is_frozen_moved_not_saved_and_sees_active_images_only():
    x0, noise, output = images(3, 4, 3, 16, 16, dtype=torch.float32)
    output.requires_grad_()
    net, counts = network(dtype=torch.float32), []
    net.register_forward_pre_hook(
        lambda net, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    term = Term(Perceptual(net), 1.0, weighting.gated(0.184), view=Affine(0.3))
    ours = X0Regularization(scheduler_of("sample"), [term])
    assert not any(weight.requires_grad for weight in net.parameters()) and not ours.train().state_dict()
    assert not net.training and not list(ours.parameters()) and ours.needs == ("original_samples",)
    found = ours(output, torch.tensor([0, 60, 300, 999]), noise, original_samples=x0.clamp(-1, 1))
    assert counts == [3, 3]
    found.loss.backward()
    assert (output.grad.flatten(1).abs().amax(1) > 0).tolist() == [True, True, True, False]
    assert all(weight.grad is None for weight in net.parameters())
    assert ours.to(torch.float64) and net.dtype == torch.float64


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distance": "l1"}, "distance must be one of cosine, l2, gram, not 'l1'"),
        ({"pool": "max"}, "pool must be one of tokens, mean, not 'max'"),
        ({"pool": "mean", "distance": "gram"}, "already"),
        ({"size": 0}, "size must be a positive integer, not 0"),
        ({"chunk": 1.5}, "chunk must be a positive integer, not 1.5"),
        ({"layers": ()}, "layers must contain at least one index"),
        ({"input_range": "[0, 255]"}, r'input_range must be "\[-1, 1\]" or "\[0, 1\]", not'),
        ({"processor": {"image_mean": [0] * 3, "image_std": [1] * 3, "size": {"max_height": 5}}}, "neither a side"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Perceptual(network(), **options)


def test_what_is_no_vision_network_is_refused():
    with pytest.raises(TypeError, match=r"use Perceptual\.from_pretrained"):
        Perceptual("facebook/dinov2-small")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="BertModel takes input_ids, not images"):
        Perceptual(transformers.BertModel(config))
    with pytest.raises(ValueError, match=r"layers=\(7,\), but Dinov2Model has 3: 0 to 2, or -3 to -1"):
        of(Perceptual(network(), layers=7), *pair())
    processor = {"image_mean": [0] * 3, "image_std": [1] * 3, "do_center_crop": True, "crop_size": 32}
    with pytest.raises(ValueError, match=r"crop of \(32, 32\) exceeds images of \(16, 16\): pass size="):
        of(Perceptual(network(), processor), *pair())


def test_a_small_transformer_costs_at_most_a_third_of_a_step():
    """At 224 x 224, with the default weighting and uniform timesteps, beside diffusers' network for 64 x 64 images."""
    blocks = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=64,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=blocks,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(blocks)),
        )
        config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6)
        loss = Perceptual(transformers.Dinov2Model(config), size=224)
        image = torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as step:
        unet(image, 0).sample.sum().backward()
    with FlopCounterMode(display=False) as term:
        of(loss, image.requires_grad_(), image.detach()).sum().backward()
    level = noise_level(scheduler_of(), torch.arange(1000))
    active = (weighting.matched(level) > 0).float().mean().item()
    assert step.get_total_flops() > 5e10 and term.get_total_flops() > 2e10  # both were counted
    assert active * term.get_total_flops() / step.get_total_flops() < 0.35


@pytest.mark.slow
def test_the_script_trains_with_it_by_name(train):
    """The embedded pictures are grey, and the network sees them enlarged."""
    network(dtype=torch.float32).save_pretrained("net")
    transformers.BitImageProcessor().save_pretrained("net")
    regularizer = ("--regularizer", "perceptual('net', layers=(1, -1), size=16)")
    folder = train("--max_train_steps", 4, *regularizer, "--reg_weighting", "gated(0.184)", "--reg_weight", 0.1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("Perceptual", 0) > 0 for row in rows)
    assert not any("net." in name for name in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
