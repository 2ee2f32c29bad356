"""Losses with networks that were trained elsewhere: they see what people see in a photograph, and read text."""

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from docs_code import block
from reading import LETTERS, read, reader, rendered
from real_weights import MOBILENET_PROCESSOR, PROCESSOR, MissingWeights, efficientnet, mobilenet

from reg_diffusers import Term, X0Regularization
from reg_diffusers.regularizers import Perceptual, Score

pytestmark = pytest.mark.loss

MILITARY_UNIFORM = 652  # class of ImageNet


def loaded(load, **options):
    """Loads a network with these weights, or skips the test and says which command installs them."""
    try:
        return load(**options)
    except MissingWeights as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photograph():
    """Grace Hopper in her uniform, (1, 3, 224, 224) in [-1, 1]; comes with matplotlib."""
    with PIL.Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        pixels = np.array(picture.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()


def test_a_photograph_is_recognised_and_a_blurred_one_less(photograph):
    score = Score(loaded(efficientnet, classifies=True), MILITARY_UNIFORM, processor=PROCESSOR)
    values = [score(blurred(photograph, radius)).item() for radius in (0, 4, 16)]
    assert values[0] < 1 and values[0] + 0.5 < values[1] < values[2]


def test_a_model_of_transformers_recognises_it_as_well(photograph):
    """MobileNetV2 is another network, with another processor; its logits are in the output of transformers."""
    net = loaded(mobilenet)
    score = Score(net, MILITARY_UNIFORM, processor=MOBILENET_PROCESSOR)
    values = [score(blurred(photograph, radius)).item() for radius in (0, 4, 16)]
    assert values[0] < 1 and values[0] + 0.5 < values[1] < values[2]


def test_blur_is_further_away_than_another_brightness_of_the_same_error(photograph):
    x = blurred(photograph, 2)
    error = (x - photograph).square().mean().sqrt()
    brighter = photograph + error
    assert (brighter - photograph).square().mean().sqrt().item() == pytest.approx(error.item(), rel=1e-4)
    loss = Perceptual(loaded(efficientnet), PROCESSOR, layers=(2, 4, 7, 10))
    distances = [loss(image, original_samples=photograph).item() for image in (x, brighter)]
    assert distances == pytest.approx([0.196, 0.0068], rel=0.05)  # the numbers in docs/regularizers.md


def test_its_gradient_sharpens(photograph):
    """Steps along the gradient of the loss bring a blurred picture closer to the photograph, also in pixels."""
    loss = Perceptual(loaded(efficientnet), PROCESSOR, layers=(2, 4))
    x = blurred(photograph, 1)
    before = (x - photograph).square().mean()
    for _ in range(5):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, original_samples=photograph).sum(), x)
        x = x - 0.5 * (x - photograph).square().sum().sqrt().detach() / 10 * gradient / gradient.norm()
    assert (x - photograph).square().mean() < before


@pytest.mark.slow
def test_what_one_network_gains_another_one_sees(photograph):
    """Steps on EfficientNet's distance lower MobileNetV2's, the judge that has no part in them."""
    loss = Perceptual(loaded(efficientnet), PROCESSOR, layers=(2, 4))
    judge = Perceptual(loaded(mobilenet).mobilenet_v2, MOBILENET_PROCESSOR, layers=(4, 8))
    x = start = blurred(photograph, 2)
    for _ in range(5):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, original_samples=photograph).sum(), x)
        x = x - 3 * gradient / gradient.norm()
    before, after = (judge(image, original_samples=photograph).item() for image in (start, x.detach()))
    assert after < 0.95 * before


@pytest.fixture(scope="module")
def reads():
    """The loss of docs/own_losses.md with EasyOCR's network."""
    return block("own_losses", "class Reads")["Reads"](loaded(reader), LETTERS)


@pytest.mark.parametrize("text", ["denoise 42", "Parseval's"])
def test_rendered_text_is_read_and_costs_little(reads, text):
    assert read(reads.reader, rendered(text)) == text
    values = [reads(blurred(rendered(text), radius), text=[text]).item() for radius in (0, 5, 8)]
    assert values[0] < 0.05 and values[0] + 0.3 < values[1] < values[2]
    assert reads(rendered(text), text=["something"]).item() > 1


def test_the_gradient_of_the_text_reaches_the_network_of_the_diffusion(reads):
    x_t, output = torch.stack([rendered("lambda")] * 2)[:, 0], torch.zeros(2, 1, 64, rendered("lambda").shape[-1])
    ours = X0Regularization(DDPMScheduler(prediction_type="v_prediction"), [Term(reads, 1.0)])
    assert ours.needs == ("text",)
    ours(output.requires_grad_(), torch.tensor([100, 900]), x_t, text=["lambda", "lambda"]).loss.backward()
    assert output.grad.flatten(1).abs().amax(1).bool().tolist() == [True, False]  # not where nothing can be read
    assert output.grad.isfinite().all()


@pytest.mark.slow
def test_lowering_it_makes_blurred_text_readable(reads):
    """Also when it is shifted, which patterns for this network alone do not survive; and closer to sharp text."""
    text = "gradient"
    sharp = rendered(text)
    x = start = blurred(sharp, 5)
    assert read(reads.reader, start) != text
    for _ in range(15):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reads(x, text=[text]).sum(), x)
        gradient = blurred(gradient, 2)
        x = (x - 0.15 * gradient / gradient.abs().max()).clamp(-1, 1).detach()
    assert read(reads.reader, x) == read(reads.reader, x.roll(3, -1)) == text
    assert (x - sharp).square().mean() < (start - sharp).square().mean()


def blurred(images, radius):
    if radius == 0:
        return images
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)
