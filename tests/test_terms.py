"""What terms must be, and what is said of those that are not."""

import diffusers
import pytest
import torch
from losses import images, loss_and_gradients, mean_square, scheduler_of
from torch import nn

from reg_diffusers import Ddim, every, weighting
from reg_diffusers.objective import RegularizedLoss, Term, X0Regularization
from reg_diffusers.regularizers import total_variation

pytestmark = pytest.mark.training

# What a regularizer must be


@pytest.mark.parametrize(
    ("regularizer", "complaint"),
    [
        (lambda x: x.mean(), r"one value per image.*shape \(4,\).*shape \(\)"),
        (lambda x: x.mean((2, 3)), r"one value per image.*shape \(4, 1\)"),
        (lambda x: x.mean((1, 2, 3))[:2], r"one value per image.*shape \(2,\)"),
        (lambda x: 1.0, "one value per image.*float"),
        (lambda x: None, "one value per image.*NoneType"),
        (lambda x: mean_square(x).detach().numpy(), "one value per image.*ndarray"),
        (lambda x: mean_square(x).detach(), "detached"),
        (lambda x: torch.zeros(len(x)), "detached"),
    ],
)
def test_a_regularizer_that_returns_something_else_is_refused_by_name(regularizer, complaint):
    loss_fn = RegularizedLoss(scheduler_of(), [Term(regularizer, 1.0, weighting.constant, name="odd one")])
    with pytest.raises(ValueError, match=f"(?s)'odd one'.*{complaint}"):
        loss_and_gradients(loss_fn)


def test_without_gradients_nothing_is_detached():
    loss_fn = RegularizedLoss(scheduler_of(), [Term(mean_square, 1.0, weighting.constant)])
    with torch.no_grad():
        result = loss_fn(lambda sample, t: sample, images(4, 1, 3, 2))
    assert result.terms["mean_square"] > 0


def test_missing_context_is_named():
    def needy(x0_hat, *, mask, depth):
        return x0_hat.flatten(1).mean(1)

    needy.needs = ("original_samples", "mask", "depth")
    loss_fn = RegularizedLoss(scheduler_of(), [Term(needy, 1.0, weighting.constant)])
    with pytest.raises(ValueError, match=r"'needy' needs depth, but the loss was given .*mask"):
        loss_and_gradients(loss_fn, mask=torch.ones(4, 1, 3, 2))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_is_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="weight must be finite"):
        Term(total_variation, weight)


def test_a_term_needs_a_regularizer_and_a_weight_only():
    term = Term(total_variation, weight=0.1)
    assert (term.name, term.weighting) == ("total_variation", weighting.matched)
    assert Term(regularizer=mean_square, weight=1, weighting=weighting.snr, name="size").name == "size"


@pytest.mark.parametrize("names", [("same", "same"), ("denoising",), ("one", "denoising")])
def test_names_must_differ_from_each_other_and_from_denoising(names):
    terms = [Term(mean_square, 1.0, name=name) for name in names]
    for refuse in (RegularizedLoss, X0Regularization):
        with pytest.raises(ValueError, match=r"different names, none .denoising."):
            refuse(scheduler_of(), terms)


# Networks inside regularizers


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(3, 1))

    def forward(self, x0_hat):
        return self.layers(x0_hat).square().flatten(1).mean(1)


def test_a_network_is_frozen_and_passes_the_gradient_on():
    torch.manual_seed(0)
    network, model = Classifier(), nn.Conv2d(1, 1, 3, padding=1)
    loss_fn = RegularizedLoss(scheduler_of(), [Term(network, 1.0, weighting.constant)])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    terms = loss_fn(lambda sample, t: model(sample), images(4, 1, 3, 3, dtype=torch.float32)).terms
    terms["Classifier"].backward()
    assert model.weight.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not [p for p in loss_fn.parameters() if p.requires_grad]


def test_a_network_stays_in_evaluation_mode():
    loss_fn = RegularizedLoss(scheduler_of(), [Term(Classifier(), 1.0), Term(total_variation, 1.0)])
    for module in (loss_fn, loss_fn.regularization, nn.Sequential(loss_fn)):
        module.train()
        assert loss_fn.training
        assert not any(m.training for network in loss_fn.regularization.networks for m in network.modules())
    loss_fn.eval()
    assert not loss_fn.training


def test_a_network_moves_with_the_loss():
    network = Classifier()
    loss_fn = RegularizedLoss(scheduler_of(), [Term(network, 1.0, weighting.constant)]).to(torch.float64)
    assert network.layers[0].weight.dtype == torch.float64
    result = loss_fn(lambda sample, t: sample.clone().requires_grad_(), images(4, 1, 3, 3))
    assert result.loss.dtype == torch.float64


def test_the_model_is_never_a_member_of_the_loss():
    model = nn.Conv2d(1, 1, 1)
    loss_fn = RegularizedLoss(scheduler_of(), [Term(total_variation, 1.0)])
    loss_fn(lambda sample, t: model(sample), images(4, 1, 3, 3, dtype=torch.float32))
    assert not list(loss_fn.parameters())


# Terms that break their contract


@pytest.mark.parametrize(
    "returned, message",
    [
        (torch.tensor(1.0), r"one value per image, \(4,\), not \(\)"),
        (torch.ones(4, 1), r"not \(4, 1\)"),
        (1.0, "not float"),
        (torch.full((4,), float("nan")), "not finite at timesteps"),
        (torch.full((4,), float("inf")), "not finite at timesteps"),
    ],
)
def test_a_weighting_of_another_form_is_refused_by_name(returned, message):
    loss_fn = RegularizedLoss(scheduler_of(), [Term(mean_square, 1.0, lambda level: returned)])
    with pytest.raises(ValueError, match=f"'mean_square'.*{message}"):
        loss_fn(lambda sample, t: sample, images(4, 1, 3, 3))


def test_a_regularizer_may_take_gradients_of_its_own():
    """L' = |grad of mean u^2|^2 = |2 u / n|^2 has a closed form."""

    def slope(x0_hat):
        (gradient,) = torch.autograd.grad(x0_hat.square().flatten(1).mean(1).sum(), x0_hat, create_graph=True)
        return gradient.square().flatten(1).sum(1)

    output = images(4, 1, 3, 3).requires_grad_()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(slope, 1.0, weighting.constant)])
    result = loss_fn(lambda sample, t: output, torch.zeros(4, 1, 3, 3, dtype=output.dtype))
    (gradient,) = torch.autograd.grad(result.terms["slope"], output)
    torch.testing.assert_close(result.terms["slope"], 4 / 81 * output.square().flatten(1).sum(1).mean())
    torch.testing.assert_close(gradient, 8 / 81 * output / 4)


@pytest.mark.parametrize("channels", [1, 6])
def test_a_model_of_other_channels_is_refused(channels):
    with pytest.raises(ValueError, match="model_output has shape"):
        RegularizedLoss(scheduler_of())(
            lambda sample, t: sample[:, :1].expand(-1, channels, -1, -1), images(2, 3, 4, 4)
        )


def test_flow_prediction_needs_a_flow_schedule():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        RegularizedLoss(diffusers.DDPMScheduler(prediction_type="flow_prediction"))(
            lambda sample, t: sample, images(2, 1, 4, 4)
        )


def test_min_snr_with_zero_terminal_snr_and_predicted_noise_is_refused():
    with pytest.raises(ValueError, match="v_prediction"):
        RegularizedLoss(diffusers.DDPMScheduler(rescale_betas_zero_snr=True), snr_gamma=5.0)


def test_strings_and_single_terms_are_refused():
    with pytest.raises(TypeError, match="load_regularizer"):
        Term("total_variation", 0.1)
    with pytest.raises(TypeError, match=r"\[Term"):
        RegularizedLoss(scheduler_of(), Term(mean_square, 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": "matched"}, "load_weighting turns a name into a weighting"),
        ({"weighting": weighting.gated}, r"weighting is the class gated: pass an instance, gated\(...\)"),
        ({"schedule": every}, r"schedule is the class every: pass an instance, every\(...\)"),
        ({"estimator": Ddim}, "estimator is the class Ddim"),
        ({"regularizer": nn.Identity}, "regularizer is the class Identity"),
        ({"weight": "0.1"}, "weight must be a number, AutoWeight or Target, not '0.1'"),
    ],
)
def test_what_is_not_a_part_of_a_term_is_refused_when_the_term_is_made(change, message):
    with pytest.raises(TypeError, match=message):
        Term(**({"regularizer": total_variation, "weight": 0.1} | change))
