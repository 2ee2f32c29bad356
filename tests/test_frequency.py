"""Losses on frequencies: closed forms, Parseval's identity, gradients at 0, bands, targets from data; and SSIM."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers import Term, X0Regularization, diagnose, load_regularizer, needs_of, weighting
from reg_diffusers.prediction import add_noise
from reg_diffusers.regularizers import (
    RadialSpectrum,
    mean_radial_spectrum,
    radial_spectrum,
    spectrum,
    ssim,
    wavelet,
)
from reg_diffusers.regularizers.frequency import _haar

pytestmark = pytest.mark.loss

PAIRED = {
    "complex": spectrum,
    "amplitude": partial(spectrum, kind="amplitude"),
    "log_amplitude": partial(spectrum, kind="log_amplitude"),
    "focal": partial(spectrum, focal=1.0),
    "bands": partial(spectrum, bands=(1.0, 0.5, 2.0)),
    "wavelet": wavelet,
    "wavelet of details": partial(wavelet, levels=1, weights=(0, 2)),
    "huber": partial(wavelet, loss="huber"),
}


def random_images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(size, cycles=1, phase=0.0):
    x = torch.arange(size).double() * 2 * math.pi * cycles / size
    return (x + phase).cos().expand(1, 1, size, size)


def pairs(*shape):
    return random_images(*shape), random_images(*shape, seed=1)


@pytest.fixture(params=PAIRED)
def paired(request):
    return PAIRED[request.param]


# All paired losses


def test_an_image_compared_with_itself_has_the_value_0_and_a_finite_gradient(paired):
    image = random_images(2, 3, 8, 8).requires_grad_()
    value = paired(image, original_samples=image.detach())
    value.sum().backward()
    assert value.abs().max() < 1e-12 and image.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_at_an_image_of_zeros_is_finite(paired, dtype):
    zeros = torch.zeros(2, 1, 8, 8, dtype=dtype, requires_grad=True)
    for original in (torch.zeros(2, 1, 8, 8, dtype=dtype), random_images(2, 1, 8, 8).to(dtype)):
        (gradient,) = torch.autograd.grad(paired(zeros, original_samples=original).sum(), zeros)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted({*PAIRED} - {"focal"}))  # whose weights are detached: see their test
def test_gradients_are_those_of_the_value(name):
    paired, (image, original) = PAIRED[name], pairs(2, 2, 4, 4)
    assert torch.autograd.gradcheck(lambda u: paired(u, original_samples=original), image.requires_grad_())


def test_an_images_value_does_not_depend_on_its_batch(paired):
    images, originals = pairs(4, 3, 8, 12)
    together = paired(images, original_samples=originals)
    alone = torch.cat([paired(u[None], original_samples=v[None]) for u, v in zip(images, originals, strict=True)])
    assert together.shape == (4,)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels", [2, 5])
def test_any_number_of_channels_counts_as_their_mean(paired, channels):
    image, original = pairs(2, 1, 8, 8)
    repeated = paired(image.repeat(1, channels, 1, 1), original_samples=original.repeat(1, channels, 1, 1))
    torch.testing.assert_close(repeated, paired(image, original_samples=original), rtol=1e-12, atol=0)


def test_half_precision_is_computed_in_float32(paired):
    image, original = (images.bfloat16().requires_grad_() for images in pairs(2, 1, 8, 8))
    value = paired(image, original_samples=original.detach())
    value.sum().backward()
    assert value.dtype == torch.float32 and image.grad.dtype == torch.bfloat16 and image.grad.isfinite().all()
    torch.testing.assert_close(value, paired(image.float(), original_samples=original.float()))


def test_a_descent_step_lowers_the_value(paired):
    image, original = pairs(1, 1, 8, 8)
    before = paired(image.requires_grad_(), original_samples=original)
    (gradient,) = torch.autograd.grad(before.sum(), image)
    assert paired(image - 1e-3 * gradient, original_samples=original) < before


def test_they_are_terms_that_need_their_own_images(paired):
    assert needs_of(paired) == ("original_samples",)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    x0, noise, output = (images.float() for images in (*pairs(3, 1, 8, 8), random_images(3, 1, 8, 8, seed=2)))
    times = torch.tensor([10, 100, 300])
    ours = X0Regularization(scheduler, [Term(paired, 0.1, weighting.gated(0.2))])
    result = ours(output.requires_grad_(), times, add_noise(scheduler, x0, noise, times), original_samples=x0)
    result.loss.backward()
    assert result.loss > 0 and output.grad.isfinite().all() and output.grad.abs().max() > 0


# Spectrum


def test_a_shifted_image_has_the_same_amplitudes():
    image = random_images(2, 2, 8, 6)
    for moved in (image.roll((3, 2), (-2, -1)), image.flip((-2, -1))):
        assert spectrum(moved, original_samples=image).min() > 0.1
        for kind in ("amplitude", "log_amplitude"):
            assert spectrum(moved, original_samples=image, kind=kind).max() < 1e-9


def test_the_complex_difference_of_a_wave_is_that_of_its_two_frequencies():
    """a cos(2 pi k x / n) has two coefficients of size a n / 2, among n^2."""
    value = spectrum(0.6 * wave(16, 3), original_samples=torch.zeros(1, 1, 16, 16).double())
    assert value.item() == pytest.approx(2 * 0.6 * 8 / 256, rel=1e-6)


def test_a_factor_in_the_image_is_its_logarithm_in_the_log_amplitude():
    image = 10 + random_images(1, 1, 8, 8)
    value = spectrum(math.e**2 * image, original_samples=image, kind="log_amplitude")
    assert value.item() == pytest.approx(2, abs=1e-4)


def test_smooth_differences_halve_with_the_resolution_and_noise_does_not():
    zeros = {size: torch.zeros(1, 1, size, size).double() for size in (32, 64)}
    coarse, fine = (spectrum(wave(size), original_samples=zero) for size, zero in zeros.items())
    assert (coarse / fine).item() == pytest.approx(2, rel=1e-4)
    coarse, fine = (spectrum(random_images(1, 1, size, size), original_samples=zero) for size, zero in zeros.items())
    assert (coarse / fine).item() == pytest.approx(1, abs=0.1)


def test_by_parseval_the_squared_difference_in_both_bases_is_that_of_the_pixels():
    """Why there is no such loss: it is the denoising loss again."""
    image, original = pairs(2, 2, 8, 8)
    pixels = (image - original).square().flatten(1).sum(1)
    difference = torch.fft.fft2(image - original, norm="ortho")
    torch.testing.assert_close(difference.abs().square().flatten(1).sum(1), pixels)
    averages, *details = _haar(image - original)
    torch.testing.assert_close(sum(band.square().flatten(1).sum(1) for band in (averages, *details)), pixels)


@pytest.mark.parametrize("call", [partial(spectrum, kind="l2"), partial(wavelet, loss="l2")])
def test_the_squared_difference_is_refused_with_the_reason(call):
    with pytest.raises(
        ValueError, match=r"not 'l2'. By Parseval's identity, the squared difference in an orthonormal"
    ):
        call(*pairs(1, 1, 4, 4)[:1], original_samples=random_images(1, 1, 4, 4))


def test_focal_weights_favour_large_errors_keep_the_scale_and_have_no_gradient():
    image = (0.3 * wave(16, 1) + 0.1 * wave(16, 5)).requires_grad_()
    zeros = torch.zeros_like(image)
    gradients = []
    for focal in (0.0, 1.0):
        value = spectrum(image, original_samples=zeros, focal=focal)
        coefficients = torch.fft.fft2(torch.autograd.grad(value, image)[0], norm="ortho").abs()[0, 0, 0]
        gradients.append((coefficients[1] / coefficients[5]).item())
    assert gradients[0] == pytest.approx(1, rel=1e-4)
    assert gradients[1] == pytest.approx(3, rel=1e-4)  # were the weights not detached, the same: see the sum below
    size = torch.fft.fft2(image.detach(), norm="ortho").abs()
    expected = (size**2).mean() / size.mean()
    assert spectrum(image, original_samples=zeros, focal=1.0).item() == pytest.approx(expected.item(), rel=1e-4)
    value = spectrum(image, original_samples=zeros, focal=1.0)
    slope = (torch.autograd.grad(value, image)[0] * image).sum().item()
    assert slope == pytest.approx(value.item(), rel=1e-4)


def test_bands_have_their_own_weights():
    zeros = torch.zeros(1, 1, 16, 16).double()
    low, high = wave(16, 2), wave(16, 7)
    for image, weights in ((low, (1, 0)), (high, (0, 1))):
        plain = spectrum(image, original_samples=zeros)
        torch.testing.assert_close(spectrum(image, original_samples=zeros, bands=weights), plain, rtol=1e-5, atol=0)
        assert spectrum(image, original_samples=zeros, bands=weights[::-1]) < 1e-6
    constant = torch.ones(1, 1, 16, 16).double()
    assert spectrum(constant, original_samples=zeros, bands=(0, 1)) < 1e-6  # the mean is in the first band
    chequers = wave(16, 8) * wave(16, 8).mT
    assert spectrum(chequers, original_samples=zeros, bands=(0, 1)) > 0.05  # the corner in the last


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(spectrum, focal=-1), "focal must be at least 0"),
        (partial(spectrum, bands=()), "bands must be weights"),
        (partial(spectrum, bands=(1, -1)), "finite and at least 0"),
        (partial(wavelet, levels=3), r"divisible by 8, not 12 x 4: use levels=2"),
        (partial(wavelet, levels=0), "needs sizes divisible by"),
        (partial(wavelet, weights=(1, 1)), r"levels \+ 1 = 3 entries, not 2"),
        (partial(wavelet, weights=(1, 1, math.nan)), "weights must be weights that are finite"),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(call, message):
    image = random_images(1, 1, 12, 4)
    with pytest.raises(ValueError, match=message):
        call(image, original_samples=image)
    with pytest.raises(ValueError, match="resize or crop the images to even sizes"):
        wavelet(random_images(1, 1, 5, 5), original_samples=random_images(1, 1, 5, 5))


# Wavelets


def test_the_haar_transform_is_that_of_its_definition():
    a, b, c, d = block = random_images(4)
    bands = _haar(block.reshape(1, 1, 2, 2))
    expected = ((a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2)
    for band, value in zip(bands, expected, strict=True):
        torch.testing.assert_close(band.flatten(), value[None])


def test_a_constant_difference_is_in_the_averages_alone_at_every_resolution():
    for size in (8, 16):
        image, zeros = torch.full((1, 1, size, size), 0.5).double(), torch.zeros(1, 1, size, size).double()
        assert wavelet(image, original_samples=zeros, levels=3).item() == pytest.approx(0.5 / 8)
        assert wavelet(image, original_samples=zeros, levels=3, weights=(0, 1, 1, 1)).item() == 0


def test_weights_go_from_the_averages_to_the_finest_details():
    zeros, stripes = torch.zeros(1, 1, 8, 8).double(), wave(8, 4)  # of period 2: in the finest level alone
    plain = wavelet(stripes, original_samples=zeros)
    assert plain.item() == pytest.approx(0.5)  # two per block of four pixels
    assert wavelet(stripes, original_samples=zeros, weights=(1, 1, 0)).item() == pytest.approx(0, abs=1e-12)
    assert wavelet(stripes, original_samples=zeros, weights=(0, 0, 3)).item() == pytest.approx(1.5)


def test_huber_is_quadratic_for_small_and_absolute_for_large_differences():
    zeros = torch.zeros(1, 1, 2, 2).double()
    for size, expected in ((0.02, 0.02**2 / 0.1), (0.4, 0.4 - 0.025)):
        image = torch.full((1, 1, 2, 2), size / 2).double()  # its average coefficient is `size`
        value = wavelet(image, original_samples=zeros, levels=1, loss="huber")
        assert value.item() == pytest.approx(expected / 4)


# Radial spectrum


def test_the_target_is_the_mean_over_the_data_and_their_values_are_small():
    images = random_images(600, 2, 16, 16)
    target = mean_radial_spectrum(images)
    assert target.shape == (8,)
    expected = torch.stack([mean_radial_spectrum(image[None]) for image in images]).mean(0)
    torch.testing.assert_close(target, expected)
    assert target.abs().max() < 0.3  # white noise of variance 1 has power 1, log 0
    values = radial_spectrum(images, target=target)
    assert values.mean() < 0.1
    assert (radial_spectrum(2 * images, target=target).mean() - math.log(4) ** 2).abs() < 0.1


def test_each_wave_is_in_its_own_band():
    for cycles in range(1, 9):
        assert mean_radial_spectrum(wave(16, cycles).mT).argmax() == cycles - 1
        assert mean_radial_spectrum(wave(16, cycles), bands=4).argmax() == (cycles - 1) // 2
    assert mean_radial_spectrum(wave(16, 8) * wave(16, 8).mT).argmax() == 7  # beyond Nyquist's, in a corner
    assert mean_radial_spectrum(torch.ones(1, 1, 16, 16)).max() < math.log(1.1e-6)  # the mean is in no band


def test_it_has_correct_gradients_any_channels_and_no_mixing_of_images():
    target = [0.1, -0.3]
    image = random_images(3, 2, 4, 5)
    assert torch.autograd.gradcheck(lambda u: radial_spectrum(u, target=target), image.requires_grad_())
    alone = torch.cat([radial_spectrum(u[None], target=target) for u in image])
    torch.testing.assert_close(radial_spectrum(image, target=target), alone, rtol=1e-12, atol=0)
    repeated = radial_spectrum(image[:, :1].repeat(1, 3, 1, 1), target=target)
    torch.testing.assert_close(repeated, radial_spectrum(image[:, :1], target=target))
    half = radial_spectrum(image.bfloat16(), target=target)
    assert half.dtype == torch.float32
    zeros = torch.zeros(1, 1, 4, 4, requires_grad=True)
    radial_spectrum(zeros, target=target).sum().backward()
    assert zeros.grad.isfinite().all()


def test_the_power_of_a_smooth_picture_grows_by_4_with_the_resolution():
    coarse, fine = (mean_radial_spectrum(wave(size), bands=8)[0] for size in (16, 16))
    assert coarse == fine
    ours = [mean_radial_spectrum(wave(size), bands=size // 2)[0].item() for size in (16, 32)]
    power = [n**2 / 4 * 2 / count for n, count in ((16, 4), (32, 4))]  # two of the four frequencies of band 1
    assert ours == pytest.approx([math.log(value) for value in power], abs=1e-6)


def test_the_module_keeps_its_target_and_reads_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = random_images(20, 1, 8, 8).float()
    ours = RadialSpectrum.of(images)
    ours.save("spectrum.pt")
    for again in (RadialSpectrum("spectrum.pt"), load_regularizer("RadialSpectrum('spectrum.pt')")):
        torch.testing.assert_close(again(images), ours(images))
        torch.testing.assert_close(again(images), radial_spectrum(images, target=mean_radial_spectrum(images)))
    assert Term(ours, 0.1).name == "radial_spectrum" and needs_of(ours) == ()
    loss = X0Regularization(DDPMScheduler(), [Term(ours, 0.1)]).to(torch.float64)
    assert ours.target.dtype == torch.float64 and not loss.state_dict()


def test_wrong_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.pt does not exist: write it with RadialSpectrum\.of"):
        RadialSpectrum(tmp_path / "missing.pt")
    torch.save({"target": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="contains no tensor"):
        RadialSpectrum(tmp_path / "other.pt")
    for target in (torch.zeros(2, 2), torch.tensor([math.inf]), []):
        with pytest.raises(ValueError, match="must be finite and"):
            RadialSpectrum(target)
    with pytest.raises(ValueError, match="images of 4 x 5 have at most 2 bands, not 3"):
        radial_spectrum(random_images(1, 1, 4, 5), target=[0, 0, 0])


# From the command line, and what diagnose says


@pytest.mark.parametrize(
    "spec",
    [
        "spectrum(kind='amplitude')",
        "spectrum(focal=1.0, bands=(1, 2))",
        "wavelet(levels=1, loss='huber')",
        "wavelet(weights=[0, 1, 1])",
        "radial_spectrum(target=(0.0, -1.0, -2.0))",
    ],
)
def test_arguments_come_from_the_command_line(spec):
    images, originals = pairs(2, 1, 8, 8)
    regularizer = load_regularizer(spec)
    context = {"original_samples": originals} if needs_of(regularizer) else {}
    assert (regularizer(images, **context) > 0).all()


def smooth_images(number):
    """Random pictures with a spectrum that falls, in about [-1, 1]."""
    f = torch.fft.fftfreq(8, d=1 / 8)
    fall = 1 / (1 + f[:, None] ** 2 + f**2)
    images = torch.fft.ifft2(torch.fft.fft2(random_images(number, 1, 8, 8)) * fall).real
    return (images / images.std() / 2).float()


def test_diagnose_judges_paired_and_unpaired_ones():
    images = smooth_images(120)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    for term in (Term(RadialSpectrum.of(images), 0.01), Term(spectrum, 0.1, weighting.gated(0.2))):
        found = diagnose(scheduler, term, images, num_levels=4)
        assert str(found)


# SSIM


def test_ssim_is_that_of_its_formula_in_one_window():
    image, original = (images.tanh() for images in pairs(2, 1, 11, 11))
    x = torch.arange(-5, 6).double()
    window = torch.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    window = window / window.sum()
    u, v = (image + 1) / 2, (original + 1) / 2
    mean_u, mean_v = ((window * values).sum((1, 2, 3)) for values in (u, v))
    var_u, var_v = ((window * values**2).sum((1, 2, 3)) - mean**2 for values, mean in ((u, mean_u), (v, mean_v)))
    covariance = (window * u * v).sum((1, 2, 3)) - mean_u * mean_v
    expected = (2 * mean_u * mean_v + 1e-4) * (2 * covariance + 9e-4)
    expected = expected / ((mean_u**2 + mean_v**2 + 1e-4) * (var_u + var_v + 9e-4))
    torch.testing.assert_close(ssim(image, original_samples=original), 1 - expected, rtol=1e-5, atol=1e-6)


def test_ssim_keeps_the_contract_of_a_paired_loss():
    image, original = (images.tanh() for images in pairs(3, 2, 8, 9))
    ours = partial(ssim, window=5)
    assert ours(image, original_samples=image).abs().max() < 1e-12
    alone = torch.cat([ours(u[None], original_samples=v[None]) for u, v in zip(image, original, strict=True)])
    torch.testing.assert_close(ours(image, original_samples=original), alone, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda u: ours(u, original_samples=original[:1]), image[:1].clone().requires_grad_()
    )
    half = ours(image.bfloat16(), original_samples=original.bfloat16())
    assert half.dtype == torch.float32
    zeros = torch.zeros(1, 1, 8, 8, requires_grad=True)
    ours(zeros, original_samples=torch.zeros(1, 1, 8, 8)).sum().backward()
    assert zeros.grad.isfinite().all()
    for window in (4, 9):
        with pytest.raises(ValueError, match=f"at most the size of the image, 8, not {window}"):
            ssim(image, original_samples=original, window=window)
    assert needs_of(ssim) == ("original_samples",) and load_regularizer("ssim(window=7)").keywords == {"window": 7}
