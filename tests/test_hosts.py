"""Loops of each kind of wiring: a perfect network has the L' of the images, and real networks are trained."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    ControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from reg_diffusers import AutoWeight, Term, X0Regularization
from reg_diffusers.regularizers import total_variation
from reg_diffusers.views import DecodedImage

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "benchmarks"))
import host_loops
import hosts

pytestmark = pytest.mark.loss

HALF = torch.bfloat16


@pytest.fixture(scope="module")
def view():
    torch.manual_seed(0)
    return DecodedImage(hosts.small_vae(), chunk=64)


def verified(step):
    return X0Regularization(step.scheduler, [Term(total_variation, weight=0.1)]).verify(**step.of_verify())


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_a_perfect_network_has_the_loss_of_the_images(name, view):
    step = hosts.step_of(name)
    assert step.loss < 1e-6
    active = hosts.regularized(step).weightings["total_variation"] != 0
    assert 1 <= active.sum() < len(active)
    assert hosts.error_of(step) < 1e-3
    assert hosts.error_of(step, view) < 1e-3


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_the_wiring_of_the_pages_is_right(name):
    assert verified(hosts.step_of(name)) < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtypes", [{"model_dtype": HALF}, {"dtype": HALF}], ids=["bf16-mixed", "bf16-true"])
def test_the_precisions_of_lightning(kind, dtypes, view):
    torch.manual_seed(0)
    step = host_loops.ddpm(hosts.images_of(hosts.HOSTS["eps"], 64), kind=kind, **dtypes)
    assert hosts.error_of(step) < 0.02
    assert hosts.error_of(step, view) < 0.02
    assert verified(step) < 0.02


def test_a_module_that_holds_the_loss_has_no_state_of_it(view):
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Conv2d(4, 4, 1)
            self.regularization = X0Regularization(
                hosts.step_of("eps").scheduler, [Term(total_variation, 0.1, view=view)]
            )

    training = Training()
    assert set(training.state_dict()) == {"network.weight", "network.bias"}
    assert len(list(training.parameters())) == 2


def test_the_weight_of_the_loop_reaches_the_weighting():
    """The minimum of SNR and gamma, by either way to say it."""
    step = hosts.step_of("v, min-SNR")
    arguments = {name: value for name, value in step.arguments.items() if name != "loss_weight"}
    by_gamma = X0Regularization(step.scheduler, [Term(total_variation, 0.1)], snr_gamma=5.0)(**arguments)
    torch.testing.assert_close(hosts.regularized(step).loss, by_gamma.loss)


def test_an_image_weighs_as_much_as_the_output_that_it_was_made_of():
    """SD3's default loss in x_0 units with sigma^-2 is that of the velocity."""
    step = hosts.step_of("SD3")
    plain = {
        "model_output": step.local["output"],
        "timesteps": step.arguments["timesteps"],
        "sample": step.local["x_t"],
    }
    of_output = X0Regularization(step.scheduler, [Term(total_variation, 0.1)])(**plain)
    torch.testing.assert_close(hosts.regularized(step).loss, of_output.loss)


class Scaled(nn.Module):
    """A network with a gradient, for images and videos."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timesteps):
        return self.factor * sample.tanh()


@pytest.mark.parametrize("name", [name for name, host in hosts.HOSTS.items() if host.kind != "parts"])
def test_an_automatic_weight_is_a_share_of_the_gradient_of_the_loops_own_loss(name):
    torch.manual_seed(0)
    step = hosts.HOSTS[name].loop(hosts.images_of(hosts.HOSTS[name], 64), Scaled())
    term = Term(total_variation, AutoWeight(0.1))
    extra = X0Regularization(step.scheduler, [term])(**step.arguments, original_samples=step.original_samples)
    output = step.local.get("image", step.arguments.get("model_output"))
    ours, own = (torch.autograd.grad(loss, output, retain_graph=True)[0].norm() for loss in (extra.loss, step.loss))
    torch.testing.assert_close(ours, 0.1 * own, rtol=1e-3, atol=0)


# Real networks


def conditional(**config):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def unconditional():
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    return unet, lambda x, t: unet(x, t).sample


def text_to_image():
    unet = conditional()
    return unet, lambda x, t: unet(x, t, torch.ones(len(x), 5, 8), return_dict=False)[0]


def sdxl():
    config = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 8}
    unet = conditional(addition_embed_type="text_time", **config)

    def call(x, t):
        added = {"text_embeds": torch.ones(len(x), 8), "time_ids": torch.ones(len(x), 6)}
        return unet(x, t, torch.ones(len(x), 5, 8), added_cond_kwargs=added, return_dict=False)[0]

    return unet, call


def controlnet():
    unet = conditional()
    control = ControlNetModel.from_unet(unet)
    unet.requires_grad_(False)

    def call(x, t):
        prompt, picture = torch.ones(len(x), 5, 8), torch.ones(len(x), 3, 64, 64)
        down, middle = control(x, t, prompt, picture, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(x, t, prompt, **residuals, return_dict=False)[0]

    return control, call


def flux():
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
    )

    def call(x, t):
        packed = FluxPipeline._pack_latents(x, *x.shape)
        places = FluxPipeline._prepare_latent_image_ids(len(x), 4, 4, x.device, x.dtype)
        conditions = {"pooled_projections": torch.ones(len(x), 8), "encoder_hidden_states": torch.ones(len(x), 5, 8)}
        tokens = transformer(
            packed, timestep=t / 1000, txt_ids=torch.zeros(5, 3), img_ids=places, **conditions, return_dict=False
        )[0]
        return FluxPipeline._unpack_latents(tokens, 64, 64, 8)

    return transformer, call


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
    )
    prompt = torch.ones(1, 5, 32), torch.ones(1, 64)
    return transformer, lambda x, t: transformer(x, *(p.expand(len(x), *p.shape[1:]) for p in prompt), t).sample


def lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=8,
    )
    return (
        transformer,
        lambda x, t: transformer(x, t, torch.ones(len(x), 5, 8), torch.ones(len(x), 5, dtype=torch.bool)).sample,
    )


def cogvideox():
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=8,
    )
    return transformer, lambda x, t: transformer(x, torch.ones(len(x), 8, 8), t).sample


NETWORKS = {
    "eps": unconditional,
    "v, min-SNR": text_to_image,
    "eps, noise offset": sdxl,
    "v": controlnet,
    "Flux": flux,
    "SD3": sd3,
    "SDXL, EDM style, Euler": sdxl,
    "CogVideoX": cogvideox,
    "Lumina2": lumina2,
    "EDM": unconditional,
    "prior preservation": text_to_image,
    "calculate_loss": sd3,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_real_network_is_trained_by_the_loss_on_decoded_pictures(name, view):
    torch.manual_seed(0)
    network, call = NETWORKS[name]()
    host = hosts.HOSTS[name]
    step = host.loop(hosts.images_of(host, 64), call)
    extra = hosts.regularized(step, view)
    assert extra.metrics()["total_variation"] > 0
    gradients = torch.autograd.grad(extra.loss, network.parameters(), allow_unused=True)
    gradients = [gradient for gradient in gradients if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert all(weight.grad is None for weight in view.vae.parameters())
