"""Startup checks: what they refuse, what they warn of, what they leave alone, each on a regularizer with one fault."""

import random
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import mean_square, scheduler_of
from torch import nn

from reg_diffusers import regularizers
from reg_diffusers.data.training_data import FieldData
from reg_diffusers.estimators import one_step
from reg_diffusers.objective import Term, X0Regularization
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.trial.checks import check_terms
from reg_diffusers.trial.members import find_networks

pytestmark = pytest.mark.training

# radial_spectrum needs a target, and the window of ssim is larger than the images here
BUILT_IN = sorted({*regularizers.__all__} - {"radial_spectrum", "ssim"})


def data_of(array):
    return FieldData(np.asarray(array, dtype=np.float32))


@pytest.fixture
def data():
    return data_of(np.random.default_rng(0).normal(size=(40, 1, 8, 8)))


@pytest.fixture
def check(data, capsys):
    """Checks one regularizer; returns what is said on stderr."""

    def run(regularizer, *, data=data, scheduler="epsilon", **options):
        check_terms((Term(regularizer, 1.0, name="odd"),), scheduler_of(scheduler), data, **options)
        return capsys.readouterr().err

    return run


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.Conv2d(4, 4, 3))


def energy(net, x0_hat):
    return net(x0_hat).square().flatten(1).mean(1)


# What passes


@pytest.mark.parametrize("scheduler", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_every_built_in_regularizer_passes_without_a_word(check, scheduler, mixed_precision):
    for name in BUILT_IN:
        regularizer = getattr(regularizers, name)
        assert check(regularizer, scheduler=scheduler, mixed_precision=mixed_precision) == "", name


@pytest.mark.parametrize("images", [np.zeros((1, 1, 8, 8)), np.zeros((5, 3, 8, 8)), np.full((2, 1, 8, 8), 255)])
def test_data_without_variance_and_single_images_pass(check, images, capsys):
    data = data_of(images)
    assert "is constant" in capsys.readouterr().err or images.any()  # said of the data, not of the loss
    for name in BUILT_IN:
        assert check(getattr(regularizers, name), data=data) == "", name


def test_a_frozen_network_passes_wherever_it_is(check):
    net = network(nn.BatchNorm2d(4), nn.Dropout()).eval().requires_grad_(False)
    for regularizer in (lambda x: energy(net, x), partial(energy, net)):
        assert check(regularizer) == ""


def test_a_network_that_is_the_regularizer_is_frozen_for_the_user(check):
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(nn.BatchNorm2d(4), nn.Dropout())

        def forward(self, x0_hat):
            return energy(self.net, x0_hat)

    assert check(Energy()) == ""


@pytest.mark.parametrize(
    "estimator, message",
    [
        (
            lambda p: p.sample,
            "--regularizer odd: an estimator returns images that are detached from the network's output",
        ),
        (
            lambda p: one_step(p)[:1],
            r"--regularizer odd: an estimator must return one x0_hat per image and draw, \(2, C",
        ),
        (lambda p: p.nothing, "--regularizer odd raised AttributeError on a batch of images"),
    ],
)
def test_an_estimator_of_ones_own_is_tried(data, estimator, message):
    with pytest.raises(UsageError, match=message):
        check_terms((Term(mean_square, 1.0, name="odd", estimator=estimator),), scheduler_of("epsilon"), data)


def test_context_is_given_image_by_image(check):
    def reconstruction(x0_hat, /, *, original_samples):
        return (x0_hat - original_samples).abs().flatten(1).mean(1)

    reconstruction.needs = ("original_samples",)
    assert check(reconstruction) == ""


# The gradient


def under_no_grad(x0_hat):
    with torch.no_grad():
        return x0_hat.flatten(1).mean(1)


@torch.no_grad()
def decorated(x0_hat):
    return x0_hat.flatten(1).mean(1)


def through_numpy(x0_hat):
    pixels = x0_hat.detach().numpy()
    return torch.from_numpy(pixels).flatten(1).mean(1)


def item_by_item(x0_hat):
    return torch.tensor([image.mean().item() for image in x0_hat])


def by_data(x0_hat):
    features = x0_hat.data * 2
    return features.flatten(1).mean(1)


def by_inference(x0_hat):
    with torch.inference_mode():
        return x0_hat.flatten(1).mean(1)


def by_comparison(x0_hat):
    bright = x0_hat > 0
    return bright.float().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("regularizer", "cut"),
    [
        (under_no_grad, r"torch\.no_grad in test_checks\.py, line \d+: return x0_hat\.flatten"),
        (decorated, r"torch\.no_grad in test_checks\.py, line \d+: return x0_hat\.flatten"),
        (through_numpy, r"\.detach\(\) and \.numpy\(\) in test_checks\.py, line \d+: pixels = x0_hat\.detach"),
        (item_by_item, r"\.item\(\) in test_checks\.py, line \d+: return torch\.tensor\("),
        (by_data, r"\.data in test_checks\.py, line \d+: features = x0_hat\.data \* 2"),
        (by_inference, r"torch\.inference_mode in test_checks\.py, line \d+: return x0_hat"),
        (by_comparison, r"torch's '(gt|__gt__)', which has no gradient, in .*: bright = x0_hat > 0"),
        (lambda x0_hat: mean_square(x0_hat).sum().item(), r"returned float.*\.item\(\) in test_checks\.py"),
    ],
)
def test_what_cuts_the_gradient_is_named_with_its_line(check, regularizer, cut):
    with pytest.raises(UsageError, match=f"--regularizer odd: .*It is cut off by {cut}|odd: .*{cut}") as refused:
        check(regularizer)
    assert "\n" not in str(refused.value)


def test_numpy_of_a_tensor_with_a_gradient_is_named_with_its_line(check):
    def regularizer(x0_hat):
        return torch.from_numpy(x0_hat.numpy()).flatten(1).mean(1)

    with pytest.raises(UsageError, match=r"odd raised RuntimeError .*numpy\(\).*\(test_checks\.py, line \d+: return "):
        check(regularizer)


def test_a_line_that_cuts_beside_the_gradient_is_not_blamed(check):
    def regularizer(x0_hat):
        target = x0_hat.detach().mean()
        return x0_hat.mean() - target

    with pytest.raises(UsageError, match="one value per image") as refused:
        check(regularizer)
    assert "cut off" not in str(refused.value)


def test_a_gradient_of_zero_is_a_warning(check):
    assert "its gradient is 0 on all images tried" in check(lambda x0_hat: x0_hat.round().flatten(1).mean(1))
    assert check(lambda x0_hat: (x0_hat.abs() - 1.5).relu().flatten(1).mean(1)) == ""  # 0 on the data alone


def test_a_gradient_that_is_no_number_on_the_data_is_a_warning(check):
    flat = data_of(np.zeros((4, 1, 8, 8)))
    said = check(lambda x0_hat: x0_hat.square().flatten(1).sum(1).sqrt(), data=flat)
    assert "its gradient is not finite on images of the data" in said


def test_values_that_are_no_numbers_on_noisy_images_only_are_a_warning(check):
    said = check(lambda x0_hat: (1.0001 - x0_hat.abs()).log().flatten(1).mean(1))
    assert "it or its gradient is not finite on noisy images" in said


def test_values_that_are_no_numbers_on_the_data_are_refused(check):
    images = np.random.default_rng(0).normal(size=(8, 1, 8, 8))
    images[3] = 0
    with pytest.raises(UsageError, match="it is not finite for 1 of 8 images"):
        check(lambda x0_hat: x0_hat.flatten(1).std(1).log(), data=data_of(images))


# Shape


@pytest.mark.parametrize("regularizer", [lambda x: x.mean(), lambda x: x.flatten(1), lambda x: None])
def test_another_shape_is_refused(check, regularizer):
    with pytest.raises(UsageError, match=r"one value per image, a tensor of shape \(2,\)"):
        check(regularizer)


def test_one_image_of_data_is_enough_to_see_a_wrong_shape(check):
    with pytest.raises(UsageError, match=r"a tensor of shape \(1,\)"):
        check(lambda x: x.mean(), data=data_of(np.eye(8)[None, None]))


# The same again, alone


def test_random_numbers_are_a_warning(check):
    for draw in (
        torch.randn_like,
        lambda x: torch.from_numpy(np.random.normal(size=x.shape)).to(x),
        lambda x: x * random.random(),
    ):
        said = check(lambda x0_hat, draw=draw: (x0_hat + draw(x0_hat)).square().flatten(1).mean(1))
        assert re.search(r"odd: it draws random numbers: its values for the same images change from .* to ", said)


def test_random_numbers_of_an_own_generator_are_a_warning_about_resuming(check):
    generator = torch.Generator().manual_seed(0)
    said = check(lambda x0_hat: mean_square(x0_hat) * torch.rand((), generator=generator))
    assert "keeps a state, or draws random numbers from a generator of its own" in said and "resumed" in said


def test_dropout_in_training_mode_is_named(check):
    net = network(nn.Dropout()).requires_grad_(False)
    said = check(lambda x0_hat: energy(net, x0_hat))
    assert "because of Dropout in training mode in its network 'net' (Sequential): call .eval() on it" in said


@pytest.mark.parametrize(
    "regularizer",
    [
        lambda x0_hat: (x0_hat - x0_hat.mean(0)).square().flatten(1).mean(1),
        lambda x0_hat: mean_square(x0_hat) / mean_square(x0_hat).max(),
        lambda x0_hat: mean_square(x0_hat).cumsum(0),
        lambda x0_hat: F.batch_norm(x0_hat, None, None, training=True).flatten(1).pow(4).mean(1),
    ],
)
def test_statistics_over_the_batch_are_refused(check, regularizer):
    with pytest.raises(UsageError, match=r"depends on the other images of the batch: .* alone, .* together"):
        check(regularizer)


def test_batch_norm_in_training_mode_is_named(check):
    class Loss:
        def __init__(self):
            self.features = network(nn.BatchNorm2d(4)).requires_grad_(False)

        def __call__(self, x0_hat):
            return energy(self.features, x0_hat)

    with pytest.raises(UsageError, match=r"BatchNorm2d in training mode in its network 'features' \(Sequential\)"):
        check(Loss())


def test_other_images_may_share_a_batch_with_rounding(check):
    """A large network on one image and on two: not the same bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 512))
    net.eval().requires_grad_(False)
    assert check(lambda x0_hat: 1 - F.cosine_similarity(net(x0_hat), net(x0_hat.flip(-1)))) == ""


# Networks


def test_a_network_that_changes_is_refused(check):
    net = network(nn.BatchNorm2d(4)).requires_grad_(False).eval()

    class Loss(nn.Module):
        def forward(self, x0_hat):
            net[1].num_batches_tracked.add_(1)
            return energy(net, x0_hat)

    with pytest.raises(UsageError, match=r"its network 'net' \(Sequential\) changes.*\(1\.num_batches_tracked\)"):
        check(Loss())


def test_a_weight_that_is_written_behind_the_back_of_autograd_is_found(check):
    net = network().requires_grad_(False).eval()

    def loss(x0_hat):
        net[0].weight.data.mul_(1 + 1e-6)
        return energy(net, x0_hat)

    with pytest.raises(UsageError, match=r"changes when it is called \(0\.weight\)"):
        check(loss)


def test_batch_norm_in_training_mode_is_found_although_one_image_shows_no_dependence(check):
    net = network(nn.BatchNorm2d(4)).requires_grad_(False)
    one = data_of(np.random.default_rng(0).normal(size=(1, 1, 8, 8)))
    with pytest.raises(UsageError, match=r"running_mean"):
        check(lambda x0_hat: energy(net, x0_hat), data=one)


def test_a_network_that_is_not_frozen_is_a_warning(check):
    net = network()
    said = check(lambda x0_hat: energy(net, x0_hat))
    assert "its network 'net' (Sequential) is not frozen: call .eval().requires_grad_(False) on it" in said
    assert len(said.splitlines()) == 1


class Undone(nn.Module):
    """Undoes what the loss does to it."""

    def __init__(self):
        super().__init__()
        self.net = network(nn.Dropout())

    def forward(self, x0_hat):
        self.net.train().requires_grad_(True)
        return energy(self.net, x0_hat)


def test_a_network_that_thaws_itself_is_a_warning(check):
    said = check(Undone())
    assert "Dropout in training mode" in said and "is not frozen" in said


GLOBAL = network()


def features(x0_hat):
    return GLOBAL(x0_hat)


def by_helper(x0_hat):
    return features(x0_hat).square().flatten(1).mean(1)


class Holder:
    def __init__(self, net):
        self.nets = {"first": [net]}

    def loss(self, x0_hat):
        return energy(self.nets["first"][0], x0_hat)


class Member(nn.Module):
    def __init__(self, net, hidden):
        super().__init__()
        self.net, self.hidden = net, [hidden]

    def forward(self, x0_hat):
        return energy(self.net, x0_hat) + energy(self.hidden[0], x0_hat)


def test_networks_are_found_where_people_put_them():
    net, other = network(), network()
    assert list(find_networks(lambda x0_hat: energy(net, x0_hat)).values()) == [net]
    assert list(find_networks(partial(energy, net)).values()) == [net]
    assert list(find_networks(Holder(net).loss).values()) == [net]
    assert list(find_networks(by_helper).values()) == [GLOBAL]
    member = Member(net, other)
    assert set(find_networks(member).values()) == {member, other}
    assert find_networks(mean_square) == {}
    assert all(find_networks(getattr(regularizers, name)) == {} for name in regularizers.__all__)


# Precision


def in_bfloat16(x0_hat):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.conv2d(x0_hat, torch.ones(1, 1, 3, 3)).float().square().flatten(1).mean(1)


def test_half_precision_is_a_warning_with_its_line(check):
    assert re.search(r"computes in bfloat16 in test_checks\.py, line \d+: return F\.conv2d", check(in_bfloat16))
    half = network().half().eval().requires_grad_(False)
    said = check(lambda x0_hat: energy(half, x0_hat.half()).float())
    assert "computes in float16 in" in said


def test_under_the_autocast_of_the_run_it_computes_in_float32(check):
    seen = []

    def loss(x0_hat):
        product = x0_hat @ x0_hat
        seen.append((product.dtype, torch.is_autocast_enabled("cpu")))
        return product.flatten(1).mean(1)

    assert check(loss, mixed_precision="bf16") == ""
    assert set(seen) == {(torch.float32, False)}


# The page

FAULTS = {
    "It is cut off by": under_no_grad,
    "it is not finite for": lambda x0_hat: (-1 - x0_hat.square()).sqrt().flatten(1).mean(1),
    "depends on the other images of the batch": lambda x0_hat: (x0_hat - x0_hat.mean(0)).square().flatten(1).mean(1),
    "is not frozen": by_helper,
    "it draws random numbers": lambda x0_hat: mean_square(x0_hat) * torch.rand(()),
    "it computes in": in_bfloat16,
    "its gradient is not finite on": lambda x0_hat: (x0_hat - x0_hat).sqrt().flatten(1).mean(1),
    "its gradient is 0 on all images tried": lambda x0_hat: x0_hat.round().flatten(1).mean(1),
}
TESTED_ABOVE = {"changes when it is called", "it keeps a state, or draws random numbers from a generator of its own"}


def test_messages_are_those_of_the_page(check):
    page = (Path(__file__).parents[1] / "docs" / "own_regularizer.md").read_text()
    table = page.split("## What is checked before the first step")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)) == FAULTS.keys() | TESTED_ABOVE
    for message, regularizer in FAULTS.items():
        try:
            said = check(regularizer)
        except UsageError as error:
            said = str(error)
        assert message in said


# L' on the data


def test_the_mean_and_spread_are_those_of_the_images(data):
    terms = (Term(mean_square, 1.0), Term(regularizers.sparsity, 1.0))
    found = check_terms(terms, scheduler_of(), data_of(np.arange(1000.0).reshape(1000, 1, 1, 1)))
    values = (np.linspace(0, 999, 64).astype(int) / 999 * 2 - 1) ** 2
    assert list(found) == ["mean_square", "sparsity"]
    assert found["mean_square"].images == 64
    assert found["mean_square"].mean == pytest.approx(values.mean(), rel=1e-5)
    assert found["mean_square"].standard_deviation == pytest.approx(values.std(ddof=1), rel=1e-5)
    spread = values.std(ddof=1)
    expected = f"{values.mean():.3g} ± {spread / 8:.1g} (standard deviation {spread:.2g}, 64 images)"
    assert str(found["mean_square"]) == expected


def test_a_run_tells_what_its_losses_are_on_the_data(train, capsys):
    train("--regularizer", "total_variation", "sparsity", "--max_train_steps", 1)
    told = capsys.readouterr().out
    for name in ("total_variation", "sparsity"):
        line = rf"^data       {name} 0\.\d+ ± 0\.\d+ \(standard deviation 0\.\d+, 64 images\)$"
        assert re.search(line, told, re.MULTILINE)


def test_one_image_has_no_spread():
    found = check_terms((Term(mean_square, 1.0),), scheduler_of(), data_of(np.eye(8)[None, None]))
    assert str(found["mean_square"]) == "1 (1 image)"


def test_a_slow_regularizer_is_measured_on_fewer_images(data):
    def slow(x0_hat):
        time.sleep(0.05 * len(x0_hat))
        return mean_square(x0_hat)

    assert check_terms((Term(slow, 1.0),), scheduler_of(), data)["slow"].images == 16


def test_the_random_numbers_of_the_training_are_left_alone(data):
    def drawing(x0_hat):
        return mean_square(x0_hat) * torch.rand(()) * np.random.random() * random.random()

    def draw():
        return torch.rand(3).tolist(), np.random.random(), random.random()

    drawn = []
    for checked in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        if checked:
            check_terms((Term(drawing, 1.0),), scheduler_of(), data)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_the_networks_and_weights_of_the_user_are_left_as_they_were(data):
    net = network(nn.BatchNorm2d(4)).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_terms((Term(partial(energy, net), 1.0, name="net"),), scheduler_of(), data)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weightings_are_checked_on_the_whole_schedule(data):
    def fails_at_the_end(level):
        return torch.where(level.timesteps < 990, 1.0, torch.nan)

    with pytest.raises(UsageError, match="--regularizer odd: the weighting of 'odd' is not finite at timesteps 990"):
        check_terms((Term(mean_square, 1.0, fails_at_the_end, "odd"),), scheduler_of(), data)


def test_what_is_checked_is_what_the_training_uses(data):
    """The checks look at the regularizer as X0Regularization leaves it, and leave it ready for that."""
    net = network(nn.BatchNorm2d(4))

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x0_hat):
            return energy(self.net, x0_hat)

    term = Term(Energy(), 1.0)
    check_terms((term,), scheduler_of(), data)
    (network_of_training,) = X0Regularization(scheduler_of(), [term]).networks
    assert not any(module.training for module in network_of_training.modules())


def test_seeding_the_global_random_numbers_is_refused(check):
    def seeding(x0_hat, /):
        torch.manual_seed(0)
        return (x0_hat * torch.rand_like(x0_hat)).flatten(1).mean(1)

    with pytest.raises(UsageError, match=r"odd: it seeds the global random numbers.*torch.Generator of its own"):
        check(seeding)


def test_working_in_place_is_refused(check):
    def clamped(x0_hat, /):
        return x0_hat.clamp_(-0.5, 0.5).flatten(1).square().mean(1)

    with pytest.raises(UsageError, match="'odd' modifies its arguments in place"):
        check(clamped)
