"""The picture of classes in docs/latents.md: a small DiT, trained in the latents of a small autoencoder.

python docs/figures/dit.py

Trains both on the pictures that ship with the package, in some minutes on two cores, and draws with diffusers' own
DiTPipeline.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler
from matplotlib import pyplot as plt
from shared import IMAGES, images, save, show

CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
SAMPLES, SCALES = 2, (1.0, 3.0)
AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "sample_size": 32,
}
NETWORK = {
    "_class_name": "DiTTransformer2DModel",
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "patch_size": 2,
}
FLAGS = (
    "--resolution 32 --vae vae --model_config_name_or_path dit.json --class_conditional --condition_dropout 0.1"
    " --regularizer total_variation --reg_weight 0.1 --max_train_steps 3000 --train_batch_size 32"
    " --learning_rate 1e-3 --preview_steps 3000 --mixed_precision no"
).split()


def trained_autoencoder(pictures: torch.Tensor, steps: int = 1500) -> AutoencoderKL:
    """An autoencoder of these pictures, (N, 1, 32, 32), whose latents have a standard deviation of about 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**AUTOENCODER)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    for step in range(steps):
        batch = pictures[torch.randint(len(pictures), (32,))]
        posterior = vae.encode(batch).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, batch) + 1e-4 * posterior.kl().mean() / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"autoencoder, step {step}: {loss.item():.3f}")
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(pictures[:512]).latent_dist.sample().std().item())
    return vae


def drawn(pipeline: DiTPipeline, scale: float) -> torch.Tensor:
    """SAMPLES pictures of each class, (SAMPLES, 10, 32, 32, 1)."""
    labels = list(range(len(CLASSES))) * SAMPLES
    generator = torch.Generator().manual_seed(0)
    out = pipeline(labels, guidance_scale=scale, generator=generator, num_inference_steps=25, output_type="np")
    return torch.from_numpy(out.images).unflatten(0, (SAMPLES, len(CLASSES)))


def main() -> None:
    pictures, labels = images()
    pictures = F.pad(pictures, (2, 2, 2, 2), value=-1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            path = folder / "clothes" / f"{label}" / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(((picture[0] + 1) * 127.5).round().byte().numpy()).save(path)
        trained_autoencoder(pictures).save_pretrained(folder / "vae")
        (folder / "dit.json").write_text(json.dumps(NETWORK))
        script = Path(__file__).parents[2] / "train_reg.py"
        data = ["--train_data_dir", "clothes", "--cache_dir", "cache", "--output_dir", "out"]
        subprocess.run([sys.executable, str(script), *data, *FLAGS], cwd=folder, check=True)
        pipeline = DiTPipeline.from_pretrained(folder / "out")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    rows = [("data", [pictures[labels == label][0] for label in range(len(CLASSES))])]
    for scale in SCALES:
        rows += [(f"guidance {scale:g}", 2 * row - 1) for row in drawn(pipeline, scale)]
    figure, axes = plt.subplots(len(rows), len(CLASSES), figsize=(8, 0.85 * len(rows)))
    for (title, row), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for picture, axis in zip(row, line, strict=True):
            show(axis, picture)
    for axis, label in zip(axes[0], CLASSES, strict=True):
        axis.set_title(label, fontsize=8)
    save(figure, "dit")
    assert (IMAGES / "dit.png").stat().st_size < 300_000


if __name__ == "__main__":
    main()
