"""How many operations a step of the loss dispatches, and that none of them waits for an accelerator."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from reg_diffusers import (
    AutoWeight,
    KnownNoise,
    Paired,
    RegularizedLoss,
    Term,
    TermError,
    X0Regularization,
    balance,
    noise_level,
    predict_original_sample,
)
from reg_diffusers.level_table import _TABLES
from reg_diffusers.loss_output import Records
from reg_diffusers.precision import all_finite, full_precision, input_dtype, promoted
from reg_diffusers.prediction import _level_parts
from reg_diffusers.regularizers import isotropic_total_variation, spectrum, total_variation
from reg_diffusers.training.loss_parts import LossParts
from reg_diffusers.views import Affine
from reg_diffusers.weight_table import WeightTable
from reg_diffusers.weighting import alpha_bar, constant, gated, low_noise, matched, snr

pytestmark = pytest.mark.loss


class Operations(TorchDispatchMode):
    """Lists the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind, terms, most",
    [("epsilon", 1, (46, 39)), ("v_prediction", 1, (49, 38)), ("epsilon", 0, (9, 4)), ("sample", 0, (9, 4))],
)
def test_a_step_around_the_network_dispatches_few_operations(kind, terms, most):
    terms = [Term(total_variation, 0.1)] * terms
    loss_fn = RegularizedLoss(DDPMScheduler(prediction_type=kind), terms)
    images, noise, output = torch.randn(3, 8, 3, 16, 16)
    output.requires_grad_()

    def step():
        return loss_fn(lambda sample, timesteps: output, images, noise=noise, timesteps=timesteps).loss

    timesteps = torch.linspace(3, 999, 8).long()
    for _ in range(3):  # the first calls check more
        step().backward()
    output.grad = None
    with Operations() as forward:
        loss = step()
    with Operations() as backward:
        loss.backward()
    assert len(forward.names) <= most[0], forward.names
    assert len(backward.names) <= most[1], backward.names


def test_a_noise_level_is_looked_up():
    scheduler = DDPMScheduler()
    timesteps = torch.tensor([3, 999])
    noise_level(scheduler, timesteps)
    with Operations() as seen:
        noise_level(scheduler, timesteps)
    assert seen.names == ["aten.index_select.default", "aten.unbind.int"]


# The table


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_table_has_the_bits_of_the_formulas(kind):
    scheduler, timesteps = DDPMScheduler(prediction_type=kind), torch.arange(1000).flip(0)[::3]
    level = noise_level(scheduler, timesteps)
    found = (level.timesteps, level.alpha, level.sigma, level.snr, level.denoising_weight)
    assert all(torch.equal(*pair) for pair in zip(found, _level_parts(scheduler, timesteps), strict=True))


def test_the_table_follows_the_scheduler():
    """A change of its table, in place or not, of its configuration, or of its sampling schedule."""
    scheduler, timesteps = DDIMScheduler(), torch.tensor([10, 500])

    def is_up_to_date():
        weight = noise_level(scheduler, timesteps).denoising_weight
        return torch.equal(weight, _level_parts(scheduler, timesteps)[-1])

    assert is_up_to_date()
    scheduler.register_to_config(prediction_type="v_prediction")
    assert is_up_to_date()
    scheduler.alphas_cumprod.mul_(0.5)
    assert is_up_to_date()
    scheduler.alphas_cumprod = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert is_up_to_date()
    (before,) = _TABLES[scheduler].values()
    scheduler.set_timesteps(7)
    assert is_up_to_date()
    (after,) = _TABLES[scheduler].values()
    assert before.levels is not after.levels


def test_a_scheduler_that_cannot_be_a_key_is_computed_each_time():
    scheduler, timesteps = DDPMScheduler(), torch.tensor([10, 500])
    same = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod, config=scheduler.config)
    levels = [noise_level(each, timesteps) for each in (scheduler, same)]
    assert all(torch.equal(getattr(levels[0], name), getattr(levels[1], name)) for name in ("alpha", "sigma", "snr"))


def test_the_table_does_not_keep_its_scheduler_and_serves_inference_and_training():
    scheduler, timesteps = DDPMScheduler(), torch.tensor([10, 500])
    with torch.inference_mode():
        noise_level(scheduler, timesteps)
    output = torch.randn(2, 1, 4, 4, requires_grad=True)
    predict_original_sample(scheduler, output, timesteps, torch.randn(2, 1, 4, 4)).sum().backward()
    held = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert held() is None


class Counted:
    """A weighting with a state."""

    calls = 0

    def __call__(self, level):
        self.calls += 1
        return level.snr * self.calls


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_table_of_a_loss_has_the_bits_of_its_weightings(snr_gamma):
    scheduler, timesteps = DDIMScheduler(prediction_type="v_prediction"), torch.arange(1000).flip(0)[::3]
    weightings = [constant, matched, gated(0.2), alpha_bar, partial(matched, snr0=1.0), low_noise]
    terms = [Term(total_variation, 0.1, weighting, name=str(n)) for n, weighting in enumerate(weightings)]
    table = WeightTable(scheduler, terms, snr_gamma)
    computed = table.at(timesteps)  # the first call makes the table of the scheduler
    looked_up = table.at(timesteps)
    assert computed.weightings == {} and list(looked_up.weightings) == [term.name for term in terms]
    assert (looked_up.factor is None) == (snr_gamma is None) == (computed.factor is None)
    assert snr_gamma is None or torch.equal(looked_up.factor, computed.factor)
    assert all(torch.equal(*pair) for pair in zip(levels_of(looked_up), levels_of(computed), strict=True))
    for term in terms:
        assert torch.equal(looked_up.weightings[term.name], term.weighting(computed.level))
    scheduler.register_to_config(prediction_type="epsilon")
    level = table.in_training(noise_level(scheduler, timesteps))
    assert torch.equal(table.at(timesteps).weightings["1"], matched(level))


def levels_of(weighted):
    level = weighted.level
    return level.timesteps, level.alpha, level.sigma, level.snr, level.denoising_weight


def test_a_weighting_of_ones_own_is_called_for_each_batch():
    counted, images, timesteps = Counted(), torch.randn(2, 1, 4, 4), torch.tensor([10, 500])
    loss_fn = RegularizedLoss(DDPMScheduler(), [Term(total_variation, 0.1, counted)])
    for calls in (1, 2, 3):
        found = loss_fn(lambda sample, timesteps: sample, images, timesteps=timesteps).weightings["total_variation"]
        assert counted.calls == calls
        assert torch.equal(found, calls * noise_level(DDPMScheduler(), timesteps).snr)


def test_a_weighting_that_is_not_finite_everywhere_is_checked_in_each_batch():
    scheduler, images = DDPMScheduler(trained_betas=[0.0, 0.1, 0.2]), torch.randn(2, 1, 4, 4)
    loss_fn = RegularizedLoss(scheduler, [Term(total_variation, 0.1, snr)])
    for _ in range(3):
        loss_fn(lambda sample, timesteps: sample, images, timesteps=torch.tensor([1, 2]))
        with pytest.raises(TermError, match="the weighting of 'total_variation' is not finite at timesteps 0 to 0"):
            loss_fn(lambda sample, timesteps: sample, images, timesteps=torch.tensor([0, 2]))


# Records


def test_records_are_computed_once_and_when_they_are_read():
    calls = []
    records = Records({"b": lambda: torch.tensor(2.0), "a": lambda: calls.append("a") or torch.tensor(1.0)})
    assert list(records) == ["b", "a"] and len(records) == 2 and calls == []
    assert records["a"] == records["a"] == 1 and calls == ["a"]
    assert {name: value.item() for name, value in records.items()} == {"b": 2, "a": 1} and calls == ["a"]
    with pytest.raises(KeyError):
        records["c"]


def test_a_record_of_images_that_were_overwritten_is_refused():
    noise = torch.randn(2, 1, 4, 4)
    loss_fn = RegularizedLoss(DDPMScheduler())
    output = loss_fn(lambda sample, timesteps: 0 * sample, torch.randn(2, 1, 4, 4), noise=noise)
    kept = loss_fn(lambda sample, timesteps: 0 * sample, torch.randn(2, 1, 4, 4), noise=noise)
    expected = noise.square().flatten(1).mean(1)
    torch.testing.assert_close(kept.per_image["denoising"], expected)
    noise.zero_()
    with pytest.raises(RuntimeError, match="per_image was read after the images, noise or output"):
        output.per_image["denoising"]
    torch.testing.assert_close(kept.per_image["denoising"], expected)


# Precision


@pytest.mark.parametrize(
    "values", [[1.0, torch.nan], [1.0, torch.inf], [torch.inf, -torch.inf], [1e38] * 9, [1.0, 2.0]]
)
def test_all_finite_is_isfinite_of_all_even_where_the_sum_overflows(values):
    values = torch.tensor(values)
    assert all_finite(values) == bool(values.isfinite().all())
    assert all_finite(torch.full((100,), 60000.0, dtype=torch.float16))


def test_dtypes_are_promoted_as_in_torch():
    assert promoted(torch.float16, torch.bfloat16) == torch.float32
    assert full_precision(torch.float16) == full_precision() == torch.float32
    assert full_precision(torch.bfloat16, torch.float64) == torch.float64


def test_the_input_has_the_dtype_of_the_first_weight_that_is_a_real_number():
    integers, half = nn.Module(), nn.Conv2d(1, 1, 1, bias=False).half()
    integers.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    nested = nn.Sequential(nn.SiLU(), integers, nn.Sequential(half, nn.Linear(1, 1)))
    sample = torch.zeros(1, dtype=torch.float64)
    for network in (nested, nn.DataParallel(nested), torch.jit.script(half)):
        first = next(weight.dtype for weight in network.parameters() if weight.is_floating_point())
        assert input_dtype(network, sample) == first == torch.float16
    for without in (integers, nn.SiLU(), abs):
        assert input_dtype(without, sample) == torch.float64


# Waiting for an accelerator

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the host waits for a device; meta tensors stand for those of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [value for value in tree_flatten((args, kwargs or {}))[0] if isinstance(value, torch.Tensor)]
        on_device = any(tensor.is_meta for tensor in given)
        name = function.overloadpacket.__name__
        assert not (on_device and name in WAITING), f"{name} waits for the device"
        masks = (
            [place for place in args[1] if place is not None and place.dtype == torch.bool] if name == "index" else []
        )
        assert not any(mask.is_meta for mask in masks), "a mask waits for its count"
        found = function(*args, **(kwargs or {}))
        copied = on_device and isinstance(found, torch.Tensor) and not found.is_meta
        assert not copied, f"{name} copies to the host"
        return found


def on_device(*shape):
    return torch.randn(shape, device="meta")


def step(loss_fn, network, device):
    images, noise = torch.randn(2, 4, 1, 8, 8, device=device)
    timesteps = torch.tensor([5, 100, 400, 900])
    return loss_fn(lambda sample, _: network(sample), images, noise=noise, timesteps=timesteps)


TERMS = {
    "one": [Term(total_variation, 0.1)],
    "paired": [Term(spectrum, 0.1, constant), Term(Paired(lambda a, b: (a - b).abs().mean((1, 2, 3))), 0.1, constant)],
    "shared view": [
        Term(total_variation, 0.1, view=Affine(2.0, 1.0)),
        Term(isotropic_total_variation, 0.1, constant, view=Affine(2.0, 1.0), normalize="active"),
    ],
    "known noise": [Term(total_variation, 0.1, constant, estimator=KnownNoise(0.5))],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["noise", "flow"])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_step_between_two_lines_of_the_log_waits(terms, scheduler, balanced):
    loss_fn = RegularizedLoss(scheduler, TERMS[terms])
    step(loss_fn, nn.Conv2d(1, 1, 3, padding=1), "cpu").loss.backward()  # the first call checks more
    network = nn.Conv2d(1, 1, 3, padding=1, device="meta")
    optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
    names = [term.name for term in TERMS[terms]]
    parts = LossParts(SimpleNamespace(device=torch.device("meta")), names, {})
    for _ in range(2):
        with NoWaiting():
            output = step(loss_fn, network, "meta")
            if balanced:
                output = balance(output, dict.fromkeys(names, 0.1))
                parts.update(output)
            output.loss.backward()
            optimizer.step()
        assert network.weight.grad.is_meta
        optimizer.zero_grad()


def test_an_automatic_weight_does_not_wait():
    """Calls without a measurement; a measurement is made in every tenth."""
    regularization = X0Regularization(DDPMScheduler(), [Term(total_variation, AutoWeight(0.1))]).to("meta")
    timesteps, output = torch.tensor([5, 100, 400, 900]), on_device(4, 1, 8, 8).requires_grad_()
    for number in range(3):
        with NoWaiting() if number else torch.enable_grad():
            found = regularization(output, timesteps, on_device(4, 1, 8, 8), original_samples=on_device(4, 1, 8, 8))
            found.loss.backward()


def test_the_mode_sees_what_waits():
    values = on_device(3)
    for waiting in (
        lambda: values.nonzero(),
        lambda: bool(values.sum()),
        lambda: values.cpu(),
        lambda: values[values > 0],
    ):
        with NoWaiting(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            waiting()
