"""What is measured on an accelerator: each section yields rows, the usual way and ours side by side."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, UNet2DModel
from loops import Images, ours, usual
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reg_diffusers import Ddim, RegDDPMPipeline, RegularizedLoss, Term, X0Regularization
from reg_diffusers.regularizers import Perceptual, total_variation
from reg_diffusers.views import DecodedImage

__all__ = ["SECONDS", "SECTIONS", "Sizes"]

# Dense bf16 peak of the tensor cores without sparsity, in TFLOP/s, from NVIDIA's data sheets; by a part of the name.
PEAKS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0}
TV = Term(total_variation, weight=0.1)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements, full or of a dry run.

    Attributes:
        network: config of the network.
        training: pixels per side and images per batch.
        autoencoder: channels of the autoencoder's blocks.
        pixels: side of the decoded image.
        latents: images per batch in latents.
        vit: hidden size and number of layers of the perceptual network.
        rounds: timed blocks of each contestant.
        steps: steps per block.
    """

    network: dict
    training: tuple[tuple[int, int], ...]
    autoencoder: tuple[int, ...]
    pixels: int
    latents: int
    vit: tuple[int, int]
    rounds: int
    steps: int


def training(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """Images per second and model FLOP utilisation of a training step, in bf16."""
    for side, batch in sizes.training:
        network, images = _network(sizes, side, device), Images(batch, side, device)
        flops = _step_flops(network, images)
        our_loop = partial(ours, network, images, precision=torch.bfloat16)
        loops = {
            "usual loop": partial(usual, network, images, precision=torch.bfloat16),
            "ours, no term": our_loop,
            "ours + total_variation": partial(our_loop, (TV,)),
            "ours + total_variation, channels_last": partial(our_loop, (TV,), channels_last=True),
        }
        yield from _compare(f"training {side} x {side}, batch {batch}, bf16", loops, sizes, device, batch, flops)


def compiled(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """The same with torch.compile; the time of the compilation is a row of its own."""
    for side, batch in sizes.training:
        network, images = _network(sizes, side, device), Images(batch, side, device)
        flops, name = _step_flops(network, images), f"compiled {side} x {side}, batch {batch}, bf16"
        step = ours(network, images, (TV,), precision=torch.bfloat16, compiled=True)
        start = time.perf_counter()
        step()
        _wait(device)
        yield {"section": name, "what": "compilation, with the first step", "s": time.perf_counter() - start}
        loops = {
            "usual loop": partial(usual, network, images, precision=torch.bfloat16),
            "ours + total_variation, compiled": partial(_given, step),
        }
        yield from _compare(name, loops, sizes, device, batch, flops)


def half_precision(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """fp16 with a GradScaler: speed, and whether the loss and the scale stay finite."""
    side, batch = sizes.training[0]
    network, images = _network(sizes, side, device), Images(batch, side, device)
    scalers = {name: torch.amp.GradScaler(device.type) for name in ("usual loop", "ours + total_variation")}
    makers = {"usual loop": partial(usual, network, images)}
    makers["ours + total_variation"] = partial(ours, network, images, (TV,))
    steps = {name: make(precision=torch.float16, scaler=scalers[name]) for name, make in makers.items()}
    name = f"training {side} x {side}, batch {batch}, fp16 with GradScaler"
    loops = {name: partial(_given, step) for name, step in steps.items()}
    yield from _compare(name, loops, sizes, device, batch)
    for what, step in steps.items():
        yield {"section": name, "what": f"{what}: loss", "value": step().item()}
        yield {"section": name, "what": f"{what}: scale", "value": scalers[what].get_scale()}


def perceptual(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """What a perceptual term of the size of ViT-S adds to a step, on the images that the default weighting uses."""
    from transformers import ViTConfig, ViTModel  # the other sections do without transformers

    side, batch = sizes.training[0]
    width, layers = sizes.vit
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64 or 1, intermediate_size=4 * width
    )
    vit = ViTModel(config, add_pooling_layer=False).to(device, torch.bfloat16)
    term = Term(Perceptual(vit, size=config.image_size), weight=0.1)
    network, images = _network(sizes, side, device), Images(batch, side, device)
    loops = {
        "usual loop": partial(usual, network, images, precision=torch.bfloat16),
        f"ours + ViT {width} x {layers} at {config.image_size}": partial(
            ours, network, images, (term,), precision=torch.bfloat16
        ),
    }
    yield from _compare(f"perceptual {side} x {side}, batch {batch}, bf16", loops, sizes, device, batch)


def decoding(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """The decoded view of a latent model: milliseconds and memory, against decoding every image of the batch."""
    blocks = len(sizes.autoencoder)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=sizes.autoencoder,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
            latent_channels=4,
        ).to(torch.bfloat16)
    vae.requires_grad_(False)
    side, batch = sizes.pixels // 2 ** (blocks - 1), sizes.latents
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    term = Term(total_variation, weight=0.1, view=DecodedImage(vae))
    regularization = X0Regularization(scheduler, [term]).to(device)
    latents, noise = torch.randn(2, batch, 4, side, side, device=device).unbind()

    def forward_noise():
        timesteps = torch.randint(0, 1000, (batch,))
        return timesteps, scheduler.add_noise(latents, noise, timesteps.to(device))

    def view() -> Tensor:
        timesteps, noisy_samples = forward_noise()
        output = noise.clone().requires_grad_()
        loss = regularization(output, timesteps, noisy_samples).loss
        loss.backward() if loss.requires_grad else None
        return loss

    def decode_all() -> Tensor:
        """Decodes x0_hat of every image at once, as a script does that adds the loss by hand."""
        timesteps, noisy_samples = forward_noise()
        output = noise.clone().requires_grad_()
        alpha = scheduler.alphas_cumprod[timesteps].to(device).view(-1, 1, 1, 1)
        x0_hat = (noisy_samples - (1 - alpha).sqrt() * output) / alpha.sqrt()
        images = vae.decode((x0_hat / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        loss = (alpha.flatten() * total_variation(images)).mean()
        loss.backward()
        return loss

    section = f"decoding {sizes.pixels} x {sizes.pixels}, batch {batch}, bf16"
    loops = {"decode all": partial(_given, decode_all), "DecodedImage, matched": partial(_given, view)}
    yield from _compare(section, loops, sizes, device, batch)


def sampling(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """Images per second of DDIM with 50 steps, in bf16 by autocast: stock pipelines cannot return bf16 images."""
    side, batch = sizes.training[0]
    network = _network(sizes, side, device)
    scheduler = DDIMScheduler()
    steps = 50 if device.type != "cpu" else 2

    def draw(pipeline) -> Callable[[], Tensor]:
        pipeline.set_progress_bar_config(disable=True)

        def step() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return torch.as_tensor(pipeline(batch, num_inference_steps=steps, output_type="np").images.sum())

        return step

    loops = {
        "DDPMPipeline": partial(draw, DDPMPipeline(network, scheduler)),
        "RegDDPMPipeline": partial(draw, RegDDPMPipeline(network, scheduler)),
    }
    name = f"sampling {side} x {side}, batch {batch}, {steps} steps of DDIM, bf16"
    yield from _compare(name, loops, sizes, device, batch, steps=1)


def toy(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """A perceptron on points of a circle: the overhead of the loss around a network that takes no time."""
    points = nn.functional.normalize(torch.randn(128, 2, device=device), dim=1)
    network = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)).to(device)

    def model(sample: Tensor, timesteps: Tensor, **kwargs) -> Tensor:
        return network(torch.cat([sample, timesteps[:, None].to(sample) / 1000], dim=1))

    def circle(x: Tensor, /) -> Tensor:
        return (x.square().sum(1) - 1).square()

    scheduler = DDIMScheduler()

    def usual_step() -> Tensor:
        noise = torch.randn_like(points)
        timesteps = torch.randint(0, 1000, (len(points),), device=device)
        loss = nn.functional.mse_loss(model(scheduler.add_noise(points, noise, timesteps), timesteps), noise)
        loss.backward()
        return loss

    loss_fn = RegularizedLoss(scheduler, [Term(circle, 0.1)], max_nonfinite_steps=None).to(device)

    def our_step() -> Tensor:
        loss = loss_fn(model, points).loss
        loss.backward()
        return loss

    unrolled = RegularizedLoss(scheduler, [Term(circle, 0.1, estimator=Ddim(1))], max_nonfinite_steps=None).to(device)

    def unrolled_step() -> Tensor:
        loss = unrolled(model, points).loss
        loss.backward()
        return loss

    steps = {"usual loop, no term": usual_step, "ours + circle": our_step, "ours + circle of Ddim(1)": unrolled_step}
    loops = {name: partial(_given, step) for name, step in steps.items()}
    yield from _compare("points in the plane, batch 128, float32", loops, sizes, device, len(points))


SECTIONS = {
    "training": training,
    "decoding": decoding,
    "perceptual": perceptual,
    "fp16": half_precision,
    "sampling": sampling,
    "toy": toy,
    "compile": compiled,
}
# The most that a section may take; together more than the limit, because most take less.
SECONDS = {
    "training": 180,
    "decoding": 60,
    "perceptual": 60,
    "fp16": 60,
    "sampling": 60,
    "toy": 30,
    "compile": 240,
}


def _given(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return step


def _network(sizes: Sizes, side: int, device: torch.device) -> UNet2DModel:
    return UNet2DModel.from_config({**sizes.network, "sample_size": side}).to(device)


def _compare(
    section: str,
    loops: dict[str, Callable[[], Callable[[], Tensor]]],
    sizes: Sizes,
    device: torch.device,
    images: int,
    flops: float | None = None,
    steps: int | None = None,
) -> Iterator[dict]:
    """Times contestants by turns, in blocks; yields the median time of each and its ratio to the first.

    The loss is read once per block, as a training reads it when it logs. Memory is the peak of the contestant's own
    blocks, with the weights of the others in it. If the time of the section ends, the rows are those of the turns that
    are complete, before the error is raised.
    """
    made, steps = {name: make() for name, make in loops.items()}, steps or sizes.steps
    times, peaks, ended = {name: [] for name in made}, dict.fromkeys(made, 0), None
    try:
        for turn in range(sizes.rounds + 1):
            for name, step in made.items():
                _reset_peak(device)
                _wait(device)
                start = time.perf_counter()
                for _ in range(steps):
                    loss = step()
                if not loss.isfinite().item():
                    raise FloatingPointError(f"{section}: the loss of {name!r} is {loss.item()}")
                taken = (time.perf_counter() - start) / steps
                if turn:  # the first turn warms up
                    times[name].append(taken)
                    peaks[name] = max(peaks[name], _peak(device))
    except TimeoutError as error:
        ended = error
    first, turns = next(iter(times)), min(map(len, times.values()))
    for name, taken in times.items() if turns else ():
        taken = taken[:turns]
        ratios = sorted(one / other for one, other in zip(times[first], taken, strict=False))
        row = {"section": section, "what": name, "turns": turns, "ms": 1000 * statistics.median(taken)}
        row |= {"images_per_s": images / statistics.median(taken), "times_as_fast": statistics.median(ratios)}
        row |= {"from": ratios[0], "to": ratios[-1], "peak_GiB": peaks[name] / 2**30 if peaks[name] else None}
        row["mfu"] = _utilisation(flops, statistics.median(taken), device)
        yield row
    if ended is not None:
        raise ended
    del made
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _step_flops(network: UNet2DModel, images: Images) -> float:
    """FLOPs of the network's forward and backward passes on one batch, counted on the meta device."""
    meta = copy.deepcopy(network).to("meta")
    samples = torch.empty(1, *images.batch.shape[1:], device="meta")
    with FlopCounterMode(display=False) as counter:
        meta(samples, torch.zeros(1, device="meta")).sample.sum().backward()
    return float(counter.get_total_flops() * len(images.batch))


def _utilisation(flops: float | None, seconds: float, device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return flops / seconds / (peak * 1e12) if flops and peak else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
