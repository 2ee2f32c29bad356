"""The loss with gradients taken at the network's output: the same update, and products that tell parts apart."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from in_processes import in_processes
from losses import TIMESTEPS, images, mean_square, scheduler_of
from torch import nn

from reg_diffusers import LossOutput, RegularizedLoss, Term, X0Regularization
from reg_diffusers.balancing import balance
from reg_diffusers.regularizers import total_variation
from reg_diffusers.weighting import constant, low_noise

pytestmark = pytest.mark.loss

TERMS = (Term(total_variation, 0.3, constant), Term(mean_square, 0.2, low_noise, "energy"))
WEIGHTS = {"total_variation": 0.3, "energy": 0.2}


class Network(nn.Module):
    """A convolution that knows the time; 64 bits unless autocast says otherwise."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 1, 3, padding=1, dtype=dtype)
        self.time = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, sample, timesteps):
        return (self.convolution(sample) + self.time * timesteps.reshape(-1, 1, 1, 1) / 1000,)


def batch(number=4, dtype=torch.float64):
    original, noise = images(2, number, 1, 5, 4, dtype=dtype)
    return original, {"noise": noise, "timesteps": torch.tensor(TIMESTEPS).repeat(number // 4)}


def gradients_of(loss, network):
    network.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("options", [{}, {"snr_gamma": 5.0}])
def test_its_value_and_gradients_are_those_of_the_loss_itself(kind, options):
    loss_fn, network = RegularizedLoss(scheduler_of(kind), TERMS, **options), Network()
    original, drawn = batch()
    plain, balanced = (loss_fn(network, original, **drawn) for _ in range(2))
    balanced = balance(balanced, WEIGHTS)
    torch.testing.assert_close(balanced.loss, plain.loss, rtol=1e-12, atol=0)
    expected, found = gradients_of(plain.loss, network), gradients_of(balanced.loss, network)
    assert all(gradient.any() for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_the_weights_are_those_given_and_may_be_tensors():
    loss_fn, network = RegularizedLoss(scheduler_of("sample"), TERMS), Network()
    heavy = RegularizedLoss(scheduler_of("sample"), [Term(total_variation, 7.0, constant)])
    original, drawn = batch()
    given = {"total_variation": torch.tensor(7.0, dtype=torch.float64), "energy": 0.0}
    balanced = balance(loss_fn(network, original, **drawn), given)
    expected = gradients_of(heavy(network, original, **drawn).loss, network)
    torch.testing.assert_close(gradients_of(balanced.loss, network), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_a_half_precision_output_survive_until_they_are_scaled(dtype):
    original, noise = torch.randn(2, 4, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    loss_fn, scale = RegularizedLoss(scheduler_of("epsilon"), [Term(total_variation, 0.1)]), 2**16

    def gradient(of):
        shift = torch.zeros(4, 1, 512, 512, requires_grad=True)

        def network(sample, timesteps):
            return (0.99 * noise + shift).to(dtype)

        output = loss_fn(network, original, noise=noise, timesteps=torch.tensor([50, 100, 200, 300]))
        (of(output).loss * scale).backward()
        return shift.grad / scale

    plain = gradient(lambda output: output)
    balanced = gradient(lambda output: balance(output, {"total_variation": 0.1}))
    torch.testing.assert_close(balanced, plain, rtol=0.02, atol=float(plain.abs().max()) * 1e-3)


def test_the_extra_part_alone_can_be_balanced():
    regularization, network = X0Regularization(scheduler_of("sample"), TERMS), Network()
    original, drawn = batch()
    output = network(original, drawn["timesteps"])[0]
    expected = gradients_of(regularization(output, drawn["timesteps"], original).loss, network)
    output = network(original, drawn["timesteps"])[0]
    balanced = balance(regularization(output, drawn["timesteps"], original), WEIGHTS)
    torch.testing.assert_close(gradients_of(balanced.loss, network), expected, rtol=1e-6, atol=1e-12)


def test_each_regularizer_is_differentiated_once_and_the_network_not_until_backward():
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(context, name, value):
            context.name = name
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            passes.append(context.name)
            return None, gradient

    def counted(x0_hat):
        return mean_square(Counted.apply("L'", x0_hat))

    network = Network()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(counted, 1.0, constant, "counted")])
    original, drawn = batch()

    def model(sample, timesteps):
        return (Counted.apply("network", network(sample, timesteps)[0]),)

    balanced = balance(loss_fn(model, original, **drawn), {"counted": 1.0})
    assert passes == ["L'"]
    balanced.loss.backward()
    assert passes == ["L'", "network"]


def test_the_graph_of_the_terms_is_freed_before_the_network_is_differentiated():
    held = []

    def holding(x0_hat):
        inner = x0_hat.exp()
        held.append(weakref.ref(inner))
        return inner.square().flatten(1).mean(1)

    network = Network()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(holding, 1.0, constant), TERMS[0]])
    original, drawn = batch()
    balanced = balance(loss_fn(network, original, **drawn), {"holding": 1.0, "total_variation": 1.0})
    gc.collect()
    assert balanced.loss.requires_grad and held[0]() is None


def test_products_are_those_of_each_image_and_independent_of_the_batch():
    loss_fn, network = RegularizedLoss(scheduler_of("sample"), TERMS), Network()
    original, drawn = batch(8)
    together = balance(loss_fn(network, original, **drawn), WEIGHTS)
    halves = [
        balance(loss_fn(network, original[part], **{name: value[part] for name, value in drawn.items()}), WEIGHTS)
        for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(together.products, torch.cat([half.products for half in halves]), rtol=1e-6, atol=0)
    assert together.products.shape == (8, 3, 3)
    first, second = together.gradients["denoising"] * 8, together.gradients["energy"] * 8
    torch.testing.assert_close(together.products[:, 0, 2], (first * second).flatten(1).sum(1))
    high_noise = drawn["timesteps"] >= 200
    assert not together.products[high_noise][:, 2].any() and together.products[~high_noise][:, 2, 2].all()


def test_values_of_each_image_are_handed_out():
    loss_fn, network = RegularizedLoss(scheduler_of("sample"), TERMS), Network()
    original, drawn = batch()
    output = loss_fn(network, original, **drawn)
    expected = (output.model_output - original).square().flatten(1).mean(1).detach()
    torch.testing.assert_close(output.per_image["denoising"], expected)
    torch.testing.assert_close(output.per_image["denoising"].mean(), output.terms["denoising"].detach())
    torch.testing.assert_close(output.per_image["energy"][:2], mean_square(output.model_output)[:2].detach())
    assert output.per_image["energy"][2:].isnan().all() and not output.per_image["energy"].requires_grad
    assert output.weightings["energy"].tolist() == [1, 1, 0, 0]


def test_an_image_that_is_dropped_spares_the_others_and_is_counted_once():
    def bad(x0_hat, *, is_bad):
        return mean_square(x0_hat) / (1 - is_bad)

    bad.needs = ("is_bad",)
    network, drawn_from = Network(), scheduler_of("sample")
    term, is_bad = Term(bad, 1.0, constant), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    original, drawn = batch()
    plain, balanced = (RegularizedLoss(drawn_from, [term]) for _ in range(2))
    expected = gradients_of(plain(network, original, **drawn, is_bad=is_bad).loss, network)
    output = balance(balanced(network, original, **drawn, is_bad=is_bad), {"bad": 1.0})
    torch.testing.assert_close(gradients_of(output.loss, network), expected, rtol=1e-6, atol=1e-12)
    assert int(balanced.regularization.nonfinite.dropped["bad"]) == 1
    assert output.per_image["bad"].isnan().tolist() == [False, True, False, False]


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    network = Network()
    original, drawn = batch()
    output = balance(RegularizedLoss(scheduler_of("sample"), TERMS)(network, original * torch.inf, **drawn), WEIGHTS)
    assert not output.loss.isfinite()
    assert not all(gradient.isfinite().all() for gradient in gradients_of(output.loss, network))
    output = RegularizedLoss(scheduler_of("sample"), TERMS)(network, original, **drawn)
    assert balance(replace(output, loss=output.loss * torch.nan), WEIGHTS).loss.isnan()


def test_what_cannot_be_balanced_is_refused():
    loss_fn, network = RegularizedLoss(scheduler_of("sample"), TERMS), Network()
    original, drawn = batch()
    output = loss_fn(network, original, **drawn)
    with pytest.raises(ValueError, match="energy"):
        balance(output, {"total_variation": 1.0})
    with pytest.raises(ValueError, match="model_output"):
        balance(LossOutput(output.loss, output.terms), WEIGHTS)
    with torch.no_grad(), pytest.raises(ValueError, match="attached"):
        balance(loss_fn(network, original, **drawn), WEIGHTS)


# As accelerate trains


def updated(balanced, accumulation=1, **options):
    """The gradients of a step of 8 images on each process, by accelerate, with or without `balance`."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        **options,
    )
    network = Network(torch.float32)
    prepared, _ = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    loss_fn = RegularizedLoss(scheduler_of(), TERMS)
    start = 8 * accelerator.process_index
    original, drawn = batch(16, torch.float32)
    for part in torch.arange(start, start + 8).chunk(accumulation):
        with accelerator.accumulate(prepared):
            output = loss_fn(prepared, original[part], **{name: value[part] for name, value in drawn.items()})
            loss = balance(output, WEIGHTS).loss if balanced else output.loss
            accelerator.backward(loss)
    return [parameter.grad.clone() for parameter in network.parameters()]


def compare_updates(**options):
    expected, found = updated(False, **options), updated(True, **options)
    assert all(gradient.any() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"mixed_precision": "bf16"}], ids=str)
def test_updates_are_the_same_through_accelerate(options):
    compare_updates(**options)


@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"mixed_precision": "bf16"}], ids=str)
def test_updates_are_the_same_in_two_processes(options):
    in_processes(partial(compare_updates, **options))
