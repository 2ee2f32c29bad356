"""A loop that hides x_t: what its network is given and returns is observed in a block."""

import gc
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.utils.checkpoint import checkpoint

from reg_diffusers import Term, X0Regularization, add_noise, weighting
from reg_diffusers.regularizers import sparsity

pytestmark = pytest.mark.loss

FLOW = FlowMatchEulerDiscreteScheduler()


class Network(nn.Module):
    """Returns a tuple, and takes its arguments by position or by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, hidden_states, timestep, mask=None):
        return (self.layer(hidden_states),)


class Diffusion:
    """Makes x_t inside, and calls the network as its kind does."""

    def __init__(self, call, calls=1):
        self.call, self.calls = call, calls

    def __call__(self, images):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images.shape, generator=generator)
        self.timesteps = torch.tensor([900.0, 100.0])
        self.x_t = add_noise(FLOW, images, noise, self.timesteps)
        for _ in range(self.calls):
            self.output = self.call(self.x_t, self.timesteps)[0]
        return (self.output - (noise - images)).square().mean()


CALLS = {
    "by position": lambda model: lambda x_t, timesteps: model(x_t, timesteps),
    "by name": lambda model: lambda x_t, timesteps: model(mask=None, timestep=timesteps, hidden_states=x_t),
    "mixed": lambda model: lambda x_t, timesteps: model(x_t, timestep=timesteps),
}


def regularization():
    return X0Regularization(FLOW, [Term(sparsity, 0.1, weighting.constant)])


@pytest.fixture
def images():
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", CALLS)
def test_the_loss_is_that_of_what_the_loop_hides(how, images):
    model, ours = Network(), regularization()
    diffusion = Diffusion(CALLS[how](model))
    with ours.watch(model) as seen:
        loss = diffusion(images)
        extra = ours(*seen).loss
        assert seen.sample is diffusion.x_t and seen.model_output is diffusion.output
    (loss + extra).backward()
    found = model.layer.weight.grad.clone()
    model.zero_grad()
    (diffusion(images) + ours(diffusion.output, diffusion.timesteps, diffusion.x_t).loss).backward()
    torch.testing.assert_close(found, model.layer.weight.grad)


def test_a_forward_repeated_by_checkpointing_in_the_backward_is_ignored(images):
    model, ours = Network(), regularization()
    diffusion = Diffusion(lambda x_t, timesteps: checkpoint(model, x_t, timesteps, use_reentrant=False))
    with ours.watch(model) as seen:
        (diffusion(images) + ours(*seen).loss).backward()
        assert seen.model_output is diffusion.output
    assert model.layer.weight.grad.abs().sum() > 0


def test_a_second_call_is_refused_unless_the_last_is_wanted(images):
    model, ours = Network(), regularization()
    with pytest.raises(ValueError, match=r"called a second time: watch\(model, call=-1\)"), ours.watch(model):
        Diffusion(model, calls=2)(images)
    diffusion = Diffusion(model, calls=2)
    with ours.watch(model, call=-1) as seen:
        diffusion(images)
        assert seen.model_output is diffusion.output


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_network_is_watched_as_the_loop_calls_it(wrap, images):
    wrapped, ours = wrap(Network()), regularization()
    diffusion = Diffusion(wrapped)
    with ours.watch(wrapped) as seen:
        diffusion(images)
        torch.testing.assert_close(seen.sample, diffusion.x_t)
        assert ours(*seen).loss > 0


def test_nothing_is_kept_after_the_block_and_no_hook_stays(images):
    model, ours = Network(), regularization()
    diffusion = Diffusion(model)
    with ours.watch(model) as seen:
        diffusion(images)
        x_t = weakref.ref(diffusion.x_t)
    del diffusion
    gc.collect()
    assert x_t() is None and not model._forward_hooks
    with pytest.raises(ValueError, match="releases the tensors at the end of its block"):
        assert seen.sample is None
    with pytest.raises(KeyError), ours.watch(model):
        raise KeyError
    assert not model._forward_hooks


class Labelled(Network):
    """Has class labels, as many as timesteps, in the place where most networks have the time."""

    def forward(self, x, labels, t):
        return super().forward(x, t)


class Reversed(Network):
    def forward(self, t, x):
        return super().forward(x, t)


@pytest.mark.parametrize(
    "model, call",
    [
        (Labelled(), lambda model, x_t, times: model(x_t, torch.tensor([7, 7]), times)),
        (Labelled(), lambda model, x_t, times: model(x_t, torch.tensor([7, 7]), t=times)),
        (Reversed(), lambda model, x_t, times: model(times, x_t)),
        (torch.nn.DataParallel(Reversed(), device_ids=[]), lambda model, x_t, times: model(x=x_t, t=times)),
    ],
)
def test_names_count_more_than_places(model, call, images):
    diffusion = Diffusion(lambda *given: call(model, *given))
    with regularization().watch(model) as seen:
        diffusion(images)
        assert seen.sample is diffusion.x_t and seen.timesteps is diffusion.timesteps


def test_what_cannot_be_watched_is_refused(images):
    ours = regularization()
    with pytest.raises(ValueError, match="Network has not been called in the block"), ours.watch(Network()) as seen:
        ours(*seen)
    with pytest.raises(TypeError, match="the network, an"), ours.watch(lambda x: x):
        pass
    with pytest.raises(ValueError, match="call must be 0"), ours.watch(Network(), call=1):
        pass
    other = nn.Linear(1, 1)
    message = "watch: no timesteps among the arguments of Linear, 1 by position"
    with pytest.raises(ValueError, match=message), ours.watch(other):
        other(torch.zeros(1, 1))
