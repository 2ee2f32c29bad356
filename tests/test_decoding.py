"""Decoded latents as the view of a loss: the pipelines' numbers, dtypes, memory, crops, and what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    DDPMScheduler,
    Flux2Pipeline,
    LTXPipeline,
    UNet2DModel,
)
from losses import images, mean_square, reconstruction, scheduler_of
from torch import nn

from reg_diffusers import RegularizedLoss, Term, TermError, X0Regularization, weighting
from reg_diffusers.balancing import balance
from reg_diffusers.estimators import MonteCarlo, one_step
from reg_diffusers.guidance import Guidance
from reg_diffusers.term import score
from reg_diffusers.views import Affine, DecodedImage

pytestmark = pytest.mark.loss

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]


def kl(kind=AutoencoderKL, channels=(8, 16), **config):
    blocks = len(channels)
    return built(
        kind,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        **config,
    )


def tiny():
    channels, blocks = (8, 8), (1, 1)
    return built(
        AutoencoderTiny,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


def compressing():
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "ResBlock")),
            ("block_out_channels", (8, 16)),
            ("layers_per_block", (1, 1)),
            ("qkv_multiscales", ((), ())),
        )
    }
    return built(AutoencoderDC, latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **sides)


def per_channel(kind):
    config = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    return built(kind, latents_mean=MEAN, latents_std=STD, **config)


def flux2():
    vae = kl(AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 3, 16))
    return vae


def with_buffers():
    """LTX keeps its statistics in buffers instead of the configuration."""
    ones, channels = (1,) * 3, (8,) * 2
    vae = built(
        AutoencoderKLLTXVideo,
        latent_channels=4,
        block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=ones,
        decoder_layers_per_block=ones,
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=1,
        scaling_factor=0.7,
    )
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def by_buffers(vae, x):
    x = LTXPipeline._denormalize_latents(x, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    return vae.decode(x).sample


def built(kind, **config):
    torch.manual_seed(0)
    return kind(**config).eval()


def by_statistics(vae, x):
    mean, std = (torch.tensor(numbers).reshape(1, 4, 1, 1, 1) for numbers in (MEAN, STD))
    return vae.decode(x * std + mean).sample


def by_batch_norm(vae, x):
    mean, variance = (value.reshape(1, 16, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    x = x * (variance + vae.config.batch_norm_eps).sqrt() + mean
    return vae.decode(Flux2Pipeline._unpatchify_latents(x)).sample


FAMILIES = {
    "scaling_factor": (kl, (4, 6, 4), lambda vae, x: vae.decode(x / 0.18215).sample),
    "shift_factor": (
        lambda: kl(scaling_factor=1.5305, shift_factor=0.0609),
        (4, 6, 4),
        lambda vae, x: vae.decode(x / 1.5305 + 0.0609).sample,
    ),
    "scaling and statistics": (
        lambda: kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
        (4, 6, 4),
        lambda vae, x: (
            vae.decode(x * torch.tensor(STD).reshape(4, 1, 1) / 0.5 + torch.tensor(MEAN).reshape(4, 1, 1)).sample
        ),
    ),
    "frames of an image autoencoder": (
        kl,
        (4, 3, 6, 4),
        lambda vae, x: torch.stack([vae.decode(x[:, :, i] / 0.18215).sample for i in range(3)], dim=2),
    ),
    "tiny": (tiny, (4, 6, 4), lambda vae, x: vae.decode(x).sample),
    "deep compression": (compressing, (4, 6, 4), lambda vae, x: vae.decode(x / 0.41407).sample),
    "Wan": (lambda: per_channel(AutoencoderKLWan), (4, 2, 6, 4), by_statistics),
    "Qwen-Image": (lambda: per_channel(AutoencoderKLQwenImage), (4, 1, 6, 4), by_statistics),
    "Qwen-Image without frames": (
        lambda: per_channel(AutoencoderKLQwenImage),
        (4, 6, 4),
        lambda vae, x: by_statistics(vae, x[:, :, None])[:, :, 0],
    ),
    "LTX": (with_buffers, (4, 2, 6, 4), by_buffers),
    "Flux 2": (flux2, (16, 6, 4), by_batch_norm),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    build, shape, expected = FAMILIES[request.param]
    return build(), images(3, *shape, dtype=torch.float32), expected


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_view_decodes_as_the_pipelines_do(family, chunk):
    vae, x, decode = family
    actual = DecodedImage(vae, chunk=chunk)(x)
    torch.testing.assert_close(actual, decode(vae, x), rtol=1e-4, atol=1e-5)
    assert actual.ndim == x.ndim
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_is_that_of_the_decoder(family, checkpointing):
    vae, x, decode = family
    x.requires_grad_()
    (expected,) = torch.autograd.grad(mean_square(decode(vae, x)).sum(), x)
    view = DecodedImage(vae, checkpointing=checkpointing, chunk=2)
    (actual,) = torch.autograd.grad(mean_square(view(x)).sum(), x)
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_what_was_encoded_is_decoded():
    """The inverse of the formula that scripts use to normalize encoded images."""
    vae = kl(scaling_factor=0.3, shift_factor=0.7)
    pictures = images(2, 3, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        encoded = vae.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(DecodedImage(vae)((encoded - 0.7) * 0.3), vae.decode(encoded).sample)


def test_the_autoencoder_keeps_its_dtype_and_the_images_are_float32():
    vae = kl()
    x = images(2, 4, 6, 4, dtype=torch.float32)
    exact = DecodedImage(vae)(x)
    half = DecodedImage(vae.to(torch.bfloat16))
    assert half(x).dtype == torch.float32
    assert vae.dtype == torch.bfloat16
    assert 0 < (half(x) - exact).abs().max() < 0.05 * exact.abs().max()


def test_another_dtype_leaves_the_loops_own_autoencoder_alone():
    vae = kl().to(torch.bfloat16)
    x = images(2, 4, 6, 4, dtype=torch.float32)
    view = DecodedImage(vae, dtype=torch.float32)
    assert (view.vae.dtype, vae.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(view(x), copy.deepcopy(vae).float().decode(x / 0.18215).sample, rtol=1e-4, atol=1e-5)
    assert DecodedImage(vae, dtype=torch.bfloat16).vae is vae


@pytest.mark.parametrize("kind", [X0Regularization, RegularizedLoss])
def test_the_autoencoder_is_frozen_moved_copied_and_no_state_of_the_loss(kind):
    vae = kl().train()
    loss_fn = kind(scheduler_of(), [Term(mean_square, 1.0, view=DecodedImage(vae), name=name) for name in "ab"])
    assert loss_fn.state_dict() == {}
    assert list(loss_fn.parameters()) == []
    assert not any(weight.requires_grad for weight in vae.parameters())
    loss_fn.load_state_dict({"regularization.networks.0.weight": torch.zeros(1)} if kind is RegularizedLoss else {})
    copied = copy.deepcopy(loss_fn).to(torch.float64)
    loss_fn.train()
    assert not any(module.training for module in vae.modules())
    assert vae.dtype == torch.float32
    regularization = copied.regularization if kind is RegularizedLoss else copied
    assert [term.view.vae.dtype for term in regularization.terms] == [torch.float64] * 2
    assert regularization.networks._networks == tuple(term.view for term in regularization.terms)
    loss_fn.to("meta")
    assert vae.device.type == "meta"


def test_a_checkpoint_with_the_weights_of_networks_still_loads():
    net = nn.Conv2d(1, 1, 1)
    before = {f"networks.0.{name}": torch.zeros_like(value) for name, value in net.state_dict().items()}
    regularization = X0Regularization(scheduler_of(), [Term(nn.Sequential(net, nn.Flatten()), 1.0)])
    regularization.load_state_dict(before)
    assert net.weight.abs().max() > 0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        regularization.load_state_dict({"weight": torch.zeros(1)})


class Counted:
    """Records the number of latents in each call of `vae.decode`."""

    def __init__(self, vae):
        self.sizes = []
        self._decode = vae.decode
        vae.decode = self

    def __call__(self, latents, **options):
        self.sizes.append(len(latents))
        return self._decode(latents, **options)


def on(*flags):
    return lambda level: torch.tensor(flags, dtype=torch.float32)


def test_all_terms_share_one_decode_of_the_active_images_in_chunks():
    vae = kl()
    counted, view = Counted(vae), DecodedImage(vae, chunk=2)
    terms = [
        Term(mean_square, 1.0, on(1, 1, 0, 0, 0), "a", view=view),
        Term(mean_square, 2.0, on(0, 1, 1, 0, 0), "b", view=view),
        Term(reconstruction, 1.0, on(0, 0, 1, 0, 0), "paired", view=view),
        Term(mean_square, 1.0, on(0, 0, 0, 0, 1), "latent"),
    ]
    output, original = images(2, 5, 4, 4, 4, dtype=torch.float32)
    output.requires_grad_()
    loss_fn = X0Regularization(scheduler_of("sample"), terms)
    for _ in range(2):
        counted.sizes.clear()
        result = loss_fn(output, 0, torch.zeros_like(output), original_samples=original)
        assert counted.sizes == [2, 1, 2, 1]  # x0_hat, then original_samples
        result.loss.backward()
        assert sorted(counted.sizes[4:]) == [1, 2]  # x0_hat again, which checkpointing recomputes
    decoded, originals = (vae.decode(x / 0.18215).sample for x in (output, original))
    torch.testing.assert_close(result.terms["a"], mean_square(decoded)[:2].sum() / 5)
    expected = reconstruction(decoded, original_samples=originals)[2] / 5
    torch.testing.assert_close(result.terms["paired"], expected)


def test_without_active_images_nothing_is_decoded_or_drawn():
    vae = kl()
    counted, view = Counted(vae), DecodedImage(vae, crop=2)
    loss_fn = X0Regularization(scheduler_of("sample"), [Term(mean_square, 1.0, on(0, 0), view=view)])
    state = torch.get_rng_state()
    loss_fn(images(2, 4, 4, 4), 0, images(2, 4, 4, 4))
    assert counted.sizes == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("method", "sizes"), [("mpgd", [1, 1]), ("dps", [1, 1]), ("lgd", [1] * 6)])
def test_guidance_decodes_once_per_step(method, sizes):
    vae = kl()
    counted, view = Counted(vae), DecodedImage(vae, checkpointing=False)
    terms = [Term(mean_square, 0.1, weighting.constant, name, view=view) for name in "ab"]
    sample = images(2, 4, 4, 4, dtype=torch.float32)
    scheduler = scheduler_of()
    guided = Guidance(terms, method=method, samples=3).model_output(lambda x: 0.5 * x, scheduler, 300, sample)
    assert counted.sizes == sizes
    alone = [Term(mean_square, 0.2, weighting.constant, view=DecodedImage(kl()))]
    if method != "lgd":  # which draws noise
        expected = Guidance(alone, method=method).model_output(lambda x: 0.5 * x, scheduler, 300, sample)
        torch.testing.assert_close(guided, expected)


def test_guidance_draws_one_window_per_step_for_x0_hat_and_originals():
    view, recorded, draws = DecodedImage(kl(), crop=2), Recorded(), []
    view.draw = lambda x: draws.append(len(x)) or DecodedImage.draw(view, x)
    guidance = Guidance(
        [
            Term(recorded, 0.1, weighting.constant, view=view, estimator=estimator)
            for estimator in (one_step, lambda prediction: one_step(prediction))
        ]
    )
    for step in range(4):
        sample = images(2, 4, 6, 6, seed=step, dtype=torch.float32)
        context = {"original_samples": sample}
        guidance.model_output(lambda x: x, scheduler_of("sample"), 300, sample, context=context)
        assert len(draws) == step + 1
        for seen, original in recorded.calls[-2:]:
            torch.testing.assert_close(seen, original)


def saved_bytes(vae, view, x):
    """Bytes of the tensors that autograd saves in the forward pass, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}
    storages = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        view(x).sum()
    return sum(storage.nbytes() for storage in storages.values())


def test_checkpointing_in_bfloat16_saves_a_seventh_of_the_bytes_at_most():
    """An AutoencoderKL with the shape of Stable Diffusion's, and an eighth of its channels."""
    vae = built(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=4,
        layers_per_block=2,
    )
    x = images(2, 4, 16, 16, dtype=torch.float32).requires_grad_()
    plain = saved_bytes(vae, DecodedImage(vae, checkpointing=False), x)
    full = saved_bytes(vae, DecodedImage(vae), x)
    vae.to(torch.bfloat16)
    assert plain > 100 * x.nbytes
    assert 0 < saved_bytes(vae, DecodedImage(vae), x) <= plain / 7
    assert saved_bytes(vae, DecodedImage(vae), x) <= full


def test_checkpointing_is_left_to_the_blocks_of_a_decoder_that_has_several():
    """A chunk that is computed again as a whole has the peak that it has without checkpointing."""
    vae, small = kl(), tiny()
    DecodedImage(vae, checkpointing=False)
    assert not vae.is_gradient_checkpointing
    for autoencoder in (vae, small):
        DecodedImage(autoencoder)
    assert vae.is_gradient_checkpointing
    assert not small.is_gradient_checkpointing


def test_a_pickled_loss_has_the_same_gradient():
    vae, scheduler = kl(), DDPMScheduler()
    loss = X0Regularization(scheduler, [Term(mean_square, 1.0, weighting.constant, view=DecodedImage(vae))])
    gradients = []
    for one in (loss, pickle.loads(pickle.dumps(loss))):
        output = images(2, 4, 8, 8, dtype=torch.float32).requires_grad_()
        one(output, torch.tensor([10, 500]), torch.zeros(2, 4, 8, 8)).loss.backward()
        gradients.append(output.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_a_crop_decodes_one_window_of_all_images():
    vae = kl()
    x = images(3, 4, 8, 6, dtype=torch.float32)
    view = DecodedImage(vae, crop=4)
    windows = set()
    for seed in range(20):
        torch.manual_seed(seed)
        view.draw(x)
        torch.manual_seed(seed)
        row, column = (int(torch.randint(count, ())) for count in (5, 3))
        expected = vae.decode(x[..., row : row + 4, column : column + 4] / 0.18215).sample
        torch.testing.assert_close(view(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view(x), expected, rtol=1e-4, atol=1e-5)
        windows.add((row, column))
    assert len(windows) > 5
    assert expected.shape == (3, 3, 8, 8)


class Recorded:
    """A paired regularizer that keeps its arguments."""

    needs = ("original_samples",)

    def __init__(self):
        self.calls = []

    def __call__(self, x0_hat, *, original_samples):
        self.calls.append((x0_hat.detach(), original_samples))
        return reconstruction(x0_hat, original_samples=original_samples)


@pytest.mark.parametrize("kind", ["X0Regularization", "RegularizedLoss"])
def test_x0_hat_and_originals_show_the_same_window_drawn_once_per_step(kind):
    vae = kl()
    view, recorded = DecodedImage(vae, crop=3), Recorded()
    terms = [Term(recorded, 1.0, on(0, 1, 1), name, view=view) for name in ("a", "b")]
    original = images(3, 4, 6, 6, dtype=torch.float32)
    pictures = images(3, 3, 12, 12, seed=1)
    windows = set()
    for seed in range(6):
        for given in ({}, {"original_images": pictures}):
            torch.manual_seed(seed)
            if kind == "RegularizedLoss":  # a perfect network, whose x0_hat is the original
                loss_fn = RegularizedLoss(scheduler_of("sample"), terms)
                timesteps = torch.zeros(3, dtype=torch.long)
                loss_fn(lambda *_: original, original, noise=original, timesteps=timesteps, **given)
            else:
                loss_fn = X0Regularization(scheduler_of("sample"), terms)
                context = given or {"original_samples": original}
                loss_fn(original.clone().requires_grad_(), 0, torch.zeros_like(original), **context)
            torch.manual_seed(seed)
            row, column = (int(torch.randint(4, ())) for _ in range(2))
            windows.add((row, column))
            (seen, one), (also_seen, other) = recorded.calls[-2:]
            assert torch.equal(seen, also_seen) and torch.equal(one, other)
            window = original[1:, :, row : row + 3, column : column + 3]
            torch.testing.assert_close(seen, vae.decode(window / 0.18215).sample, rtol=1e-4, atol=1e-5)
            expected = pictures[1:, :, 2 * row : 2 * row + 6, 2 * column : 2 * column + 6].float() if given else seen
            torch.testing.assert_close(one, expected)
            assert not one.requires_grad
    assert len(windows) > 2


def test_a_window_is_drawn_once_per_step_for_all_estimators():
    """And all noisy images of MonteCarlo show it."""
    vae = kl()
    view, recorded = DecodedImage(vae, crop=2), Recorded()
    draws = []
    view.draw = lambda x: draws.append(len(x)) or DecodedImage.draw(view, x)
    terms = [
        Term(recorded, 1.0, weighting.constant, "one", view=view),
        Term(recorded, 1.0, weighting.constant, "many", estimator=MonteCarlo(3), view=view),
    ]
    loss_fn = X0Regularization(scheduler_of("sample"), terms)
    output = images(2, 4, 6, 6, dtype=torch.float32)
    pictures = images(2, 3, 12, 12, seed=1)
    for step in range(3):
        loss_fn(output, 0, torch.zeros_like(output), original_images=pictures)
        (seen, original), (noisy, repeated) = recorded.calls[-2:]
        assert torch.equal(repeated, original.repeat(3, 1, 1, 1))
        assert len(noisy) == 3 * len(seen)
        assert len(draws) == step + 1


def test_balance_sees_the_same_gradients_with_checkpointing():
    output, found = images(2, 4, 4, 4, dtype=torch.float32).requires_grad_(), []
    for checkpointing in (True, False):
        view = DecodedImage(kl(), checkpointing=checkpointing)
        terms = [
            Term(regularizer, 1.0, weighting.constant, name, view=view)
            for name, regularizer in (("a", mean_square), ("b", lambda x: x.abs().flatten(1).mean(1)))
        ]
        result = X0Regularization(scheduler_of("sample"), terms)(output, 0, torch.zeros_like(output))
        found.append(balance(result, {"a": 0.3, "b": 2.0}).gradients)
    for name in "ab":
        assert found[0][name].abs().max() > 0
        torch.testing.assert_close(found[0][name], found[1][name])


def test_a_resumed_run_draws_the_same_windows():
    view, x = DecodedImage(kl(), crop=2), images(2, 4, 6, 6, dtype=torch.float32)

    def windows():
        for _ in range(4):
            view.draw(x)
            yield view(x)

    state = torch.get_rng_state()
    first = list(windows())
    torch.set_rng_state(state)
    assert all(torch.equal(one, other) for one, other in zip(first, windows(), strict=True))


def test_originals_in_the_place_of_decoded_ones_are_not_decoded():
    vae = kl()
    counted, recorded = Counted(vae), Recorded()
    output, original = images(2, 2, 4, 4, 4, dtype=torch.float32)
    pictures = images(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    terms = [
        Term(recorded, 1.0, weighting.constant, "decoded", view=DecodedImage(vae)),
        Term(reconstruction, 1.0, weighting.constant, "latent"),
    ]
    loss_fn = X0Regularization(scheduler_of("sample"), terms)
    result = loss_fn(
        output.requires_grad_(), 0, torch.zeros_like(output), original_samples=original, original_images=pictures
    )
    assert counted.sizes == [1, 1]
    assert torch.equal(recorded.calls[0][1], pictures)
    torch.testing.assert_close(result.terms["latent"], reconstruction(output, original_samples=original).mean())
    result.loss.backward()
    assert output.grad.abs().max() > 0
    assert pictures.grad is None


def test_other_views_take_original_images_of_their_own_size():
    output = images(2, 1, 4, 4)
    term = Term(reconstruction, 1.0, weighting.constant, view=lambda x: x.repeat(1, 3, 1, 1))
    pictures = images(2, 3, 4, 4, seed=1)
    loss_fn = X0Regularization(scheduler_of("sample"), [term])
    loss = loss_fn(output, 0, torch.zeros_like(output), original_images=pictures).loss
    torch.testing.assert_close(loss, reconstruction(output, original_samples=pictures).mean())
    with pytest.raises(ValueError, match=r"size \(3, 2, 4\), but the view of 'reconstruction' returns \(3, 4, 4\)"):
        loss_fn(output, 0, torch.zeros_like(output), original_images=pictures[:, :, :2])


@pytest.mark.parametrize("crop", [None, 2])
def test_original_images_of_another_size_are_refused(crop):
    output = images(2, 4, 4, 4, dtype=torch.float32)
    term = Term(reconstruction, 1.0, weighting.constant, view=DecodedImage(kl(), crop=crop))
    loss_fn = X0Regularization(scheduler_of("sample"), [term])
    with pytest.raises(ValueError, match=r"size \(3, 16, 8\), but the latents decode to \(3, 8, 8\)"):
        loss_fn(output, 0, torch.zeros_like(output), original_images=torch.zeros(2, 3, 16, 8))


def test_original_images_that_nothing_uses_are_refused():
    output = images(2, 4, 4, 4)
    for terms in ([Term(mean_square, 1.0, view=Affine(2.0))], [Term(reconstruction, 1.0)]):
        with pytest.raises(TypeError, match="unexpected keyword argument 'original_images'"):
            X0Regularization(scheduler_of(), terms)(output, 0, output, original_images=torch.zeros(2, 3, 8, 8))


def test_a_score_draws_a_window_too():
    view = DecodedImage(kl(), crop=2)
    term, x = Term(Recorded(), 1.0, view=view), images(2, 4, 6, 6, dtype=torch.float32)
    scores = {tuple(score(term, x, {"original_samples": x + 1}).tolist()) for _ in range(8)}
    assert len(scores) > 1


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((2, 16, 4, 4), "this VAE decodes 4 channels, x0_hat has 16"),
        ((2, 8, 4, 4, 4), "this VAE decodes 4 channels, x0_hat has 8"),
        ((2, 16, 4), r"needs latents \(n, C, h, w\) or \(n, C, F, h, w\), not \(2, 16, 4\): unpack tokens"),
    ],
)
def test_latents_of_another_form_are_refused(shape, complaint):
    output = torch.zeros(shape)
    loss_fn = X0Regularization(scheduler_of(), [Term(mean_square, 1.0, weighting.constant, view=DecodedImage(kl()))])
    with pytest.raises(ValueError, match=complaint):
        loss_fn(output, 0, output)
    with pytest.raises(ValueError, match="this VAE decodes 16 channels, x0_hat has 4"):
        DecodedImage(flux2())(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "float32"}, "dtype must be \"auto\" or a floating-point torch.dtype, not 'float32'"),
        ({"dtype": torch.int8}, "not torch.int8"),
        ({"chunk": 0}, "chunk must be a positive integer, not 0"),
        ({"crop": 2.5}, "crop must be a positive integer, not 2.5"),
    ],
)
def test_options_out_of_range_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DecodedImage(kl(), **options)


def test_a_crop_larger_than_the_latents_is_refused():
    with pytest.raises(ValueError, match="crop=5 exceeds the latents, 8 x 4"):
        DecodedImage(kl(), crop=5)(torch.zeros(1, 4, 8, 4))


def test_an_autoencoder_without_the_numbers_is_refused_with_the_fix():
    vae = kl(scaling_factor=None)
    with pytest.raises(
        ValueError, match=r"AutoencoderKL specifies neither .*register_to_config\(scaling_factor=1.0\)"
    ):
        DecodedImage(vae)
    vae.register_to_config(scaling_factor=2.0)
    x = images(1, 4, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(DecodedImage(vae)(x), vae.decode(x / 2).sample)
    with pytest.raises(ValueError, match="AutoencoderKL has 3 latents_mean for 4 channels"):
        DecodedImage(kl(latents_mean=MEAN[:3], latents_std=STD[:3]))
    with pytest.raises(ValueError, match="Conv2d specifies neither"):
        DecodedImage(nn.Conv2d(1, 1, 1))


class Overflowing(nn.Module):
    """A view that is not finite where the image is large, in its value or only in its gradient."""

    nonfinite_advice = "use another dtype"

    def __init__(self, of_value):
        super().__init__()
        self._of_value = of_value

    def forward(self, x):
        large = (x.abs() > 100).flatten(1).any(1).reshape(-1, 1, 1, 1)
        return x / torch.where(large, 0.0, 1.0) if self._of_value else _Overflow.apply(x, large)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(context, x, large):
        context.save_for_backward(large)
        return x.clone()

    @staticmethod
    def backward(context, gradients):
        return torch.where(context.saved_tensors[0], torch.inf, gradients), None


@pytest.mark.parametrize("of_value", [True, False])
def test_an_image_that_the_view_makes_non_finite_is_dropped_and_counted_for_each_term(of_value):
    output = images(4, 1, 3, 3)
    output[2] = 1000.0
    output[3] = torch.nan
    output.requires_grad_()
    view = Overflowing(of_value)
    terms = [
        Term(mean_square, 1.0, on(*flags), name, view=view)
        for name, flags in (("a", (1, 1, 1, 1)), ("b", (0, 1, 1, 0)), ("c", (1, 0, 0, 0)))
    ]
    loss_fn = X0Regularization(scheduler_of("sample"), terms, max_nonfinite_steps=None)
    loss_fn(output, 0, torch.zeros_like(output)).loss.backward()
    assert {name: int(count) for name, count in loss_fn.nonfinite.dropped.items()} == {"a": 1, "b": 1, "c": 0}
    assert output.grad[:2].abs().min() > 0
    assert not output.grad[2:].any()
    assert loss_fn.nonfinite.last_timesteps("b") == [0.0]


def test_an_overflow_in_a_half_precision_decoder_leads_to_float32():
    vae = kl().to(torch.float16)
    vae.decoder.conv_out.bias.data.fill_(6e4)
    vae.decoder.conv_out.weight.data.fill_(1e4)
    output = images(2, 4, 4, 4, dtype=torch.float32).requires_grad_()

    def loss_of(view):
        return X0Regularization(scheduler_of("sample"), [Term(mean_square, 1.0, weighting.constant, view=view)])

    loss_fn = loss_of(DecodedImage(vae))
    with pytest.warns(
        UserWarning, match=r"left out of 'mean_square'; the view decodes in torch.float16: use .*float32\)"
    ):
        loss_fn(output, 0, torch.zeros_like(output)).loss.backward()
    assert loss_fn.nonfinite.dropped["mean_square"] == 2
    assert not output.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            loss_fn(output, 0, torch.zeros_like(output)).loss.backward()
        with pytest.raises(FloatingPointError, match=r"10 steps in a row.*dtype=torch.float32"):
            loss_fn(output, 0, torch.zeros_like(output))
        exact = loss_of(DecodedImage(vae, dtype=torch.float32))
        exact(output, 0, torch.zeros_like(output)).loss.backward()
    assert output.grad.abs().max() > 0
    assert exact.nonfinite.remedy("mean_square") == ""


def test_a_view_that_does_not_depend_on_x0_hat_is_refused_at_the_first_step():
    output = images(2, 1, 3, 3).requires_grad_()
    loss_fn = X0Regularization(
        scheduler_of("sample"), [Term(mean_square, 1.0, weighting.constant, view=lambda x: 0 * x + 1)]
    )
    with pytest.raises(TermError, match="view of 'mean_square' passes no gradient to x0_hat"):
        loss_fn(output, 0, torch.zeros_like(output)).loss.backward()


def test_a_gradient_of_zero_from_the_regularizer_is_no_fault_of_the_view():
    output = torch.zeros(2, 1, 3, 3, requires_grad=True)
    loss_fn = X0Regularization(scheduler_of("sample"), [Term(mean_square, 1.0, weighting.constant, view=Affine(2.0))])
    loss_fn(output, 0, torch.zeros_like(output)).loss.backward()
    assert not output.grad.any()


def test_a_latent_model_trains_on_decoded_pictures():
    """Three lines in a loop, in bfloat16, with a loss that falls."""
    torch.manual_seed(0)
    vae = kl().to(torch.bfloat16)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    loss_fn = RegularizedLoss(
        scheduler_of("sample"), [Term(mean_square, 10.0, weighting.constant, view=DecodedImage(vae, crop=2))]
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    values = []
    for _ in range(30):
        output = loss_fn(unet, torch.randn(4, 4, 4, 4))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(output.terms["mean_square"].item())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
