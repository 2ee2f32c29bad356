"""What `diagnose` finds: closed forms on Gaussian data, verdicts on images whose answer is known, the command."""

import json
import subprocess
import sys
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reg_diffusers import (
    AffineSchedule,
    Ddim,
    KnownNoise,
    MonteCarlo,
    RegDDPMPipeline,
    Term,
    TermError,
    diagnose,
    judge,
    noise_level,
    one_step,
    regularizers,
    weighting,
)
from reg_diffusers.cli import main
from reg_diffusers.regularizers import physics
from reg_diffusers.term import score
from reg_diffusers.views import DecodedImage

pytestmark = pytest.mark.loss

SIZE = 6
EPSILON = DDPMScheduler()
VELOCITY = DDPMScheduler(prediction_type="v_prediction")


def gradient_matrix():
    """A with gradient_energy(x) = x^T A x."""
    basis = torch.eye(SIZE**2, dtype=torch.float64).view(-1, 1, SIZE, SIZE)
    shifted = [regularizers.gradient_energy(basis[i] + basis) for i in range(SIZE**2)]
    alone = regularizers.gradient_energy(basis)
    return (torch.stack(shifted) - alone[:, None] - alone) / 2


@pytest.fixture(scope="module")
def gaussian():
    """Gaussian images that are smooth, with their mean and covariance."""
    place = torch.arange(SIZE, dtype=torch.float64)
    line = torch.exp(-((place[:, None] - place) ** 2) / 4)
    covariance = 0.2 * torch.kron(line, line) + 0.002 * torch.eye(SIZE**2, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    samples = torch.randn(6000, SIZE**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (samples @ factor.T - 0.2).view(-1, 1, SIZE, SIZE).float(), covariance


@pytest.fixture(scope="module")
def diagnosis(gaussian):
    return diagnose(EPSILON, Term(regularizers.gradient_energy, 0.1), gaussian[0], num_levels=12)


def closed_forms(diagnosis, covariance):
    """Gain and (remaining covariance) of the best guess at each level."""
    for level in diagnosis.levels:
        alpha = (level.snr / (1 + level.snr)) ** 0.5
        noisy = alpha**2 * covariance + (1 - alpha**2) * torch.eye(SIZE**2, dtype=torch.float64)
        gain = alpha * covariance @ torch.linalg.inv(noisy)
        yield level, alpha * gain @ covariance  # covariance of the guesses


def test_estimates_agree_with_the_closed_form_on_gaussian_data(gaussian, diagnosis):
    """Where nothing but the mean is known, L' of its own error counts, too: that of an image through their number."""
    _, covariance = gaussian
    energy, size = gradient_matrix(), SIZE**2
    for level, of_guess in closed_forms(diagnosis, covariance):
        best = level.best
        mean = torch.full((size,), -0.2, dtype=torch.float64)
        value = (mean @ energy @ mean + (energy * of_guess).sum()).item()
        of_mean = (energy * covariance).sum().item() / diagnosis.images
        gap = ((energy * (of_guess - covariance)).sum()).item()
        error = ((covariance - of_guess).trace() / size).item()
        assert abs(best.value - value) < 4 * best.value_error + 0.02 * value + 2 * of_mean
        assert abs(best.gap - gap) < 4 * best.gap_error + 0.02 * abs(gap)
        assert best.error == pytest.approx(error, rel=0.1)
        assert abs(best.cosine) < 4 * best.cosine_error + 0.02  # the error of a mean is uncorrelated with all else


def test_displacement_and_rise_agree_with_the_closed_form(gaussian, diagnosis):
    _, covariance = gaussian
    energy, size, weight = gradient_matrix(), SIZE**2, 0.1
    rise, loss = 0.0, 0.0
    for level, of_guess in closed_forms(diagnosis, covariance):
        snr = torch.tensor([level.snr])
        tau = weight * weighting.matched(noise_level_of(snr)).item() * size / (2 * level.snr)
        away = torch.eye(size) - torch.linalg.inv(torch.eye(size) + 2 * tau * energy)
        square = ((away @ of_guess @ away.T).trace() / size).item()  # a constant mean image is not moved
        assert level.displacement * diagnosis.spread == pytest.approx(square**0.5, rel=0.1, abs=1e-6)
        rise += level.training_share * level.snr * square
        loss += level.training_share * level.snr * (covariance - of_guess).trace().item() / size
    assert diagnosis.asked.rise == pytest.approx(rise / loss, rel=0.15)


@pytest.mark.parametrize("name", ["snr", "constant", "matched"])
def test_few_levels_predict_the_rise_over_all_timesteps(gaussian, name):
    """The rise is a sum over the whole schedule; eight levels in place of 100 give the same, by interpolation."""
    images, covariance = gaussian
    energy, size, weight = gradient_matrix(), SIZE**2, 0.1
    levels = noise_level(EPSILON, torch.arange(0, 1000, 10))
    lambdas, rise, loss = getattr(weighting, name)(levels).double(), 0.0, 0.0
    identity = torch.eye(size, dtype=torch.float64)
    for alpha, snr, factor in zip(levels.alpha.double(), levels.snr.double(), lambdas, strict=True):
        of_guess = (
            alpha**2 * covariance @ torch.linalg.inv(alpha**2 * covariance + (1 - alpha**2) * identity) @ covariance
        )
        away = identity - torch.linalg.inv(identity + weight * factor * size / snr * energy)
        rise += snr * (away @ of_guess @ away.T).trace()
        loss += snr * (covariance - of_guess).trace()
    term = Term(regularizers.gradient_energy, weight, getattr(weighting, name))
    found = diagnose(EPSILON, term, images, num_levels=8, timesteps=levels.timesteps)
    assert found.asked.rise == pytest.approx((rise / loss).item(), rel=0.1)


def noise_level_of(snr):
    from reg_diffusers import NoiseLevel

    return NoiseLevel(torch.zeros(1), (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt(), snr, snr)


def test_an_affordable_weight_costs_what_was_said(gaussian, diagnosis):
    for share, costs in diagnosis.affordable.items():
        assert {cost.weighting for cost in costs} >= {"matched", "constant"}
        for cost in costs:
            assert cost.rise == pytest.approx(share, rel=1e-6)
    best = diagnosis.affordable[0.05][0]
    again = diagnose(
        EPSILON, Term(regularizers.gradient_energy, best.weight, getattr(weighting, best.weighting)), gaussian[0],
        num_levels=12,
    )  # fmt: skip
    assert again.asked.rise == pytest.approx(0.05, rel=1e-4)
    assert again.asked.fall == pytest.approx(best.fall, rel=1e-4)


def test_ratios_are_those_of_the_design(diagnosis):
    """For noise prediction and a constant weight the ratio is weight / SNR; 2.5e4 at the last step of the schedule."""
    last = diagnosis.levels[-1]
    assert last.timestep == 999
    assert last.ratio_constant / 0.1 == pytest.approx(2.5e4, rel=0.02)
    assert last.ratio == 0


@pytest.mark.slow
def test_shares_add_up_and_low_noise_decides_most(gaussian):
    """On the schedule of Stable Diffusion t < 200 decides 95 % of a sample."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    found = diagnose(scheduler, Term(regularizers.sparsity, 0.1), gaussian[0][:400], num_levels=60)
    assert sum(level.training_share for level in found.levels) == pytest.approx(1)
    assert sum(level.decided_share for level in found.levels) == pytest.approx(1)
    low = sum(level.decided_share for level in found.levels if level.timestep < 200)
    assert low == pytest.approx(0.95, abs=0.01)


def test_flow_matching_is_diagnosed_too(gaussian):
    found = diagnose(FlowMatchEulerDiscreteScheduler(), Term(regularizers.sparsity, 0.1), gaussian[0][:400])
    assert 15 <= len(found.levels) <= 20
    assert all(np.isfinite([level.best.error, level.ratio, level.displacement]).all() for level in found.levels)


@pytest.mark.parametrize("chosen", [weighting.gated(3), weighting.signal_power(2), weighting.snr])
def test_every_weighting_can_be_diagnosed(gaussian, chosen):
    """Those with arguments are named with them; those without are compared with each other."""
    found = diagnose(EPSILON, Term(regularizers.sparsity, 0.1, chosen), gaussian[0][:300], num_levels=3)
    name = "snr" if chosen is weighting.snr else str(chosen)
    assert found.asked.weighting == name
    assert weighting.matched.__name__ in str(found.affordable)


def test_the_same_seed_says_the_same_and_leaves_the_generator_alone(gaussian):
    before = torch.get_rng_state()
    one, two = (diagnose(EPSILON, Term(regularizers.sparsity, 0.1), gaussian[0][:300], num_levels=4) for _ in range(2))
    assert one == two
    assert torch.equal(before, torch.get_rng_state())


def test_guesses_of_a_model_are_measured_beside_the_best_ones(gaussian):
    """A model that always predicts noise 0 takes the noisy image for the image, up to its scale."""
    found = diagnose(
        EPSILON,
        Term(regularizers.gradient_energy, 0.1),
        gaussian[0][:400],
        model=lambda noisy_samples, timesteps: torch.zeros_like(noisy_samples),
        num_levels=5,
    )
    for level in found.levels:
        assert level.model.error == pytest.approx(1 / level.snr, rel=0.05)
        assert level.model.error > level.best.error
    assert any("the model's own errors" in reason for reason in judge(found).reasons)


def test_min_snr_counts_as_in_the_training(gaussian):
    found = diagnose(EPSILON, Term(regularizers.sparsity, 0.1), gaussian[0][:300], snr_gamma=5, num_levels=6)
    for level in found.levels:
        assert level.denoising_weight == pytest.approx(min(level.snr, 5), rel=1e-5)


def test_the_share_of_the_gradient_under_min_snr_is_that_of_its_losses(gaussian):
    """In x_0 units both gradients are plain; by the model output both have the slope of the parameterization."""
    found = diagnose(
        EPSILON, Term(regularizers.sparsity, 0.1, weighting.constant), gaussian[0][:300], snr_gamma=5, num_levels=4
    )
    for level in found.levels:
        expected = 2 * min(level.snr, 5) * (level.best.error / level.snr) ** 0.5 / SIZE
        assert level.best.denoising_gradient == pytest.approx(expected, rel=1e-4)
        assert level.best.auxiliary_gradient == pytest.approx(0.1 / SIZE / level.snr**0.5, rel=1e-4)


def test_the_share_of_the_gradient_is_that_at_the_model_output(gaussian):
    found = diagnose(EPSILON, Term(regularizers.sparsity, 0.1, weighting.constant), gaussian[0][:300], num_levels=6)
    double = diagnose(EPSILON, Term(regularizers.sparsity, 0.2, weighting.constant), gaussian[0][:300], num_levels=6)
    assert double.gradient_share() == pytest.approx(2 * found.gradient_share())
    for level in found.levels:  # the gradient of sparsity has 1 / size in each of the values
        expected = 0.1 / SIZE / level.snr**0.5
        assert level.best.auxiliary_gradient == pytest.approx(expected, rel=1e-4)
        assert level.best.denoising_gradient == pytest.approx(
            2 * (level.snr * level.best.error) ** 0.5 / SIZE, rel=1e-4
        )


# Verdicts


@pytest.fixture(scope="module")
def blocks():
    """Dark pictures with one bright block each."""
    generator = np.random.default_rng(0)
    images = torch.full((400, 1, 8, 8), -1.0)
    for image in images:
        top, left = generator.integers(0, 4, 2)
        image[:, top : top + 4, left : left + 3] = generator.uniform(0, 1)
    return images


def sharpness(images, /):
    return (4 - regularizers.total_variation(images)) ** 2


def falls_without_end(images, /):
    return -images.square().flatten(1).mean(1)


def brighter(images, /):
    return -images.flatten(1).mean(1)


def no_number_on_guesses(images, /):
    """Real pictures have nothing below -1; guesses have."""
    return (images + 1 + 1e-6).sqrt().flatten(1).mean(1)


@pytest.mark.parametrize(
    "regularizer, weight, weighted, answer",
    [
        (regularizers.total_variation, 0.02, weighting.matched, "makes sense"),
        (regularizers.total_variation, 1.0, weighting.constant, "makes sense only below t="),
        (regularizers.out_of_range, 0.1, weighting.matched, "makes sense"),
        (partial(regularizers.mean_intensity, target=0.9), 0.1, weighting.matched, "contradicts the data"),
        (sharpness, 0.1, weighting.matched, "contradicts the data"),
        (regularizers.total_variation, 1e-7, weighting.matched, "has no effect"),
        (partial(regularizers.out_of_range, low=-50, high=50), 1.0, weighting.matched, "has no effect"),
        (falls_without_end, 5.0, weighting.matched, "cannot work"),
        (falls_without_end, 0.01, weighting.matched, "contradicts the data"),
        (brighter, 1e3, weighting.matched, "cannot work"),
        (brighter, 1e-2, weighting.matched, "contradicts the data"),
        (regularizers.total_variation, 1.0, weighting.matched, "makes sense, with a smaller weight"),
        (no_number_on_guesses, 0.1, weighting.matched, "cannot work"),
    ],
)
def test_verdict(blocks, regularizer, weight, weighted, answer):
    found = judge(diagnose(VELOCITY, Term(regularizer, weight, weighted), blocks, num_levels=6))
    assert found.answer == answer or (answer.endswith("=") and found.answer.startswith(answer))
    assert found.reasons
    assert all(any(letter.isdigit() for letter in reason) for reason in found.reasons)


def test_a_law_that_all_images_satisfy_is_lowered_by_shrinking_and_says_so():
    """Half of everything has a quarter of a quadratic residual; divided by the mean square, nothing is gained."""
    stream = torch.randn(200, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = torch.stack([physics.difference(stream, -2), -physics.difference(stream, -1)], 1) / 2
    found = {name: judged_shrinking(flow, partial(physics.divergence, normalized=name)) for name in (False, True)}
    assert found[False].data.halfway == pytest.approx(found[False].data.noisy / 4, rel=0.02)
    assert found[True].data.halfway > 0.7 * found[True].data.noisy
    said = {name: any("shrinking" in reason for reason in judge(result).reasons) for name, result in found.items()}
    assert said == {False: True, True: False}
    smooth = judged_shrinking(flow, regularizers.total_variation)  # the data do not satisfy it
    assert not any("shrinking" in reason for reason in judge(smooth).reasons)


def judged_shrinking(images, regularizer):
    return diagnose(VELOCITY, Term(regularizer, 1.0, name="law"), images, num_levels=2)


def test_the_verdict_of_a_model_goes_by_its_own_errors(blocks):
    """A model whose guesses are too smooth is not helped by a wish for smoothness."""

    def too_smooth(noisy_samples, timesteps):
        alpha = VELOCITY.alphas_cumprod[timesteps.long()].sqrt().view(-1, 1, 1, 1)
        x0_hat = torch.nn.functional.avg_pool2d(noisy_samples / alpha, 5, 1, 2, count_include_pad=False).clamp(-1, 1)
        return (alpha * noisy_samples - x0_hat) / (1 - alpha**2).sqrt()

    term = Term(regularizers.total_variation, 0.02)
    assert judge(diagnose(VELOCITY, term, blocks, num_levels=8)).answer == "makes sense"
    assert judge(diagnose(VELOCITY, term, blocks, num_levels=8, model=too_smooth)).answer == "contradicts the data"


def test_an_estimator_that_calls_the_network_again_is_refused(blocks):
    term = Term(regularizers.total_variation, 0.1, estimator=Ddim(1))
    with pytest.raises(ValueError, match="has no network for Ddim"):
        diagnose(VELOCITY, term, blocks)


def test_the_loops_own_timesteps_decide_the_shares_of_the_training(blocks):
    term = Term(regularizers.total_variation, 0.02)
    early = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(0))
    found = diagnose(VELOCITY, term, blocks[:60], num_levels=6, timesteps=early)
    assert max(level.timestep for level in found.levels) < 300
    assert sum(level.training_share for level in found.levels) == pytest.approx(1)
    half = torch.cat([torch.full((300,), 10), torch.full((100,), 900)])
    shares = {
        level.timestep: level.training_share for level in diagnose(VELOCITY, term, blocks, timesteps=half).levels
    }
    assert shares == {10: 0.75, 900: 0.25}


def test_a_schedule_of_functions_is_diagnosed_as_that_of_diffusers(blocks):
    """Time runs from noise to image there, and its network predicts the negative of flow matching's output."""
    term, flow = Term(regularizers.total_variation, 0.02), FlowMatchEulerDiscreteScheduler()
    times = torch.linspace(20, 980, 200)
    own = AffineSchedule(lambda t: t, lambda t: 1 - t, "velocity")
    expected = diagnose(flow, term, blocks[:60], num_levels=4, timesteps=times).levels
    found = diagnose(own, term, blocks[:60], num_levels=4, timesteps=1 - times / 1000).levels
    for one, other in zip(expected, found, strict=True):
        assert other.timestep == pytest.approx(1 - one.timestep / 1000, abs=1e-4)
        for name in ("snr", "training_share", "ratio", "displacement"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=0.03), name
    with pytest.raises(ValueError, match="has no training schedule to draw timesteps from: pass timesteps"):
        diagnose(own, term, blocks)


@pytest.mark.slow
def test_latents_are_diagnosed_through_the_decoded_image():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    latents = torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    view = DecodedImage(vae, chunk=8)
    term = Term(regularizers.total_variation, 0.1, view=view)
    found = diagnose(VELOCITY, term, latents, num_levels=3)
    expected = score(term, latents).mean().item()
    assert found.shape == (4, 4, 4) and found.data.mean == pytest.approx(expected, rel=0.3)


def test_known_noise_is_diagnosed_nearer_to_the_images(blocks):
    """At kappa = 1 it is the plain term; below, the guesses are nearer to the images, and so is L'."""

    def levels(estimator):
        term = Term(regularizers.gradient_energy, 0.1, weighting.constant, estimator=estimator)
        return diagnose(VELOCITY, term, blocks[:60], num_levels=3).levels

    plain, whole, half = levels(one_step), levels(KnownNoise(1.0)), levels(KnownNoise(0.5))
    for one, other, nearer in zip(plain, whole, half, strict=True):
        assert other.best.value == pytest.approx(one.best.value, rel=1e-3)
        assert other.displacement == pytest.approx(one.displacement, rel=0.02, abs=1e-6)
        assert abs(nearer.best.gap) <= abs(one.best.gap) + 1e-6


def test_monte_carlo_is_diagnosed_by_the_mean_of_its_draws(blocks):
    """E |u + r z|^2 = |u|^2 + r^2."""

    def energy(images, /):
        return images.square().flatten(1).mean(1)

    def levels(estimator):
        return diagnose(VELOCITY, Term(energy, 0.1, estimator=estimator), blocks[:60], num_levels=3).levels

    for one, drawn in zip(levels(one_step), levels(MonteCarlo(64)), strict=True):
        assert drawn.best.value == pytest.approx(one.best.value + 1 / (1 + one.snr), rel=0.03)


def detached(images, /):
    return images.detach().flatten(1).mean(1)


def logarithm(images, /):
    return images.log().flatten(1).mean(1)


def of_the_batch(images, /):
    return (images - images.mean()).square().flatten(1).mean(1)


def of_masks(images, /, *, mask):
    return (mask * images).flatten(1).mean(1)


of_masks.needs = ("mask",)


@pytest.mark.parametrize(
    "regularizer, reason",
    [(detached, "detached"), (logarithm, "non-finite"), (of_the_batch, "other images"), (of_masks, "needs mask")],
)
def test_a_regularizer_that_breaks_its_contract_is_refused(blocks, regularizer, reason):
    with pytest.raises(TermError, match=reason):
        diagnose(VELOCITY, Term(regularizer, 0.1), blocks, num_levels=3)


def test_what_regularizers_need_goes_with_their_images(blocks):
    masks = (blocks > -1).float()
    found = diagnose(VELOCITY, Term(of_masks, 0.1), blocks, num_levels=3, mask=masks)
    expected = (masks * blocks).flatten(1).mean(1)
    assert found.data.mean == pytest.approx(expected.mean().item(), abs=4 * expected.std().item() / 80**0.5)


def test_too_few_images_and_equal_images_are_refused(blocks):
    with pytest.raises(ValueError, match="19 images are too few"):
        diagnose(VELOCITY, Term(regularizers.sparsity, 0.1), blocks[:19])
    with pytest.raises(ValueError, match="all images are the same"):
        diagnose(VELOCITY, Term(regularizers.sparsity, 0.1), blocks[:1].expand(50, 1, 8, 8))


# The command


def command(folder, *flags):
    return subprocess.run(
        [sys.executable, "-m", "reg_diffusers", "diagnose", *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("diagnose")
    np.save(folder / "fields.npy", blocks.numpy())
    np.save(folder / "few.npy", blocks.numpy()[:10])
    (folder / "own.py").write_text(
        "def cut(x, /):\n    y = x.detach()\n    return y.flatten(1).mean(1)\n"
        "def labelled(x, /, *, class_labels):\n    return x.flatten(1).mean(1)\n"
        "labelled.needs = ('class_labels',)\n"
    )
    return folder


@pytest.mark.slow
def test_the_command_judges_each_regularizer_and_writes_what_it_found(folder, monkeypatch, capsys):
    flags = ("--train_data_dir", "fields.npy", "--regularizer", "total_variation", "own:cut", "--num_levels", 4)
    done = command(folder, *flags, "--reg_weight", 0.02, "--prediction_type", "v_prediction")
    assert done.returncode == 0, done.stderr
    assert "Verdict: total_variation makes sense." in done.stdout
    assert "Recommended: --reg_weighting" in done.stdout
    assert "Verdict: cut cannot work." in done.stdout and "own.py" in done.stdout
    written = folder / "diagnosis"
    assert json.loads((written / "cut.json").read_text())["verdict"]["answer"] == "cannot work"
    assert sorted(path.name for path in written.iterdir()) == [
        "cut.json",
        "total_variation.json",
        "total_variation.png",
        "total_variation.svg",
    ]
    found = json.loads((written / "total_variation.json").read_text())
    assert found["verdict"]["answer"] == "makes sense" and len(found["levels"]) == 4
    assert found["asked"]["weight"] == 0.02

    monkeypatch.chdir(folder)
    again = ["diagnose", *map(str, flags[:3]), "total_variation", "--num_levels", "4"]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(again)
    assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    main([*again, "--overwrite", "--reg_weight", "0.03"])
    assert json.loads((written / "total_variation.json").read_text())["asked"]["weight"] == 0.03


@pytest.mark.slow
def test_the_same_command_again_replaces_its_own_files_and_no_others(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    again = "diagnose --train_data_dir fields.npy --regularizer sparsity --num_levels 2 --output again".split()
    main(again)
    first = capsys.readouterr().out
    (folder / "again" / "sparsity.png").write_bytes(b"old")
    main([*again, "--verbose"])
    second = capsys.readouterr().out
    assert (folder / "again" / "sparsity.png").stat().st_size > 1000
    assert "shift     how far the loss moves D" in second and "shift  " not in first
    assert first.splitlines()[2].startswith("Verdict: sparsity ") and len(first) < len(second)
    for content in ("{}", "no JSON", '["verdict"]'):
        (folder / "again" / "sparsity.json").write_text(content)
        for flags in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match=r"^2$"):
                main([*again, *flags])
            assert "holds sparsity.json, which no diagnosis wrote" in capsys.readouterr().err
    (folder / "again" / "sparsity.json").unlink()
    with pytest.raises(SystemExit, match=r"^2$"):
        main(again)
    assert "holds sparsity.png, which no diagnosis wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_finds_the_weight_of_a_share(folder):
    flags = ("--train_data_dir", "fields.npy", "--regularizer", "sparsity", "--num_levels", 4, "--output", "share")
    done = command(folder, *flags, "--reg_weight", "auto:0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "share" / "sparsity.json").read_text())
    levels = [(level["training_share"], level["best"]) for level in found["levels"]]
    squares = [
        sum(share * best[f"{name}_gradient"] ** 2 for share, best in levels) for name in ("auxiliary", "denoising")
    ]
    assert squares[0] / squares[1] == pytest.approx(0.01)
    assert f"--reg_weight auto:0.1 is about {found['asked']['weight']:.3g}" in done.stdout


@pytest.mark.slow
def test_the_command_measures_a_model(folder, tiny_unet):
    RegDDPMPipeline(tiny_unet(), EPSILON).save_pretrained(str(folder / "model"))
    flags = (
        "--train_data_dir",
        "fields.npy",
        "--regularizer",
        "sparsity",
        "--num_levels",
        3,
        "--output",
        "with_model",
    )
    done = command(folder, *flags, "--model", "model", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "The same for the model:" in done.stdout
    assert json.loads((folder / "with_model" / "sparsity.json").read_text())["levels"][0]["model"]["source"] == "model"


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--train_data_dir", "few.npy"), "10 images are too few"),
        (("--train_data_dir", "nowhere"), "nowhere"),
        (("--train_data_dir", "fields.npy", "--regularizer", "own:labelled"), "needs class_labels"),
        (("--train_data_dir", "fields.npy", "--regularizer", "none"), "--regularizer none"),
        (("--train_data_dir", "fields.npy", "--model", "nothing_there"), "--model nothing_there"),
        (("--train_data_dir", "fields.npy", "--resolution", "16", "--model", "model"), "--resolution 16"),
        (("--train_data_dir", "fields.npy", "--num_levels", "1"), "--num_levels"),
        (("--train_data_dir", "fields.npy", "--reg_target", "total_variation=0.1"), "--reg_target"),
        (("--train_data_dir", "fields.npy", "--num_images", "-1"), "--num_images"),
        (("--train_data_dir", "fields.npy", "--streaming"), "--streaming"),
    ],
)
def test_what_cannot_work_is_one_line(folder, tiny_unet, flags, said, monkeypatch, capsys):
    if "model" in flags:
        RegDDPMPipeline(tiny_unet(), EPSILON).save_pretrained(str(folder / "model"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # "nothing_there" is looked for there
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *flags, "--output", "unused"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "unused").exists()


def test_a_model_is_diagnosed_on_the_data_that_it_was_trained_on(folder, tiny_unet, monkeypatch, capsys):
    """The embedded pictures have nothing to do with it."""
    RegDDPMPipeline(tiny_unet(), EPSILON).save_pretrained(str(folder / "trained"))
    monkeypatch.chdir(folder)
    command = ["diagnose", "--model", "trained", "--regularizer", "sparsity", "--num_levels", "2"]
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*command, "--output", "unused"])
    assert "--model trained does not record its training data" in capsys.readouterr().err.splitlines()[-1]
    (folder / "trained" / "reg_settings.yaml").write_text("dataset_name: null\ntrain_data_dir: fields.npy\n")
    main([*command, "--output", "recorded"])
    assert "fields from fields.npy, the training data of trained" in capsys.readouterr().out.splitlines()[0]


def test_arguments_of_a_model_follow_their_images(gaussian):
    """A network that is given the images themselves guesses each of them exactly."""
    images = gaussian[0][:60]

    def knowing(noisy_samples, timesteps, *, originals):
        alpha_bar = EPSILON.alphas_cumprod[timesteps.long()].reshape(-1, 1, 1, 1)
        return (noisy_samples - alpha_bar.sqrt() * originals) / (1 - alpha_bar).sqrt()

    term = Term(regularizers.gradient_energy, 0.1)
    found = diagnose(EPSILON, term, images, model=knowing, model_kwargs={"originals": images}, num_levels=3)
    assert all(level.model.error < 1e-6 < level.best.error for level in found.levels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"term": [Term(regularizers.total_variation, 0.1)]}, TypeError, "diagnose takes one Term"),
        ({"original_samples": torch.zeros(30, 1, 4, 4, dtype=torch.uint8)}, TypeError, "floating-point .*torch.uint8"),
        (
            {"original_samples": torch.zeros(30, 1, 4, 4).numpy()},
            TypeError,
            "original_samples must be a floating-point",
        ),
        ({"original_samples": torch.full((30, 1, 4, 4), torch.nan)}, ValueError, "original_samples has non-finite"),
        ({"num_levels": 0}, ValueError, "num_levels must be at least 1, not 0"),
    ],
)
def test_arguments_of_a_diagnosis_that_cannot_be_meant_are_refused_by_name(change, error, message):
    given = {"term": Term(regularizers.total_variation, 0.1), "original_samples": torch.randn(30, 1, 4, 4)}
    with pytest.raises(error, match=message):
        diagnose(DDPMScheduler(), **(given | change))


@pytest.mark.parametrize("inside", ["", "figures/here"])
@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_figures_are_not_written_where_a_training_would_read_them(image_folder, capsys, flag, inside):
    folder = image_folder()
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        main(["diagnose", flag, str(folder), "--output", str(folder / inside)])
    assert f"lies in {flag} {folder}, where a training would read the figures as images" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
